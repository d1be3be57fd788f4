"""One move: each arrow, and what comes in between."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from kvfs import layout
from kvfs.errors import BlockBusy, BlockCorrupt, BlockNotFound, TierFull, TierOffline
from kvfs.tiers import forms
from kvfs.tiers.copying import copy_file
from kvfs.upkeep import mover
from tests.store.helpers import (
    Workbench,
    assert_consistent,
    assert_no_litter,
    create,
    file_on,
    files_on,
    move,
    private_files,
    put,
    read,
    row_at,
    seal_all,
    take_away,
    tiers_of,
    writable,
)

SLOWER = ["hdd", "remote"]


# --- the way down and up


@pytest.mark.parametrize("target", SLOWER)
async def test_a_demotion_moves_and_a_promotion_keeps_the_lower_copy(
    bench: Workbench, target: str
) -> None:
    store = await bench.start()
    data = os.urandom(3_000_001)
    await put(store, b"ns/deep/a", data)
    assert await move(store, "demote", b"ns/deep/a", "nvme", target) == len(data)
    assert tiers_of(store, b"ns/deep/a") == [target]
    assert file_on(store, target, b"ns/deep/a").read_bytes() == data
    assert not file_on(store, "nvme", b"ns/deep/a").exists()
    await assert_consistent(store)
    assert await move(store, "promote", b"ns/deep/a", target, "nvme") == len(data)
    assert tiers_of(store, b"ns/deep/a") == ["nvme", target]
    await assert_consistent(store)
    assert await move(store, "demote", b"ns/deep/a", "nvme", target) == 0, "an unlink only"
    assert await read(store, b"ns/deep/a") == data
    await assert_consistent(store)
    counters = store.volume.counters
    assert counters.tier(0).promotions == 1
    assert counters.tier(0).demotions == 2
    assert counters.tier(0).moved_in_bytes == len(data)


async def test_an_empty_block_moves(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"a", b"")
    await move(store, "demote", b"a", "nvme", "hdd")
    assert await read(store, b"a") == b""
    await assert_consistent(store)


async def test_a_drop_removes_one_of_two_replicas_and_never_the_last(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"a", b"data")
    with pytest.raises(BlockBusy, match="only replica"):
        await move(store, "drop", b"a", "nvme", None)
    await move(store, "demote", b"a", "nvme", "hdd")
    await move(store, "promote", b"a", "hdd", "nvme")
    assert await move(store, "drop", b"a", "hdd", None) > 0
    assert tiers_of(store, b"a") == ["nvme"]
    assert await move(store, "drop", b"a", "hdd", None) == 0
    await assert_consistent(store)


async def test_the_replica_that_can_be_read_is_never_dropped(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"a", b"data")
    await move(store, "demote", b"a", "nvme", "hdd")
    await move(store, "promote", b"a", "hdd", "nvme")
    take_away(store.volume.tier_named("hdd"))
    with pytest.raises(BlockBusy, match="only replica that can be read"):
        await move(store, "drop", b"a", "nvme", None)


async def test_an_eviction_takes_every_replica_and_leaves_the_heat(bench: Workbench) -> None:
    store = await bench.start()
    gone: list[tuple[int, bytes]] = []
    store.volume.name_changed = lambda parent, name: gone.append((parent, name))
    inode = await put(store, b"a", b"data")
    await move(store, "demote", b"a", "nvme", "hdd")
    await move(store, "promote", b"a", "hdd", "nvme")
    for second in range(5):
        store.volume.accesses.touch(inode, store.volume.clock.now_s() + 2 * second)
    before = store.attributes.heat(inode)
    assert before > 4
    assert await move(store, "evict", b"a", "hdd", None) > 0
    assert gone == [(1, b"a")]
    assert [files_on(tier) for tier in store.volume.tiers] == [set()] * 3
    await assert_consistent(store)
    again = await put(store, b"a", b"data")
    assert store.attributes.heat(again) > before, "the name's heat came back"


# --- what follows the block


@pytest.mark.parametrize("target", SLOWER)
async def test_xattrs_pin_ttl_mode_and_times_follow_the_block(
    bench: Workbench, target: str
) -> None:
    store = await bench.start()
    inode = await put(store, b"a", b"data", mode=0o604)
    await store.attributes.set_xattr(inode, b"user.vllm.kv_crc32c", b"\x01\x02\0\xff")
    await store.attributes.set_xattr(inode, b"user.kvfs.pin", b"1")
    await store.attributes.set_xattr(inode, b"user.kvfs.ttl", b"2h")
    await store.attributes.set(inode, mtime_ns=1_600_000_000_000_000_001)
    await move(store, "demote", b"a", "nvme", target)
    file = file_on(store, target, b"a")
    assert os.getxattr(file, "user.vllm.kv_crc32c") == b"\x01\x02\0\xff"
    assert os.getxattr(file, "user.kvfs.pin") == b"1"
    assert os.getxattr(file, "user.kvfs.ttl") == b"7200s"
    assert file.stat().st_mtime_ns == 1_600_000_000_000_000_001
    row = row_at(store, b"a")
    assert (row.id, row.mode, row.pin, row.ttl_s) == (inode, 0o604, "1", 7200)
    await store.attributes.remove_xattr(inode, b"user.kvfs.pin")
    assert "user.kvfs.pin" not in os.listxattr(file)
    await assert_consistent(store)


async def test_the_owner_follows_the_block(bench: Workbench) -> None:
    store = await bench.start()
    _, block = await store.blocks.create(1, b"a", 0o600, 1234, 5678)
    await store.blocks.close(block, writer=True)
    await seal_all(store)
    await move(store, "demote", b"a", "nvme", "hdd")
    status = file_on(store, "hdd", b"a").stat()
    row = row_at(store, b"a")
    assert (row.uid, row.gid) == (1234, 5678)
    if os.geteuid() == 0:
        assert (status.st_uid, status.st_gid) == (1234, 5678)


# --- verification


def rot(file: Path) -> None:
    with writable(file).open("r+b") as writer:
        writer.seek(5)
        writer.write(b"\xff")


@pytest.mark.parametrize(
    ("source", "target"),
    [("nvme", "hdd"), ("hdd", "nvme"), ("nvme", "remote"), ("remote", "nvme")],
)
async def test_a_rotten_source_is_not_copied_and_quarantined(
    bench: Workbench, expect_log: list[str], source: str, target: str
) -> None:
    expect_log.append("'a' is bad .it has not the checksum .*: quarantined")
    store = await bench.start()
    await put(store, b"a", bytes(100_000))
    if source != "nvme":
        await move(store, "demote", b"a", "nvme", source)
    rot(file_on(store, source, b"a"))
    kind: Any = "demote" if source == "nvme" else "promote"
    with pytest.raises(BlockCorrupt, match="has not the sealed checksum"):
        await move(store, kind, b"a", source, target)
    assert store.volume.catalog.resolve(b"a") is None, "it was its only replica"
    assert not file_on(store, source, b"a").exists()
    assert not file_on(store, target, b"a").exists()
    (aside,) = private_files(store.volume.tier_named(source), layout.QUARANTINE_DIR)
    assert aside.endswith(b".checksum.a")
    assert store.volume.counters.events["checksum_mismatches"] == 1
    assert store.volume.tier_named(target).state == "online"
    assert_no_litter(store)


async def test_a_copy_that_rots_on_the_way_is_dropped(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    await put(store, b"a", bytes(100_000))

    def copy_badly(source: int, target: int, progress: Callable[[int], None]) -> int:
        copied = copy_file(source, target, progress)
        os.pwrite(target, b"\xff", 5)
        return copied

    monkeypatch.setattr(forms, "copy_file", copy_badly)
    with pytest.raises(BlockCorrupt):
        await move(store, "demote", b"a", "nvme", "hdd")
    monkeypatch.undo()
    assert_no_litter(store)
    await assert_consistent(store)
    await move(store, "demote", b"a", "nvme", "hdd")
    await assert_consistent(store)


# --- refusals


async def test_a_full_target_refuses(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"a", bytes(100_000))
    hdd = store.volume.tier_named("hdd")
    taken = store.volume.space.reserve(hdd.index, store.volume.space[hdd.index].free_bytes - 4096)
    assert taken is not None
    with pytest.raises(TierFull, match="tier hdd is full"):
        await move(store, "demote", b"a", "nvme", "hdd")
    taken.release()
    assert_no_litter(store)
    await assert_consistent(store)


async def test_an_offline_target_refuses(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"a", b"data")
    take_away(store.volume.tier_named("hdd"))
    with pytest.raises(TierOffline):
        await move(store, "demote", b"a", "nvme", "hdd")
    assert tiers_of(store, b"a") == ["nvme"]
    assert_no_litter(store)


@pytest.mark.parametrize("target", SLOWER)
async def test_a_medium_that_is_full_is_not_taken_offline(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, expect_log: list[str], target: str
) -> None:
    expect_log.append(f"tier {target} is full, new blocks go elsewhere")
    store = await bench.start()
    await put(store, b"a", b"data")

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(forms, "copy_file", fail)
    for _ in range(4):
        with pytest.raises(TierFull, match="No space"):
            await move(store, "demote", b"a", "nvme", target)
    monkeypatch.undo()
    tier = store.volume.tier_named(target)
    assert (tier.state, tier.health.shown, tier.accepts) == ("online", "full", False)
    await tier.examine()
    assert tier.accepts
    assert_no_litter(store)
    await assert_consistent(store)


@pytest.mark.parametrize("target", SLOWER)
async def test_errors_of_the_medium_take_the_target_offline(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, expect_log: list[str], target: str
) -> None:
    expect_log.append(f"tier {target} is (degraded|offline|failing)")
    store = await bench.start()
    await put(store, b"a", b"data")

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(forms, "copy_file", fail)
    for _ in range(3):
        with pytest.raises(OSError, match="Input/output"):
            await move(store, "demote", b"a", "nvme", target)
    assert store.volume.tier_named(target).state == "offline"
    assert tiers_of(store, b"a") == ["nvme"]
    assert_no_litter(store)


async def test_a_remote_copy_without_progress_is_given_up(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, expect_log: list[str]
) -> None:
    expect_log.append("no answer within 0.05 s")
    store = await bench.start()
    await put(store, b"a", b"data")
    remote = store.volume.tier_named("remote")
    remote.reconfigure(msgspec.structs.replace(remote.config, deadline_s=0.05))
    release, ended = threading.Event(), threading.Event()

    def hang(*_: object) -> int:
        release.wait()
        ended.set()
        return 0

    monkeypatch.setattr(mover, "copy_verified", hang)
    with pytest.raises(TierOffline, match="no answer within"):
        await move(store, "demote", b"a", "nvme", "remote")
    release.set()
    await trio.to_thread.run_sync(ended.wait)
    assert tiers_of(store, b"a") == ["nvme"]
    assert_no_litter(store)
    await assert_consistent(store)


async def test_what_is_not_sealed_or_temporary_does_not_move(bench: Workbench) -> None:
    store = await bench.start()
    block = await create(store, b"writing", b"data")
    with pytest.raises(BlockBusy, match="not sealed"):
        await move(store, "demote", b"writing", "nvme", "hdd")
    await store.blocks.close(block, writer=True)
    await put(store, b"a.tmp", b"data")
    with pytest.raises(BlockBusy, match="temporary"):
        await move(store, "demote", b"a.tmp", "nvme", "hdd")
    await put(store, b"a", b"data")
    with pytest.raises(BlockBusy, match="not on hdd"):
        await move(store, "promote", b"a", "hdd", "remote")
    with pytest.raises(BlockNotFound):
        store.mover.movable(1)
    with pytest.raises(BlockNotFound):
        store.mover.movable(999)
    await seal_all(store)
    await assert_consistent(store)


async def test_an_open_block_is_copied_but_not_dropped(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"a", b"data")
    block = await store.blocks.open_reader(row_at(store, b"a").id)
    with pytest.raises(BlockBusy, match="open"):
        await move(store, "demote", b"a", "nvme", "hdd")
    assert tiers_of(store, b"a") == ["nvme", "hdd"]
    assert await store.blocks.read(block, 0, 4) == b"data"
    await store.blocks.close(block, writer=False)
    await move(store, "demote", b"a", "nvme", "hdd")
    assert tiers_of(store, b"a") == ["hdd"]
    await assert_consistent(store)
