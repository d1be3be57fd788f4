"""What a crash left, put right at mount: bounded steps before serving, a walk while serving.

Before serving: sweep staging, finish intents, decide what was not sealed. While serving: compare
tiers and catalog in both directions (`reconcile`). A lost catalog is rebuilt before serving.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from enum import Enum

import msgspec
import trio

from kvfs import heat, layout
from kvfs.attributes import PIN, TTL, parse_ttl, seal_from
from kvfs.errors import KvfsError, TierOffline
from kvfs.replicas import Replicas, largest
from kvfs.rows import GOOD, ROOT_INODE, BlockState, Inode, Kind, Replica
from kvfs.seal import Content, Seal, content_of
from kvfs.tier import Tier, write_identity
from kvfs.volume import Volume
from kvfs.walk import Found, in_batches, is_there, missing_files, walk_tier

log = logging.getLogger(__name__)

PROGRESS_FILES = 50_000
# More inodes than 2^20 a second are not made, so no number up to now is above the time times this.
NUMBERS_PER_SECOND_BITS = 20


class Verdict(Enum):
    """What a file on a tier is to the catalog."""

    KNOWN = "known"
    REPLICA = "a replica the catalog does not know"
    NEW = "a block the catalog does not know"
    STALE = "an older generation of a block"
    NEWER = "a newer generation of a block"
    TORN = "not sealed and not known"
    ADOPT = "not sealed, to be adopted"


class Recovery:
    """Owned by the trio loop."""

    def __init__(self, volume: Volume, replicas: Replicas) -> None:
        self.volume = volume
        self.replicas = replicas

    async def before_serving(self) -> None:
        """Everything that must hold before the first request."""
        volume = self.volume
        if volume.rebuild or (volume.unclean and not volume.same_boot):
            # Blocks that only a tier knows keep their numbers: new ones must not be among them.
            volume.catalog.skip_numbers(int(volume.clock.now_s()) << NUMBERS_PER_SECOND_BITS)
        volume.catalog.clamp_heat(
            volume.clock.now_s() + heat.MAX_HALF_LIVES_AHEAD * volume.config.tiering.half_life_s
        )
        for tier in volume.tiers:
            if not tier.online:
                continue
            try:
                swept = await tier.run(tier.sweep_staging)
                if swept:
                    log.info("tier %s: %d unfinished copies removed", tier.name, swept)
                await self.replicas.settle(tier)
            except (OSError, TierOffline) as error:
                log.error("tier %s: recovery: %s", tier.name, error)
        await self._decide_unsealed()
        if volume.rebuild:
            log.info("the catalog is missing: it is rebuilt from the tiers")
        for tier in volume.tiers:
            adopting = tier.online and tier.identity.adopt
            if tier.online and (volume.rebuild or adopting):
                await self.absorb_tier(tier)
            if adopting:
                tier.identity = msgspec.structs.replace(tier.identity, adopt=False)
                write_identity(tier.config.path, tier.identity)

    # --- blocks that were not sealed

    async def _decide_unsealed(self) -> None:
        catalog = self.volume.catalog
        decide = {
            BlockState.WRITING: self._decide_writing,
            BlockState.PUBLISHED: self._decide_published,
            BlockState.REOPENED: self._decide_reopened,
        }
        for number in catalog.unsealed(decide):
            inode = catalog.get(number)
            path = catalog.path_of(number)
            replicas = self.replicas.readable(number)
            if inode is None or path is None:
                continue
            if not replicas:
                if not catalog.replicas(number):
                    self._forget(inode)
                continue
            with contextlib.suppress(TierOffline):
                await decide[BlockState(inode.state)](inode, path, *replicas[0])

    async def _decide_writing(
        self, inode: Inode, path: bytes, tier: Tier, replica: Replica
    ) -> None:
        """Nobody was told that it is complete: only a seal proves that it was."""
        if not await self._accept_seal(inode, path, tier, replica):
            log.info("%r was being written when kvfs stopped: removed", os.fsdecode(path))
            self._discard(inode, path, "discarded_writing")

    async def _decide_published(
        self, inode: Inode, path: bytes, tier: Tier, replica: Replica
    ) -> None:
        """Complete if the machine did not stop: the page cache outlived the daemon."""
        if await self._accept_seal(inode, path, tier, replica):
            return
        try:
            status = await tier.run(os.stat, tier.locate(path, bool(replica.fanned)))
        except FileNotFoundError:
            self._discard(inode, path, "discarded_published")
            return
        if not self.volume.same_boot:
            shown = os.fsdecode(path)
            log.warning("%r was not sealed before the machine stopped: quarantined", shown)
            await tier.run(tier.quarantine, path, bool(replica.fanned))
            self._discard(inode, path, "discarded_published")
            return
        self.volume.catalog.update(inode.id, size_bytes=status.st_size)
        self.volume.request_seal(inode.id)

    async def _accept_seal(self, inode: Inode, path: bytes, tier: Tier, replica: Replica) -> bool:
        """The record was written but not committed: it says what a commit would have."""
        absolute = tier.locate(path, bool(replica.fanned))
        try:
            seal = await tier.run(tier.read_seal, absolute)
            if seal is None or (seal.inode, seal.generation) != (inode.id, inode.generation):
                return False
            # A writer that came while it was sealed leaves a record that is not of its bytes.
            content = await tier.run(content_of, absolute)
            status = await tier.run(os.stat, absolute)
        except FileNotFoundError:
            return False
        if content != Content(seal.length_bytes, seal.checksum):
            return False
        self._record_sealed(inode, seal, tier, status)
        return True

    def _record_sealed(self, inode: Inode, seal: Seal, tier: Tier, status: os.stat_result) -> None:
        catalog, allocated = self.volume.catalog, status.st_blocks * 512
        replicas = catalog.replicas(inode.id)
        before = next(r for r in replicas if r.tier == tier.number)
        with catalog.transaction():
            catalog.update(
                inode.id, state=int(BlockState.SEALED), checksum=seal.checksum,
                size_bytes=seal.length_bytes, mtime_ns=seal.mtime_ns,
            )  # fmt: skip
            catalog.set_allocated(inode.id, tier.number, allocated)
        replicas.remove(before)
        self.volume.space.resize(
            tier.index, before.allocated_bytes, allocated, beside_bytes=largest(replicas)
        )

    async def _decide_reopened(
        self, inode: Inode, path: bytes, tier: Tier, replica: Replica
    ) -> None:
        """The content that was sealed wins, wherever it still is; else the block is torn."""
        catalog = self.volume.catalog
        for other in sorted(catalog.replicas(inode.id), key=lambda r: r.state):
            place = self.volume.by_number[other.tier]
            if not place.online:
                continue
            sealed = await self._seal_again(inode, path, place, other)
            if sealed is None:
                continue
            rest = [r for r in catalog.replicas(inode.id) if r.tier != other.tier]
            rewritten = [r for r in rest if r.state == GOOD] if other.state != GOOD else []
            self._revive(sealed, path, rewritten)
            return
        log.warning("%r was being rewritten when kvfs stopped: removed", os.fsdecode(path))
        self._discard(inode, path, "discarded_reopened")

    async def _seal_again(
        self, inode: Inode, path: bytes, tier: Tier, replica: Replica
    ) -> Inode | None:
        """The row with the length of the last seal, if a replica has that content.

        The replica gets the record again, which it lost when it was opened for writing.
        """
        absolute = tier.locate(path, bool(replica.fanned))

        def check() -> Inode | None:
            content = content_of(absolute)
            if content is None or content.checksum != inode.checksum:
                return None
            sealed = inode._replace(size_bytes=content.length_bytes)
            tier.write_seal(absolute, seal_from(sealed))
            return sealed

        return await tier.run(check)

    def _revive(self, inode: Inode, path: bytes, rewritten: list[Replica]) -> None:
        self.replicas.forget_replicas(
            inode.id, path, rewritten, state=int(BlockState.SEALED), size_bytes=inode.size_bytes
        )

    def _discard(self, inode: Inode, path: bytes, event: str) -> None:
        self.replicas.remove_block(inode, path)
        self.volume.counters.count(event)
        self.volume.settling_due.set()

    def _forget(self, inode: Inode) -> None:
        with self.volume.catalog.transaction():
            self.volume.catalog.delete(inode.id)

    # --- files that the catalog does not know

    async def absorb_tier(self, tier: Tier) -> None:
        """Bring every file of a tier into the catalog, or out of the namespace."""
        iterator = walk_tier(tier)
        count = 0
        while batch := await in_batches(tier, iterator):
            for found in batch:
                await self.absorb(tier, found)
            before, count = count, count + len(batch)
            if count // PROGRESS_FILES > before // PROGRESS_FILES:
                log.info("tier %s: %d files walked", tier.name, count)
        log.info("tier %s: %d files and directories walked", tier.name, count)

    async def absorb(self, tier: Tier, found: Found) -> None:
        """One file or directory of a tier."""
        if found.is_directory:
            if tier.index == 0 and not self._is_promised(tier, found):
                self._take_xattrs(self._ensure_directory(found.path, found.status), found)
            return
        async with self.volume.claims.hold(found.path):
            if self.judge(tier, found) is Verdict.KNOWN or self._is_promised(tier, found):
                return
            # The walk saw it a while ago: it may have been moved or removed meanwhile.
            if not await tier.run(is_there, tier, found):
                return
            verdict = self.judge(tier, found)
            if verdict in (Verdict.NEW, Verdict.NEWER, Verdict.ADOPT):
                self._adopt(tier, found, verdict)
            elif verdict is Verdict.REPLICA:
                self._add_replica(tier, found)
            elif verdict is Verdict.STALE or verdict is Verdict.TORN:
                await self._set_aside(tier, found, verdict)

    def _is_promised(self, tier: Tier, found: Found) -> bool:
        """Whether it is yet to be renamed or removed there: its name says nothing."""
        return any(
            layout.is_within(found.path, layout.logical_path(intent.path)[0])
            for intent in self.volume.catalog.intents(tier.number)
        )

    def judge(self, tier: Tier, found: Found) -> Verdict:
        """What the file is, by name and seal record. Changes nothing."""
        catalog = self.volume.catalog
        there = catalog.resolve(found.path)
        seal = self._trusted_seal(tier, found, there)
        if there is not None and any(r.tier == tier.number for r in catalog.replicas(there.id)):
            return Verdict.KNOWN
        if seal is None:
            adopt = tier.identity.adopt and there is None
            return Verdict.ADOPT if adopt else Verdict.TORN
        if there is not None and there.id != seal.inode:
            # Numbers only grow: of two blocks at one name the higher one replaced the other.
            newer = self.volume.rebuild and seal.inode > there.id
            return Verdict.NEWER if newer else Verdict.STALE
        row = there or catalog.get(seal.inode)
        if row is None:
            return Verdict.NEW
        if seal.generation > row.generation and (row.state == BlockState.SEALED):
            return Verdict.NEWER
        same = seal.generation == row.generation and seal.checksum == row.checksum
        return Verdict.REPLICA if same and there is not None else Verdict.STALE

    def _trusted_seal(self, tier: Tier, found: Found, there: Inode | None) -> Seal | None:
        """The seal record, unless it comes from another kvfs: its numbers mean nothing here."""
        seal = found.seal
        if seal is None or not tier.identity.adopt:
            return seal
        row = there or self.volume.catalog.get(seal.inode)
        if row is None or (row is there and (row.id, row.checksum) == (seal.inode, seal.checksum)):
            return seal
        return None

    def _adopt(self, tier: Tier, found: Found, verdict: Verdict) -> None:
        """A block appears. A newer generation replaces what was known by its number."""
        if verdict is Verdict.ADOPT:
            found = replace(found, seal=None)
        catalog, seal = self.volume.catalog, found.seal
        if verdict is Verdict.NEWER:
            assert seal is not None, "only a sealed file has a generation"
            for older in (catalog.get(seal.inode), catalog.resolve(found.path)):
                path = catalog.path_of(older.id) if older else None
                if older is not None and path is not None:
                    self.replicas.remove_block(older, path)
        directory, name = layout.split(found.path)
        parent = self._ensure_directory(directory, None)
        allocated = found.status.st_blocks * 512
        with catalog.transaction():
            number = self._insert_found(found)
            catalog.link(parent, name, number)
            tau = found.status.st_mtime
            catalog.add_replica(number, tier.number, allocated, tau, fanned=found.fanned)
            self._take_xattrs(number, found)
        self.volume.space.add(tier.index, allocated)
        self.volume.blocks += 1
        self.volume.counters.count("adopted")
        self.volume.name_changed(parent, name)
        if seal is None:
            self.volume.request_seal(number)

    def _insert_found(self, found: Found) -> int:
        catalog, seal, status = self.volume.catalog, found.seal, found.status
        if seal is None:
            mode = stat.S_IMODE(status.st_mode)
            return catalog.insert_inode(
                Kind.BLOCK, mode, status.st_uid, status.st_gid, status.st_mtime_ns,
                size_bytes=status.st_size, state=BlockState.PUBLISHED,
            )  # fmt: skip
        return catalog.insert_inode(
            Kind.BLOCK, seal.mode, seal.uid, seal.gid, seal.mtime_ns, inode=seal.inode,
            size_bytes=seal.length_bytes, generation=seal.generation,
            state=BlockState.SEALED, checksum=seal.checksum,
        )  # fmt: skip

    def _take_xattrs(self, number: int, found: Found) -> None:
        catalog = self.volume.catalog
        for name, value in found.xattrs:
            if name == PIN:
                pin = value.decode("ascii", "replace").strip()
                catalog.update(number, pin=None if pin in ("", "0") else pin)
            elif name == TTL:
                with contextlib.suppress(KvfsError):
                    catalog.update(number, ttl_s=parse_ttl(value))
            elif not name.startswith(b"user.kvfs."):
                catalog.set_xattr(number, name, value)

    def _add_replica(self, tier: Tier, found: Found) -> None:
        assert found.seal is not None
        allocated = found.status.st_blocks * 512
        tau = self.volume.catalog.tau_of(found.seal.inode) or found.status.st_mtime
        beside_bytes = largest(self.volume.catalog.replicas(found.seal.inode))
        self.volume.catalog.add_replica(
            found.seal.inode, tier.number, allocated, tau, fanned=found.fanned
        )
        self.volume.space.add(tier.index, allocated, beside_bytes=beside_bytes)

    async def _set_aside(self, tier: Tier, found: Found, verdict: Verdict) -> None:
        """Out of the namespace: an empty or older file goes, another one to quarantine."""
        with contextlib.suppress(FileNotFoundError):
            if found.status.st_size == 0 or verdict is Verdict.STALE:
                await tier.run(tier.remove, found.path, found.fanned)
                self.volume.counters.count("stale_removed")
            else:
                aside = await tier.run(tier.quarantine, found.path, found.fanned)
                self.volume.counters.count("quarantined")
                shown = os.fsdecode(found.path)
                log.warning("%r is %s: now %s", shown, verdict.value, os.fsdecode(aside))

    def _ensure_directory(self, path: bytes, status: os.stat_result | None) -> int:
        """The inode of a directory, made with all above it when the catalog lacks it."""
        if not path:
            return ROOT_INODE
        catalog = self.volume.catalog
        known = catalog.resolve(path)
        if known is not None:
            return known.id
        head, name = layout.split(path)
        parent = self._ensure_directory(head, None)
        if status is None:
            status = self._directory_status(path)
        with catalog.transaction():
            number = catalog.insert_inode(
                Kind.DIRECTORY, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid,
                status.st_mtime_ns,
            )  # fmt: skip
            catalog.link(parent, name, number)
        self.volume.directories += 1
        self.volume.name_changed(parent, name)
        return number

    def _directory_status(self, path: bytes) -> os.stat_result:
        first = self.volume.tiers[0]
        absolute = first.locate(path)
        os.makedirs(absolute, mode=0o755, exist_ok=True)
        return os.stat(absolute)

    # --- while serving

    async def reconcile(self, paced: Callable[[], float] = lambda: 0.0) -> None:
        """After an unclean stop: compare each tier with the catalog in both directions."""
        self.volume.walking = True
        for tier in self.volume.tiers:
            if not tier.online:
                continue
            with self.volume.tolerate(f"tier {tier.name}: walk stopped"):
                await self.replicas.settle(tier)
                await self.absorb_tier(tier)
                await self._drop_missing(tier)
            await trio.sleep(paced())
        self.volume.walking = False

    async def _drop_missing(self, tier: Tier) -> None:
        """Rows whose file is gone."""
        after = 0
        while rows := self.volume.catalog.replica_page(tier.number, after):
            expected = []
            for inode, fanned, size, state in rows:
                path = self.volume.catalog.path_of(inode)
                if path is not None and inode not in self.replicas.open_blocks:
                    sealed = size if state == BlockState.SEALED else -1
                    expected.append((inode, path, bool(fanned), sealed))
            missing = await trio.to_thread.run_sync(
                missing_files, tier, expected, limiter=tier.limiter, abandon_on_cancel=tier.remote
            )
            for number in missing:
                await self.confirm_missing(tier, number, drop=True)
            after = rows[-1][0]

    async def confirm_missing(self, tier: Tier, number: int, *, drop: bool) -> bool:
        """Whether a replica's file is really not there; with `drop` it is forgotten then."""
        catalog = self.volume.catalog
        path, inode = catalog.path_of(number), catalog.get(number)
        if path is None or inode is None or number in self.replicas.open_blocks:
            return False
        # A rename that is only promised has its file under the old name.
        await self.replicas.settle(tier)
        async with self.volume.claims.hold(path):
            inode = catalog.get(number)
            mine = [r for r in catalog.replicas(number) if r.tier == tier.number]
            if inode is None or not mine or catalog.path_of(number) != path:
                return False
            size = inode.size_bytes if inode.state == BlockState.SEALED else -1
            expected = [(number, path, bool(mine[0].fanned), size)]
            missing = bool(await tier.run(missing_files, tier, expected))
            if missing and drop:
                self.replicas.lose(inode, tier)
            return missing
