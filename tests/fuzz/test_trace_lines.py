"""Traces: whatever a file holds is requests, or an error that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kvfs.errors import UsageError
from kvfs.tools.trace import ZSTD_MAGIC, check_trace, read_trace
from tests.fuzz.fuzzing import corpus, damaged, fuzz, replay

SPLICES = (
    b"\n", b"\r\n", b"{", b"[", b'"hash_ids"', b"1e999", b"-1", b"null", b"18446744073709551616",
    b"NaN", b'"\\ud800"', b"\xff", b"\0", b',"x":1', ZSTD_MAGIC,
)  # fmt: skip


def check_path(error: UsageError, path: Path) -> None:
    assert str(path) in str(error)


def try_trace(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    read = 0
    try:
        for request in read_trace(path):
            assert request.timestamp_ms >= 0
            assert min(request.input_length, request.output_length) >= 0
            assert all(isinstance(number, int) for number in request.hash_ids)
            read += 1
    except UsageError as error:
        check_path(error, path)
        with pytest.raises(UsageError):
            check_trace(path)
        return
    if read:
        assert check_trace(path).requests == read
    else:
        with pytest.raises(UsageError, match="no request"):
            check_trace(path)


@replay("trace")
def test_each_trace_of_the_corpus(tmp_path: Path, data: bytes) -> None:
    try_trace(tmp_path / "trace", data)


@fuzz(400)
@given(data=damaged(corpus("trace"), SPLICES) | st.binary())
def test_any_trace(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    try_trace(tmp_path_factory.getbasetemp() / "trace", data)


@fuzz(100)
@given(data=damaged(corpus("trace"), SPLICES), cut=st.integers(0, 40))
def test_any_compressed_trace(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, cut: int
) -> None:
    compressed = zstandard.compress(data)
    try_trace(tmp_path_factory.getbasetemp() / "trace", compressed[: len(compressed) - cut])
