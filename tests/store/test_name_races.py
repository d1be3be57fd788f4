"""Names that change while a slower tier is asked, and changes promised to a tier that was away."""

from __future__ import annotations

import errno
import os
import threading
from typing import Any

import pytest
import trio
import trio.testing

from kvfs.errors import TierFull
from kvfs.tiers.backing import create_file, open_file, rename_into_place
from kvfs.tiers.tier import Tier, close_descriptor
from tests.store.helpers import (
    Workbench,
    assert_consistent,
    create,
    file_on,
    files_on,
    put,
    put_on,
    read,
    rename,
    rewrite,
    seal_all,
    settle_all,
    take_away,
    tiers_of,
    unlink,
    until,
)


def on_open(monkeypatch: pytest.MonkeyPatch, *changes: tuple[Any, ...]) -> None:
    """Run async calls on the loop when a worker is about to open a file, the first time."""

    def change_then_open(*arguments: Any) -> int:
        monkeypatch.setattr("kvfs.blocks.blocks.open_file", open_file)
        for call in changes:
            trio.from_thread.run(*call)
        return open_file(*arguments)

    monkeypatch.setattr("kvfs.blocks.blocks.open_file", change_then_open)


@pytest.mark.parametrize(("old", "new"), [(b"d/a", b"d/b"), (b"d", b"e")])
async def test_a_block_that_is_renamed_while_it_is_opened_is_not_lost(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, old: bytes, new: bytes
) -> None:
    store = await bench.start()
    inode = await put_on(store, b"d/a", b"data", "hdd")
    on_open(monkeypatch, (rename, store, old, new))
    block = await store.blocks.open_reader(inode)
    assert await store.blocks.read(block, 0, 10) == b"data"
    await store.blocks.close(block, writer=False)
    await assert_consistent(store)


async def test_the_bytes_are_never_those_of_a_block_that_took_the_name(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    inode = await put_on(store, b"a", b"mine", "hdd")
    await put_on(store, b"b", b"else", "hdd")
    on_open(monkeypatch, (rename, store, b"a", b"c"), (rename, store, b"b", b"a"))
    block = await store.blocks.open_reader(inode)
    assert await store.blocks.read(block, 0, 10) == b"mine"
    await store.blocks.close(block, writer=False)
    await assert_consistent(store)


async def test_a_directory_waits_for_a_file_that_is_opened_for_writing_in_it(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    inode = await put_on(store, b"d/a", b"data", "hdd")
    async with trio.open_nursery() as nursery:

        async def start_rename() -> None:
            nursery.start_soon(rename, store, b"d", b"e")

        on_open(monkeypatch, (start_rename,))
        block = await store.blocks.open_writer(inode)
        await store.blocks.write(block, 0, b"DATA")
        await store.blocks.close(block, writer=True)
    await seal_all(store)
    assert await read(store, b"e/a") == b"DATA"
    await assert_consistent(store)


async def test_a_directory_waits_for_a_file_that_is_made_in_it(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    await put_on(store, b"d/old", b"old", "hdd")
    store.volume.tiers[0].draining = True
    async with trio.open_nursery() as nursery:

        def rename_then_create(*arguments: Any) -> int:
            trio.from_thread.run_sync(nursery.start_soon, rename, store, b"d", b"e")
            trio.from_thread.run(trio.testing.wait_all_tasks_blocked)
            return create_file(*arguments)

        monkeypatch.setattr("kvfs.blocks.blocks.create_file", rename_then_create)
        block = await create(store, b"d/new", b"new")
        monkeypatch.undo()
    await store.blocks.close(block, writer=True)
    await seal_all(store)
    assert await read(store, b"e/new") == b"new"
    assert await read(store, b"e/old") == b"old"
    await assert_consistent(store)


# --- promises


async def test_a_block_is_found_before_its_promised_rename_is_done(bench: Workbench) -> None:
    store = await bench.start()
    await put_on(store, b"d/a", b"data", "remote")
    remote = store.volume.tier_named("remote")
    take_away(remote)
    await rename(store, b"d/a", b"d/b")
    await rename(store, b"d", b"e")
    remote.health.probed("")
    assert await read(store, b"e/b") == b"data"
    await assert_consistent(store)


async def test_a_block_is_rewritten_before_its_promised_rename_is_done(bench: Workbench) -> None:
    store = await bench.start()
    await put_on(store, b"a", b"data", "remote")
    remote = store.volume.tier_named("remote")
    take_away(remote)
    await rename(store, b"a", b"b")
    remote.health.probed("")
    await rewrite(store, b"b", b"DATA")
    await seal_all(store)
    assert await read(store, b"b") == b"DATA"
    await assert_consistent(store)


async def test_a_walk_leaves_what_is_promised_to_move(bench: Workbench) -> None:
    store = await bench.start()
    inode = await put_on(store, b"d/a", b"data", "remote")
    remote = store.volume.tier_named("remote")
    take_away(remote)
    await rename(store, b"d/a", b"d/b")
    remote.health.probed("")
    await store.recovery.absorb_tier(remote)
    assert not await store.recovery.confirm_fault(remote, inode, repair=True)
    assert await read(store, b"d/b") == b"data"
    await assert_consistent(store)


async def test_a_name_that_changed_hands_while_the_tier_was_away(bench: Workbench) -> None:
    store = await bench.start()
    await put_on(store, b"a", b"one", "remote")
    await put_on(store, b"b", b"two", "remote")
    remote = store.volume.tier_named("remote")
    take_away(remote)
    await rename(store, b"a", b"c")
    await rename(store, b"b", b"a")
    remote.health.probed("")
    assert await read(store, b"a") == b"two"
    assert await read(store, b"c") == b"one"
    await assert_consistent(store)


async def test_a_removal_is_done_before_the_directory_moves(bench: Workbench) -> None:
    store = await bench.start()
    await put_on(store, b"d/gone", b"x" * 5000, "hdd")
    await put_on(store, b"d/kept", b"kept", "hdd")
    await unlink(store, b"d/gone")
    await rename(store, b"d", b"e")
    await settle_all(store)
    assert files_on(store.volume.tier_named("hdd")) == {b"e/kept"}
    await assert_consistent(store)


async def test_a_rename_does_not_wait_for_a_tier_that_fails(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, expect_log: list[str]
) -> None:
    expect_log.append("tier hdd is degraded")
    store = await bench.start()
    await put_on(store, b"d/a", b"data", "nvme", "hdd")
    fail_on(monkeypatch, "hdd", errno.EIO)
    await rename(store, b"d/a", b"d/b")
    await rename(store, b"d", b"e")
    monkeypatch.undo()
    assert await read(store, b"e/b") == b"data"
    await assert_consistent(store)


@pytest.mark.parametrize(("old", "new"), [(b"d/a", b"d/b"), (b"d", b"e")])
async def test_a_rename_that_a_tier_refuses_is_taken_back_on_all(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, old: bytes, new: bytes
) -> None:
    store = await bench.start()
    await put_on(store, b"d/a", b"data", "nvme", "hdd")
    fail_on(monkeypatch, "hdd", errno.ENOSPC)
    with pytest.raises(OSError, match="No space"):
        await rename(store, old, new)
    monkeypatch.undo()
    assert file_on(store, "nvme", b"d/a").read_bytes() == b"data"
    await settle_all(store)
    assert file_on(store, "hdd", b"d/a").read_bytes() == b"data"
    assert tiers_of(store, b"d/a") == ["nvme", "hdd"]
    assert await read(store, b"d/a") == b"data"


def fail_on(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Let a tier refuse every rename."""

    def refuse(tier: Tier, source: bytes, target: bytes) -> None:
        if tier.name == name:
            raise OSError(number, os.strerror(number))
        rename_into_place(tier, source, target)

    monkeypatch.setattr("kvfs.volume.replicas.rename_into_place", refuse)


# --- a file that goes on to the next tier


async def test_a_copy_to_the_next_tier_that_fails_leaves_nothing(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.configure(nvme_mib=1)
    store = await bench.start()
    block = await create(store, b"a", b"x" * 1000)
    before = set(os.listdir("/proc/self/fd"))

    def refuse(source: int, target: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("kvfs.tiers.backing.copy_file", refuse)
    with pytest.raises((OSError, TierFull)):
        await store.blocks.write(block, 0, b"y" * (2 << 20))
    monkeypatch.undo()
    assert set(os.listdir("/proc/self/fd")) <= before
    assert files_on(store.volume.tier_named("hdd")) == set()
    await store.blocks.close(block, writer=True)
    await seal_all(store)
    await assert_consistent(store)


async def test_a_source_that_fails_to_remove_it_does_so_later(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.configure(nvme_mib=1)
    store = await bench.start()
    block = await create(store, b"a", b"x" * 1000)

    def refuse(path: bytes, fanned: bool) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(store.volume.tiers[0], "remove", refuse)
    await store.blocks.write(block, 0, b"y" * (2 << 20))
    monkeypatch.undo()
    await store.blocks.close(block, writer=True)
    await seal_all(store)
    assert tiers_of(store, b"a") == ["hdd"]
    await assert_consistent(store)


async def test_a_remote_file_whose_close_hangs_stops_nobody(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    remote = store.volume.tier_named("remote")
    descriptor = os.open(os.devnull, os.O_RDONLY)
    released = threading.Event()
    closed: list[int] = []
    real = os.close

    def hang(number: int) -> None:
        if number == descriptor:
            released.wait()
            closed.append(number)
        real(number)

    monkeypatch.setattr(os, "close", hang)
    close_descriptor(remote, descriptor)
    await put(store, b"a", b"data")
    assert await read(store, b"a") == b"data"
    assert not closed
    released.set()
    await until(lambda: closed, "the close that hung")
