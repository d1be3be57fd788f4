"""Traces: what is read, what is refused and how it is named, and the shape of generated load."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kvfs.errors import UsageError
from kvfs.tools.trace import TOKENS_PER_BLOCK, Request, chat_workload, check_trace, read_trace

LINES = [
    {"timestamp": 0, "input_length": 900, "output_length": 5, "hash_ids": [0, 1]},
    {"timestamp": 27482, "input_length": 1300, "output_length": 0, "hash_ids": [0, 2, 3]},
    {"timestamp": 30000.5, "input_length": 0, "output_length": 7, "hash_ids": []},
]
TEXT = "".join(json.dumps(line) + "\n" for line in LINES).encode()
REQUESTS = [
    Request(0, 900, 5, (0, 1)),
    Request(27482, 1300, 0, (0, 2, 3)),
    Request(30000.5, 0, 7, ()),
]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "trace.jsonl"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(TEXT, id="plain"),
        pytest.param(TEXT.removesuffix(b"\n"), id="no newline at the end"),
        pytest.param(TEXT.replace(b"\n", b"\r\n\n"), id="blank lines and carriage returns"),
        pytest.param(zstandard.compress(TEXT), id="zstd"),
        pytest.param(
            zstandard.compress(TEXT[:40]) + zstandard.compress(TEXT[40:]), id="two zstd frames"
        ),
    ],
)
def test_reads_plain_and_compressed(trace: Path, data: bytes) -> None:
    trace.write_bytes(data)
    assert list(read_trace(trace)) == REQUESTS
    assert list(read_trace(trace, 2)) == REQUESTS[:2]
    summary = check_trace(trace)
    assert (summary.requests, summary.blocks, summary.duration_s) == (3, 5, 30.0005)


@pytest.mark.parametrize("compressed", [False, True])
def test_reads_lines_longer_than_a_chunk(trace: Path, compressed: bool) -> None:
    requests = [{**LINES[0], "hash_ids": list(range(n, n + 40_000))} for n in range(5)]
    data = b"\n".join(json.dumps(request).encode() for request in requests)
    trace.write_bytes(zstandard.compress(data) if compressed else data)
    assert [request.hash_ids[0] for request in read_trace(trace)] == [0, 1, 2, 3, 4]


def test_fields_that_other_traces_add_are_ignored(trace: Path) -> None:
    trace.write_text(json.dumps({**LINES[0], "type": "text", "chat_id": 7}))
    assert list(read_trace(trace)) == REQUESTS[:1]


@pytest.mark.parametrize(
    "bad",
    [
        b"{",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"timestamp": 0, "input_length": 900, "output_length": 5}',
        b'{"timestamp": -1, "input_length": 9, "output_length": 5, "hash_ids": []}',
        b'{"timestamp": 0, "input_length": 9, "output_length": 5, "hash_ids": ["a"]}',
        b'{"timestamp": 0, "input_length": 9, "output_length": 5, "hash_ids": []} x',
    ],
)
def test_a_corrupt_line_is_named_by_its_number(trace: Path, bad: bytes) -> None:
    lines = TEXT.splitlines()
    trace.write_bytes(b"\n".join([lines[0], b"", bad, lines[1]]))
    with pytest.raises(UsageError, match=re.escape(f"{trace}: line 3 ")) as refusal:
        check_trace(trace)
    assert "\n" not in str(refusal.value)
    assert check_trace(trace, 1).requests == 1


def test_a_cut_off_zstd_file_is_refused_even_between_two_lines(trace: Path) -> None:
    writer = zstandard.ZstdCompressor().compressobj()
    head = writer.compress(TEXT) + writer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    trace.write_bytes(head)
    with pytest.raises(UsageError, match="cut off"):
        check_trace(trace)


def test_a_damaged_zstd_file_is_refused(trace: Path) -> None:
    data = bytearray(zstandard.compress(TEXT * 50))
    data[len(data) // 2 :] = b"\xff" * (len(data) - len(data) // 2)
    trace.write_bytes(data)
    with pytest.raises(UsageError):
        check_trace(trace)


@pytest.mark.parametrize("data", [b"", b"\n\n"])
def test_an_empty_trace_is_refused(trace: Path, data: bytes) -> None:
    trace.write_bytes(data)
    with pytest.raises(UsageError, match="no request"):
        check_trace(trace)


def test_a_missing_trace_is_refused(trace: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        check_trace(trace)


@given(data=st.binary(max_size=300), magic=st.booleans(), good=st.booleans())
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, magic: bool, good: bool
) -> None:
    trace = tmp_path_factory.getbasetemp() / "any.jsonl"
    prefix = b"\x28\xb5\x2f\xfd" if magic else b""
    trace.write_bytes(prefix + (TEXT if good else b"") + data)
    refused = ""
    try:
        requests = check_trace(trace).requests
    except UsageError as refusal:
        requests, refused = 0, str(refusal)
    assert requests >= 1 or str(trace) in refused


def test_a_workload_is_a_function_of_its_seed() -> None:
    assert chat_workload(1, 20) == chat_workload(1, 20)
    assert chat_workload(1, 20) != chat_workload(2, 20)


def test_a_workload_needs_a_session() -> None:
    with pytest.raises(UsageError, match="at least one session"):
        chat_workload(1, 0)


@given(
    seed=st.integers(),
    sessions=st.integers(1, 20),
    turns=st.integers(1, 8),
    system_tokens=st.integers(0, 5000),
)
def test_every_prompt_continues_its_conversation(
    seed: int, sessions: int, turns: int, system_tokens: int
) -> None:
    requests = chat_workload(seed, sessions, turns=turns, system_tokens=system_tokens)
    system = tuple(range(system_tokens // TOKENS_PER_BLOCK))
    times = [request.timestamp_ms for request in requests]
    assert times == sorted(times)
    parent: dict[int, int] = {}
    for request in requests:
        assert request.hash_ids[: len(system)] == system
        assert len(request.hash_ids) == request.input_length // TOKENS_PER_BLOCK
        # An id stands for everything before it as well, so it has one predecessor for ever.
        for before, after in zip((-1, *request.hash_ids), request.hash_ids, strict=False):
            assert parent.setdefault(after, before) == before


def test_a_workload_shares_its_system_prompt_and_reuses_its_turns() -> None:
    requests = chat_workload(7, 200)
    seen: set[int] = set()
    blocks = hits = 0
    for request in requests:
        hits += sum(hash_id in seen for hash_id in request.hash_ids)
        blocks += len(request.hash_ids)
        seen.update(request.hash_ids)
    assert len(requests) > 600
    assert 0.5 < hits / blocks < 0.95
