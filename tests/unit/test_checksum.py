"""Checksums of files: in slices, past the page cache, and what the page cache has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st

from kvfs.tiers.checksum import PIECE_BYTES, Digest, cached_bytes, checksum_of, drop_cached


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


sizes = st.integers(0, 3 * PIECE_BYTES) | st.sampled_from(
    [0, 1, 4095, 4096, 4097, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES]
)


@given(sizes, st.integers(1, 3 * PIECE_BYTES), st.booleans())
@example(PIECE_BYTES, 1, True)
def test_slices_of_any_size_make_the_same_checksum(
    tmp_path: Path, size_bytes: int, slice_bytes: int, direct: bool
) -> None:
    data = (b"some bytes that repeat " * (size_bytes // 23 + 1))[:size_bytes]
    file = tmp_path / "file"
    file.write_bytes(data)
    with opened(file, os.O_RDONLY | (os.O_DIRECT if direct else 0)) as descriptor:
        digest = Digest(descriptor, direct=direct)
        read = []
        while not digest.done:
            read.append(digest.advance(slice_bytes))
        assert digest.checksum() == xxhash.xxh3_128_digest(data)
        assert digest.length_bytes == sum(read) == size_bytes
        assert all(bytes_of_slice < slice_bytes + PIECE_BYTES for bytes_of_slice in read)


@pytest.mark.parametrize("past_page_cache", [False, True])
def test_the_checksum_of_a_whole_file(tmp_path: Path, past_page_cache: bool) -> None:
    data = os.urandom(2 * PIECE_BYTES + 5)
    (tmp_path / "file").write_bytes(data)
    with opened(tmp_path / "file") as descriptor:
        checksum = checksum_of(descriptor, past_page_cache=past_page_cache)
    assert checksum == xxhash.xxh3_128_digest(data)


def test_what_the_page_cache_has_of_a_file_is_known(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(PIECE_BYTES + 100))
    with opened(file) as descriptor:
        assert cached_bytes(descriptor, PIECE_BYTES + 100) == PIECE_BYTES + 100
        os.fsync(descriptor)
        drop_cached(descriptor)
        assert cached_bytes(descriptor, PIECE_BYTES + 100) == 0


def test_reading_past_the_page_cache_leaves_nothing_in_it(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(PIECE_BYTES))
    with opened(file, os.O_RDONLY | os.O_DIRECT) as descriptor:
        os.fsync(descriptor)
        drop_cached(descriptor)
        Digest(descriptor, direct=True).advance()
        assert cached_bytes(descriptor, PIECE_BYTES) == 0
