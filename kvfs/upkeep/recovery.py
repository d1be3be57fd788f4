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

from kvfs import failpoints, layout
from kvfs.blocks.attributes import PIN, TTL, differs, parse_ttl, stored_pin, takeable
from kvfs.blocks.verify import Verifier
from kvfs.catalog.rows import ROOT_INODE, BlockState, Inode, Kind, Placed, Replica
from kvfs.errors import KvfsError
from kvfs.policy import heat
from kvfs.tiers.backing import sync_block
from kvfs.tiers.identity import write_identity
from kvfs.tiers.seal import Seal, seal_from
from kvfs.tiers.space import saved_by
from kvfs.tiers.tier import Tier
from kvfs.tiers.walk import Fault, Found, fault_of, in_batches, is_there, missing_files, walk_tier
from kvfs.upkeep.unfinished import Unfinished
from kvfs.volume.hindsight import holds, is_another
from kvfs.volume.replicas import Replicas, largest
from kvfs.volume.volume import Volume

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
    DUPLICATE = "a block that the catalog knows elsewhere on the tier"
    ADOPT = "not sealed, to be adopted"


class Recovery:
    """Owned by the trio loop."""

    def __init__(self, volume: Volume, replicas: Replicas, verifier: Verifier) -> None:
        self.volume = volume
        self.replicas = replicas
        self.verifier = verifier
        self.quarantine = verifier.quarantine
        self.unfinished = Unfinished(volume, replicas, verifier.quarantine)
        # Tiers to compare with the catalog yet: those that were away are when they come back.
        self.unwalked: set[Tier] = set()
        # Blocks that a catalog which is behind did not know at their names: their files are
        # evidence of what came later. Few: what was done between its last fsync and the end.
        self._appeared: set[int] = set()

    async def before_serving(self) -> None:
        """Everything that must hold before the first request."""
        volume = self.volume
        if volume.rebuild or (volume.unclean and not volume.same_boot):
            # Blocks that only a tier knows keep their numbers: new ones must not be among them.
            volume.catalog.skip_numbers(int(volume.clock.now_s()) << NUMBERS_PER_SECOND_BITS)
        volume.catalog.clamp_heat(
            volume.clock.now_s() + heat.MAX_HALF_LIVES_AHEAD * volume.config.tiering.half_life_s
        )
        failpoints.hit("recovery.begun")
        await self.quarantine.run_once()
        for tier in volume.tiers:
            if not tier.online:
                continue
            with volume.tolerate("recovery", tier.name):
                swept = await tier.run_in_thread(tier.sweep_staging)
                if swept:
                    log.info("tier %s: %d unfinished copies removed", tier.name, swept)
                await self.replicas.settle(tier)
                failpoints.hit("recovery.settled")
        await self.unfinished.decide()
        failpoints.hit("recovery.decided")
        if volume.rebuild:
            log.info("the catalog is missing: it is rebuilt from the tiers")
        for tier in volume.tiers:
            adopting = tier.online and tier.identity.adopt
            if tier.online and (volume.rebuild or adopting):
                self.unwalked.add(tier)
                tolerated = volume.tolerate("walk stopped", tier.name)
                with tolerated if tier.remote else contextlib.nullcontext():
                    await self.absorb_tier(tier)
                    self.unwalked.discard(tier)
            if adopting and tier not in self.unwalked:
                failpoints.hit("recovery.adopted")
                tier.identity = msgspec.structs.replace(tier.identity, adopt=False)
                write_identity(tier.config.path, tier.identity)
        volume.recovered()
        if volume.rebuild and not self.unwalked:
            volume.caught_up()

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
            if tier.index > 0:
                # Made for a file that never came, or left by one that went.
                await tier.run(tier.remove_empty_parents, tier.locate(found.path))
            elif not self.is_promised(tier, found):
                self._take_xattrs(self._ensure_directory(found.path, found.status), found)
            return
        if self.judge(tier, found) is Verdict.KNOWN:
            await self._mend_record(tier, found)
            return
        async with self.volume.claims.hold(found.path, *self._expected_at(found)):
            if self.judge(tier, found) is Verdict.KNOWN or self.is_promised(tier, found):
                return
            # The walk saw it a while ago: it may have been moved or removed meanwhile.
            if not await tier.run(is_there, tier, found):
                return
            verdict = self.judge(tier, found)
            if self.volume.catalog_behind:
                verdict = await self._with_hindsight(tier, found, verdict)
            if verdict is Verdict.NEWER:
                await self._supersede(tier, found)
            if verdict in (Verdict.NEW, Verdict.NEWER, Verdict.ADOPT):
                await self._adopt(tier, found, verdict)
            elif verdict is Verdict.REPLICA:
                self._add_replica(tier, found)
            elif verdict in (Verdict.STALE, Verdict.TORN, Verdict.DUPLICATE):
                await self._set_aside(tier, found, verdict)

    async def _mend_record(self, tier: Tier, found: Found) -> None:
        """A sealed block's file whose record went, or is not of this seal: a crash came between.

        What it holds is read first, and the record is written again if it is what was sealed.
        """
        inode = self.volume.catalog.resolve(found.path)
        if inode is None or self._lacks_record(tier, found, inode) is None:
            return
        if self.is_promised(tier, found):
            return
        if await self.verifier.condemn(inode.id, tier):
            return
        async with self.volume.claims.hold(found.path):
            row = self.volume.catalog.resolve(found.path)
            replica = self._lacks_record(tier, found, row) if row is not None else None
            if row is not None and replica is not None and row.id == inode.id:
                absolute = tier.locate(found.path, found.fanned)
                seal = seal_from(row, replica.codec)
                status = await tier.run(tier.write_seal, absolute, seal)
                failpoints.hit("recovery.record_mended")
                self.replicas.measured(row.id, tier, status.st_blocks * 512)
                if tier.durable:
                    await tier.run_in_thread(sync_block, tier, [absolute])

    def _lacks_record(self, tier: Tier, found: Found, inode: Inode) -> Replica | None:
        """The replica, if its file lacks a record. One that looks like another block's is found by
        its row."""
        if inode.state != BlockState.SEALED or inode.id in self.replicas.open_blocks:
            return None
        if found.seal is not None and not differs(found.seal, inode):
            return None
        for replica in self.volume.catalog.replicas(inode.id):
            if replica.tier == tier.number and found.may_hold(inode, replica.codec):
                return replica
        return None

    def is_promised(self, tier: Tier, found: Found) -> bool:
        """Whether it is yet to be renamed or removed there: its name says nothing."""
        return any(
            layout.is_within(found.path, layout.logical_path(intent.path)[0])
            for intent in self.volume.catalog.intents.left(tier.number)
        )

    def judge(self, tier: Tier, found: Found) -> Verdict:
        """What the file is, by name and seal record. Changes nothing."""
        catalog = self.volume.catalog
        there = catalog.resolve(found.path)
        seal = self._trusted_seal(tier, found, there)
        behind = self.volume.catalog_behind
        for replica in catalog.replicas(there.id) if there is not None else ():
            if replica.tier == tier.number:
                if behind and there and seal and is_another(seal, there):
                    gone = seal.inode < there.id and catalog.get(seal.inode) is None
                    return Verdict.STALE if gone else Verdict.NEWER
                at_its_place = bool(replica.fanned) == found.fanned
                return Verdict.KNOWN if at_its_place else Verdict.DUPLICATE
        if seal is None:
            adopt = tier.identity.adopt and there is None
            return Verdict.ADOPT if adopt else Verdict.TORN
        if there is not None and there.id != seal.inode:
            # Numbers only grow: of two blocks at one name the higher one replaced the other.
            newer = behind and seal.inode > there.id
            return Verdict.NEWER if newer else Verdict.STALE
        row = there or catalog.get(seal.inode)
        if row is None:
            return Verdict.NEW
        if seal.generation > row.generation and (row.state == BlockState.SEALED):
            return Verdict.NEWER
        if (seal.generation, seal.checksum) != (row.generation, row.checksum):
            return Verdict.STALE
        return Verdict.DUPLICATE if there is None else Verdict.REPLICA

    def _trusted_seal(self, tier: Tier, found: Found, there: Inode | None) -> Seal | None:
        """The seal record, unless it comes from another kvfs: its numbers mean nothing here."""
        seal = found.seal
        if seal is None or not tier.identity.adopt:
            return seal
        row = there or self.volume.catalog.get(seal.inode)
        if row is None or (row is there and (row.id, row.checksum) == (seal.inode, seal.checksum)):
            return seal
        return None

    def _expected_at(self, found: Found) -> list[bytes]:
        """Where a catalog that is behind has the block of a file: nobody opens it there meanwhile
        and finds it gone."""
        if found.seal is None or not self.volume.catalog_behind:
            return []
        path = self.volume.catalog.path_of(found.seal.inode)
        return [] if path is None else [path]

    async def _with_hindsight(self, tier: Tier, found: Found, verdict: Verdict) -> Verdict:
        """A file that the catalog expects elsewhere is the block, unless that is there as well, or
        a later block has the name."""
        seal = found.seal
        row = self.volume.catalog.get(seal.inode) if seal else None
        if row is None or seal is None:
            return verdict
        if verdict not in (Verdict.NEWER, Verdict.STALE, Verdict.DUPLICATE):
            return verdict
        if verdict is Verdict.STALE and await self._is_replaced(row, tier, found):
            return verdict
        if seal.generation > row.generation:
            # Renamed or rewritten after what the catalog knows: older only than who had the name.
            return Verdict.NEWER if verdict is Verdict.STALE else verdict
        if not await self._is_elsewhere(row, tier, found):
            return Verdict.NEWER
        return Verdict.DUPLICATE if verdict is Verdict.NEWER else verdict

    async def _is_replaced(self, row: Inode, tier: Tier, found: Found) -> bool:
        """Whether a later block has the name of a file, on another tier: then only a directory
        above was renamed, and the file in it was to be removed."""
        later = self.volume.catalog.resolve(found.path)
        if later is None or later.id == row.id:
            return False
        if not self.volume.rebuild and later.id not in self._appeared:
            # Known at that name before: it is what was replaced.
            return False
        return await self._is_elsewhere(later, tier, found)

    async def _is_elsewhere(self, row: Inode, tier: Tier, found: Found) -> bool:
        """Whether a block has, or may have, another file than the one that was found."""
        path = self.volume.catalog.path_of(row.id)
        block = self.replicas.open_blocks.get(row.id)
        is_open = block is not None and block.descriptor >= 0
        if path is None or is_open or row.state != BlockState.SEALED:
            return True
        for replica in self.volume.catalog.replicas(row.id):
            place, fanned = self.volume.by_number[replica.tier], bool(replica.fanned)
            if (place, path, fanned) == (tier, found.path, found.fanned):
                continue
            absolute = place.locate(path, fanned)
            if not place.online or await place.run(holds, place, absolute, row.id):
                return True
        return False

    async def _supersede(self, tier: Tier, found: Found) -> None:
        """What was known by the number or the name of a newer file goes, with the files that are
        still its own."""
        assert found.seal is not None, "only a sealed file has a generation"
        catalog = self.volume.catalog
        for older in (catalog.get(found.seal.inode), catalog.resolve(found.path)):
            path = catalog.path_of(older.id) if older else None
            if older is None or path is None:
                continue
            for replica in catalog.replicas(older.id):
                place, fanned = self.volume.by_number[replica.tier], bool(replica.fanned)
                absolute = place.locate(path, fanned)
                removable = place.online and (place, path) != (tier, found.path)
                if removable and await place.run(holds, place, absolute, older.id):
                    await place.run(place.remove, path, fanned)
                self.replicas.forget_file(older, place)
            failpoints.hit("recovery.superseded")

    async def _adopt(self, tier: Tier, found: Found, verdict: Verdict) -> None:
        """A block appears."""
        if verdict is Verdict.ADOPT:
            found = replace(found, seal=None)
        row = self._enter(tier, found)
        if self.volume.catalog_behind and not self.volume.rebuild:
            self._appeared.add(row.id)
        if found.seal is None and found.header is not None:
            # Complete by its header; nobody else would give it a record.
            absolute = tier.locate(found.path, found.fanned)
            status = await tier.run(tier.write_seal, absolute, seal_from(row, found.codec))
            self.replicas.measured(row.id, tier, status.st_blocks * 512)
        elif found.seal is None:
            self.volume.request_seal(row.id)

    def _enter(self, tier: Tier, found: Found) -> Inode:
        """The row of a block that appears."""
        catalog = self.volume.catalog
        directory, name = layout.split(found.path)
        parent = self._ensure_directory(directory, None)
        allocated = found.status.st_blocks * 512
        with catalog.transaction("adopt"):
            number = self._insert_found(found)
            catalog.link(parent, name, number)
            tau = found.status.st_mtime
            row = catalog.get(number)
            assert row is not None
            saved_bytes = saved_by(found.codec, row.size_bytes, allocated)
            catalog.add_replica(
                number, tier.number, allocated, tau, fanned=found.fanned,
                mtime_ns=found.status.st_mtime_ns, codec=found.codec, saved_bytes=saved_bytes,
            )  # fmt: skip
            self._take_xattrs(number, found)
        self.volume.space.add(tier.index, allocated, saved_bytes=saved_bytes)
        self.volume.blocks += 1
        self.volume.counters.count("adopted")
        self.volume.name_changed(parent, name)
        return row

    def _insert_found(self, found: Found) -> int:
        catalog, seal, status = self.volume.catalog, found.seal, found.status
        if seal is None:
            mode, header = stat.S_IMODE(status.st_mode), found.header
            return catalog.insert_inode(
                Kind.BLOCK, mode, status.st_uid, status.st_gid, status.st_mtime_ns,
                size_bytes=header.size_bytes if header else status.st_size,
                state=BlockState.SEALED if header else BlockState.PUBLISHED,
                checksum=header.checksum if header else None,
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
                catalog.update(number, pin=stored_pin(value))
            elif name == TTL:
                with contextlib.suppress(KvfsError):
                    catalog.update(number, ttl_s=parse_ttl(value))
        for name, value in takeable(found.xattrs):
            catalog.set_xattr(number, name, value)

    def _add_replica(self, tier: Tier, found: Found) -> None:
        assert found.seal is not None
        allocated = found.status.st_blocks * 512
        tau = self.volume.catalog.tau_of(found.seal.inode) or found.status.st_mtime
        beside_bytes = largest(self.volume.catalog.replicas(found.seal.inode))
        saved_bytes = saved_by(found.codec, found.seal.length_bytes, allocated)
        with self.volume.catalog.transaction("adopt_replica"):
            self.volume.catalog.add_replica(
                found.seal.inode, tier.number, allocated, tau, fanned=found.fanned,
                mtime_ns=found.status.st_mtime_ns, codec=found.codec, saved_bytes=saved_bytes,
            )  # fmt: skip
        self.volume.space.add(
            tier.index, allocated, beside_bytes=beside_bytes, saved_bytes=saved_bytes
        )

    async def _set_aside(self, tier: Tier, found: Found, verdict: Verdict) -> None:
        """Out of the namespace: an empty or older file goes, another one to quarantine."""
        with contextlib.suppress(FileNotFoundError):
            if found.status.st_size == 0 or verdict is Verdict.STALE:
                await tier.run(tier.remove, found.path, found.fanned)
                failpoints.hit("recovery.stale_removed")
                self.volume.counters.count("stale_removed")
            else:
                await self.quarantine.put(
                    tier, found.path, found.fanned, reason="unknown", message=f"is {verdict.value}"
                )

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
        with catalog.transaction("adopt_directory"):
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
        first.files.make_directories(absolute)
        return first.files.status(absolute)

    # --- while serving

    async def reconcile(self, paced: Callable[[], float] = lambda: 0.0) -> None:
        """After an unclean stop: compare each tier with the catalog in both directions."""
        self.volume.walking = True
        self.unwalked.update(self.volume.tiers)
        # What left one tier may be on the next: rows go when all files have been seen.
        absorbed = [tier for tier in self.volume.tiers if await self._absorb_online(tier)]
        for tier in absorbed:
            await self._finish_walk(tier)
            await trio.sleep(paced())
        if not self.unwalked:
            self.volume.caught_up()
        self.volume.walking = False
        failpoints.hit("recovery.reconciled")

    async def walk(self, tier: Tier) -> None:
        """Compare one tier with the catalog; one that is away or fails is left for later."""
        if await self._absorb_online(tier):
            await self._finish_walk(tier)
            if self.volume.catalog_behind and not self.unwalked:
                self.volume.caught_up()

    async def _absorb_online(self, tier: Tier) -> bool:
        """Whether all files of a tier have been seen."""
        if tier.online:
            with self.volume.tolerate("walk stopped", tier.name):
                await self.replicas.settle(tier)
                await self.absorb_tier(tier)
                failpoints.hit("recovery.walked")
                return True
        return False

    async def _finish_walk(self, tier: Tier) -> None:
        with self.volume.tolerate("walk stopped", tier.name):
            await self._drop_missing(tier)
            self.unwalked.discard(tier)

    async def _drop_missing(self, tier: Tier) -> None:
        """Rows whose file is gone."""
        after = 0
        while rows := self.volume.catalog.replica_page(tier.number, after):
            expected = []
            for placed in rows:
                path = self.volume.catalog.path_of(placed.inode)
                if path is not None and placed.inode not in self.replicas.open_blocks:
                    expected.append((path, placed))
            for placed in await tier.run_in_thread(missing_files, tier, expected):
                await self.confirm_fault(tier, placed.inode, repair=True)
            after = rows[-1].inode

    async def confirm_fault(
        self, tier: Tier, number: int, *, repair: bool, settle: bool = True
    ) -> Fault | None:
        """What is really wrong with a replica's file by its looks. `repair` forgets a replica
        without one, and quarantines one that is bad; `settle` does what is promised first.
        """
        catalog = self.volume.catalog
        path, inode = catalog.path_of(number), catalog.get(number)
        if path is None or inode is None or number in self.replicas.open_blocks:
            return None
        # A rename that is only promised has its file under the old name.
        if settle:
            await self.replicas.settle(tier)
        async with self.volume.claims.hold(path):
            inode = catalog.get(number)
            mine = [r for r in catalog.replicas(number) if r.tier == tier.number]
            if inode is None or not mine or catalog.path_of(number) != path:
                return None
            placed = Placed(
                number, mine[0].fanned, mine[0].codec, inode.size_bytes, inode.state, inode.checksum
            )
            fault = await tier.run(fault_of, tier, path, placed)
            if fault == "missing-file" and repair:
                self.replicas.lose(inode, tier)
        if fault not in (None, "missing-file") and repair:
            await self.verifier.condemn(number, tier)
        return fault
