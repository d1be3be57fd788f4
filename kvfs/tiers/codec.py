"""Compressed replicas: their format on a tier, writing it and reading it.

A compressed replica is a chain of zstd frames that `zstd -d` decodes: independent frames of 64 KiB
of content each, so that any range is read without the rest, a table of them in a skippable frame,
and a header of 4 KiB. docs/FORMAT.md has every field. Blocking functions on descriptors, for worker
threads; zstandard and xxhash let other threads run. They keep no state between calls and at most a
few MiB in memory. They know nothing of tiers: the mover decides what is compressed.

A reader trusts nothing: each length is checked against what the format allows before it is used,
each frame against its checksum before it is decoded. What does not fit raises BlockCorrupt.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import xxhash
import zstandard

from kvfs.errors import BlockCorrupt
from kvfs.tiers.copying import write_all

HEADER_BYTES = 4096
CHUNK_BYTES = 64 << 10
"""Content of one frame. nvcomp wants small independent frames; larger ones gain under 1 %."""

FRAME_ALIGNMENT_BYTES = 16
"""nvcomp decodes in place what begins at a multiple of 8, and faster of 16."""

MAX_BLOCK_BYTES = 1 << 30
"""A larger block is stored raw, so that no table is larger than 256 KiB."""

MIN_GAIN = 0.05
LEVEL = 1
# Of mantissas: finds repeats (zeros, padding), spends no time on the entropy of single bytes.
FAST_LEVEL = -1

PIECE_BYTES = 1 << 20

_SKIPPABLE = 0x184D2A5E
_MAGIC = b"KVFSZSTD"
_VERSION = 1
_PLANE_SPLIT = 1
_MAX_FRAME_BYTES = CHUNK_BYTES + 512

_SKIPPABLE_HEAD = struct.Struct("<II")
_HEADER = struct.Struct("<II8sHHIQQI4x16sQ")
_TABLE_HEAD = struct.Struct("<II8x")
_ENTRY = struct.Struct("<IIQ")
_CHECK = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class CompressedInfo:
    """What `compress_file` wrote. `checksum` is XXH3-128 of the content, as in a seal."""

    size_bytes: int
    file_bytes: int
    checksum: bytes
    plane_split: bool


class Header(NamedTuple):
    """What a compressed replica says of itself. `checksum` is that of the block's seal."""

    size_bytes: int
    plane_split: bool
    checksum: bytes
    file_bytes: int
    table_checksum: int


class Frame(NamedTuple):
    """One zstd frame in the file: where it is, the content it decodes to, XXH3-64 of itself."""

    offset: int
    length_bytes: int
    size_bytes: int
    checksum: int


@dataclass(frozen=True, slots=True)
class _Shape:
    """What size and plane split say of a file before a byte of it is read.

    The content is cut into pieces. A piece is one frame; with planes split it is two, the bytes at
    even offsets and the bytes at odd ones.
    """

    size_bytes: int
    plane_split: bool

    @property
    def piece_bytes(self) -> int:
        return CHUNK_BYTES * self.frames_per_piece

    @property
    def frames_per_piece(self) -> int:
        return 2 if self.plane_split else 1

    @property
    def frame_count(self) -> int:
        return -(-self.size_bytes // self.piece_bytes) * self.frames_per_piece

    @property
    def table_bytes(self) -> int:
        return _TABLE_HEAD.size + self.frame_count * _ENTRY.size

    @property
    def first_frame(self) -> int:
        return HEADER_BYTES + self.table_bytes

    def frame_size_bytes(self, number: int) -> int:
        """The content of a frame; the planes of a piece are equally long."""
        begin = number // self.frames_per_piece * self.piece_bytes
        return min(self.piece_bytes, self.size_bytes - begin) // self.frames_per_piece


def compress_file(
    source: int, target: int, *, plane_split: bool, progress: Callable[[int], None] | None = None
) -> CompressedInfo | None:
    """Write the content of `source` compressed to the empty file `target`; None: raw is better.

    `plane_split` separates the bytes of 16-bit numbers; it is left out where the length is odd.
    `source` must not change meanwhile: the caller compares the checksum with that of the seal.
    After None the target is empty again. `progress` gets the bytes read so far. Raises OSError.
    """
    size = os.fstat(source).st_size
    return _compress(size, partial(_pread_at, source), target, plane_split, progress)


def recompress(
    block: CompressedBlock, target: int, *, plane_split: bool,
    progress: Callable[[int], None] | None = None,
) -> CompressedInfo | None:  # fmt: skip
    """`compress_file` of a block that is compressed in another way. Raises BlockCorrupt too."""
    return _compress(block.size_bytes, block.read, target, plane_split, progress)


def _compress(
    size: int, read: Callable[[int, int], bytes], target: int, plane_split: bool,
    progress: Callable[[int], None] | None,
) -> CompressedInfo | None:  # fmt: skip
    shape = _Shape(size, plane_split and size % 2 == 0)
    if 0 < size <= MAX_BLOCK_BYTES:
        writer = _Writer(target, shape)
        digest = xxhash.xxh3_128()
        offset = 0
        while offset < size and writer.is_worth_it:
            content = read(offset, min(PIECE_BYTES, size - offset))
            digest.update(content)
            writer.add(content)
            offset += len(content)
            if progress:
                progress(offset)
        if writer.is_worth_it:
            return writer.finish(digest.digest())
    os.ftruncate(target, 0)
    return None


class _Writer:
    """Writes the frames of one file, then table and header. Owned by one call of one thread."""

    def __init__(self, target: int, shape: _Shape) -> None:
        self._target = target
        self._shape = shape
        self._table: list[bytes] = []
        self._end = shape.first_frame
        self._limit = int(shape.size_bytes * (1 - MIN_GAIN))
        # No dictionary, no checksum of zstd's own: nvcomp takes plain frames of a known size.
        self._compress = zstandard.ZstdCompressor(level=LEVEL).compress
        self._compress_fast = zstandard.ZstdCompressor(level=FAST_LEVEL).compress

    @property
    def is_worth_it(self) -> bool:
        """Whether the file so far can still save MIN_GAIN of the block."""
        return _aligned(self._end, HEADER_BYTES) <= self._limit

    def add(self, content: bytes) -> None:
        """The next content: whole pieces, except for the last one of the block."""
        out: list[bytes] = []
        end = self._end
        for offset in range(0, len(content), self._shape.piece_bytes):
            for frame, size in self._frames_of(content[offset : offset + self._shape.piece_bytes]):
                gap = _gap(end, FRAME_ALIGNMENT_BYTES)
                self._table.append(_ENTRY.pack(len(frame), size, xxhash.xxh3_64_intdigest(frame)))
                out += (gap, frame)
                end += len(gap) + len(frame)
        write_all(self._target, b"".join(out), self._end)
        self._end = end

    def _frames_of(self, piece: bytes) -> Iterator[tuple[bytes, int]]:
        if not self._shape.plane_split:
            yield self._compress(piece), len(piece)
            return
        # The low bytes are mantissa, which does not compress: no time is spent on them.
        yield self._compress_fast(piece[0::2]), len(piece) // 2
        yield self._compress(piece[1::2]), len(piece) // 2

    def finish(self, checksum: bytes) -> CompressedInfo:
        """The end of the file, then its beginning: an unfinished one has no header."""
        shape = self._shape
        gap = _gap(self._end, HEADER_BYTES)
        write_all(self._target, gap, self._end)
        file_bytes = self._end + len(gap)
        payload_bytes = shape.table_bytes - _SKIPPABLE_HEAD.size
        table = _TABLE_HEAD.pack(_SKIPPABLE, payload_bytes) + b"".join(self._table)
        header = _HEADER.pack(
            _SKIPPABLE, HEADER_BYTES - _SKIPPABLE_HEAD.size, _MAGIC, _VERSION,
            _PLANE_SPLIT if shape.plane_split else 0, CHUNK_BYTES, shape.size_bytes, file_bytes,
            shape.frame_count, checksum, xxhash.xxh3_64_intdigest(table),
        )  # fmt: skip
        header = header.ljust(HEADER_BYTES - _CHECK.size, b"\0")
        write_all(self._target, header + _CHECK.pack(xxhash.xxh3_64_intdigest(header)) + table, 0)
        return CompressedInfo(shape.size_bytes, file_bytes, checksum, shape.plane_split)


class CompressedBlock:
    """A compressed replica that is open for reading; it does not own its descriptor.

    Nothing of it changes after `open_compressed`, so threads may share it.
    """

    def __init__(self, descriptor: int, shape: _Shape, checksum: bytes, table: bytes) -> None:
        self._descriptor = descriptor
        self._pread = _reader(descriptor)
        self._shape = shape
        self.checksum = checksum
        self.frames = _frames_in(table, shape)

    @property
    def size_bytes(self) -> int:
        """The length of the block, not of the file."""
        return self._shape.size_bytes

    @property
    def plane_split(self) -> bool:
        """Whether frames hold, in turn, the even and the odd bytes of 128 KiB."""
        return self._shape.plane_split

    def read(self, offset: int, size: int) -> bytes:
        """The bytes at `offset`, fewer only at the end of the block.

        Reads and decodes the frames that hold them. Raises BlockCorrupt, OSError.
        """
        piece_bytes = self._shape.piece_bytes
        end = min(offset + size, self.size_bytes)
        if not 0 <= offset < end:
            return b""
        first = offset // piece_bytes
        content = self._pieces(first, -(-end // piece_bytes))
        return bytes(content[offset - first * piece_bytes : end - first * piece_bytes])

    def decompress_to(self, target: int, progress: Callable[[int], None] | None = None) -> None:
        """Write the block to the empty file `target`, and check it against its checksum.

        After BlockCorrupt or OSError what was written is worthless.
        """
        digest = xxhash.xxh3_128()
        for offset in range(0, self.size_bytes, PIECE_BYTES):
            content = self.read(offset, PIECE_BYTES)
            digest.update(content)
            write_all(target, content, offset)
            if progress:
                progress(offset + len(content))
        if digest.digest() != self.checksum:
            raise BlockCorrupt("a compressed replica does not have the content it was made of")

    @property
    def stored_bytes(self) -> int:
        """The length of the frames in the file, with the gaps between them."""
        last = self.frames[-1]
        return last.offset + last.length_bytes - self.frames[0].offset

    def read_stored(self, into: memoryview) -> None:
        """Fill `into` with the frames as they are stored, for a decoder elsewhere (nvcomp).

        Each is checked, for such a decoder may take valid frames only. `into` has `stored_bytes`.
        Raises BlockCorrupt, OSError.
        """
        begin = self.frames[0].offset
        done = 0
        while done < len(into):
            count = os.preadv(self._descriptor, [into[done:]], begin + done)
            if count == 0:
                raise BlockCorrupt("a file is shorter than it was or than it says")
            done += count
        for frame in self.frames:
            _check_frame(frame, into[frame.offset - begin :][: frame.length_bytes])

    def _pieces(self, first: int, end: int) -> memoryview:
        """The content of whole pieces, from one read of the file."""
        per_piece = self._shape.frames_per_piece
        frames = self.frames[first * per_piece : end * per_piece]
        begin = frames[0].offset
        end_bytes = frames[-1].offset + frames[-1].length_bytes
        stored = memoryview(self._pread(end_bytes - begin, begin))
        decode = zstandard.ZstdDecompressor().decompress
        contents = [
            _content_of(frame, stored[frame.offset - begin :][: frame.length_bytes], decode)
            for frame in frames
        ]
        if not self.plane_split:
            return memoryview(b"".join(contents))
        merged = bytearray(sum(frame.size_bytes for frame in frames))
        position = 0
        for even, odd in zip(contents[0::2], contents[1::2], strict=True):
            piece_end = position + len(even) + len(odd)
            merged[position:piece_end:2] = even
            merged[position + 1 : piece_end : 2] = odd
            position = piece_end
        return memoryview(merged)


def read_header(descriptor: int) -> Header:
    """The checked header; nothing more of the file is read.

    Raises BlockCorrupt for what is no compressed replica, OSError.
    """
    header = _reader(descriptor)(HEADER_BYTES, 0)
    (check,) = _CHECK.unpack(header[-_CHECK.size :])
    if xxhash.xxh3_64_intdigest(header[: -_CHECK.size]) != check:
        raise BlockCorrupt("the header of a compressed replica is damaged")
    (
        skippable, payload_bytes, magic, version, flags, chunk_bytes, size_bytes, file_bytes,
        frame_count, checksum, table_check,
    ) = _HEADER.unpack(header[: _HEADER.size])  # fmt: skip
    kind = (skippable, payload_bytes, magic, version, chunk_bytes)
    if kind != (_SKIPPABLE, HEADER_BYTES - _SKIPPABLE_HEAD.size, _MAGIC, _VERSION, CHUNK_BYTES):
        raise BlockCorrupt("not a compressed replica, or one of a format that is not known here")
    shape = _Shape(size_bytes, flags == _PLANE_SPLIT)
    if (
        flags not in (0, _PLANE_SPLIT)
        or not 0 < size_bytes <= MAX_BLOCK_BYTES
        or (shape.plane_split and size_bytes % 2)
        or frame_count != shape.frame_count
        or file_bytes != os.fstat(descriptor).st_size
    ):
        raise BlockCorrupt("the header of a compressed replica contradicts itself or its file")
    return Header(size_bytes, shape.plane_split, checksum, file_bytes, table_check)


def open_compressed(descriptor: int) -> CompressedBlock:
    """Read and check header and table. With O_DIRECT the medium is read, past the page cache.

    Raises BlockCorrupt for what is no compressed replica, OSError.
    """
    header = read_header(descriptor)
    shape = _Shape(header.size_bytes, header.plane_split)
    table = _reader(descriptor)(shape.table_bytes, HEADER_BYTES)
    if xxhash.xxh3_64_intdigest(table) != header.table_checksum:
        raise BlockCorrupt("the frame table of a compressed replica is damaged")
    block = CompressedBlock(descriptor, shape, header.checksum, table)
    last = block.frames[-1]
    if _aligned(last.offset + last.length_bytes, HEADER_BYTES) != header.file_bytes:
        raise BlockCorrupt("the frame table of a compressed replica contradicts its file")
    return block


def _frames_in(table: bytes, shape: _Shape) -> tuple[Frame, ...]:
    """The table with offsets. Raises BlockCorrupt for a length that no frame has."""
    frames = []
    end = shape.first_frame
    for number, entry in enumerate(_ENTRY.iter_unpack(table[_TABLE_HEAD.size :])):
        length, size, checksum = entry
        if not 0 < length <= _MAX_FRAME_BYTES or size != shape.frame_size_bytes(number):
            raise BlockCorrupt(f"frame {number} of a compressed replica has an impossible length")
        offset = _aligned(end, FRAME_ALIGNMENT_BYTES)
        frames.append(Frame(offset, length, size, checksum))
        end = offset + length
    return tuple(frames)


def _content_of(frame: Frame, stored: memoryview, decode: Callable[..., bytes]) -> bytes:
    """One frame decoded, with no more memory than it may need."""
    _check_frame(frame, stored)
    try:
        return decode(stored, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise BlockCorrupt(f"a frame of a compressed replica cannot be decoded: {error}") from None


def _check_frame(frame: Frame, stored: memoryview) -> None:
    """Raises BlockCorrupt for what a decoder should not be given."""
    if xxhash.xxh3_64_intdigest(stored) != frame.checksum:
        raise BlockCorrupt("a frame of a compressed replica does not match its checksum")
    try:
        announced = zstandard.frame_content_size(stored)
    except zstandard.ZstdError as error:
        raise BlockCorrupt(f"a frame of a compressed replica cannot be decoded: {error}") from None
    # A decoder allocates what a frame announces, whatever limit it is given.
    if announced != frame.size_bytes:
        raise BlockCorrupt(
            "a frame of a compressed replica holds another length than its table says"
        )


def _aligned(position: int, alignment: int) -> int:
    """The next multiple of `alignment` that a skippable frame can fill up to from `position`."""
    gap = -position % alignment
    return position + gap + (alignment if 0 < gap < _SKIPPABLE_HEAD.size else 0)


def _gap(position: int, alignment: int) -> bytes:
    """The skippable frame from `position` to the next aligned one; nothing where it is aligned."""
    length = _aligned(position, alignment) - position
    if length == 0:
        return b""
    head = _SKIPPABLE_HEAD.pack(_SKIPPABLE, length - _SKIPPABLE_HEAD.size)
    return head.ljust(length, b"\0")


def _reader(descriptor: int) -> Callable[[int, int], bytes]:
    """Reads exactly so many bytes at an offset. Raises BlockCorrupt where the file ends before."""
    direct = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
    return partial(_pread_direct if direct else _pread, descriptor)


def _pread_at(descriptor: int, offset: int, size: int) -> bytes:
    return _pread(descriptor, size, offset)


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            raise BlockCorrupt("a file is shorter than it was or than it says")
        data += more
    return data


def _pread_direct(descriptor: int, size: int, offset: int) -> bytes:
    """O_DIRECT wants whole pages into whole pages; a compressed file has no others."""
    begin = offset - offset % HEADER_BYTES
    wanted = offset + size - begin
    pages = mmap.mmap(-1, wanted + -wanted % HEADER_BYTES)
    done = 0
    while done < wanted:
        count = os.preadv(descriptor, [memoryview(pages)[done:]], begin + done)
        if count == 0:
            raise BlockCorrupt("a file is shorter than it was or than it says")
        done += count
    return pages[offset - begin : wanted]
