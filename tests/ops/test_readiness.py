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
from hypothesis import given
from hypothesis import strategies as st

from kvfs.mount import readiness
from kvfs.mount.readiness import TRIAL_WAITS, Gaps, Readiness

Pair = tuple[socket.socket, socket.socket]
LEARNED_AFTER = 16


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


def expecting(*, short: bool) -> Readiness:
    """A wait after many that were short, or long."""
    ready = Readiness()
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


# --- pyfuse3


@pytest.mark.parametrize(("cores", "replaced"), [(1, False), (2, True)])
def test_pyfuse3_waits_like_this_where_the_client_has_a_core_of_its_own(
    monkeypatch: pytest.MonkeyPatch, cores: int, *, replaced: bool
) -> None:
    fuse: Any = pyfuse3
    monkeypatch.setattr(fuse, "trio", trio)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    readiness.install()
    assert (fuse.trio.lowlevel.wait_readable != trio.lowlevel.wait_readable) == replaced
    assert fuse.trio.Lock is trio.Lock
    assert fuse.trio.lowlevel.notify_closing is trio.lowlevel.notify_closing
