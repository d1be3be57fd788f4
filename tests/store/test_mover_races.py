"""What happens to a block while the mover copies it."""

from __future__ import annotations

import os
from typing import Any

import pytest
import trio
import trio.testing

from kvfs import layout
from kvfs.errors import BlockBusy, BlockNotFound
from kvfs.tiers.tier import Tier
from kvfs.upkeep import mover
from tests.store.helpers import (
    Workbench,
    assert_consistent,
    assert_no_litter,
    during_copy,
    file_on,
    files_on,
    move,
    private_files,
    put,
    read,
    rename,
    rewrite,
    seal_all,
    settle_all,
    tiers_of,
    unlink,
    until,
)

SLOWER = ["hdd", "remote"]


async def test_a_block_that_is_unlinked_meanwhile_leaves_nothing(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    await put(store, b"d/a", b"data")
    during_copy(monkeypatch, lambda: unlink(store, b"d/a"))
    with pytest.raises(BlockNotFound):
        await move(store, "demote", b"d/a", "nvme", "hdd")
    assert_no_litter(store)
    assert files_on(store.volume.tier_named("hdd")) == set()
    await assert_consistent(store)


@pytest.mark.parametrize("placed", [False, True], ids=["before", "after"])
async def test_an_unmount_while_a_copy_is_put_in_place_leaves_no_file_without_a_row(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, placed: bool
) -> None:
    store = await bench.start()
    await put(store, b"d/a", b"data")
    await seal_all(store)
    real = mover.put_in_place

    def cancel_beside(*arguments: Any) -> os.stat_result:
        if not placed:
            trio.from_thread.run_sync(nursery.cancel_scope.cancel)
        status = real(*arguments)
        if placed:
            trio.from_thread.run_sync(nursery.cancel_scope.cancel)
        return status

    monkeypatch.setattr(mover, "put_in_place", cancel_beside)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(move, store, "demote", b"d/a", "nvme", "hdd")
    await until(lambda: not store.volume.tier_named("hdd").limiter.borrowed_tokens, "threads done")
    await assert_consistent(store)


async def test_a_block_that_is_renamed_meanwhile_stays_where_it_was(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    await put(store, b"a", b"data")
    during_copy(monkeypatch, lambda: rename(store, b"a", b"b"))
    with pytest.raises(BlockBusy, match="changed while it was copied"):
        await move(store, "demote", b"a", "nvme", "hdd")
    assert_no_litter(store)
    assert tiers_of(store, b"b") == ["nvme"]
    await assert_consistent(store)


async def test_a_directory_that_is_renamed_meanwhile_gets_the_copy_at_its_new_name(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    await put(store, b"d/a", b"data")
    during_copy(monkeypatch, lambda: rename(store, b"d", b"e"))
    await move(store, "demote", b"d/a", "nvme", "hdd")
    assert tiers_of(store, b"e/a") == ["hdd"]
    assert await read(store, b"e/a") == b"data"
    await assert_consistent(store)


async def test_a_block_that_is_overwritten_meanwhile_is_the_new_one(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    await put(store, b"a", b"old")
    await put(store, b"a.tmp", b"new")
    during_copy(monkeypatch, lambda: rename(store, b"a.tmp", b"a"))
    with pytest.raises(BlockNotFound):
        await move(store, "demote", b"a", "nvme", "hdd")
    assert_no_litter(store)
    assert await read(store, b"a") == b"new"
    assert files_on(store.volume.tier_named("hdd")) == set()
    await assert_consistent(store)


async def test_a_block_that_is_rewritten_meanwhile_is_not_committed(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    await put(store, b"a", b"old")

    async def change() -> None:
        await rewrite(store, b"a", b"new")
        await seal_all(store)

    during_copy(monkeypatch, change)
    with pytest.raises(BlockBusy):
        await move(store, "demote", b"a", "nvme", "hdd")
    assert_no_litter(store)
    assert await read(store, b"a") == b"new"
    await assert_consistent(store)


async def test_a_move_that_is_not_wanted_any_more_is_dropped(bench: Workbench) -> None:
    store = await bench.start()
    inode = await put(store, b"a", b"data")
    tiers = store.volume.tiers
    with pytest.raises(BlockBusy):
        await store.mover.copy(inode, tiers[0], tiers[1], "demote", lambda: False)
    assert_no_litter(store)
    await assert_consistent(store)


async def test_the_copy_waits_for_whoever_changes_the_path(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    await put(store, b"d/a", b"data")
    async with trio.open_nursery() as nursery:
        async with store.volume.claims.hold(b"d"):
            nursery.start_soon(move, store, "demote", b"d/a", "nvme", "hdd")
            hdd = store.volume.tiers[1]
            await until(lambda: private_files(hdd, layout.STAGING_DIR), "a copy in staging")
            assert tiers_of(store, b"d/a") == ["nvme"]
        await until(lambda: tiers_of(store, b"d/a") == ["hdd"], "the move is done")
    await assert_consistent(store)


async def test_a_cancelled_copy_leaves_no_litter(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    await put(store, b"a", b"data")
    with trio.CancelScope() as scope:

        async def change() -> None:
            scope.cancel()

        during_copy(monkeypatch, change)
        await move(store, "demote", b"a", "nvme", "hdd")
    assert_no_litter(store)
    await assert_consistent(store)


async def test_one_block_is_moved_by_one_at_a_time_and_its_progress_shows(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    inode = await put(store, b"a", bytes(3_000_000))
    seen: list[mover.Running] = []

    async def look() -> None:
        seen.append(store.mover.running[inode])
        with pytest.raises(BlockBusy, match="being moved already"):
            await move(store, "demote", b"a", "nvme", "remote")

    during_copy(monkeypatch, look)
    await move(store, "demote", b"a", "nvme", "hdd")
    running = seen[0]
    assert (running.kind, running.path, running.source, running.target) == (
        "demote", b"a", "nvme", "hdd",
    )  # fmt: skip
    assert running.done_bytes == running.size_bytes == 3_000_000
    assert not store.mover.running
    await assert_consistent(store)


async def test_a_demotion_removes_its_source_after_the_commit(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    await put(store, b"a", b"data")
    real = Tier.remove
    seen = []

    def remove(tier: Tier, path: bytes, fanned: bool) -> None:
        seen.append((tiers_of(store, path), file_on(store, "hdd", path).read_bytes()))
        real(tier, path, fanned)

    monkeypatch.setattr(Tier, "remove", remove)
    await move(store, "demote", b"a", "nvme", "hdd")
    assert seen == [(["hdd"], b"data")]
    await assert_consistent(store)


async def test_many_moves_at_once_keep_the_accounts(bench: Workbench) -> None:
    store = await bench.start()
    paths = [b"d%d/%d" % (number % 3, number) for number in range(30)]
    for path in paths:
        await put(store, path, path * 1000)
    async with trio.open_nursery() as nursery:
        for path in paths[:20]:
            nursery.start_soon(move, store, "demote", path, "nvme", "hdd")
        for path in paths[20:]:
            nursery.start_soon(move, store, "demote", path, "nvme", "remote")
    for path in paths[::2]:
        await unlink(store, path)
    await settle_all(store)
    for path in paths[1::2]:
        assert await read(store, path) == path * 1000
    await assert_consistent(store)
