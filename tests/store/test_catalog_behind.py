"""After a power loss the catalog lacks its last transactions, and the tiers have what was done.

The catalog is put back to an earlier moment, and the tiers are left as they are: what was sealed
on them must be there, under the name it had last, whoever asks first.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from kvfs import layout
from kvfs.catalog.catalog import Catalog
from kvfs.errors import BlockStale
from kvfs.fsck import check_online
from kvfs.store import Store
from kvfs.volume.catalog_file import catalog_path
from tests.store.helpers import (
    Workbench,
    assert_consistent,
    create,
    move,
    put,
    put_on,
    read,
    rename,
    rewrite,
    row_at,
    seal_all,
    settle_all,
    unlink,
)

OLD, NEW = b"old content " * 900, b"NEW CONTENT of another length " * 700
Blocks = dict[bytes, bytes]


class Rewinder:
    """A store whose catalog can be put back."""

    def __init__(self, bench: Workbench, store: Store) -> None:
        self.bench = bench
        self.store = store
        self.remembered: Blocks = {b"d/a": OLD, b"d/b": OLD}
        self._kept = catalog_path(bench.config).with_suffix(".kept")

    def remember(self) -> None:
        """This is the last moment that reaches the catalog's disk."""
        self.store.volume.catalog.intents.flush()
        Catalog.checkpoint(self.store.volume.catalog.connection)
        shutil.copyfile(catalog_path(self.bench.config), self._kept)

    async def lose_power(self) -> Store:
        """A store that could serve, of what is left."""
        self.bench.crash(self.store)
        self.bench.lose_catalog()
        path = catalog_path(self.bench.config)
        self._kept.rename(path)
        with sqlite3.connect(path) as catalog:
            catalog.execute("UPDATE meta SET value = 'an earlier boot' WHERE key = 'boot_id'")
        catalog.close()
        store = await self.bench.start()
        assert store.volume.catalog_behind
        return store


# Each makes something of two blocks `d/a` and `d/b`, of which the catalog knows only what was
# before `remember`; the answer is what must be there.
Doing = Callable[[Rewinder], Awaitable[Blocks]]


async def replaced(rewinder: Rewinder) -> Blocks:
    rewinder.remember()
    await put(rewinder.store, b"d/a.tmp", NEW)
    await rename(rewinder.store, b"d/a.tmp", b"d/a")
    return {b"d/a": NEW, b"d/b": OLD}


async def replaced_on_a_slower_tier(rewinder: Rewinder) -> Blocks:
    await move(rewinder.store, "demote", b"d/a", "nvme", "hdd")
    rewinder.remember()
    await put(rewinder.store, b"d/a.tmp", NEW)
    await rename(rewinder.store, b"d/a.tmp", b"d/a")
    await settle_all(rewinder.store)
    await move(rewinder.store, "demote", b"d/a", "nvme", "hdd")
    return {b"d/a": NEW, b"d/b": OLD}


async def renamed(rewinder: Rewinder) -> Blocks:
    rewinder.remember()
    await rename(rewinder.store, b"d/a", b"e/c")
    return {b"e/c": OLD, b"d/b": OLD}


async def names_exchanged(rewinder: Rewinder) -> Blocks:
    await rewrite(rewinder.store, b"d/b", NEW)
    await seal_all(rewinder.store)
    rewinder.remember()
    await rename(rewinder.store, b"d/a", b"d/c")
    await rename(rewinder.store, b"d/b", b"d/a")
    await rename(rewinder.store, b"d/c", b"d/b")
    return {b"d/a": NEW, b"d/b": OLD}


async def name_used_again(rewinder: Rewinder) -> Blocks:
    rewinder.remember()
    await rename(rewinder.store, b"d/a", b"d/c")
    await put(rewinder.store, b"d/a", NEW)
    return {b"d/a": NEW, b"d/b": OLD, b"d/c": OLD}


async def directory_renamed(rewinder: Rewinder) -> Blocks:
    await move(rewinder.store, "demote", b"d/a", "nvme", "hdd")
    rewinder.remember()
    await rename(rewinder.store, b"d", b"e")
    return {b"e/a": OLD, b"e/b": OLD}


async def replaced_in_a_renamed_directory(rewinder: Rewinder) -> Blocks:
    """What was replaced lies on the slower tier still, where the catalog does not expect it."""
    await move(rewinder.store, "demote", b"d/a", "nvme", "hdd")
    rewinder.remember()
    await rename(rewinder.store, b"d", b"e")
    await put(rewinder.store, b"e/a.tmp", NEW)
    await rename(rewinder.store, b"e/a.tmp", b"e/a")
    return {b"e/a": NEW, b"e/b": OLD}


async def renamed_over_a_younger_one(rewinder: Rewinder) -> Blocks:
    """The younger one lies on the slower tier still, where the catalog expects it."""
    await put_on(rewinder.store, b"d/c", NEW, "hdd")
    rewinder.remembered[b"d/c"] = NEW
    rewinder.remember()
    await rename(rewinder.store, b"d/a", b"d/c")
    return {b"d/b": OLD, b"d/c": OLD}


async def demoted_and_renamed_over_a_younger_one(rewinder: Rewinder) -> Blocks:
    await move(rewinder.store, "demote", b"d/a", "nvme", "hdd")
    await put(rewinder.store, b"d/c", NEW)
    rewinder.remember()
    await rename(rewinder.store, b"d/a", b"d/c")
    return {b"d/b": OLD, b"d/c": OLD}


async def directory_renamed_to_where_a_younger_one_was(rewinder: Rewinder) -> Blocks:
    await put_on(rewinder.store, b"e/a", NEW, "hdd")
    rewinder.remember()
    await unlink(rewinder.store, b"e/a")
    await rename(rewinder.store, b"d", b"e")
    return {b"e/a": OLD, b"e/b": OLD}


async def replaced_by_another_in_a_renamed_directory(rewinder: Rewinder) -> Blocks:
    """Both were known, under other names."""
    await move(rewinder.store, "demote", b"d/a", "nvme", "hdd")
    await put(rewinder.store, b"d/c", NEW)
    rewinder.remember()
    await rename(rewinder.store, b"d", b"e")
    await rename(rewinder.store, b"e/c", b"e/a")
    return {b"e/a": NEW, b"e/b": OLD}


async def rewritten(rewinder: Rewinder) -> Blocks:
    rewinder.remember()
    await rewrite(rewinder.store, b"d/a", NEW)
    await seal_all(rewinder.store)
    return {b"d/a": NEW, b"d/b": OLD}


async def rewritten_while_it_was_known_to_be(rewinder: Rewinder) -> Blocks:
    block = await rewinder.store.blocks.open_writer(row_at(rewinder.store, b"d/a").id)
    rewinder.remember()
    await rewinder.store.blocks.write(block, 0, NEW)
    await rewinder.store.blocks.close(block, writer=True)
    await seal_all(rewinder.store)
    return {b"d/a": NEW + OLD[len(NEW) :], b"d/b": OLD}


async def rewritten_beside_a_suspect_replica(rewinder: Rewinder) -> Blocks:
    """It was opened for writing between the copy and the drop of a demotion."""
    store, number = rewinder.store, row_at(rewinder.store, b"d/a").id
    hdd = store.volume.tier_named("hdd")
    await store.mover.copy(number, store.volume.tiers[0], hdd, "demote")
    block = await store.blocks.open_writer(number)
    rewinder.remember()
    await store.blocks.write(block, 0, NEW)
    await store.blocks.close(block, writer=True)
    await seal_all(store)
    return {b"d/a": NEW + OLD[len(NEW) :], b"d/b": OLD}


async def published_and_replaced(rewinder: Rewinder) -> Blocks:
    block = await create(rewinder.store, b"d/c.tmp", OLD)
    await rewinder.store.blocks.close(block, writer=True)
    await rename(rewinder.store, b"d/c.tmp", b"d/c")
    rewinder.remember()
    await seal_all(rewinder.store)
    await put(rewinder.store, b"d/c.tmp", NEW)
    await rename(rewinder.store, b"d/c.tmp", b"d/c")
    return {b"d/a": OLD, b"d/b": OLD, b"d/c": NEW}


async def written_and_replaced(rewinder: Rewinder) -> Blocks:
    block = await create(rewinder.store, b"d/c", OLD)
    rewinder.remember()
    await rewinder.store.blocks.close(block, writer=True)
    await put(rewinder.store, b"d/c.tmp", NEW)
    await rename(rewinder.store, b"d/c.tmp", b"d/c")
    return {b"d/a": OLD, b"d/b": OLD, b"d/c": NEW}


async def demoted(rewinder: Rewinder) -> Blocks:
    rewinder.remember()
    await move(rewinder.store, "demote", b"d/a", "nvme", "hdd")
    return {b"d/a": OLD, b"d/b": OLD}


async def demoted_and_back_alone(rewinder: Rewinder) -> Blocks:
    """The catalog still promises to remove the replica that has become the only one."""
    hdd = rewinder.store.volume.tier_named("hdd")
    number = row_at(rewinder.store, b"d/a").id
    await rewinder.store.mover.copy(number, rewinder.store.volume.tiers[0], hdd, "demote")
    replicas = rewinder.store.volume.catalog.replicas(number)
    mine = [r for r in replicas if r.tier != hdd.number]
    rewinder.store.replicas.forget_replicas(number, b"d/a", mine)
    rewinder.remember()
    await settle_all(rewinder.store)
    await move(rewinder.store, "promote", b"d/a", "hdd", "nvme")
    await move(rewinder.store, "drop", b"d/a", "hdd", None)
    return {b"d/a": OLD, b"d/b": OLD}


async def removed_and_made_anew(rewinder: Rewinder) -> Blocks:
    """The catalog still promises to remove the old file."""
    await move(rewinder.store, "demote", b"d/a", "nvme", "hdd")
    await unlink(rewinder.store, b"d/a")
    rewinder.remember()
    await settle_all(rewinder.store)
    await put_on(rewinder.store, b"d/a", NEW, "hdd")
    return {b"d/a": NEW, b"d/b": OLD}


async def renamed_on_a_slower_tier_and_made_anew(rewinder: Rewinder) -> Blocks:
    """The catalog still promises the rename that was done."""
    await move(rewinder.store, "demote", b"d/a", "nvme", "hdd")
    hdd = rewinder.store.volume.tier_named("hdd")
    number = row_at(rewinder.store, b"d/a").id
    with rewinder.store.volume.catalog.transaction("test"):
        rewinder.store.volume.catalog.relink(number, row_at(rewinder.store, b"d").id, b"c")
        rewinder.store.volume.catalog.intents.add(hdd.number, "rename", number, b"d/a", b"d/c")
    rewinder.remember()
    await settle_all(rewinder.store)
    await put_on(rewinder.store, b"d/a", NEW, "hdd")
    return {b"d/a": NEW, b"d/b": OLD, b"d/c": OLD}


async def made(rewinder: Rewinder) -> Blocks:
    rewinder.remember()
    await put(rewinder.store, b"e/f/c", NEW)
    return {b"d/a": OLD, b"d/b": OLD, b"e/f/c": NEW}


@pytest.mark.parametrize("early", [False, True], ids=["after-the-walk", "before-the-walk"])
@pytest.mark.parametrize(
    "doing",
    [
        replaced, replaced_on_a_slower_tier, renamed, names_exchanged, name_used_again,
        directory_renamed, replaced_in_a_renamed_directory, renamed_over_a_younger_one,
        demoted_and_renamed_over_a_younger_one, directory_renamed_to_where_a_younger_one_was,
        replaced_by_another_in_a_renamed_directory, rewritten,
        rewritten_while_it_was_known_to_be, rewritten_beside_a_suspect_replica,
        published_and_replaced, written_and_replaced, demoted, demoted_and_back_alone,
        removed_and_made_anew, renamed_on_a_slower_tier_and_made_anew, made,
    ],
)  # fmt: skip
async def test_what_was_sealed_is_there(
    bench: Workbench, expect_log: list[str], doing: Doing, early: bool
) -> None:
    # A row whose file went on elsewhere, when it is asked for before the walk has come to it.
    expect_log.append("lost '[de]/[abc]")
    store = await bench.start()
    for name in (b"d/a", b"d/b"):
        await put(store, name, OLD)
    rewinder = Rewinder(bench, store)
    expected = await doing(rewinder)
    store = await rewinder.lose_power()
    if early:
        await ask_for(store, expected, rewinder.remembered)
    await store.recovery.reconcile()
    await seal_all(store)
    for path, data in expected.items():
        assert await read(store, path) == data, path
    assert not store.volume.catalog_behind
    await assert_consistent(store)
    assert (await check_online(store, repair=False, progress=no_progress)).findings == []
    quarantined = [
        name
        for tier in store.volume.tiers
        for name in os.listdir(os.fsdecode(tier.root + b"/" + layout.QUARANTINE_DIR))
    ]
    assert quarantined == []


async def ask_for(store: Store, expected: Blocks, before: Blocks) -> None:
    """What the kernel does with a name, and what an engine sees: the block, or what the catalog
    knows by that name and finds there, or a miss."""
    store.volume.walking = True
    for path, data in expected.items():
        for _ in range(2):
            head, name = layout.split(path)
            parent = store.volume.catalog.resolve(head)
            found = store.namespace.lookup(parent.id, name) if parent else None
            if found is None and parent is not None:
                found = await store.find_on_tiers(parent.id, name)
            if found is None:
                continue
            try:
                assert await read(store, path) in (data, before.get(path))
            except BlockStale:
                continue  # the kernel looks the name up again


async def no_progress(done: int, total: int) -> None:
    """Nobody is shown any."""


async def test_a_walk_that_was_cut_off_begins_anew(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"d/a", OLD)
    store = await bench.restart_after_crash(store, reboot=True)
    assert store.volume.catalog_behind
    store.volume.walking = True
    bench.stop(store)
    store = await bench.start()
    assert (store.volume.unclean, store.volume.same_boot) == (True, True)
    assert store.volume.catalog_behind
    await store.recovery.reconcile()
    bench.stop(store)
    store = await bench.start()
    assert not store.volume.unclean
    assert not store.volume.catalog_behind


async def test_a_rebuild_that_was_cut_off_is_one_again(bench: Workbench) -> None:
    store = await bench.start()
    number = await put(store, b"d/a", OLD)
    bench.stop(store)
    bench.lose_catalog()
    bench.crash(bench.open())
    store = await bench.start()
    assert store.volume.rebuild
    assert row_at(store, b"d/a").id == number
    assert await put(store, b"d/b", OLD) > number
    await assert_consistent(store)
    store = await bench.restart_after_crash(store)
    assert not store.volume.rebuild


async def test_a_first_mount_that_was_cut_off_is_a_first_mount_again(bench: Workbench) -> None:
    private = bench.config.tier[0].path / os.fsdecode(layout.PRIVATE_DIR)
    for name in ("staging", "quarantine"):
        (private / name).mkdir(parents=True)
    (private / "tier.json.new").write_bytes(b"{}")
    store = await bench.start()
    await put(store, b"d/a", OLD)
    await assert_consistent(store)


async def test_a_private_directory_with_files_is_no_first_mount(bench: Workbench) -> None:
    quarantine: Path = bench.config.tier[0].path / os.fsdecode(layout.QUARANTINE_DIR)
    quarantine.mkdir(parents=True)
    (quarantine / "a").write_bytes(b"somebody's")
    with pytest.raises(Exception, match="not empty and not a kvfs tier"):
        bench.open()
