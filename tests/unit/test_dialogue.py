"""The client's side of the protocol, without a socket: what is asked, and what becomes of answers
that nobody waits for."""

from __future__ import annotations

import array
import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from kvfs import dialogue
from kvfs.control import Error, ErrorBody, Message, Progress, Reply, encode_message
from kvfs.dialogue import (
    MOST_PATH_BYTES,
    MOST_PATHS,
    Answer,
    Ask,
    Below,
    ConnectionLost,
    Conversation,
    Forsake,
    Write,
    bytes_of,
    chunks,
)
from kvfs.errors import BlockNotFound, DaemonUnavailable, FilesystemError, UsageError
from kvfs.leased import Leased


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def tell(conversation: Conversation, message: Message, *, lost: bool = False) -> Answer | None:
    """What the socket would bring; descriptors arrive as duplicates."""
    data, memfd = encode_message(message)
    given = [memfd] if memfd is not None else []
    if isinstance(message, Progress | Reply):
        given += [os.dup(descriptor) for descriptor in message.descriptors]
    if lost:
        os.close(given.pop())
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", given).tobytes())]
    flags = socket.MSG_CTRUNC if lost else 0
    return conversation.take(data, ancillary if given else [], flags)


def block(place: int) -> list[Any]:
    return [place, 5, bytes(16), 1, 0, 0, False]


def lease_part(request: int, lease: int, *places: int) -> Progress:
    """A part of an answer, with a descriptor for each block."""
    rows = [block(place) for place in places]
    return Progress(request, {"lease": lease, "blocks": rows}, (0,) * len(places))


def lease_reply(request: int, lease: int, statuses: bytes, *places: int) -> Reply:
    """The end of an answer, with the last of its blocks."""
    result = {"lease": lease, "statuses": statuses, "tiers": ["nvme"], "codecs": ["raw"]}
    rows = [block(place) for place in places]
    result |= {"blocks": rows, "max_lease_s": 600.0}
    return Reply(request, result, (0,) * len(places))


# --- one connection


def test_parts_and_result_make_an_answer() -> None:
    conversation, before = Conversation(), descriptors()
    request = conversation.begin(Ask("lease", {}))
    assert tell(conversation, lease_part(request.id, 7, 0, 1)) is None
    assert tell(conversation, lease_part(request.id, 7, 2)) is None
    answer = tell(conversation, lease_reply(request.id, 7, bytes(5), 3, 4))
    assert answer is not None
    assert [len(part.descriptors) for part in answer.parts] == [2, 1, 2]
    assert not answer.lost
    answer.close()
    answer.close()
    assert descriptors() == before


def test_what_was_given_up_is_closed_and_undone_with_the_next_request() -> None:
    conversation, before = Conversation(), descriptors()
    first = conversation.begin(Ask("lease", {}))
    tell(conversation, lease_part(first.id, 7, 0, 1))
    conversation.abandon()
    assert descriptors() == before
    second = conversation.begin(Ask("put_begin", {}))
    # Late answers to the first one.
    assert tell(conversation, lease_part(first.id, 7, 2)) is None
    assert tell(conversation, lease_reply(first.id, 7, bytes(4), 3)) is None
    assert tell(conversation, Error(first.id, ErrorBody(5, 1, "x"))) is None
    assert tell(conversation, Progress(second.id, {"put": 3}, (0,))) is None
    conversation.abandon()
    conversation.forsake(Forsake("put", [8]))
    assert descriptors() == before
    asked = [(ask.verb, ask.args) for ask in conversation.overdue()]
    assert asked == [
        *[("release", {"leases": [7]})] * 3,
        ("put_abort", {"put": 3}), ("put_abort", {"put": 8}),
    ]  # fmt: skip
    assert list(conversation.overdue()) == []


def test_descriptors_that_could_not_be_delivered_are_noticed() -> None:
    conversation, before = Conversation(), descriptors()
    request = conversation.begin(Ask("lease", {}))
    assert tell(conversation, lease_part(request.id, 7, 0, 1), lost=True) is None
    answer = tell(conversation, lease_reply(request.id, 7, bytes(2)))
    assert answer is not None
    assert answer.lost
    request = conversation.begin(Ask("lease", {}))
    answer = tell(conversation, lease_reply(request.id, 7, bytes(2), 0, 1), lost=True)
    assert answer is not None
    assert answer.lost
    assert descriptors() == before


def test_errors_of_the_daemon_and_of_the_connection() -> None:
    conversation, before = Conversation(), descriptors()
    request = conversation.begin(Ask("lease", {}))
    tell(conversation, lease_part(request.id, 7, 0))
    missing = ErrorBody(errno.ENOENT, 8, "no such block")
    with pytest.raises(BlockNotFound, match="no such block"):
        tell(conversation, Error(request.id, missing))
    assert descriptors() == before
    # What no request was understood for is for whichever there is.
    with pytest.raises(BlockNotFound):
        tell(conversation, Error(0, missing))
    with pytest.raises(ConnectionLost):
        conversation.take(b"", [], 0)
    with pytest.raises(DaemonUnavailable, match="is not understood"):
        conversation.take(b"nonsense", [], 0)


# --- operations


def carry_out(steps: dialogue.Dialogue[Any], answers: list[Any]) -> tuple[Any, list[Any]]:
    """The result, and what was yielded; exceptions among the answers are thrown."""
    asked = []
    try:
        step = steps.send(None)
        while True:
            asked.append(step)
            answer = answers.pop(0)
            step = steps.throw(answer) if isinstance(answer, BaseException) else steps.send(answer)
    except StopIteration as end:
        assert answers == []
        return end.value, asked


def looked_up(found: int, stopped: str = "found") -> Answer:
    result = {"found": found, "stopped": stopped, "tiers": ["nvme", "hdd"], "at": bytes(found)}
    return Answer(result)


def test_a_lookup_of_many_paths_stops_where_they_stop() -> None:
    paths = [b"%d" % number for number in range(2 * MOST_PATHS + 5)]
    hits, asked = carry_out(
        dialogue.lookup(paths), [looked_up(MOST_PATHS), looked_up(3, "missing")]
    )
    assert [ask.verb for ask in asked] == ["lookup"] * 2
    assert (len(hits), hits.stopped, set(hits.tiers)) == (MOST_PATHS + 3, "missing", {"nvme"})
    hits, asked = carry_out(
        dialogue.lookup(paths), [looked_up(MOST_PATHS), looked_up(MOST_PATHS), looked_up(5)]
    )
    assert (len(hits), hits.stopped) == (len(paths), "found")


@pytest.mark.parametrize(
    ("paths", "sizes"),
    [
        ([], []),
        ([b"x"] * MOST_PATHS, [MOST_PATHS]),
        ([b"x"] * (MOST_PATHS + 1), [MOST_PATHS, 1]),
        ([bytes(MOST_PATH_BYTES)] * 2 + [b"x"], [1, 1, 1]),
        ([b"x", bytes(MOST_PATH_BYTES + 1), b"x"], [1, 1, 1]),
    ],
)
def test_requests_are_cut_to_what_one_may_be(paths: list[bytes], sizes: list[int]) -> None:
    parts = list(chunks(paths))
    assert [len(part) for part in parts] == sizes
    assert [path for part in parts for path in part] == paths


def lease_of(*paths: bytes) -> dialogue.Dialogue[Leased]:
    return dialogue.lease(paths, direct=True, wait=None, deadline_s=None, sparse=False)


def leased(lease: int, statuses: bytes, *places: int) -> Answer:
    """With descriptors that are really open."""
    given = tuple(os.open("/dev/null", os.O_RDONLY) for _ in places)
    part = Progress(1, {"lease": lease, "blocks": [block(place) for place in places]}, given)
    return Answer(lease_reply(1, lease, statuses).result, [part])


def test_a_lease_is_put_together_from_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialogue, "MOST_PATHS", 4)
    before = descriptors()
    paths = [b"%d" % number for number in range(7)]
    answers = [leased(7, bytes(4), *range(4)), leased(8, b"\0\1", 0)]
    lease, asked = carry_out(lease_of(*paths), answers)
    assert [len(ask.args["paths"]) for ask in asked] == [4, 3]
    assert (lease.numbers, lease.prefix, len(lease)) == ((7, 8), 5, 5)
    assert [lease.blocks[-3] is not None, *lease.blocks[-2:]] == [True, None, None]
    assert (lease[0].path, lease[-1].path) == (b"0", b"4")
    assert lease.stopped == "missing"
    lease.close_descriptors()
    lease.close_descriptors()
    assert (descriptors(), len(lease)) == (before, 0)


@pytest.mark.parametrize("failure", [FilesystemError(errno.EDQUOT), KeyboardInterrupt()])
def test_a_lease_that_fails_half_way_is_undone(
    failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialogue, "MOST_PATHS", 2)
    before, asked = descriptors(), []
    steps = lease_of(b"a", b"b", b"c")
    steps.send(None)
    steps.send(leased(7, bytes(2), 0, 1))
    asked.append(steps.throw(failure))
    with pytest.raises(type(failure)):
        steps.send(None)
    assert asked == [Forsake("lease", [7])]
    assert descriptors() == before


def test_of_a_lost_connection_nothing_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialogue, "MOST_PATHS", 1)
    before, steps = descriptors(), lease_of(b"a", b"b")
    steps.send(None)
    steps.send(leased(7, bytes(1), 0))
    with pytest.raises(ConnectionLost):
        steps.throw(ConnectionLost("it is gone"))
    assert descriptors() == before


def test_a_process_without_descriptors_keeps_none_of_a_lease() -> None:
    before, answer = descriptors(), leased(7, bytes(2), 0)
    answer.lost = True
    steps = lease_of(b"a", b"b")
    steps.send(None)
    assert steps.send(answer) == Forsake("lease", [7])
    with pytest.raises(OSError, match="no descriptor left") as caught:
        steps.send(None)
    assert caught.value.errno == errno.EMFILE
    assert descriptors() == before


def test_a_put_writes_closes_and_commits(tmp_path: Path) -> None:
    before, data = descriptors(), os.urandom(3_000_000)
    descriptor = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT)
    steps = dialogue.put(b"a", memoryview(data), mode=0o600, replace=True)
    begin = steps.send(None)
    assert isinstance(begin, Ask)
    assert (begin.verb, begin.args["size_bytes"]) == ("put_begin", len(data))
    write = steps.send(Answer({"put": 4}, [Progress(1, {"put": 4}, (descriptor,))]))
    assert isinstance(write, Write)
    write.carry_out()
    commit = steps.send(None)
    assert descriptors() == before
    assert (tmp_path / "a").read_bytes() == data
    assert isinstance(commit, Ask)
    assert (commit.verb, commit.args) == ("put_commit", {"put": 4})
    done = {"created": True, "size_bytes": len(data), "checksum": bytes(16), "tier": "nvme"}
    with pytest.raises(StopIteration) as end:
        steps.send(Answer(done))
    assert end.value.value.created


def test_a_put_whose_write_fails_is_given_up() -> None:
    before = descriptors()
    steps = dialogue.put(b"a", memoryview(b"1"), mode=0o644, replace=False)
    steps.send(None)
    descriptor = os.open("/dev/null", os.O_RDONLY)
    write = steps.send(Answer({"put": 4}, [Progress(1, {"put": 4}, (descriptor,))]))
    assert isinstance(write, Write)
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        write.carry_out()
    assert steps.throw(caught.value) == Forsake("put", [4])
    with pytest.raises(OSError, match="Bad file descriptor"):
        steps.send(None)
    assert descriptors() == before


# --- paths and buffers


def test_paths_are_relative_to_the_directory_or_below_it() -> None:
    below = Below("/mnt/kvfs/vllm", b"vllm")
    assert below("a/b") == below(b"a/b") == below(Path("/mnt/kvfs/vllm/a/b")) == b"vllm/a/b"
    assert Below("/mnt/kvfs", b"")("a") == b"a"
    assert below("\udcff") == b"vllm/\xff"
    for outside in ("/mnt/kvfs/other/a", "/mnt/kvfs/vllm", "/mnt/kvfs/vllm2/a"):
        with pytest.raises(UsageError, match="is not below"):
            below(outside)
    with pytest.raises(UsageError, match="is not below"):
        Below(None, b"")("/a")
    for one in ("a", b"a", Path("a")):
        with pytest.raises(TypeError, match="a list of paths"):
            below.all(one)  # type: ignore[arg-type] # what is wrong about it


def test_buffers_are_taken_without_a_copy_or_not_at_all() -> None:
    numbers = array.array("d", [1.0, 2.0])
    view = bytes_of(numbers)
    assert (len(view), view.format) == (16, "B")
    numbers[0] = 3.0
    assert view[:8] == numbers.tobytes()[:8]
    assert len(bytes_of(b"")) == 0
    with pytest.raises(TypeError, match="not contiguous"):
        bytes_of(memoryview(b"123456")[::2])
