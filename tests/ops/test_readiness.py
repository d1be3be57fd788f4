"""Waiting for the next request: what is expected of a wait, and that none is missed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any

import pyfuse3
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from kvfs.mount import readiness
from kvfs.mount.readiness import (
    MOST_TURNS,
    ROUNDS_TO_ANSWER,
    TRIAL_WAITS,
    Gaps,
    ReaderLock,
    Readiness,
)

Pair = tuple[socket.socket, socket.socket]
LEARNED_AFTER = 16


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


# --- what is expected


@given(st.lists(st.booleans(), min_size=1, max_size=2))
def test_what_repeats_is_expected(pattern: list[bool]) -> None:
    gaps = Gaps()
    waits = cycle(pattern)
    for short in islice(waits, LEARNED_AFTER):
        gaps.note(short=short)
    for short in islice(waits, LEARNED_AFTER):
        assert gaps.next_is_short == short
        gaps.note(short=short)


def test_one_long_wait_does_not_end_a_storm() -> None:
    gaps = Gaps()
    for _ in range(LEARNED_AFTER):
        gaps.note(short=True)
    gaps.note(short=False)
    for _ in range(LEARNED_AFTER):
        gaps.note(short=True)
    assert gaps.next_is_short


@given(st.lists(st.booleans()))
def test_after_enough_long_waits_the_next_is_expected_to_be_long(before: list[bool]) -> None:
    gaps = Gaps()
    for short in before:
        gaps.note(short=short)
    for _ in range(LEARNED_AFTER):
        gaps.note(short=False)
    assert not gaps.next_is_short


# --- how it waits


def expecting(*, short: bool, threads: int = 0) -> Readiness:
    """A wait after many that were short, or long."""
    ready = Readiness(lambda: threads)
    for _ in range(LEARNED_AFTER):
        ready.gaps.note(short=short)
    return ready


async def test_requests_one_upon_another_are_awaited_awake(pair: Pair) -> None:
    ours, theirs = pair
    ready = expecting(short=True)
    for number in range(LEARNED_AFTER):
        theirs.send(b"%d" % number)
        await ready.wait_readable(ours.fileno())
        assert ours.recv(10) == b"%d" % number
    assert ready.awake == LEARNED_AFTER


async def test_now_and_then_a_wait_is_spent_awake_against_expectation(pair: Pair) -> None:
    ours, theirs = pair
    theirs.send(b"x")
    ready = expecting(short=False)
    ready.waits = TRIAL_WAITS - 1
    await ready.wait_readable(ours.fileno())
    assert ready.awake == 1


async def test_who_was_awake_in_vain_sleeps_until_something_comes(pair: Pair) -> None:
    ours, theirs = pair
    ready = expecting(short=True)
    for _ in range(2 * TRIAL_WAITS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ready.wait_readable, ours.fileno())
            await trio.sleep(0.002)
            theirs.send(b"x")
        assert ours.recv(10) == b"x"
    assert not ready.gaps.next_is_short
    assert ready.awake < TRIAL_WAITS / 2


async def test_the_end_of_a_connection_ends_the_wait(pair: Pair) -> None:
    ours, theirs = pair
    theirs.close()
    for short in (False, True):
        await expecting(short=short).wait_readable(ours.fileno())
    assert ours.recv(10) == b""


async def test_another_descriptor_is_another_wait(pair: Pair) -> None:
    ours, theirs = pair
    ready = expecting(short=True)
    theirs.send(b"x")
    await ready.wait_readable(ours.fileno())
    with trio.move_on_after(0.05) as scope:
        await ready.wait_readable(theirs.fileno())
    assert scope.cancelled_caught
    ours.send(b"y")
    await ready.wait_readable(theirs.fileno())


@pytest.mark.parametrize(
    ("cores", "threads", "awake"), [(1, 0, 0), (2, 0, 1), (2, 1, 0), (3, 1, 1)]
)
async def test_nobody_loses_a_core_to_who_looks_out(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, cores: int, threads: int, awake: int
) -> None:
    ours, theirs = pair
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    ready = expecting(short=True, threads=threads)
    theirs.send(b"x")
    await ready.wait_readable(ours.fileno())
    assert ready.awake == awake


async def test_a_request_is_answered_before_anybody_looks_out_for_the_next(pair: Pair) -> None:
    ours, theirs = pair
    theirs.send(b"x")
    ready = expecting(short=True)
    steps: list[str] = []

    async def answer(task_status: trio.TaskStatus[None]) -> None:
        ready.answering = True
        task_status.started()
        for _ in range(ROUNDS_TO_ANSWER - 2):
            await trio.lowlevel.checkpoint()
        steps.append("answered")
        ready.answering = False

    async with trio.open_nursery() as nursery:
        await nursery.start(answer)
        await ready.wait_readable(ours.fileno())
        steps.append("ready")
    assert steps == ["answered", "ready"]


async def test_a_request_that_waits_for_a_slow_tier_keeps_nobody(pair: Pair) -> None:
    ours, theirs = pair
    ready = expecting(short=True)
    ready.answering = True
    for _ in range(2):
        theirs.send(b"x")
        await ready.wait_readable(ours.fileno())
        assert ours.recv(10) == b"x"
    assert ready.awake == 2


# --- whose turn it is


async def test_one_task_reads_at_a_time_and_others_have_their_turn() -> None:
    lock = ReaderLock()
    reading = 0
    reads: list[int] = []
    other = 0

    async def read(reader: int) -> None:
        nonlocal reading
        for number in range(100):
            async with lock:
                reading += 1
                assert reading == 1
                if number % 7 == 0:
                    await trio.lowlevel.checkpoint()
                reading -= 1
            reads.append(reader)

    async def work() -> None:
        nonlocal other
        while len(reads) < 200:
            other += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, 0)
        nursery.start_soon(read, 1)
        nursery.start_soon(work)
    assert other >= 200 / MOST_TURNS / 2


async def test_who_waits_reads_when_the_one_before_is_kept_by_its_request() -> None:
    lock, kept, read_on = ReaderLock(), trio.Event(), trio.Event()

    async def first() -> None:
        async with lock:
            pass
        await kept.wait()

    async def second() -> None:
        async with lock:
            read_on.set()

    async with trio.open_nursery() as nursery:
        async with lock:
            nursery.start_soon(first)
            nursery.start_soon(second)
            await trio.testing.wait_all_tasks_blocked()
        await read_on.wait()
        kept.set()


async def test_one_that_is_cancelled_in_its_turn_leaves_it_to_the_next() -> None:
    lock, cancelled = ReaderLock(), trio.CancelScope()
    read: list[str] = []

    async def reader(name: str, scope: trio.CancelScope) -> None:
        with scope:
            async with lock:
                await trio.lowlevel.checkpoint()
                read.append(name)

    async with trio.open_nursery() as nursery:
        async with lock:
            nursery.start_soon(reader, "first", cancelled)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(reader, "second", trio.CancelScope())
            await trio.testing.wait_all_tasks_blocked()
        cancelled.cancel()
    assert read == ["second"]


# --- pyfuse3


def test_pyfuse3_waits_like_this(monkeypatch: pytest.MonkeyPatch) -> None:
    fuse: Any = pyfuse3
    monkeypatch.setattr(fuse, "trio", trio)
    ready = Readiness()
    readiness.install(ready)
    assert fuse.trio.lowlevel.wait_readable == ready.wait_readable
    assert fuse.trio.Lock is ReaderLock
    assert fuse.trio.open_nursery is trio.open_nursery
    assert fuse.trio.lowlevel.notify_closing is trio.lowlevel.notify_closing
