"""The pace of background reading, on a clock that jumps."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from kvfs.tiers.pacing import BURST_S, Pacer

MIB = 1 << 20


async def test_so_many_bytes_a_second_and_no_more(autojump_clock: MockClock) -> None:
    pacer = Pacer(lambda: 10 * MIB)
    start_s = trio.current_time()
    for _ in range(100):
        await pacer.spend(MIB)
    assert trio.current_time() - start_s == pytest.approx(10, abs=BURST_S)


async def test_what_was_large_is_paid_back(autojump_clock: MockClock) -> None:
    pacer = Pacer(lambda: MIB)
    start_s = trio.current_time()
    await pacer.spend(60 * MIB)
    assert trio.current_time() - start_s == pytest.approx(60, abs=BURST_S)


async def test_a_pause_saves_no_more_than_a_burst(autojump_clock: MockClock) -> None:
    pacer = Pacer(lambda: MIB)
    await trio.sleep(1000)
    start_s = trio.current_time()
    await pacer.spend(10 * MIB)
    assert trio.current_time() - start_s == pytest.approx(10 - BURST_S)


async def test_without_a_rate_nobody_waits(autojump_clock: MockClock) -> None:
    pacer = Pacer(lambda: 0)
    start_s = trio.current_time()
    await pacer.spend(10**15)
    assert trio.current_time() == start_s


async def test_a_changed_rate_holds_from_the_next_bytes_on(autojump_clock: MockClock) -> None:
    rate = MIB
    pacer = Pacer(lambda: rate)
    await pacer.spend(MIB)
    rate = 100 * MIB
    start_s = trio.current_time()
    await pacer.spend(100 * MIB)
    assert trio.current_time() - start_s == pytest.approx(1, abs=BURST_S)
