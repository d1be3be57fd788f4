"""Prefetching: a bounded queue of promotions that somebody asked for."""

from __future__ import annotations

import msgspec
import pytest
import trio

from kvfs.leasing.prefetch import Asked
from kvfs.store import Store
from tests.conftest import MIB
from tests.store.helpers import (
    Workbench,
    assert_consistent,
    put,
    put_on,
    take_away,
    tiers_of,
    unlink,
    until,
)

LATER_S = 1e6


async def carried_out(store: Store) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.prefetcher.run)
        await until(lambda: len(store.prefetcher) == 0, "the queue is empty")
        nursery.cancel_scope.cancel()


def ask(store: Store, *numbers: int, for_s: float = LATER_S) -> Asked:
    return store.prefetcher.ask(list(numbers), trio.current_time() + for_s)


async def test_blocks_come_to_the_fastest_tier(bench: Workbench) -> None:
    store = await bench.start()
    there = await put(store, b"there", b"1")
    slow = [await put_on(store, name, name, name.decode()) for name in (b"hdd", b"remote")]
    assert ask(store, there, *slow, *slow) == Asked(accepted=4, there=1, refused=0)
    assert len(store.prefetcher) == 2
    await carried_out(store)
    assert (tiers_of(store, b"hdd"), tiers_of(store, b"remote")) == (
        ["nvme", "hdd"], ["nvme", "remote"],
    )  # fmt: skip
    assert store.volume.counters.reasons["prefetches", "", ""] == 0
    assert store.volume.counters.events["prefetches"] == 2
    assert store.volume.accesses.pending() == {}
    await assert_consistent(store)


async def test_what_does_not_fit_the_queue_is_refused(bench: Workbench) -> None:
    store = await bench.start()
    numbers = [await put_on(store, b"%d" % number, b"x", "hdd") for number in range(3)]
    leases = msgspec.structs.replace(store.volume.config.leases, prefetches=2)
    store.volume.config = msgspec.structs.replace(store.volume.config, leases=leases)
    assert ask(store, *numbers) == Asked(accepted=2, there=0, refused=1)
    assert ask(store, *numbers[:2]) == Asked(accepted=2, there=0, refused=0)
    await carried_out(store)
    assert ask(store, *numbers) == Asked(accepted=1, there=2, refused=0)


async def test_one_whose_deadline_passed_is_dropped(bench: Workbench) -> None:
    store = await bench.start()
    late, longer = [await put_on(store, name, b"x", "hdd") for name in (b"late", b"longer")]
    assert ask(store, late, longer, for_s=-1).accepted == 2
    assert ask(store, longer).accepted == 1
    await carried_out(store)
    assert (tiers_of(store, b"late"), tiers_of(store, b"longer")) == (["hdd"], ["nvme", "hdd"])
    assert store.volume.counters.reasons["prefetches_dropped", "deadline", ""] == 1


async def test_a_full_tier_is_passed_over(bench: Workbench) -> None:
    bench.configure(nvme_mib=4)
    store = await bench.start()
    size = 2 * MIB
    from_remote = await put_on(store, b"remote", bytes(size), "remote")
    from_hdd = await put_on(store, b"hdd", bytes(size), "hdd")
    await put(store, b"in the way", bytes(3 * MIB))
    ask(store, from_remote, from_hdd)
    await carried_out(store)
    assert tiers_of(store, b"remote") == ["hdd", "remote"]
    assert tiers_of(store, b"hdd") == ["hdd"]
    assert store.volume.tiering_due.is_set()
    assert store.volume.counters.reasons["prefetches_dropped", "full", ""] == 1
    await assert_consistent(store)


async def test_blocks_that_go_or_fail_meanwhile_stop_nobody(
    bench: Workbench, expect_log: list[str]
) -> None:
    store = await bench.start()
    gone = await put_on(store, b"gone", b"x", "hdd")
    away = await put_on(store, b"away", b"x", "remote")
    fine = await put_on(store, b"fine", b"x", "hdd")
    ask(store, gone, away, fine)
    await unlink(store, b"gone")
    take_away(store.volume.tier_named("remote"))
    await carried_out(store)
    assert tiers_of(store, b"fine") == ["nvme", "hdd"]
    assert tiers_of(store, b"away") == ["remote"]


async def test_who_waits_for_a_promotion_is_told_when_it_is_done(bench: Workbench) -> None:
    store = await bench.start()
    number = await put_on(store, b"a", b"x", "hdd")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.prefetcher.run)
        await store.prefetcher.promote(number, trio.current_time() + LATER_S)
        assert tiers_of(store, b"a") == ["nvme", "hdd"]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("count", [0, 50])
async def test_many_at_once(bench: Workbench, count: int) -> None:
    store = await bench.start()
    numbers = [await put_on(store, b"%d" % number, b"x", "hdd") for number in range(count)]
    assert ask(store, *numbers).accepted == count
    await carried_out(store)
    assert all(tiers_of(store, b"%d" % n) == ["nvme", "hdd"] for n in range(count))
    await assert_consistent(store)
