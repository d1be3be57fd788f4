"""Scrub: all replicas from their media, at a pace, from where the last one stopped."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from kvfs import layout
from kvfs.store import Store
from kvfs.tiers.checksum import cached_bytes, drop_cached
from kvfs.tiers.pacing import Pacer
from kvfs.tiers.tier import Tier
from kvfs.upkeep import scrub
from kvfs.upkeep.scrub import Scrubber, Tally
from tests.store.helpers import (
    Workbench,
    assert_consistent,
    create,
    file_on,
    move,
    private_files,
    put,
    put_on,
    read,
    rename,
    row_at,
    seal_all,
    tiers_of,
    until,
)
from tests.store.test_verify import rot

BAD = "is bad .*: quarantined"
SIZE = 50_000


def unpaced() -> Pacer:
    return Pacer(lambda: 0)


async def quietly(_: Tally) -> None:
    """Nobody follows."""


async def scrub_all(store: Store, *tiers: str, restart: bool = False) -> Tally:
    chosen = [store.volume.tier_named(name) for name in tiers] or store.volume.tiers
    return await store.scrubber.scrub(chosen, unpaced(), quietly, restart=restart)


async def populate(store: Store) -> None:
    """Six replicas of four blocks."""
    for name in (b"d/fast", b"d/both", b"e/slow", b"e/f/remote"):
        await put(store, name, os.urandom(SIZE))
    await move(store, "demote", b"d/both", "nvme", "hdd")
    await move(store, "promote", b"d/both", "hdd", "nvme")
    await move(store, "demote", b"e/slow", "nvme", "hdd")
    await move(store, "promote", b"e/slow", "hdd", "nvme")
    await move(store, "demote", b"e/f/remote", "nvme", "remote")


@pytest.mark.semantics("S-verify-8")
async def test_sound_replicas_are_read_and_left_alone(bench: Workbench) -> None:
    store = await bench.start()
    await populate(store)
    tally = await scrub_all(store)
    assert (tally.blocks, tally.total, tally.bad, tally.unreadable) == (6, 6, 0, 0)
    assert tally.size_bytes == 6 * SIZE
    await assert_consistent(store)


@pytest.mark.semantics("S-verify-8")
async def test_bad_replicas_are_found_on_every_tier(
    bench: Workbench, expect_log: list[str]
) -> None:
    expect_log.append(BAD)
    store = await bench.start()
    await populate(store)
    for tier, path in (("nvme", b"d/fast"), ("hdd", b"d/both"), ("remote", b"e/f/remote")):
        rot(store, tier, path)
    tally = await scrub_all(store)
    assert tally.bad == 3
    named = sorted((one["tier"], one["path"]) for one in tally.named)
    assert named == [("hdd", b"d/both"), ("nvme", b"d/fast"), ("remote", b"e/f/remote")]
    assert tiers_of(store, b"d/both") == ["nvme"]
    assert store.volume.catalog.resolve(b"d/fast") is None
    assert len(private_files(store.volume.tiers[0], layout.QUARANTINE_DIR)) == 1
    assert (await scrub_all(store)).bad == 0
    await assert_consistent(store)


async def test_a_file_that_is_gone_is_found(bench: Workbench, expect_log: list[str]) -> None:
    expect_log.append("tier hdd lost")
    store = await bench.start()
    await put_on(store, b"both", os.urandom(SIZE), "nvme", "hdd")
    file_on(store, "hdd", b"both").unlink()
    assert (await scrub_all(store)).bad == 1
    assert tiers_of(store, b"both") == ["nvme"]
    await assert_consistent(store)


async def test_it_reads_the_medium_and_leaves_the_page_cache_as_it_is(bench: Workbench) -> None:
    store = await bench.start()
    await put_on(store, b"a", os.urandom(SIZE), "nvme", "hdd")
    descriptors = [os.open(file_on(store, tier, b"a"), os.O_RDONLY) for tier in ("nvme", "hdd")]
    for descriptor in descriptors:
        os.fsync(descriptor)
        drop_cached(descriptor)
    os.pread(descriptors[0], SIZE, 0)
    await scrub_all(store)
    assert cached_bytes(descriptors[0], SIZE) == SIZE, "the working set stays"
    assert cached_bytes(descriptors[1], SIZE) == 0, "nothing pushes it out"
    for descriptor in descriptors:
        os.close(descriptor)


async def test_without_direct_reads_nothing_new_is_left_in_the_page_cache(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrub, "_direct", lambda tier: False)
    store = await bench.start()
    await put(store, b"a", os.urandom(SIZE))
    descriptor = os.open(file_on(store, "nvme", b"a"), os.O_RDONLY)
    os.fsync(descriptor)
    assert (await scrub_all(store)).size_bytes == SIZE
    assert cached_bytes(descriptor, SIZE) == SIZE
    drop_cached(descriptor)
    assert (await scrub_all(store)).size_bytes == SIZE
    assert cached_bytes(descriptor, SIZE) == 0
    os.close(descriptor)


async def test_it_is_no_access(bench: Workbench) -> None:
    store = await bench.start()
    inode = await put(store, b"a", b"data")
    before = store.attributes.heat(inode)
    await scrub_all(store)
    assert len(store.volume.accesses) == 0
    assert store.attributes.heat(inode) <= before
    assert store.volume.counters.tier(0).opens == 0


async def test_what_is_not_sealed_or_open_for_writing_is_passed_over(bench: Workbench) -> None:
    store = await bench.start()
    writing = await create(store, b"writing", b"data")
    inode = await put(store, b"reopened", b"data")
    reopened = await store.blocks.open_writer(inode)
    await store.blocks.write(reopened, 0, b"DA")
    tally = await scrub_all(store)
    assert (tally.blocks, tally.bad, tally.size_bytes) == (2, 0, 0)
    for block in (writing, reopened):
        await store.blocks.close(block, writer=True)
    await seal_all(store)
    await assert_consistent(store)


async def test_a_block_that_moves_away_while_it_is_read_is_not_bad(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    await put(store, b"a", os.urandom(SIZE))
    real = Scrubber._read

    async def rename_first(self: Scrubber, tier: Tier, path: bytes, *rest: object) -> None:
        await rename(store, b"a", b"b")
        await put(store, b"a", os.urandom(SIZE))
        monkeypatch.undo()
        await real(self, tier, path, *rest)  # type: ignore[arg-type] # passed on

    monkeypatch.setattr(Scrubber, "_read", rename_first)
    assert (await scrub_all(store)).bad == 0
    await assert_consistent(store)


async def test_a_path_or_a_tier_limits_it(bench: Workbench) -> None:
    store = await bench.start()
    await populate(store)
    assert (await scrub_all(store, "hdd")).blocks == 2

    async def below(path: bytes, *tiers: str) -> int:
        chosen = [store.volume.tier_named(name) for name in tiers] or store.volume.tiers
        root = row_at(store, path)
        return (await store.scrubber.scrub_below(root, chosen, unpaced(), quietly)).blocks

    assert await below(b"d") == 3
    assert await below(b"e") == 3
    assert await below(b"e", "hdd") == 1
    assert await below(b"e/f") == 1
    assert await below(b"d/both") == 2
    assert await below(b"") == 6


async def test_a_large_directory_is_gone_through_page_by_page(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrub, "PAGE_NAMES", 3)
    store = await bench.start()
    names = {b"d/%d" % number for number in range(8)} | {b"d/x/%d" % n for n in range(7)}
    for name in names:
        await put(store, name, b"data")
    seen = []

    async def follow(tally: Tally) -> None:
        seen.append(tally.path)

    await store.scrubber.scrub_below(row_at(store, b"d"), store.volume.tiers, unpaced(), follow)
    assert sorted(seen) == sorted(names)


async def stop_after(store: Store, blocks: int, pacer: Pacer | None = None) -> None:
    """A scrub that is interrupted, as by Ctrl-C."""

    class Interrupted(Exception):
        """The client is gone."""

    async def interrupt(tally: Tally) -> None:
        if tally.blocks == blocks:
            raise Interrupted

    with pytest.raises(Interrupted):
        await store.scrubber.scrub(store.volume.tiers, pacer or unpaced(), interrupt)


@pytest.mark.semantics("S-verify-8")
@pytest.mark.parametrize("end", ["command", "unmount", "crash"])
async def test_it_goes_on_where_it_was_stopped(bench: Workbench, end: str) -> None:
    store = await bench.start()
    for number in range(10):
        await put(store, b"%d" % number, b"data")
    await stop_after(store, 4)
    if end == "unmount":
        bench.stop(store)
        store = await bench.start()
    elif end == "crash":
        store = await bench.restart_after_crash(store)
    scrubbed = store.volume.counters.events["scrubbed"]
    tally = await scrub_all(store)
    assert tally.resumed
    assert tally.blocks == tally.total == 10
    assert store.volume.counters.events["scrubbed"] - scrubbed == 6
    again = await scrub_all(store)
    assert not again.resumed
    assert again.blocks == 10


async def test_it_can_begin_anew(bench: Workbench) -> None:
    store = await bench.start()
    for number in range(10):
        await put(store, b"%d" % number, b"data")
    await stop_after(store, 4)
    tally = await scrub_all(store, restart=True)
    assert not tally.resumed
    assert tally.blocks == 10
    assert store.volume.counters.events["scrubbed"] == 14


async def test_it_keeps_to_a_pace(bench: Workbench, autojump_clock: MockClock) -> None:
    autojump_clock.autojump_threshold = 0.05
    store = await bench.start()
    for number in range(10):
        await put(store, b"%d" % number, os.urandom(SIZE))
    start_s = trio.current_time()
    await store.scrubber.scrub(store.volume.tiers, Pacer(lambda: SIZE), quietly)
    assert trio.current_time() - start_s >= 9


async def test_a_tier_that_is_away_is_left_out(bench: Workbench, expect_log: list[str]) -> None:
    expect_log.append("tier hdd is offline")
    store = await bench.start()
    await populate(store)
    hdd = store.volume.tier_named("hdd")
    hdd.health.lost("a test")
    tally = await scrub_all(store)
    assert (tally.blocks, tally.total) == (4, 4)
    assert not store.scrubber.progress(hdd).started_s


async def test_a_replica_that_cannot_be_read_is_named_and_kept(
    bench: Workbench, expect_log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expect_log += ["cannot be read: .*Input/output error", "tier nvme is degraded"]
    store = await bench.start()
    await put(store, b"a", os.urandom(SIZE))

    def fail(*arguments: object) -> int:
        monkeypatch.undo()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(scrub, "open_file", fail)
    tally = await scrub_all(store)
    assert (tally.bad, tally.unreadable) == (0, 1)
    assert tally.named[0]["what"] == "Input/output error"
    assert await read(store, b"a")
    await assert_consistent(store)


# --- the service


async def during_service(store: Store, condition: Callable[[], object]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.scrubber.run)
        await until(condition, "the service did it")
        nursery.cancel_scope.cancel()


async def test_the_service_scrubs_once_and_then_waits_for_the_next_day(
    bench: Workbench, expect_log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expect_log.append(BAD)
    monkeypatch.setattr(scrub, "IDLE_S", 0.01)
    bench.configure(scrub_rate=10**9)
    store = await bench.start()
    await populate(store)
    rot(store, "hdd", b"d/both")
    events = store.volume.counters.events
    tiers = store.volume.tiers
    await during_service(
        store, lambda: all(store.scrubber.progress(tier).finished_s for tier in tiers)
    )
    assert events["scrubbed"] == 6
    assert sum(store.scrubber.progress(tier).bad for tier in tiers) == 1
    with trio.move_on_after(0.1):
        await store.scrubber.run()
    assert events["scrubbed"] == 6
    monkeypatch.setattr(scrub, "PASS_EVERY_S", 0.0)
    await during_service(store, lambda: events["scrubbed"] >= 11)
    await assert_consistent(store)


async def test_without_a_rate_the_service_does_nothing(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrub, "IDLE_S", 0.01)
    store = await bench.start()
    await populate(store)
    with trio.move_on_after(0.1):
        await store.scrubber.run()
    assert store.volume.counters.events["scrubbed"] == 0


async def test_an_order_need_not_wait_for_the_pass_of_the_service(bench: Workbench) -> None:
    bench.configure(scrub_rate=50_000)
    store = await bench.start()
    for number in range(40):
        await put(store, b"%d" % number, bytes(1000))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.scrubber.run)
        await until(lambda: store.volume.counters.events["scrubbed"] > 2, "the service is at work")
        assert (await scrub_all(store)).blocks == 40
        nursery.cancel_scope.cancel()
    assert store.volume.counters.events["scrubbed"] == 40, "together, not twice"
