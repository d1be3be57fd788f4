"""In numpy, on the host: what the kernels in `kvfs.gpu.kernels` have to do.

Without state. The tests hold the kernels against it, and `make test-gpu` does on a real GPU.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvfs.gpu.arrays import HostMemory
from kvfs.gpu.layout import PagedBlocks, Plane
from kvfs.tiers.codec import CHUNK_BYTES

Bytes = npt.NDArray[np.uint8]


def scatter(staged: Bytes, blocks: PagedBlocks) -> None:
    """Copy blocks, one a row of `staged`, into their pages of a cache on the host."""
    pages = list(blocks.pages)
    for plane in blocks.layout.planes:
        _rows_of(plane)[pages] = staged[
            : len(pages), plane.offset : plane.offset + plane.page_bytes
        ]


def gather(blocks: PagedBlocks, staged: Bytes) -> None:
    """Copy blocks out of their pages of a cache on the host, each into a row of `staged`."""
    pages = list(blocks.pages)
    for plane in blocks.layout.planes:
        staged[: len(pages), plane.offset : plane.offset + plane.page_bytes] = _rows_of(plane)[
            pages
        ]


def _rows_of(plane: Plane) -> Bytes:
    assert isinstance(plane.memory, HostMemory)
    rows: Bytes = np.frombuffer(plane.memory.view, np.uint8).reshape(plane.pages, plane.page_bytes)
    return rows


def merge_halves(split: Bytes, merged: Bytes) -> None:
    """Undo the plane split of a compressed block: its pieces have even bytes before odd ones."""
    for start in range(0, len(split), 2 * CHUNK_BYTES):
        piece = split[start : start + 2 * CHUNK_BYTES]
        half = len(piece) // 2
        merged[start : start + len(piece) : 2] = piece[:half]
        merged[start + 1 : start + len(piece) : 2] = piece[half:]
