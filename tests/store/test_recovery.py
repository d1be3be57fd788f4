"""What a crash leaves at each step, and what the next mount makes of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvfs import layout
from kvfs.catalog.rows import GOOD, BlockState
from kvfs.store import Store
from kvfs.upkeep.sealer import Job, seal_files
from tests.store.helpers import (
    Workbench,
    assert_consistent,
    create,
    file_on,
    files_on,
    make_directory,
    move,
    private_files,
    put,
    put_on,
    read,
    rename,
    rewrite,
    row_at,
    seal_all,
    settle_all,
    take_away,
    tiers_of,
    unlink,
    writable,
)


class Killed(BaseException):
    """The daemon ends here."""


def killed_before_files_change(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next change of names is committed, and then the daemon dies."""

    async def die(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(store.replicas, "apply", die)
    monkeypatch.setattr(store.replicas, "carry_out_rename", die)


# --- litter and intents


async def test_unfinished_copies_are_swept(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"a", b"data")
    for tier in store.volume.tiers:
        staged = Path(os.fsdecode(tier.root + b"/" + layout.staging_path(77, 1)))
        staged.write_bytes(b"half a copy")
    store = await bench.restart_after_crash(store)
    assert await read(store, b"a") == b"data"
    await assert_consistent(store)


async def test_a_promised_unlink_is_carried_out(bench: Workbench) -> None:
    store = await bench.start()
    await put_on(store, b"d/a", b"data", "nvme", "hdd", "remote")
    await unlink(store, b"d/a")
    assert file_on(store, "hdd", b"d/a").exists()
    store = await bench.restart_after_crash(store)
    for tier in store.volume.tiers:
        assert files_on(tier) == set()
    await assert_consistent(store)


async def test_an_unlink_waits_for_a_tier_that_is_away(bench: Workbench) -> None:
    store = await bench.start()
    await put_on(store, b"d/a", b"data", "nvme", "remote")
    remote = store.volume.tier_named("remote")
    take_away(remote)
    await unlink(store, b"d/a")
    await settle_all(store)
    assert file_on(store, "remote", b"d/a").exists()
    remote.health.probed("")
    await settle_all(store)
    assert not file_on(store, "remote", b"d/a").exists()
    await assert_consistent(store)


async def test_a_promised_unlink_is_void_once_a_block_lives_there(bench: Workbench) -> None:
    store = await bench.start()
    await put_on(store, b"d/a", b"old", "hdd")
    await unlink(store, b"d/a")
    await put(store, b"d/a", b"new")
    await move(store, "demote", b"d/a", "nvme", "hdd")
    assert store.volume.catalog.intents.left(store.volume.tier_named("hdd").number)
    store = await bench.restart_after_crash(store)
    assert await read(store, b"d/a") == b"new"
    assert tiers_of(store, b"d/a") == ["hdd"]
    await assert_consistent(store)


@pytest.mark.parametrize("tiers", [("nvme",), ("hdd",), ("nvme", "hdd"), ("nvme", "remote")])
async def test_a_rename_that_was_committed_is_finished(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, tiers: tuple[str, ...]
) -> None:
    store = await bench.start()
    inode = await put_on(store, b"old/a", b"data", *tiers)
    await make_directory(store, b"new")
    killed_before_files_change(store, monkeypatch)
    with pytest.raises(Killed):
        await rename(store, b"old/a", b"new/b")
    store = await bench.restart_after_crash(store)
    row = row_at(store, b"new/b")
    assert (row.id, row.generation) == (inode, 2)
    assert await read(store, b"new/b") == b"data"
    assert store.volume.catalog.resolve(b"old/a") is None
    await assert_consistent(store)


async def test_a_rename_over_a_block_is_finished(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    await put_on(store, b"a", b"replaced", "nvme", "hdd", "remote")
    await put_on(store, b"a.tmp", b"kept", "nvme")
    killed_before_files_change(store, monkeypatch)
    with pytest.raises(Killed):
        await rename(store, b"a.tmp", b"a")
    store = await bench.restart_after_crash(store)
    assert await read(store, b"a") == b"kept"
    assert tiers_of(store, b"a") == ["nvme"]
    await assert_consistent(store)


async def test_a_rename_of_a_directory_is_finished_on_every_tier(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    await put_on(store, b"d/fast", b"1", "nvme")
    await put_on(store, b"d/e/both", b"2", "nvme", "hdd")
    await put_on(store, b"d/e/slow", b"3", "remote")
    killed_before_files_change(store, monkeypatch)
    with pytest.raises(Killed):
        await rename(store, b"d", b"renamed")
    store = await bench.restart_after_crash(store)
    for path, data in ((b"fast", b"1"), (b"e/both", b"2"), (b"e/slow", b"3")):
        assert await read(store, b"renamed/" + path) == data
    await assert_consistent(store)


async def test_a_rename_is_finished_twice_without_harm(bench: Workbench) -> None:
    store = await bench.start()
    inode = await put_on(store, b"a", b"data", "nvme", "hdd")
    await rename(store, b"a", b"b")
    with store.volume.catalog.transaction("test"):
        for tier in store.volume.tiers[:2]:
            store.volume.catalog.intents.add(tier.number, "rename", inode, b"a", b"b")
    store = await bench.restart_after_crash(store)
    assert await read(store, b"b") == b"data"
    await assert_consistent(store)


async def test_a_promised_rename_is_void_once_the_block_is_called_otherwise(
    bench: Workbench,
) -> None:
    store = await bench.start()
    inode = await put_on(store, b"c", b"data", "nvme", "hdd")
    await put(store, b"a", b"another")
    with store.volume.catalog.transaction("test"):
        for tier in store.volume.tiers[:2]:
            store.volume.catalog.intents.add(tier.number, "rename", inode, b"a", b"b")
    store = await bench.restart_after_crash(store)
    assert await read(store, b"a") == b"another"
    assert await read(store, b"c") == b"data"
    await assert_consistent(store)


async def test_a_rename_on_a_tier_that_is_away_is_done_when_it_returns(bench: Workbench) -> None:
    store = await bench.start()
    await put_on(store, b"d/a", b"data", "nvme", "remote")
    remote = store.volume.tier_named("remote")
    take_away(remote)
    await rename(store, b"d/a", b"d/b")
    await rename(store, b"d/b", b"e/c")
    remote.health.probed("")
    await assert_consistent(store)
    await move(store, "drop", b"e/c", "nvme", None)
    assert await read(store, b"e/c") == b"data"
    await assert_consistent(store)


async def test_many_changes_while_a_tier_is_away_are_done_in_order(bench: Workbench) -> None:
    store = await bench.start()
    await put_on(store, b"d/kept", b"kept", "nvme", "remote")
    await put_on(store, b"d/back", b"back", "nvme", "remote")
    await put_on(store, b"d/gone", b"gone", "nvme", "remote")
    remote = store.volume.tier_named("remote")
    take_away(remote)
    await rename(store, b"d/kept", b"d/renamed")
    await rename(store, b"d/back", b"d/elsewhere")
    await rename(store, b"d/elsewhere", b"d/back")
    await rename(store, b"d/gone", b"d/kept")
    await rename(store, b"d", b"e")
    await unlink(store, b"e/kept")
    await put(store, b"e/kept", b"new")
    remote.health.probed("")
    await assert_consistent(store)
    for path, data in ((b"e/renamed", b"kept"), (b"e/back", b"back")):
        await move(store, "drop", path, "nvme", None)
        assert await read(store, path) == data
    assert await read(store, b"e/kept") == b"new"
    await assert_consistent(store)


# --- blocks that were not sealed


async def test_what_was_being_written_is_discarded(bench: Workbench) -> None:
    store = await bench.start()
    await create(store, b"d/a", b"half")
    store = await bench.restart_after_crash(store)
    assert store.volume.catalog.resolve(b"d/a") is None
    assert store.volume.counters.events["discarded_writing"] == 1
    await assert_consistent(store)


async def test_what_was_closed_and_not_published_is_discarded(bench: Workbench) -> None:
    store = await bench.start()
    block = await create(store, b"d/a", b"closed")
    await store.blocks.close(block, writer=True)
    store = await bench.restart_after_crash(store)
    assert store.volume.catalog.resolve(b"d/a") is None
    await assert_consistent(store)


@pytest.mark.parametrize("by", ["rename", "fsync"])
async def test_what_was_published_survives_the_daemon(bench: Workbench, by: str) -> None:
    store = await bench.start()
    block = await create(store, b"d/a.tmp", b"published")
    if by == "rename":
        await store.blocks.close(block, writer=True)
    else:
        await store.blocks.fsync(block, data_only=True)
    await rename(store, b"d/a.tmp", b"d/a")
    store = await bench.restart_after_crash(store)
    await seal_all(store)
    assert await read(store, b"d/a") == b"published"
    assert row_at(store, b"d/a").state == BlockState.SEALED
    await assert_consistent(store)


async def test_what_was_published_and_not_sealed_is_quarantined_after_a_reboot(
    bench: Workbench, expect_log: list[str]
) -> None:
    expect_log.append("was not sealed before the machine stopped: quarantined")
    store = await bench.start()
    await put(store, b"d/sealed", b"sealed")
    block = await create(store, b"d/a.tmp", b"published")
    await store.blocks.close(block, writer=True)
    await rename(store, b"d/a.tmp", b"d/a")
    store = await bench.restart_after_crash(store, reboot=True)
    assert store.volume.catalog.resolve(b"d/a") is None
    assert await read(store, b"d/sealed") == b"sealed"
    (aside,) = private_files(store.volume.tiers[0], layout.QUARANTINE_DIR)
    assert aside.endswith(b".unsealed.a")
    await assert_consistent(store)


async def test_a_published_block_whose_file_is_gone_is_gone(bench: Workbench) -> None:
    store = await bench.start()
    block = await create(store, b"d/a", b"published")
    await store.blocks.fsync(block, data_only=False)
    file_on(store, "nvme", b"d/a").unlink()
    store = await bench.restart_after_crash(store)
    assert store.volume.catalog.resolve(b"d/a") is None
    await assert_consistent(store)


@pytest.mark.semantics("S-crash-3")
@pytest.mark.parametrize("reboot", [False, True])
async def test_what_was_half_written_is_kept_where_that_is_wanted(
    bench: Workbench, expect_log: list[str], reboot: bool
) -> None:
    expect_log.append("was being (re)?written when kvfs stopped: quarantined")
    bench.configure(unfinished="quarantine")
    store = await bench.start()
    await create(store, b"d/writing", b"half")
    await put(store, b"d/rewritten", b"0123456789")
    block = await store.blocks.open_writer(row_at(store, b"d/rewritten").id)
    await store.blocks.write(block, 0, b"abc")
    store = await bench.restart_after_crash(store, reboot=reboot)
    for name in (b"d/writing", b"d/rewritten"):
        assert store.volume.catalog.resolve(name) is None
    nvme = store.volume.tiers[0]
    assert files_on(nvme) == set()
    directory = Path(os.fsdecode(nvme.root + b"/" + layout.QUARANTINE_DIR))
    kept = {file.name.split(".", 1)[1]: file.read_bytes() for file in directory.iterdir()}
    assert kept == {"unfinished.writing": b"half", "unfinished.rewritten": b"abc3456789"}
    await assert_consistent(store)


def seal_without_commit(store: Store, path: bytes) -> None:
    """The sealer's worker wrote the record, and then the daemon died."""
    job = Job(row_at(store, path), path, False)
    (sealed,), _ = seal_files(store.volume.tiers[0], [job])
    assert sealed.checksum is not None


@pytest.mark.parametrize("reboot", [False, True])
async def test_a_seal_that_was_not_committed_is_accepted(bench: Workbench, reboot: bool) -> None:
    store = await bench.start()
    block = await create(store, b"d/a", b"complete")
    await store.blocks.close(block, writer=True)
    seal_without_commit(store, b"d/a")
    store = await bench.restart_after_crash(store, reboot=reboot)
    assert row_at(store, b"d/a").state == BlockState.SEALED
    assert await read(store, b"d/a") == b"complete"
    await assert_consistent(store)


async def test_a_seal_that_is_not_of_the_content_is_not_accepted(bench: Workbench) -> None:
    store = await bench.start()
    block = await create(store, b"d/a", b"complete")
    await store.blocks.close(block, writer=True)
    seal_without_commit(store, b"d/a")
    with writable(file_on(store, "nvme", b"d/a")).open("r+b") as file:
        file.write(b"torn")
    store = await bench.restart_after_crash(store)
    assert store.volume.catalog.resolve(b"d/a") is None
    await assert_consistent(store)


# --- blocks that were reopened


@pytest.mark.parametrize("tiers", [("nvme",), ("nvme", "hdd")])
async def test_a_reopened_block_that_did_not_change_is_kept(
    bench: Workbench, tiers: tuple[str, ...]
) -> None:
    store = await bench.start()
    await put_on(store, b"d/a", b"unchanged", *tiers)
    await store.blocks.open_writer(row_at(store, b"d/a").id)
    store = await bench.restart_after_crash(store)
    row = row_at(store, b"d/a")
    assert (row.state, row.generation) == (BlockState.SEALED, 1)
    assert tiers_of(store, b"d/a") == list(tiers)
    assert all(r.state == GOOD for r in store.volume.catalog.replicas(row.id))
    await assert_consistent(store)


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("length", [4, 5000])
async def test_a_reopened_block_that_changed_is_what_the_lower_copy_has(
    bench: Workbench, closed: bool, length: int
) -> None:
    store = await bench.start()
    await put_on(store, b"d/a", b"as it was", "nvme", "hdd")
    if closed:
        await rewrite(store, b"d/a", b"X" * length)
    else:
        block = await store.blocks.open_writer(row_at(store, b"d/a").id)
        await store.blocks.write(block, 0, b"X" * length)
    store = await bench.restart_after_crash(store)
    await settle_all(store)
    assert tiers_of(store, b"d/a") == ["hdd"]
    assert await read(store, b"d/a") == b"as it was"
    assert not file_on(store, "nvme", b"d/a").exists()
    await assert_consistent(store)


async def test_a_reopened_block_that_changed_and_had_no_copy_is_gone(
    bench: Workbench, expect_log: list[str]
) -> None:
    expect_log.append("was being rewritten when kvfs stopped: removed")
    store = await bench.start()
    await put(store, b"d/a", b"as it was")
    block = await store.blocks.open_writer(row_at(store, b"d/a").id)
    await store.blocks.write(block, 0, b"X")
    store = await bench.restart_after_crash(store)
    assert store.volume.catalog.resolve(b"d/a") is None
    await assert_consistent(store)


async def test_a_block_that_was_revived_survives_the_loss_of_the_catalog(
    bench: Workbench,
) -> None:
    store = await bench.start()
    await put(store, b"d/a", b"unchanged")
    await store.blocks.open_writer(row_at(store, b"d/a").id)
    store = await bench.restart_after_crash(store)
    bench.stop(store)
    bench.lose_catalog()
    store = await bench.start()
    assert await read(store, b"d/a") == b"unchanged"
    await assert_consistent(store)
