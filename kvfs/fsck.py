"""Catalog against tiers, in both directions: findings, and repairs when asked.

Online it runs in the daemon, beside the requests; offline it opens the volume itself, which needs
every tier unmounted. What is repaired follows the catalog; what only a tier knows is adopted if its
seal says so, else put to quarantine. Without repair nothing is changed: offline not even what the
next mount would put right after a crash, which is found as well then.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from kvfs import failpoints, layout
from kvfs.blocks.attributes import differs
from kvfs.blocks.quarantine import look, take_charge
from kvfs.catalog import scans
from kvfs.catalog.rows import BlockState, Inode, Kind
from kvfs.config import Config
from kvfs.store import Store
from kvfs.tiers.space import PAGE_BYTES
from kvfs.tiers.tier import Tier
from kvfs.tiers.walk import Fault, Found, in_batches, missing_files, walk_tier
from kvfs.upkeep.recovery import Verdict
from kvfs.volume.catalog_file import catalog_path
from kvfs.volume.volume import open_volume

AsyncProgress = Callable[[int, int], Awaitable[None]]
# Any name is in staging for a moment; a copy's is of a form of its own.
MOMENT_S = 60.0
FAULTS: dict[Fault, str] = {
    "missing-file": "no such file",
    "wrong-size": "not of the sealed length",
    "wrong-header": "not the header of what was sealed",
}
UNFINISHED = (BlockState.WRITING, BlockState.PUBLISHED, BlockState.REOPENED)


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
    """One check of a store. Owned by the trio loop.

    `serving`: a daemon is at work, so what is under way is not a finding.
    """

    def __init__(
        self, store: Store, *, repair: bool, progress: AsyncProgress, serving: bool = True
    ) -> None:
        self.store = store
        self.repair = repair
        self.serving = serving
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
            await self._check_private(tier)
        if not self.serving:
            self._check_unfinished()
        orphans = self._check_orphans()
        self._check_accounts()
        if self.repair or not orphans:
            self._check_totals()
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
            gone = not await tier.run(tier.files.exists, tier.locate(found.path, found.fanned))
        if gone or recovery.is_promised(tier, found):
            return
        if verdict is not Verdict.KNOWN:
            if self.repair:
                await recovery.absorb(tier, found)
            kind = "duplicate" if verdict is Verdict.DUPLICATE else "unknown-file"
            self._found(kind, found.path, tier, verdict.value, repaired=self.repair)
            return
        inode = catalog.resolve(found.path)
        if inode is None or inode.state != BlockState.SEALED or inode.kind != Kind.BLOCK:
            return
        replica = next(r for r in catalog.replicas(inode.id) if r.tier == tier.number)
        # One that looks like another block's is found by its row.
        if inode.id in self.store.replicas.open_blocks or not found.may_hold(inode, replica.codec):
            return
        if found.seal is None or differs(found.seal, inode):
            await self._reseal(tier, inode, found.path)
        else:
            self._check_allocation(tier, inode, found)

    async def _reseal(self, tier: Tier, inode: Inode, path: bytes) -> None:
        """A record that does not say what the catalog says is written again for what was sealed.

        What a file without its record holds is read first.
        """
        if self.repair and not await self.store.verifier.condemn(inode.id, tier):
            await self.store.attributes.mirror_block(inode)
            failpoints.hit("fsck.resealed")
        self._found("seal-record", path, tier, "missing or old", repaired=self.repair)

    def _check_allocation(self, tier: Tier, inode: Inode, found: Found) -> None:
        """What a file takes against what is counted for it; its xattrs may have got a page."""
        replicas = self.store.volume.catalog.replicas(inode.id)
        mine = [replica for replica in replicas if replica.tier == tier.number]
        allocated = found.status.st_blocks * 512
        if not mine or abs(allocated - mine[0].allocated_bytes) <= PAGE_BYTES:
            return
        counted = mine[0].allocated_bytes
        if self.repair:
            self.store.replicas.measured(inode.id, tier, allocated)
        detail = f"{counted} bytes counted, {allocated} allocated"
        self._found("account", found.path, tier, detail, repaired=self.repair)

    async def _check_rows(self, tier: Tier) -> None:
        catalog, after = self.store.volume.catalog, 0
        while rows := catalog.replica_page(tier.number, after):
            expected = []
            for placed in rows:
                path = catalog.path_of(placed.inode)
                if path is not None and placed.inode not in self.store.replicas.open_blocks:
                    expected.append((path, placed))
            paths = {placed.inode: path for path, placed in expected}
            for placed in await tier.run_in_thread(missing_files, tier, expected):
                await self._check_missing(tier, placed.inode, paths[placed.inode])
            await self._tick(len(rows))
            after = rows[-1].inode

    async def _check_missing(self, tier: Tier, number: int, path: bytes) -> None:
        """Confirm under a claim; the repair drops the row, and the block with the last one."""
        fault = await self.store.recovery.confirm_fault(
            tier, number, repair=self.repair, settle=self.serving or self.repair
        )
        if fault is not None:
            self._found(fault, path, tier, FAULTS[fault], repaired=self.repair)

    async def _check_private(self, tier: Tier) -> None:
        """Staging that belongs to no copy, and quarantine that kvfs does not know."""
        running = self.store.mover.running
        for name in await tier.run_in_thread(find_litter, tier):
            number, _, _ = name.partition(b".")
            if number.isdigit() and int(number) in running:
                continue
            if self.repair:
                await tier.run(remove_litter, tier, name)
            self._found("staging", name, tier, "unfinished copy", repaired=self.repair)
        for file in await tier.run_in_thread(look, tier):
            if not file.reason:
                if self.repair:
                    await tier.run(take_charge, tier, file)
                self._found(
                    "quarantine", file.name, tier, "not put there by kvfs", repaired=self.repair
                )
        if self.repair:
            await self.store.quarantine.tidy(tier)

    def _check_unfinished(self) -> None:
        """What a crash left and the next mount decides."""
        volume = self.store.volume
        for number in volume.catalog.unsealed(UNFINISHED):
            row, path = volume.catalog.get(number), volume.catalog.path_of(number)
            if row is not None and path is not None:
                detail = f"{BlockState(row.state).name.lower()}: the next mount decides"
                self._found("unfinished", path, None, detail, repaired=False)
        for tier in volume.tiers:
            promised = len(volume.catalog.intents.left(tier.number))
            if promised:
                detail = f"{promised} removals and renames: the next mount carries them out"
                self._found("unfinished", b"", tier, detail, repaired=False)

    def _check_orphans(self) -> int:
        """Rows that nothing refers to."""
        volume, count = self.store.volume, len(self.report.findings)
        for number in volume.catalog.orphans():
            if number in self.store.replicas.open_blocks:
                continue
            if self.repair:
                with volume.catalog.transaction("fsck_orphan"):
                    volume.catalog.delete(number)
            self._found("orphan-row", b"", None, f"inode {number}", repaired=self.repair)
        return len(self.report.findings) - count

    def _check_accounts(self) -> None:
        """Counters against a sum over the catalog."""
        volume = self.store.volume
        usage = scans.usage(volume.catalog.connection)
        saved = scans.saved_bytes(volume.catalog.connection)
        for tier in volume.tiers:
            summed = (*usage.get(tier.number, (0, 0)), saved.get(tier.number, 0))
            account = volume.space[tier.index]
            counted = (account.blocks, account.used_bytes, account.saved_bytes)
            if counted == summed:
                continue
            detail = f"(blocks, bytes, saved bytes): {counted} counted, {summed} in the catalog"
            if self.repair:
                account.blocks, account.used_bytes, account.saved_bytes = summed
            self._found("account", b"", tier, detail, repaired=self.repair)

    def _check_totals(self) -> None:
        volume = self.store.volume
        counted = (volume.space.duplicate_bytes, volume.blocks, volume.directories)
        connection = volume.catalog.connection
        summed = (scans.duplicate_bytes(connection), *scans.totals(connection))
        if counted != summed:
            if self.repair:
                volume.space.duplicate_bytes, volume.blocks, volume.directories = summed
            detail = f"(duplicate bytes, blocks, directories): {counted} counted, {summed} there"
            self._found("account", b"", None, detail, repaired=self.repair)


def find_litter(tier: Tier) -> list[bytes]:
    """Names in staging that no call of a moment can have there. Blocking."""
    directory = tier.root + b"/" + layout.STAGING_DIR
    found = []
    for name in tier.files.names(directory):
        try:
            status = tier.files.status(directory + b"/" + name)
        except FileNotFoundError:
            continue
        of_copy = name.replace(b".", b"").isdigit()
        if of_copy or time.time() - status.st_ctime > MOMENT_S:
            found.append(name)
    return found


def remove_litter(tier: Tier, name: bytes) -> None:
    """A copy that became a replica meanwhile has left. Blocking."""
    with contextlib.suppress(FileNotFoundError):
        tier.files.unlink(tier.root + b"/" + layout.STAGING_DIR + b"/" + name)


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

    volume = open_volume(config, only_look=not repair)
    # A missing catalog is made anew by looking for it.
    mend = repair or volume.rebuild
    try:
        with volume.damage_told():
            store = Store(volume)
            litter = _staging_litter(store) if mend else []
            if mend:
                await store.recovery.before_serving()
                await store.sealer.seal_pending()
            check = Fsck(store, repair=repair, progress=report, serving=mend)
            result = await check.run()
            result.findings[:0] = litter
            for tier in volume.tiers if mend else ():
                if tier.online:
                    await store.replicas.settle(tier)
    except BaseException:
        volume.close(clean=False)
        raise
    volume.close(clean=mend)
    return result


def _staging_litter(store: Store) -> list[Finding]:
    """Copies that a crash left: opening the volume removes them."""
    findings = []
    for tier in store.volume.tiers:
        if tier.online:
            for name in tier.files.names(tier.root + b"/" + layout.STAGING_DIR):
                detail = "unfinished copy"
                findings.append(Finding("staging", name, tier.name, detail, repaired=True))
    return findings
