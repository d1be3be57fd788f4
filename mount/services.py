"""The small services of the daemon: each a loop that does one bounded thing and waits."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3

import trio

from kvfs.catalog import scans
from kvfs.catalog.catalog import BATCH_ROWS, LOG_BYTES, Catalog
from kvfs.errors import BlockBusy, BlockNotFound, TierError, reason_of
from kvfs.policy import heat
from kvfs.store import Store
from kvfs.tiers.tier import Tier
from kvfs.volume.accesses import Pending
from kvfs.volume.volume import Volume

log = logging.getLogger(__name__)

FLUSH_S = 1.0
GROWTH_S = 0.5
TRIM_GHOSTS_EVERY = 60
CHECKPOINT_SECONDS = 5
SETTLE_S = 5.0
EXPIRE_S = 2.0
EXPIRE_BLOCKS = 5000
PROBE_S = 5.0
TIDY_S = 60.0


async def flush_heat(store: Store) -> None:
    """Accesses and directory times into the catalog, every second."""
    flushes = 0
    while True:
        await trio.sleep(FLUSH_S)
        with store.volume.tolerate("flush of the heat"):
            await flush_once(store)
            flushes += 1
            if flushes % TRIM_GHOSTS_EVERY == 0:
                store.volume.catalog.ghosts.trim(store.volume.config.tiering.ghosts)


async def flush_once(store: Store) -> None:
    """At most 500 rows a transaction, with a pause for requests between them.

    Raises sqlite3.OperationalError, with nothing forgotten, when the catalog's disk is full.
    """
    volume = store.volume
    while times := store.namespace.directory_times(BATCH_ROWS):
        with volume.catalog.transaction("flush_times"):
            for directory, changed_ns in times:
                volume.catalog.update(directory, mtime_ns=changed_ns, ctime_ns=changed_ns)
        store.namespace.directory_times_flushed(times)
        await trio.lowlevel.checkpoint()
    while entries := volume.accesses.take(BATCH_ROWS):
        now_s = volume.clock.now_s()
        try:
            _merge_heat(volume, entries, now_s)
        except BaseException:
            volume.accesses.put_back(entries)
            raise
        volume.accesses.flushed(entries, now_s)
        await trio.lowlevel.checkpoint()


def _merge_heat(volume: Volume, entries: list[tuple[int, Pending]], now_s: float) -> None:
    half_life_s = volume.config.tiering.half_life_s
    with volume.catalog.transaction("flush_heat"):
        for inode, pending in entries:
            stored = volume.catalog.tau_of(inode)
            if stored is None:
                continue
            tau = heat.touch(stored, pending.tau, half_life_s)
            tau = heat.clamp(tau, now_s, half_life_s)
            volume.catalog.set_tau(inode, tau, int(pending.last_s * 1e9))


async def account_unseen(store: Store) -> None:
    """Follow files that grow past the daemon."""
    while True:
        await trio.sleep(GROWTH_S)
        store.blocks.growth.account_unseen()
        for tier in store.volume.tiers:
            if tier.inline and tier.online:
                with contextlib.suppress(OSError, TierError):
                    await store.blocks.relief.measure(tier)


async def checkpoint(volume: Volume) -> None:
    """Move the log into the database, every few seconds or when it is long."""
    while True:
        with volume.tolerate("checkpoint of the catalog"):
            for _ in range(CHECKPOINT_SECONDS):
                await trio.sleep(1)
                if volume.catalog.log_bytes() > 2 * LOG_BYTES:
                    break
            await checkpoint_once(volume.catalog)


async def checkpoint_once(catalog: Catalog) -> None:
    """From a thread: its fsync would stop the loop.

    The log begins anew only when nothing was written since, which under load never is so. Then the
    little that came while the thread was at it is moved on the loop, where nobody writes beside.
    """
    if await trio.to_thread.run_sync(_checkpoint, catalog) > LOG_BYTES:
        await trio.to_thread.run_sync(_checkpoint, catalog)
        Catalog.checkpoint(catalog.connection)


def _checkpoint(catalog: Catalog) -> int:
    connection = sqlite3.connect(catalog.path, isolation_level=None)
    try:
        return Catalog.checkpoint(connection)
    finally:
        connection.close()


async def settle_intents(store: Store) -> None:
    """Carry out promised removals and renames, per tier, so that a slow one delays no other."""
    busy: set[Tier] = set()
    asked: set[Tier] = set()

    async def work(tier: Tier) -> None:
        await settle(store, tier)
        busy.discard(tier)
        if tier in asked:
            asked.discard(tier)
            store.volume.settling_due.set()

    async with trio.open_nursery() as nursery:
        while True:
            with trio.move_on_after(SETTLE_S):
                await store.volume.settling_due.wait()
            store.volume.settling_due = trio.Event()
            asked.update(tier for tier in busy if tier.online)
            for tier in store.volume.tiers:
                if tier.online and tier not in busy:
                    busy.add(tier)
                    nursery.start_soon(work, tier)


async def settle(store: Store, tier: Tier) -> None:
    """What fails stays promised."""
    with store.volume.tolerate("what is promised", tier.name):
        await store.replicas.settle(tier)


async def expire(store: Store) -> None:
    """TTLs and temporary files that their writer forgot."""
    while True:
        await trio.sleep(EXPIRE_S)
        with store.volume.tolerate("expiry"):
            await expire_once(store)


async def expire_once(store: Store) -> None:
    """Those of them that are due now."""
    expired, forgotten = await trio.to_thread.run_sync(_find_expired, store)
    for inode in expired:
        try:
            store.replicas.evict(inode, reason="ttl")
        except (BlockBusy, BlockNotFound, OSError) as error:
            store.volume.counters.count("evictions_skipped", reason=reason_of(error))
            continue
        store.volume.counters.count("ttl_expired")
    for inode in forgotten:
        with store.volume.tolerate("removal of temporary files"):
            remove_temporary(store, inode)
    if expired or forgotten:
        store.volume.settling_due.set()


def _find_expired(store: Store) -> tuple[list[int], list[int]]:
    reader = store.volume.catalog.reader()
    now_ns = int(store.volume.clock.now_s() * 1e9)
    before_ns = now_ns - int(store.volume.config.tiering.tmp_ttl_s * 1e9)
    try:
        return (
            scans.expired(reader, now_ns, EXPIRE_BLOCKS),
            scans.forgotten_temporaries(reader, before_ns, EXPIRE_BLOCKS),
        )
    finally:
        reader.close()


def remove_temporary(store: Store, number: int) -> None:
    """A `*.tmp` without a handle goes, sealed or not."""
    catalog = store.volume.catalog
    inode, path, entry = catalog.get(number), catalog.path_of(number), catalog.entry(number)
    if inode is None or path is None or entry is None:
        return
    if number in store.replicas.open_blocks or not store.volume.claims.is_free(path):
        return
    log.info("%r was forgotten by its writer: removed", os.fsdecode(path))
    store.replicas.remove_block(inode, path)
    store.volume.name_changed(*entry)
    store.volume.counters.count("tmp_expired")


async def watch_tiers(store: Store) -> None:
    """Bring tiers back that failed or take nothing new, when a probe succeeds, and notice remote
    ones that fail before an engine does."""
    async with trio.open_nursery() as nursery:
        for tier in store.volume.tiers:
            nursery.start_soon(_watch, store, tier)


async def _watch(store: Store, tier: Tier) -> None:
    while True:
        with contextlib.suppress(OSError, TierError):
            await store.blocks.relief.measure(tier)
        await trio.sleep(min(PROBE_S, tier.config.deadline_s))
        if tier.health.shown != "online":
            was_online = tier.online
            await tier.examine()
            if tier.online and not was_online:
                await _catch_up(store, tier)
        elif tier.remote:
            # What it answers goes into its health.
            with contextlib.suppress(OSError, TierError):
                await tier.run(tier.check_present)


async def _catch_up(store: Store, tier: Tier) -> None:
    """A tier is back: what was left to do on it."""
    store.volume.settling_due.set()
    with store.volume.tolerate("looking for what is not sealed"):
        store.sealer.scan()
    if tier in store.recovery.unwalked:
        await store.recovery.walk(tier)


async def tidy_quarantine(store: Store) -> None:
    """What is too old or too much leaves the quarantines."""
    while True:
        await trio.sleep(TIDY_S)
        await store.quarantine.run_once()


async def tell_incidents(volume: Volume) -> None:
    """What was held back in the log for a while."""
    while True:
        await trio.sleep(PROBE_S)
        volume.incidents.tell()
