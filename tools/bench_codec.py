"""How fast one core compresses and decompresses a block: the last rows of `make bench`.

The content is bfloat16 numbers of a normal distribution, which compress as the KV cache of a real
model does (docs/PERFORMANCE.md). Files are in memory: no disk is measured. Speeds are of CPU time,
which other work on the machine changes little.
"""

from __future__ import annotations

import os
import random
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.table import Table

from kvfs.errors import KvfsError
from kvfs.tiers.codec import compress_file, open_compressed
from kvfs.tools.render import table

BLOCK_BYTES = 2 << 20
CALLS = 8


@dataclass(frozen=True, slots=True)
class CodecRow:
    """One way to compress; speeds are of the block's bytes, medians of the rounds."""

    plane_split: bool
    ratio: float
    compress_bytes_per_s: float
    decompress_bytes_per_s: float

    def document(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def bfloat16_block(size_bytes: int, seed: int = 0) -> bytes:
    """Normally distributed numbers: the upper halves of 32-bit ones."""
    source = random.Random(seed)
    count = size_bytes // 2
    floats = struct.pack(f"<{count}f", *(source.gauss(0, 1) for _ in range(count)))
    block = bytearray(size_bytes)
    block[0::2], block[1::2] = floats[2::4], floats[3::4]
    return bytes(block)


def measure_codec(rounds: int) -> list[CodecRow]:
    """Both ways, in turn in every round."""
    content = bfloat16_block(BLOCK_BYTES)
    laps: dict[bool, list[tuple[int, float, float]]] = {False: [], True: []}
    for _ in range(rounds):
        for plane_split, done in laps.items():
            done.append(_lap(content, plane_split=plane_split))
    return [
        CodecRow(
            plane_split,
            len(content) / done[0][0],
            len(content) / median(compress_s for _, compress_s, _ in done),
            len(content) / median(decompress_s for _, _, decompress_s in done),
        )
        for plane_split, done in laps.items()
    ]


def _lap(content: bytes, *, plane_split: bool) -> tuple[int, float, float]:
    """Bytes of the file, CPU seconds to compress a block and to decompress it."""
    with _memory_file() as source, _memory_file() as target, _memory_file() as copy:
        os.pwrite(source, content, 0)
        info = compress_file(source, target, plane_split=plane_split)
        if info is None:
            raise KvfsError("the block of the benchmark does not compress")
        compress_s = _seconds(lambda: compress_file(source, target, plane_split=plane_split))
        decompress_s = _seconds(lambda: open_compressed(target).decompress_to(copy))
    return info.file_bytes, compress_s, decompress_s


def _seconds(call: Callable[[], object]) -> float:
    started = time.thread_time()
    for _ in range(CALLS):
        call()
    return (time.thread_time() - started) / CALLS


@contextmanager
def _memory_file() -> Iterator[int]:
    descriptor = os.memfd_create("kvfs-bench")
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def codec_table(rows: Sequence[CodecRow]) -> Table:
    view = table("One core, bfloat16, 2 MiB", ">ratio", ">compress", ">decompress", "")
    for row in rows:
        speeds = (row.compress_bytes_per_s, row.decompress_bytes_per_s)
        cells = (f"{speed / 1e6:,.0f} MB/s" for speed in speeds)
        name = "zstd, planes split" if row.plane_split else "zstd"
        view.add_row(name, f"{row.ratio:.2f}", *cells, "")
    return view
