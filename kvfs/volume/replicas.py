"""Where bytes go and how they leave: placement of new files, removal of replicas, intents.

Removal on the tier that is called on the loop happens at once, before the catalog forgets the file.
On every other tier it is promised in the same transaction and carried out by `settle`: an engine's
unlink never waits for a disk, and a tier that is offline learns of it when it returns.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Container, Iterable
from functools import partial
from typing import Any

import trio

from kvfs import failpoints, layout
from kvfs.catalog import scans
from kvfs.catalog.rows import GOOD, BlockState, Inode, Intent, Kind, Replica
from kvfs.errors import BlockBusy, BlockNotFound, RecordBehind, TierFull, reason_of
from kvfs.policy import heat
from kvfs.tiers.backing import rename_into_place
from kvfs.tiers.fan_out import redirect
from kvfs.tiers.health import is_of_medium
from kvfs.tiers.space import Reservation, saved_by, sealed
from kvfs.tiers.tier import Tier
from kvfs.volume.hindsight import holds, is_overtaken
from kvfs.volume.open_block import OpenBlock
from kvfs.volume.volume import Volume

log = logging.getLogger(__name__)

# How many cold residents are looked at when a writer finds every tier full.
EMERGENCY_CANDIDATES = 512
ROOM_ATTEMPTS = 16
ROOM_RETRY_S = 0.05
# So many promises that fail for reasons of their own speak of the tier.
PROMISES_STUCK = 64


def largest(replicas: Iterable[Replica]) -> int:
    """Allocated bytes of the largest of some replicas; 0 of none."""
    return max((replica.allocated_bytes for replica in replicas), default=0)


class Replicas:
    """Owned by the trio loop; `open_blocks` is the table that `kvfs.blocks.blocks` keeps."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.open_blocks: dict[int, OpenBlock] = {}
        # Held bytes that carrying out an intent frees, by intent and summed by tier.
        self._intent_bytes: dict[int, int] = {}
        self._promised_bytes: Counter[int] = Counter()

    # --- choosing

    def readable(self, inode: int) -> list[tuple[Tier, Replica]]:
        """Good replicas on tiers that answer, fastest first."""
        by_number = self.volume.by_number
        found = [
            (by_number[replica.tier], replica)
            for replica in self.volume.catalog.replicas(inode)
            if replica.state == GOOD and by_number[replica.tier].online
        ]
        return sorted(found, key=lambda pair: pair[0].index)

    async def place(
        self, at_least_bytes: int, *keys: object, after: int = -1
    ) -> tuple[Tier, Reservation]:
        """The fastest tier below `after` with room, and the room. Evicts as a last resort.

        Raises TierFull.
        """
        volume = self.volume
        candidates = [t for t in volume.tiers if t.accepts and t.index > after]
        for tier in candidates:
            wanted = max(at_least_bytes, volume.space.expected_bytes(tier.index, *keys))
            reservation = volume.space.reserve(tier.index, wanted)
            if reservation is not None:
                self._watch(tier)
                return tier, reservation
        volume.request_tiering()
        if volume.config.tiering.on_full == "evict" and candidates:
            last = candidates[-1]
            wanted = max(at_least_bytes, volume.space.expected_bytes(last.index, *keys))
            # Another writer may take the room while the files are removed.
            while await self.wait_for_room(last, wanted):
                reservation = volume.space.reserve(last.index, wanted)
                if reservation is not None:
                    return last, reservation
        volume.counters.count("refused_full", reason="full")
        raise TierFull("every tier is full")

    def _watch(self, tier: Tier) -> None:
        account = self.volume.space[tier.index]
        _, mark = self.volume.config.tiering.watermarks(tier.config)
        if account.taken_bytes > mark * account.planned_bytes:
            self.volume.request_tiering()

    async def wait_for_room(self, tier: Tier, wanted_bytes: int) -> bool:
        """`make_room`, tried for a while: what is being sealed or moved now can go in a moment."""
        for _ in range(ROOM_ATTEMPTS):
            if await self.make_room(tier, wanted_bytes):
                return True
            await trio.sleep(ROOM_RETRY_S)
        return False

    async def make_room(self, tier: Tier, wanted_bytes: int) -> bool:
        """Evict the coldest from a tier that is full to the last byte; whether it has room then."""
        volume = self.volume
        account = volume.space[tier.index]
        rows = volume.catalog.coldest(tier.number, EMERGENCY_CANDIDATES)
        for inode in rows:
            if wanted_bytes <= account.free_bytes + self._promised_bytes[tier.number]:
                break
            try:
                self._leave(inode, tier)
            except (BlockBusy, BlockNotFound) as error:
                volume.counters.count("evictions_skipped", reason=error.reason, tier=tier.name)
                continue
            volume.counters.count("emergency_evictions")
        await self.settle(tier)
        return wanted_bytes <= account.free_bytes

    def _leave(self, number: int, tier: Tier) -> None:
        """Drop a block's copy on a tier, or the block if that was the last one."""
        elsewhere = [t for t, _ in self.readable(number) if t is not tier]
        inode = self.volume.catalog.get(number)
        if not elsewhere or inode is None:
            self.evict(number, from_tier=tier, reason="writer")
            return
        path = self.check_evictable(inode)
        mine = [r for r in self.volume.catalog.replicas(number) if r.tier == tier.number]
        self.forget_replicas(number, path, mine)

    async def relieve(self, block: OpenBlock, size_bytes: int) -> bool:
        """Evict for a writer whose tier is the last; whether its file may have this size then."""
        tier, reservation = block.tier, block.reservation
        if reservation is None or self.volume.config.tiering.on_full != "evict":
            return False
        if any(other.accepts and other.index > tier.index for other in self.volume.tiers):
            return False
        more = sealed(size_bytes) - block.accounted_bytes - reservation.size_bytes
        return more > 0 and await self.wait_for_room(tier, more)

    # --- removing

    def remove_block(self, inode: Inode, path: bytes) -> None:
        """The block goes: name, rows, and the files of all replicas.

        Raises OSError, with nothing changed, when the inline tier refuses that very file.
        """
        volume = self.volume
        replicas = volume.catalog.replicas(inode.id)
        removed = self._remove_inline(path, replicas)
        failpoints.hit("remove.inline_removed")
        with volume.catalog.transaction("remove"):
            promised = self.promise_removal(inode.id, path, replicas, removed)
            volume.catalog.delete(inode.id)
        self.account_removal(inode, replicas, promised)

    def _remove_inline(self, path: bytes, replicas: list[Replica]) -> set[int]:
        """Unlink at once on the tier that is called on the loop; the numbers of tiers where that
        was done. One that fails is promised it like the others."""
        removed = set()
        for replica in replicas:
            tier = self.volume.by_number[replica.tier]
            if not (tier.inline and tier.online):
                continue
            try:
                with tier.judged():
                    tier.remove(path, bool(replica.fanned))
            except OSError as error:
                if not is_of_medium(error):
                    raise
            else:
                removed.add(tier.number)
        return removed

    def promise_removal(
        self, inode: int, path: bytes, replicas: list[Replica], removed: Container[int] = ()
    ) -> dict[int, int]:
        """Intents to unlink the files of replicas, but for tiers where they are `removed`; tier
        number -> intent. In a transaction of the caller, who calls `account_removal` after it."""
        promised = {}
        for replica in replicas:
            tier = self.volume.by_number[replica.tier]
            if tier.number not in removed:
                stored = layout.stored_path(path, bool(replica.fanned))
                intent = self.volume.catalog.intents.add(tier.number, "unlink", inode, stored)
                promised[tier.number] = intent.id
        return promised

    def account_removal(
        self, inode: Inode, replicas: list[Replica], promised: dict[int, int]
    ) -> None:
        """Bring accounts and open handles up to date after the rows are gone."""
        volume = self.volume
        block = self.open_blocks.get(inode.id)
        for place, replica in enumerate(replicas):
            tier = volume.by_number[replica.tier]
            account = volume.space[tier.index]
            self.uncount(replica, replicas[place + 1 :])
            if block is not None and block.tier is tier and not block.fetched:
                block.accounted_bytes = replica.allocated_bytes
                block.hold(account)
            elif tier.number in promised:
                self._hold_promised(tier, promised[tier.number], replica.allocated_bytes)
        if block is not None:
            block.orphan = inode
        volume.accesses.forget(inode.id)
        volume.blocks -= 1

    def account_spill(self, replicas: list[Replica], source: Tier, target: Tier) -> None:
        """A file being written went on elsewhere, in place of an older copy there."""
        rest = list(replicas)
        for replica in replicas:
            if replica.tier in (source.number, target.number):
                rest.remove(replica)
                self.uncount(replica, rest)
        self.volume.space.add(target.index, 0)

    def uncount(self, replica: Replica, rest: list[Replica]) -> None:
        """A replica went, and the block keeps the rest."""
        self.volume.space.remove(
            self.volume.by_number[replica.tier].index, replica.allocated_bytes,
            beside_bytes=largest(rest), saved_bytes=replica.saved_bytes,
        )  # fmt: skip

    def _hold_promised(self, tier: Tier, intent: int, allocated_bytes: int) -> None:
        """Until the file is unlinked its bytes are on the tier."""
        self._intent_bytes[intent] = allocated_bytes
        self._promised_bytes[tier.number] += allocated_bytes
        self.volume.space[tier.index].held_bytes += allocated_bytes

    def forget_replicas(
        self, inode: int, path: bytes, gone: list[Replica], **columns: Any
    ) -> dict[int, int]:
        """Some replicas of a block are no more, and what it keeps is good; tier number -> intent.

        `columns` of the inode change with it.
        """
        volume = self.volume
        rest = volume.catalog.replicas(inode)
        with volume.catalog.transaction("forget_replicas"):
            promised = self.promise_removal(inode, path, gone)
            for replica in gone:
                volume.catalog.drop_replica(inode, replica.tier)
            volume.catalog.set_replica_states(inode, GOOD, besides=-1)
            if columns:
                volume.catalog.update(inode, **columns)
        block = self.open_blocks.get(inode)
        for replica in gone:
            rest.remove(replica)
            tier = volume.by_number[replica.tier]
            size = replica.allocated_bytes
            self.uncount(replica, rest)
            if block is not None and block.tier is tier and not block.fetched:
                block.accounted_bytes = size
                block.hold(volume.space[tier.index])
            else:
                self._hold_promised(tier, promised[tier.number], size)
        volume.settling_due.set()
        return promised

    async def drop(self, inode: Inode, tier: Tier, path: bytes) -> int:
        """Remove one replica of a block that has another; its bytes. The caller claims the path."""
        replicas = self.volume.catalog.replicas(inode.id)
        mine = [replica for replica in replicas if replica.tier == tier.number]
        assert mine, "the replica to drop is not there"
        assert len(replicas) > 1, "the last replica is evicted, not dropped"
        promised = self.forget_replicas(inode.id, path, mine)
        await tier.run(tier.remove, path, bool(mine[0].fanned))
        failpoints.hit("drop.removed")
        self.finish(tier, promised[tier.number])
        return mine[0].allocated_bytes

    def check_evictable(self, inode: Inode) -> bytes:
        """The path of a block that may go now. Raises BlockBusy with the reason."""
        volume = self.volume
        entry = volume.catalog.entry(inode.id)
        path = volume.catalog.path_of(inode.id)
        if entry is None or path is None or inode.kind != Kind.BLOCK:
            raise BlockNotFound("no such block")
        if inode.id in self.open_blocks:
            raise BlockBusy("it is open")
        if inode.state != BlockState.SEALED:
            raise volume.not_sealed(inode.id)
        if inode.pin is not None or self.pinned_by_directory(entry[0]):
            raise BlockBusy("it is pinned")
        if not volume.claims.is_free(path):
            raise BlockBusy("it is being moved")
        return path

    def pinned_by_directory(self, directory: int) -> bool:
        """Whether a directory above holds a pin."""
        connection = self.volume.catalog.connection
        return scans.is_pinned(connection, scans.pinned_directories(connection), directory)

    def evict(self, number: int, *, reason: str, from_tier: Tier | None = None) -> int:
        """Drop a block with all its replicas; bytes freed. Raises BlockBusy, BlockNotFound.

        For `watermark` and for a `writer` what matches `keep` stays.
        """
        volume = self.volume
        inode = volume.catalog.get(number)
        if inode is None:
            raise BlockNotFound("no such block")
        path = self.check_evictable(inode)
        parent, name = volume.catalog.entry(number) or (0, b"")
        own = reason in ("watermark", "writer")
        if own and scans.is_kept(name, volume.config.tiering.keep):
            raise BlockBusy("its name matches `keep`")
        replicas = volume.catalog.replicas(number)
        tau = volume.accesses.tau(number, volume.catalog.tau_of(number) or heat.never)
        self.remove_block(inode, path)
        failpoints.hit("evict.removed")
        volume.name_changed(parent, name)
        volume.catalog.ghosts.add(path, tau)
        last = from_tier or volume.by_number[max(r.tier for r in replicas)]
        volume.counters.tier(last.index).evictions += 1
        volume.counters.count("evictions", reason=reason, tier=last.name)
        return sum(replica.allocated_bytes for replica in replicas)

    def measured(self, number: int, tier: Tier, allocated_bytes: int, **columns: Any) -> None:
        """What a replica allocates by now; a record may have taken a page of its own. Other
        columns of it may change as well. Nothing when the replica has gone meanwhile."""
        catalog = self.volume.catalog
        row, others = catalog.get(number), catalog.replicas(number)
        mine = next((replica for replica in others if replica.tier == tier.number), None)
        if row is None or mine is None:
            return
        others.remove(mine)
        codec = columns.get("codec", mine.codec)
        saved_bytes = saved_by(codec, row.size_bytes, allocated_bytes)
        catalog.update_replica(
            number, tier.number,
            allocated_bytes=allocated_bytes, saved_bytes=saved_bytes, **columns,
        )  # fmt: skip
        self.volume.space.resize(
            tier.index, mine.allocated_bytes, allocated_bytes, beside_bytes=largest(others),
            saved_more_bytes=saved_bytes - mine.saved_bytes,
        )  # fmt: skip

    def lose(self, inode: Inode, tier: Tier, reason: str = "no such file") -> None:
        """A replica's file is gone: forget it, and with the last one the block."""
        volume = self.volume
        path = volume.catalog.path_of(inode.id)
        replicas = volume.catalog.replicas(inode.id)
        mine = [replica for replica in replicas if replica.tier == tier.number]
        if not mine or path is None:
            return
        text = f"tier {tier.name} lost {os.fsdecode(path)!r}: {reason}"
        volume.incidents.note("replicas_lost", text, reason="gone", tier=tier.name)
        self.forget_file(inode, tier)

    def forget_file(self, inode: Inode, tier: Tier) -> None:
        """A replica's file is not at its place any more: its row goes, and the block with the
        last one."""
        volume = self.volume
        replicas = volume.catalog.replicas(inode.id)
        mine = [replica for replica in replicas if replica.tier == tier.number]
        if not mine:
            return
        others = [replica for replica in replicas if replica.tier != tier.number]
        if others:
            with volume.catalog.transaction("lose_replica"):
                volume.catalog.drop_replica(inode.id, tier.number)
            self.uncount(mine[0], others)
            return
        entry = volume.catalog.entry(inode.id)
        with volume.catalog.transaction("lose_block"):
            volume.catalog.delete(inode.id)
        self.account_removal(inode, replicas, {})
        if entry is not None:
            volume.name_changed(*entry)

    # --- intents

    async def settle(self, tier: Tier) -> None:
        """Carry out what was promised for a tier, in order. Stops where the tier fails.

        A promise that fails for a reason of its own holds up only those for the same paths.
        """
        catalog = self.volume.catalog
        stuck: list[Intent] = []
        for intent in catalog.intents.left(tier.number):
            if any(meets(intent, *_paths_of(other)) for other in stuck):
                continue
            stored = [path for path in (intent.path, intent.target) if path is not None]
            async with self.volume.claims.hold(*(layout.logical_path(p)[0] for p in stored)):
                # Who promised it may have done it meanwhile, and the old name be another's.
                if not catalog.intents.is_left(intent.id):
                    continue
                try:
                    await self.apply(tier, intent)
                except OSError as error:
                    if is_of_medium(error) or len(stuck) >= PROMISES_STUCK:
                        raise
                    stuck.append(intent)
                    self._is_stuck(tier, intent, error)
                    continue
                failpoints.hit("intent.applied")
                self.finish(tier, intent.id)
        catalog.intents.flush()
        tier.health.behind = bool(tier.health.behind and catalog.intents.left(tier.number))

    def _is_stuck(self, tier: Tier, intent: Intent, error: OSError) -> None:
        what = f"tier {tier.name}: {intent.kind} of {os.fsdecode(intent.path)!r} is still promised"
        self.volume.incidents.note(
            "promises_stuck", f"{what}: {error}", reason=reason_of(error), tier=tier.name
        )

    async def catch_up(self, tier: Tier) -> None:
        """Before a tier that was away is asked for a file by its name."""
        if tier.health.behind:
            with self.volume.tolerate("what is promised", tier.name):
                await self.settle(tier)

    def finish(self, tier: Tier, intent: int) -> None:
        """An intent is done: what it held is free."""
        freed_bytes = self._intent_bytes.pop(intent, 0)
        self._promised_bytes[tier.number] -= freed_bytes
        self.volume.space[tier.index].held_bytes -= freed_bytes
        self.volume.catalog.intents.done(intent)

    async def apply(self, tier: Tier, intent: Intent) -> None:
        """Do what an intent says unless it is void by now. The caller claims the path."""
        catalog = self.volume.catalog
        if intent.id <= self.volume.doubted_intent and await self._is_overtaken(tier, intent):
            return
        if intent.kind == "unlink":
            if catalog.replica_at(tier.number, intent.path) is None:
                await tier.run(_remove_stored, tier, intent.path)
            return
        assert intent.target is not None
        # In order, also when the block has yet another name by now: the next intent starts there.
        there = catalog.replica_at(tier.number, intent.path)
        path = tier.root + b"/" + intent.path
        if there is not None and not (
            # Another's by now, in the catalog; on a tier that was away it still is what moves.
            there != intent.inode and await tier.run(holds, tier, path, intent.inode)
        ):
            return
        if catalog.replica_at(tier.number, intent.target) not in (None, intent.inode):
            return
        await self.carry_out_rename(tier, intent)

    async def _is_overtaken(self, tier: Tier, intent: Intent) -> bool:
        alive = self.volume.catalog.get(intent.inode) is not None
        return await tier.run(partial(is_overtaken, tier, intent, alive=alive))

    async def carry_out_rename(self, tier: Tier, intent: Intent) -> None:
        """Do what an intent to rename says. The caller claims the path. Raises RecordBehind too."""
        assert intent.target is not None, "a rename has a target"
        try:
            await tier.run(_rename_stored, tier, intent.path, intent.target)
        except FileNotFoundError:
            # Renamed before a crash, but perhaps without the record that says so.
            await tier.confirm_present()
        except OSError as error:
            redirected = await redirect(self.volume.catalog, tier, intent, error)
            await self.carry_out_rename(tier, redirected)
            return
        inode = self.volume.catalog.get(intent.inode)
        if inode and inode.kind == Kind.BLOCK and inode.state == BlockState.SEALED:
            try:
                await tier.run(_raise_generation, tier, intent.target, inode)
            except OSError as error:
                raise RecordBehind(error.errno, error.strerror) from error


def meets(intent: Intent, *paths: bytes) -> bool:
    """Whether an intent speaks of one of these paths, or of what is above or below them."""
    return any(
        layout.is_within(path, name) or layout.is_within(name, path)
        for path in paths for name in _paths_of(intent)
    )  # fmt: skip


def _paths_of(intent: Intent) -> list[bytes]:
    stored = (intent.path, intent.target or intent.path)
    return [layout.logical_path(path)[0] for path in stored]


def _remove_stored(tier: Tier, stored: bytes) -> None:
    path, fanned = layout.logical_path(stored)
    tier.remove(path, fanned)
    failpoints.hit("intent.removed")


def _rename_stored(tier: Tier, source: bytes, target: bytes) -> None:
    """Rename below a tier's root, making the target's directories. Repeating is harmless."""
    old, new = tier.root + b"/" + source, tier.root + b"/" + target
    failpoints.hit("intent.renaming")
    rename_into_place(tier, old, new)
    failpoints.hit("intent.renamed")
    if tier.index > 0:
        tier.remove_empty_parents(os.path.dirname(old))


def _raise_generation(tier: Tier, stored: bytes, inode: Inode) -> None:
    absolute = tier.root + b"/" + stored
    seal = tier.read_seal(absolute)
    if seal is not None and seal.inode == inode.id:
        # That it was touched must not be hidden by this.
        tier.write_seal(absolute, seal.at_generation(inode.generation), keep_time=True)
        failpoints.hit("intent.generation_raised")
