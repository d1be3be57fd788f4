"""The two forms of a replica's file: the bytes of its block as they are (raw), or compressed.

What a file is by its looks, the checksum of the block in it, and writing one form from the other.
Blocking functions on descriptors, for worker threads; they keep no state.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from kvfs import failpoints
from kvfs.catalog.rows import RAW, ZSTD
from kvfs.config import Compress
from kvfs.errors import BlockCorrupt, BlockTorn
from kvfs.tiers import copying
from kvfs.tiers.checksum import PIECE_BYTES, Digest, checksum_of
from kvfs.tiers.codec import (
    CompressedBlock,
    compress_file,
    open_compressed,
    read_header,
    recompress,
)
from kvfs.tiers.copying import copy_file


def check_looks(
    descriptor: int, codec: int, size_bytes: int, checksum: bytes, file_bytes: int
) -> None:
    """Raise BlockCorrupt unless a file of so many bytes can, by its looks, hold this block.

    A raw one has its length; a compressed one, whose length says nothing, has a header with length
    and checksum of the block. Raises OSError.
    """
    if codec == RAW:
        if file_bytes != size_bytes:
            raise BlockTorn(f"{file_bytes} bytes, sealed with {size_bytes}")
        return
    header = read_header(descriptor)
    if header.size_bytes != size_bytes:
        raise BlockTorn(f"a header for {header.size_bytes} bytes, sealed with {size_bytes}")
    if header.checksum != checksum:
        raise BlockCorrupt("its header has not the checksum it was sealed with")


def may_hold(descriptor: int, codec: int, size_bytes: int, checksum: bytes) -> bool:
    """`check_looks` as an answer. Raises OSError."""
    try:
        file_bytes = os.fstat(descriptor).st_size
        check_looks(descriptor, codec, size_bytes, checksum, file_bytes)
    except BlockCorrupt:
        return False
    return True


class DecodedDigest(Digest):
    """The checksum of the block in a compressed file. `advance` raises BlockCorrupt, OSError."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor)
        self._block: CompressedBlock | None = None

    def _read(self) -> bytes:
        if self._block is None:
            self._block = open_compressed(self._descriptor)
        return self._block.read(self.length_bytes, PIECE_BYTES)


def digest_of(descriptor: int, codec: int, *, direct: bool = False) -> Digest:
    """The checksum of the block in a file, yet to be made."""
    return Digest(descriptor, direct=direct) if codec == RAW else DecodedDigest(descriptor)


def is_readable(descriptor: int, codec: int, done_bytes: int) -> bool:
    """Whether a transfer that failed can blame the target. How far it was in a compressed source is
    not known: all of that is read."""
    if codec == RAW:
        return copying.is_readable(descriptor, done_bytes)
    try:
        checksum_of(descriptor)
    except OSError:
        return False
    return True


def transfer(
    source: int, codec: int, target: int, compress: Compress, progress: Callable[[int], None]
) -> int:
    """Write the block in one file to an empty one, compressed where that is asked for and worth
    it; the codec of what was written. `progress` gets how far it is.

    Raises BlockCorrupt for a source that cannot be decoded, OSError.
    """
    planes = compress == "zstd-planes"
    if codec == RAW:
        written = compress != "none" and compress_file(
            source, target, plane_split=planes, progress=progress
        )
        if written:
            failpoints.hit("transfer.compressed")
            return ZSTD
        copy_file(source, target, progress)
        return RAW
    block = open_compressed(source)
    if compress != "none":
        if block.plane_split == (planes and block.size_bytes % 2 == 0):
            copy_file(source, target, progress)
            return ZSTD
        if recompress(block, target, plane_split=planes, progress=progress):
            failpoints.hit("transfer.recompressed")
            return ZSTD
    block.decompress_to(target, progress)
    failpoints.hit("transfer.decompressed")
    return RAW
