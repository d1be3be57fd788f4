"""Accesses that the catalog does not know yet."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs.policy import heat
from kvfs.volume.accesses import SAME_ACCESS_S, Accesses

HALF_LIFE_S = 120.0
times = st.lists(st.integers(0, 100_000).map(lambda t: t / 10), min_size=1, max_size=30).map(sorted)


def test_a_second_open_at_once_is_the_same_access() -> None:
    accesses = Accesses(HALF_LIFE_S)
    assert accesses.touch(1, 100.0)
    assert not accesses.touch(1, 100.5)
    assert accesses.touch(2, 100.5), "another block has its own"
    assert accesses.touch(1, 100.0 + SAME_ACCESS_S)
    assert len(accesses) == 2


@given(times)
def test_pending_heat_is_the_sum_of_counted_accesses(seconds: list[float]) -> None:
    accesses = Accesses(HALF_LIFE_S)
    counted = [now for now in seconds if accesses.touch(1, now)]
    assert all(b - a >= SAME_ACCESS_S for a, b in pairwise(counted))
    now = seconds[-1]
    expected = sum(2 ** ((t - now) / HALF_LIFE_S) for t in counted)
    pending = accesses.tau(1, heat.never)
    assert heat.heat_at(pending, now, HALF_LIFE_S) == pytest.approx(expected)
    assert accesses.pending() == {1: pending}


@given(times, st.integers(1, 30))
def test_a_flush_in_the_middle_changes_nothing(seconds: list[float], middle: int) -> None:
    whole, parts = Accesses(HALF_LIFE_S), Accesses(HALF_LIFE_S)
    stored = heat.never
    for number, now in enumerate(seconds):
        assert whole.touch(1, now) == parts.touch(1, now)
        if number % middle == 0:
            taken = parts.take(10)
            for _, pending in taken:
                stored = heat.touch(stored, pending.tau, HALF_LIFE_S)
            parts.flushed(taken, now)
    assert parts.tau(1, stored) == pytest.approx(whole.tau(1, heat.never))


def test_what_is_taken_is_not_pending() -> None:
    accesses = Accesses(HALF_LIFE_S)
    for inode in range(5):
        accesses.touch(inode, 100.0)
    taken = accesses.take(3)
    assert len(taken) == 3
    assert len(accesses) == 2
    assert {inode for inode, _ in taken} | set(accesses.pending()) == set(range(5))
    assert len(accesses.take(10)) == 2
    assert accesses.take(10) == []


def test_a_block_that_is_gone_is_forgotten() -> None:
    accesses = Accesses(HALF_LIFE_S)
    accesses.touch(1, 100.0)
    accesses.forget(1)
    accesses.forget(2)
    assert accesses.tau(1, 50.0) == 50.0
    assert len(accesses) == 0
