"""Compressed replicas: what goes in comes out, other decoders agree, and no damage is served."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import xxhash
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kvfs.errors import BlockCorrupt
from kvfs.tiers.codec import (
    CHUNK_BYTES,
    HEADER_BYTES,
    MAX_BLOCK_BYTES,
    CompressedBlock,
    CompressedInfo,
    compress_file,
    open_compressed,
    read_header,
    recompress,
)

KIB, MIB = 1 << 10, 1 << 20
SKIPPABLE = 0x184D2A5E


@contextmanager
def file_of(data: bytes = b"") -> Iterator[int]:
    """A file in memory, its descriptor at the end."""
    descriptor = os.memfd_create("codec")
    try:
        os.write(descriptor, data)
        yield descriptor
    finally:
        os.close(descriptor)


def content_of(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def compressed(data: bytes, *, plane_split: bool = False) -> tuple[CompressedInfo | None, bytes]:
    """What `compress_file` says, and the file that it wrote."""
    with file_of(data) as source, file_of() as target:
        info = compress_file(source, target, plane_split=plane_split)
        return info, content_of(target)


def decompressed(file: bytes) -> bytes:
    with file_of(file) as source, file_of() as target:
        open_compressed(source).decompress_to(target)
        return content_of(target)


def bfloat16s(count: int, seed: int = 0) -> bytes:
    """Normally distributed, as the numbers of a KV cache nearly are."""
    source = random.Random(seed)
    floats = struct.pack(f"<{count}f", *(source.gauss(0, 1) for _ in range(count)))
    halves = bytearray(2 * count)
    halves[0::2], halves[1::2] = floats[2::4], floats[3::4]
    return bytes(halves)


KV = bfloat16s(200 * KIB + 77)  # several pieces, the last one neither whole nor round

parts = st.tuples(
    st.sampled_from(["zeros", "text", "bfloat16s", "random"]),
    st.integers(0, 3 * CHUNK_BYTES),
    st.integers(0, 1000),
)


def made_of(pieces: list[tuple[str, int, int]]) -> bytes:
    return b"".join(piece_of(*piece) for piece in pieces)


def piece_of(kind: str, size: int, seed: int) -> bytes:
    match kind:
        case "zeros":
            return bytes(size)
        case "text":
            return (b"%d KV " % seed * (size // 4 + 1))[:size]
        case "bfloat16s":
            return (KV * 2)[seed : seed + size]
    return random.Random(seed).randbytes(size)


# --- what goes in comes out -------------------------------------------------------------------


@given(st.lists(parts, max_size=4), st.booleans(), st.data())
def test_round_trip(
    pieces: list[tuple[str, int, int]], plane_split: bool, data: st.DataObject
) -> None:
    content = made_of(pieces)
    info, file = compressed(content, plane_split=plane_split)
    if info is None:
        assert file == b""
        return
    assert info == CompressedInfo(
        len(content), len(file), xxhash.xxh3_128_digest(content),
        plane_split and len(content) % 2 == 0,
    )  # fmt: skip
    assert len(file) % 4096 == 0
    assert len(file) <= 0.95 * len(content)
    assert decompressed(file) == content
    with file_of(file) as descriptor:
        block = open_compressed(descriptor)
        assert (block.size_bytes, block.checksum) == (len(content), info.checksum)
        for _ in range(5):
            offset = data.draw(st.integers(0, len(content) + 10))
            size = data.draw(st.integers(0, len(content) + 10))
            assert block.read(offset, size) == content[offset : offset + size]


@given(st.lists(parts, max_size=3), st.booleans(), st.booleans())
def test_what_is_recompressed_is_as_if_compressed_from_the_block(
    pieces: list[tuple[str, int, int]], before: bool, after: bool
) -> None:
    content = made_of(pieces)
    info, file = compressed(content, plane_split=before)
    if info is None:
        return
    with file_of(file) as source, file_of() as target:
        block = open_compressed(source)
        again = recompress(block, target, plane_split=after)
        assert (again, content_of(target)) == compressed(content, plane_split=after)


def test_direct_reads_are_of_whole_pages(tmp_path: Path) -> None:
    content = KV[:300_001]
    info, file = compressed(content)
    assert info is not None
    path = tmp_path / "block"
    path.write_bytes(file)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("this filesystem has no O_DIRECT")
    try:
        header = read_header(descriptor)
        assert (header.size_bytes, header.file_bytes) == (len(content), len(file))
        block = open_compressed(descriptor)
        assert block.read(0, len(content)) == content
        assert block.read(70_000, 1) == content[70_000:70_001]
        os.truncate(path, len(file) - HEADER_BYTES)
        with pytest.raises(BlockCorrupt):
            block.read(len(content) - 1, 1)
    finally:
        os.close(descriptor)


def test_progress_counts_the_bytes_of_the_block() -> None:
    content = bytes(2 * MIB + 5)
    with file_of(content) as source, file_of() as target, file_of() as copy:
        steps: list[int] = []
        assert compress_file(source, target, plane_split=False, progress=steps.append)
        assert steps == [MIB, 2 * MIB, len(content)]
        steps.clear()
        open_compressed(target).decompress_to(copy, steps.append)
        assert steps == [MIB, 2 * MIB, len(content)]


def test_planes_of_bfloat16_compress_better_than_their_numbers() -> None:
    plain, split = compressed(KV)[0], compressed(KV, plane_split=True)[0]
    assert plain
    assert split
    assert split.file_bytes < 0.93 * plain.file_bytes


def test_a_read_touches_only_the_frames_it_needs() -> None:
    _, file = compressed(KV)
    with file_of(file) as descriptor:
        block = open_compressed(descriptor)
        for frame in (block.frames[0], block.frames[2]):
            os.pwrite(descriptor, bytes(frame.length_bytes), frame.offset)
        assert block.read(CHUNK_BYTES, CHUNK_BYTES) == KV[CHUNK_BYTES : 2 * CHUNK_BYTES]
        for offset in (CHUNK_BYTES - 1, 2 * CHUNK_BYTES):
            with pytest.raises(BlockCorrupt, match="does not match its checksum"):
                block.read(offset, 2)


def test_threads_may_read_one_block_together() -> None:
    _, file = compressed(KV, plane_split=True)
    wrong: list[int] = []

    def read_all(block: CompressedBlock, step: int) -> None:
        wrong.extend(
            offset
            for offset in range(0, len(KV), step)
            if block.read(offset, step) != KV[offset : offset + step]
        )

    with file_of(file) as descriptor:
        block = open_compressed(descriptor)
        threads = [threading.Thread(target=read_all, args=(block, 9_000 + n)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


# --- when raw is better -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(bytes(8 * KIB), id="no smaller with header and table"),
        pytest.param(random.Random(1).randbytes(3 * MIB), id="random"),
        pytest.param(bytes(40 * KIB) + random.Random(1).randbytes(MIB - 40 * KIB), id="3.9 %"),
    ],
)
@pytest.mark.parametrize("plane_split", [False, True])
def test_raw_is_better_and_leaves_nothing(content: bytes, plane_split: bool) -> None:
    assert compressed(content, plane_split=plane_split) == (None, b"")


def test_a_gain_of_five_percent_is_taken() -> None:
    info, _ = compressed(bytes(80 * KIB) + random.Random(1).randbytes(MIB - 80 * KIB))
    assert info


def test_a_block_too_large_for_a_table_is_raw() -> None:
    with file_of() as source, file_of() as target:
        os.ftruncate(source, MAX_BLOCK_BYTES + 1)
        assert compress_file(source, target, plane_split=False) is None


def test_an_odd_length_has_no_planes() -> None:
    info, file = compressed(KV + b"x", plane_split=True)
    assert info
    assert not info.plane_split
    assert decompressed(file) == KV + b"x"


# --- other decoders ---------------------------------------------------------------------------


def planes_of(content: bytes) -> bytes:
    """What a decoder that knows nothing of planes gets."""
    pieces = (content[at : at + 2 * CHUNK_BYTES] for at in range(0, len(content), 2 * CHUNK_BYTES))
    return b"".join(piece[0::2] + piece[1::2] for piece in pieces)


@pytest.mark.parametrize("plane_split", [False, True])
def test_the_zstandard_module_decodes_it(plane_split: bool) -> None:
    _, file = compressed(KV, plane_split=plane_split)
    reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
    assert reader.read() == (planes_of(KV) if plane_split else KV)


@pytest.mark.skipif(not shutil.which("zstd"), reason="the zstd command is not installed")
@pytest.mark.parametrize("plane_split", [False, True])
def test_the_zstd_command_decodes_it(plane_split: bool) -> None:
    _, file = compressed(KV, plane_split=plane_split)
    done = subprocess.run(["zstd", "-d", "-c"], input=file, capture_output=True, check=True)
    assert done.stdout == (planes_of(KV) if plane_split else KV)


@pytest.mark.parametrize("plane_split", [False, True])
def test_the_file_is_what_the_format_page_says(plane_split: bool) -> None:
    """A reader written from docs/FORMAT.md alone, which checks what GPU decoders need too."""
    _, file = compressed(KV, plane_split=plane_split)
    head = struct.unpack_from("<II8sHHIQQII16sQ", file)
    count, table = head[8], file[4096 : 4096 + 16 + 16 * head[8]]
    assert head == (
        SKIPPABLE, 4088, b"KVFSZSTD", 1, int(plane_split), 65536, len(KV), len(file), count, 0,
        xxhash.xxh3_128_digest(KV), xxhash.xxh3_64_intdigest(table),
    )  # fmt: skip
    assert file[72:4088] == bytes(4016)
    assert struct.unpack_from("<Q", file, 4088) == (xxhash.xxh3_64_intdigest(file[:4088]),)
    assert struct.unpack_from("<IIQ", table) == (SKIPPABLE, len(table) - 8, 0)
    end, frames = 4096 + len(table), []
    for length, size, check in struct.iter_unpack("<IIQ", table[16:]):
        offset = end + -end % 16 + (16 if 0 < -end % 16 < 8 else 0)
        frame = file[offset : offset + length]
        assert xxhash.xxh3_64_intdigest(frame) == check
        parameters = zstandard.get_frame_parameters(frame)
        assert (parameters.content_size, parameters.dict_id) == (size, 0)
        assert parameters.window_size <= max(size, 1024)
        assert not parameters.has_checksum
        frames.append(zstandard.ZstdDecompressor().decompress(frame))
        end = offset + length
    assert len(frames) == count
    assert b"".join(frames) == (planes_of(KV) if plane_split else KV)


# --- damage -----------------------------------------------------------------------------------

FILES = {split: compressed(KV[: 300 * KIB], plane_split=split)[1] for split in (False, True)}


def refused_or(expected: bytes, file: bytes) -> None:
    """Every way to read `file` gives `expected` or BlockCorrupt."""
    with file_of(file) as descriptor, file_of() as copy:
        try:
            block = open_compressed(descriptor)
        except BlockCorrupt:
            return
        assert block.size_bytes == len(expected)
        for offset in range(0, len(expected), 100_000):
            try:
                assert block.read(offset, 100_000) == expected[offset : offset + 100_000]
            except BlockCorrupt:
                pass
        try:
            block.decompress_to(copy)
            assert content_of(copy) == expected
        except BlockCorrupt:
            pass


@given(st.booleans(), st.data())
def test_damage_is_an_error_or_does_not_matter(plane_split: bool, data: st.DataObject) -> None:
    file = bytearray(FILES[plane_split])
    # Half of the damage where the structure is.
    places = st.integers(0, 5 * KIB) | st.integers(0, len(file) - 1)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(places)
        match data.draw(st.sampled_from(["flip", "overwrite", "cut", "extend", "repeat"])):
            case "flip":
                file[place % len(file)] ^= 1 << data.draw(st.integers(0, 7))
            case "overwrite":
                file[place : place + 9] = data.draw(st.binary(min_size=9, max_size=9))
            case "cut":
                del file[max(1, place) :]
            case "extend":
                file += data.draw(st.binary(min_size=1, max_size=5000))
            case "repeat":
                other = data.draw(places)
                file[place : place + 4096] = file[other : other + 4096]
    refused_or(KV[: 300 * KIB], bytes(file))


def table_of(file: bytes) -> bytes:
    (count,) = struct.unpack_from("<I", file, 40)
    return file[HEADER_BYTES : HEADER_BYTES + 16 + 16 * count]


def checked(header: bytes, table: bytes) -> bytes:
    """Header and table with the checksums that belong to them, as a forger would write them."""
    header = header[:64] + struct.pack("<Q", xxhash.xxh3_64_intdigest(table)) + header[72:4088]
    return header + struct.pack("<Q", xxhash.xxh3_64_intdigest(header)) + table


@given(
    st.booleans(),
    st.sampled_from([(0, 4), (4, 4), (8, 8), (16, 2), (18, 2), (20, 4), (24, 8), (32, 8), (40, 4)]),
    st.integers(0, 2**64 - 1) | st.integers(0, 1 << 20),
)
def test_a_forged_header_is_refused(plane_split: bool, field: tuple[int, int], value: int) -> None:
    file = FILES[plane_split]
    offset, size = field
    forged = bytearray(file[:HEADER_BYTES])
    forged[offset : offset + size] = (value % 256**size).to_bytes(size, "little")
    file = checked(bytes(forged), table_of(file))
    file += FILES[plane_split][len(file) :]
    with file_of(file) as descriptor:
        if file == FILES[plane_split]:
            open_compressed(descriptor)
        else:
            with pytest.raises(BlockCorrupt):
                open_compressed(descriptor)


@given(
    st.integers(0, 4),
    st.integers(0, 2**32 - 1) | st.integers(0, 2 * CHUNK_BYTES),
    st.integers(0, 2**32 - 1) | st.just(CHUNK_BYTES),
)
def test_a_forged_table_is_refused(number: int, length: int, size: int) -> None:
    table = bytearray(table_of(FILES[False]))
    struct.pack_into("<II", table, 16 + 16 * number, length, size)
    file = checked(FILES[False][:HEADER_BYTES], bytes(table))
    file += FILES[False][len(file) :]
    if not 0 < length <= CHUNK_BYTES + 512 or size != (CHUNK_BYTES if number < 4 else 44 * KIB):
        with file_of(file) as descriptor, pytest.raises(BlockCorrupt, match="impossible"):
            open_compressed(descriptor)
    refused_or(KV[: 300 * KIB], file)


@pytest.mark.parametrize("change", [-4096, -1, 1, 4096])
def test_a_file_of_another_length_is_refused(change: int) -> None:
    file = FILES[False]
    other = file[:change] if change < 0 else file + bytes(change)
    with file_of(other) as descriptor, pytest.raises(BlockCorrupt, match="contradicts"):
        open_compressed(descriptor)
    header = file[:32] + struct.pack("<Q", len(other)) + file[40:HEADER_BYTES]
    forged = checked(header, table_of(file))
    forged += other[len(forged) :]
    with file_of(forged) as descriptor, pytest.raises(BlockCorrupt, match="contradicts"):
        open_compressed(descriptor)


def test_a_table_that_no_block_needs_is_not_even_read() -> None:
    file = FILES[False]
    size = 1 << 44
    forged = struct.pack("<QQI", size, len(file), size // CHUNK_BYTES)
    file = checked(file[:24] + forged + file[44:HEADER_BYTES], table_of(file))
    file += FILES[False][len(file) :]
    with file_of(file) as descriptor, pytest.raises(BlockCorrupt, match="contradicts"):
        open_compressed(descriptor)


def test_a_damaged_table_is_refused_before_it_is_used() -> None:
    file = bytearray(FILES[False])
    file[HEADER_BYTES + 8] ^= 1
    with file_of(bytes(file)) as descriptor, pytest.raises(BlockCorrupt, match="table"):
        open_compressed(descriptor)


def with_frame(frame: bytes) -> bytes:
    """A valid file of one piece whose only frame is replaced, all checksums made to fit."""
    _, file = compressed(bytes(40 * KIB))
    entry = struct.pack("<IIQ", len(frame), 40 * KIB, xxhash.xxh3_64_intdigest(frame))
    table = file[HEADER_BYTES : HEADER_BYTES + 16] + entry
    content = file[: HEADER_BYTES + 32] + frame
    padded = content + struct.pack("<II", SKIPPABLE, -(len(content) + 8) % 4096)
    padded += bytes(-len(padded) % 4096)
    header = file[:32] + struct.pack("<Q", len(padded)) + file[40:HEADER_BYTES]
    return checked(header, table) + padded[HEADER_BYTES + 32 :]


def streamed(content: bytes) -> bytes:
    """A frame that does not say how much it holds."""
    writer = zstandard.ZstdCompressor().compressobj()
    return writer.compress(content) + writer.flush()


def announcing(size: int) -> bytes:
    """A frame whose header announces `size` bytes and whose only block is empty."""
    return struct.pack("<IBBQ", 0xFD2FB528, 0xC0, 0x58, size) + bytes([1, 0, 0])


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(announcing(1 << 40), id="announces a TiB"),
        pytest.param(announcing(40 * KIB), id="announces what it does not hold"),
        pytest.param(streamed(bytes(256 * MIB)), id="bomb without size"),
        pytest.param(zstandard.compress(bytes(41 * KIB)), id="too much"),
        pytest.param(zstandard.compress(bytes(39 * KIB)), id="too little"),
        pytest.param(zstandard.compress(bytes(40 * KIB)) + b"more", id="more behind it"),
        pytest.param(zstandard.compress(bytes(40 * KIB))[:-1], id="cut off"),
        pytest.param(struct.pack("<II", SKIPPABLE, 0), id="skippable"),
        pytest.param(random.Random(1).randbytes(99), id="no frame"),
    ],
)
def test_a_forged_frame_is_refused(frame: bytes) -> None:
    with file_of(with_frame(frame)) as descriptor:
        block = open_compressed(descriptor)
        with pytest.raises(BlockCorrupt):
            block.read(0, 1)


def test_the_forger_of_these_tests_forges_well() -> None:
    assert decompressed(with_frame(zstandard.compress(bytes(40 * KIB)))) == bytes(40 * KIB)


@given(st.binary(min_size=1, max_size=300))
def test_any_bytes_in_place_of_a_frame_are_refused(frame: bytes) -> None:
    refused_or(bytes(40 * KIB), with_frame(frame))


def test_a_whole_read_checks_the_checksum_of_the_block() -> None:
    file = bytearray(FILES[False])
    file[48] ^= 1
    forged = checked(bytes(file[:HEADER_BYTES]), table_of(FILES[False]))
    with ExitStack() as stack:
        descriptor = stack.enter_context(file_of(forged + bytes(file[len(forged) :])))
        copy = stack.enter_context(file_of())
        block = open_compressed(descriptor)
        with pytest.raises(BlockCorrupt, match="does not have the content"):
            block.decompress_to(copy)


@pytest.mark.parametrize("content", [b"", b"x", KV[: 64 * KIB], bytes(8192)])
def test_an_ordinary_file_is_no_compressed_replica(content: bytes) -> None:
    with file_of(content) as descriptor, pytest.raises(BlockCorrupt):
        open_compressed(descriptor)


def test_a_file_that_shrinks_while_it_is_read_is_an_error() -> None:
    with file_of(FILES[False]) as descriptor:
        block = open_compressed(descriptor)
        os.ftruncate(descriptor, block.frames[1].offset + 1)
        assert block.read(0, 10) == KV[:10]
        with pytest.raises(BlockCorrupt, match="shorter"):
            block.read(CHUNK_BYTES, 10)
