"""Catalog against tiers, in both directions: findings, and repairs when asked.

Online it runs in the daemon, beside the requests; offline it opens the volume itself, which needs
every tier unmounted. What is repaired follows the catalog; what only a tier knows is adopted if its
seal says so, else put to quarantine.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from kvfs import layout
from kvfs.config import Config
from kvfs.recovery import Verdict
from kvfs.rows import BlockState, Kind
from kvfs.seal import Seal
from kvfs.store import Store
from kvfs.tier import Tier
from kvfs.volume import catalog_path, open_volume
from kvfs.walk import Found, in_batches, missing_files, walk_tier

AsyncProgress = Callable[[int, int], Awaitable[None]]
PROGRESS_EVERY = 500


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be."""

    kind: str
    path: bytes
    tier: str
    detail: str
    repaired: bool

    def as_document(self) -> dict[str, Any]:
        """For the control protocol."""
        return {
            "kind": self.kind, "path": self.path, "tier": self.tier,
            "detail": self.detail, "repaired": self.repaired,
        }  # fmt: skip


@dataclass(slots=True)
class FsckReport:
    """What was found among how many files and rows."""

    findings: list[Finding] = field(default_factory=list)
    checked: int = 0


class Fsck:
    """One check of a store. Owned by the trio loop."""

    def __init__(self, store: Store, *, repair: bool, progress: AsyncProgress) -> None:
        self.store = store
        self.repair = repair
        self.report = FsckReport()
        self._progress = progress
        self._total = sum(account.blocks for account in store.volume.space.tiers) * 2

    async def run(self) -> FsckReport:
        """Walk every tier that is online, then every row."""
        for tier in self.store.volume.tiers:
            if not tier.online:
                self._found("tier-offline", b"", tier, "not checked", repaired=False)
                continue
            await self._check_files(tier)
            await self._check_rows(tier)
        self._check_orphans()
        self._check_accounts()
        return self.report

    def _found(
        self, kind: str, path: bytes, tier: Tier | None, detail: str, *, repaired: bool
    ) -> None:
        name = tier.name if tier else ""
        self.report.findings.append(Finding(kind, path, name, detail, repaired))

    async def _tick(self, count: int) -> None:
        self.report.checked += count
        await self._progress(self.report.checked, max(self._total, self.report.checked))

    async def _check_files(self, tier: Tier) -> None:
        iterator = walk_tier(tier)
        while batch := await in_batches(tier, iterator):
            for found in batch:
                if not found.is_directory:
                    await self._check_file(tier, found)
            await self._tick(len(batch))

    async def _check_file(self, tier: Tier, found: Found) -> None:
        recovery, catalog = self.store.recovery, self.store.volume.catalog
        async with self.store.volume.claims.hold(found.path):
            verdict = recovery.judge(tier, found)
            gone = not await tier.run(os.path.lexists, tier.locate(found.path, found.fanned))
        if gone:
            return
        if verdict is not Verdict.KNOWN:
            if self.repair:
                await recovery.absorb(tier, found)
            self._found("unknown-file", found.path, tier, verdict.value, repaired=self.repair)
            return
        inode = catalog.resolve(found.path)
        if inode is None or inode.state != BlockState.SEALED or inode.kind != Kind.BLOCK:
            return
        if found.seal is None or _differs(found.seal, inode.id, inode.generation, inode.checksum):
            await self._reseal(tier, found)

    async def _reseal(self, tier: Tier, found: Found) -> None:
        """A record that does not say what the catalog says: the sealer writes it again."""
        catalog = self.store.volume.catalog
        inode = catalog.resolve(found.path)
        if inode is None or inode.id in self.store.replicas.open_blocks:
            return
        if self.repair and inode.checksum is not None:
            seal = Seal(
                inode.id, inode.generation, inode.size_bytes, inode.checksum,
                inode.mode, inode.uid, inode.gid, inode.mtime_ns,
            )  # fmt: skip
            await tier.run(tier.write_seal, tier.locate(found.path, found.fanned), seal)
        self._found("seal-record", found.path, tier, "missing or old", repaired=self.repair)

    async def _check_rows(self, tier: Tier) -> None:
        catalog, after = self.store.volume.catalog, 0
        while rows := catalog.replica_page(tier.number, after):
            expected = []
            for number, fanned, size, state in rows:
                path = catalog.path_of(number)
                if path is not None and number not in self.store.replicas.open_blocks:
                    sealed = size if state == BlockState.SEALED else -1
                    expected.append((number, path, bool(fanned), sealed))
            missing = await trio.to_thread.run_sync(
                missing_files, tier, expected, limiter=tier.limiter, abandon_on_cancel=tier.remote
            )
            paths = {number: path for number, path, _, _ in expected}
            for number in missing:
                await self._check_missing(tier, number, paths[number])
            await self._tick(len(rows))
            after = rows[-1][0]

    async def _check_missing(self, tier: Tier, number: int, path: bytes) -> None:
        """Confirm under a claim; the repair drops the row, and the block with the last one."""
        if await self.store.recovery.confirm_missing(tier, number, drop=self.repair):
            detail = "no file of the sealed length"
            self._found("missing-file", path, tier, detail, repaired=self.repair)

    def _check_orphans(self) -> None:
        """Rows that nothing refers to."""
        volume = self.store.volume
        for number in volume.catalog.orphans():
            if number in self.store.replicas.open_blocks:
                continue
            if self.repair:
                with volume.catalog.transaction():
                    volume.catalog.delete(number)
            self._found("orphan-row", b"", None, f"inode {number}", repaired=self.repair)

    def _check_accounts(self) -> None:
        """Counters against a sum over the catalog."""
        volume = self.store.volume
        usage = volume.catalog.usage()
        for tier in volume.tiers:
            count, size = usage.get(tier.number, (0, 0))
            account = volume.space[tier.index]
            if (account.blocks, account.used_bytes) == (count, size):
                continue
            detail = f"{account.used_bytes} bytes counted, {size} in the catalog"
            if self.repair:
                account.blocks, account.used_bytes = count, size
            self._found("account", b"", tier, detail, repaired=self.repair)


def _differs(seal: Seal, inode: int, generation: int, checksum: bytes | None) -> bool:
    return (seal.inode, seal.generation, seal.checksum) != (inode, generation, checksum)


async def check_online(store: Store, *, repair: bool, progress: AsyncProgress) -> FsckReport:
    """Check a mounted store."""
    return await Fsck(store, repair=repair, progress=progress).run()


def check_offline(
    config: Config, *, repair: bool, rebuild: bool, progress: Callable[[int, int], None]
) -> FsckReport:
    """Check tiers that are not mounted; with `rebuild` the catalog is made anew from them first.

    Raises TierError when a daemon has them.
    """
    if rebuild:
        _set_catalog_aside(config)
    return trio.run(_check_offline, config, repair, progress)


def _set_catalog_aside(config: Config) -> None:
    probe = open_volume(config)
    probe.close(clean=False)
    path = catalog_path(config)
    for suffix in ("", "-wal", "-shm"):
        source = path.with_name(path.name + suffix)
        if source.exists():
            source.rename(path.with_name(f"{path.name}.before-rebuild{suffix}"))


async def _check_offline(
    config: Config, repair: bool, progress: Callable[[int, int], None]
) -> FsckReport:
    async def report(done: int, total: int) -> None:
        progress(done, total)

    volume = open_volume(config)
    try:
        store = Store(volume)
        litter = _staging_litter(store)
        await store.recovery.before_serving()
        await store.sealer.seal_pending()
        result = await check_online(store, repair=repair, progress=report)
        result.findings[:0] = litter
        for tier in volume.tiers:
            if tier.online:
                await store.replicas.settle(tier)
    except BaseException:
        volume.close(clean=False)
        raise
    volume.close(clean=True)
    return result


def _staging_litter(store: Store) -> list[Finding]:
    """Copies that a crash left: opening the volume removes them."""
    findings = []
    for tier in store.volume.tiers:
        if tier.online:
            for entry in os.scandir(tier.root + b"/" + layout.STAGING_DIR):
                detail = "unfinished copy"
                findings.append(Finding("staging", entry.name, tier.name, detail, repaired=True))
    return findings
