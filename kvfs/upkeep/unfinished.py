"""What was not sealed when kvfs stopped: complete after all, or out of the namespace.

Decided before the first request. A seal record that fits, or the content of the last seal, proves a
block complete; so does having been published, while the machine did not stop.
"""

from __future__ import annotations

import contextlib
import logging
import os

from kvfs import failpoints
from kvfs.blocks.quarantine import Quarantine
from kvfs.catalog.rows import GOOD, BlockState, Inode, Replica
from kvfs.tiers.backing import sync_block
from kvfs.tiers.seal import Content, Seal, content_of, seal_from
from kvfs.tiers.tier import Tier
from kvfs.volume.hindsight import holds_another
from kvfs.volume.replicas import Replicas, largest
from kvfs.volume.volume import Volume

log = logging.getLogger(__name__)


class Unfinished:
    """Owned by the trio loop."""

    def __init__(self, volume: Volume, replicas: Replicas, quarantine: Quarantine) -> None:
        self.volume = volume
        self.replicas = replicas
        self.quarantine = quarantine

    async def decide(self) -> None:
        """Whatever the catalog says is not sealed, unless its tier is away."""
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
            with self.volume.overlook("recovery_skipped", replicas[0][0]):
                if self.volume.catalog_behind and await self._is_overtaken(inode, path, replicas):
                    continue
                await decide[BlockState(inode.state)](inode, path, *replicas[0])

    async def _is_overtaken(
        self, inode: Inode, path: bytes, replicas: list[tuple[Tier, Replica]]
    ) -> bool:
        """What lies at its place came later than the catalog knows: the walk takes that in."""
        for tier, replica in replicas:
            if await tier.run(holds_another, tier, tier.locate(path, bool(replica.fanned)), inode):
                # Suspect ones too: the walk takes in nothing under a number that is not sealed.
                for known in self.volume.catalog.replicas(inode.id):
                    self.replicas.forget_file(inode, self.volume.by_number[known.tier])
                return True
        return False

    async def _decide_writing(
        self, inode: Inode, path: bytes, tier: Tier, replica: Replica
    ) -> None:
        """Nobody was told that it is complete: only a seal proves that it was."""
        if not await self._accept_seal(inode, path, tier, replica):
            await self._keep_unfinished(inode, path, tier, replica, "was being written")
            self._discard(inode, path, "discarded_writing")

    async def _keep_unfinished(
        self, inode: Inode, path: bytes, tier: Tier, replica: Replica, what: str
    ) -> None:
        """What it holds so far goes away, or where an admin can look at it."""
        what = f"{what} when kvfs stopped"
        if self.volume.config.tiering.unfinished == "remove":
            log.info("%r %s: removed", os.fsdecode(path), what)
            return
        with contextlib.suppress(FileNotFoundError):
            await self.quarantine.put(
                tier, path, bool(replica.fanned), reason="unfinished", message=what
            )

    async def _decide_published(
        self, inode: Inode, path: bytes, tier: Tier, replica: Replica
    ) -> None:
        """Complete if the machine did not stop: the page cache outlived the daemon."""
        if await self._accept_seal(inode, path, tier, replica):
            return
        try:
            status = await tier.run(tier.files.status, tier.locate(path, bool(replica.fanned)))
        except FileNotFoundError:
            self._discard(inode, path, "discarded_published")
            return
        if not self.volume.same_boot:
            await self.quarantine.put(
                tier, path, bool(replica.fanned), reason="unsealed",
                message="was not sealed before the machine stopped",
            )  # fmt: skip
            self._discard(inode, path, "discarded_published")
            return
        self.volume.catalog.update(inode.id, size_bytes=status.st_size)
        failpoints.hit("recovery.kept")
        self.volume.request_seal(inode.id)

    async def _accept_seal(self, inode: Inode, path: bytes, tier: Tier, replica: Replica) -> bool:
        """The record was written but not committed: it says what a commit would have."""
        absolute = tier.locate(path, bool(replica.fanned))
        try:
            seal = await tier.run(tier.read_seal, absolute)
            if seal is None or (seal.inode, seal.generation) != (inode.id, inode.generation):
                return False
            # A writer that came while it was sealed leaves a record that is not of its bytes.
            content = await tier.run_in_thread(content_of, tier.files, absolute, replica.codec)
            status = await tier.run(tier.files.status, absolute)
        except FileNotFoundError:
            return False
        if content != Content(seal.length_bytes, seal.checksum):
            return False
        if tier.durable:
            await tier.run_in_thread(sync_block, tier, [absolute])
        self._record_sealed(inode, seal, tier, status)
        return True

    def _record_sealed(self, inode: Inode, seal: Seal, tier: Tier, status: os.stat_result) -> None:
        catalog, allocated = self.volume.catalog, status.st_blocks * 512
        replicas = catalog.replicas(inode.id)
        before = next(r for r in replicas if r.tier == tier.number)
        with catalog.transaction("accept_seal"):
            catalog.update(
                inode.id, state=int(BlockState.SEALED), checksum=seal.checksum,
                size_bytes=seal.length_bytes, mtime_ns=seal.mtime_ns,
            )  # fmt: skip
            catalog.update_replica(
                inode.id, tier.number, allocated_bytes=allocated,
                verified=self.volume.mounts, mtime_ns=status.st_mtime_ns,
            )  # fmt: skip
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
            absolute = place.locate(path, bool(other.fanned))
            status = await place.run(place.files.status, absolute)
            self.replicas.measured(inode.id, place, status.st_blocks * 512)
            rest = [r for r in catalog.replicas(inode.id) if r.tier != other.tier]
            rewritten = [r for r in rest if r.state == GOOD] if other.state != GOOD else []
            self._revive(sealed, path, rewritten)
            return
        await self._keep_unfinished(inode, path, tier, replica, "was being rewritten")
        self._discard(inode, path, "discarded_reopened")

    async def _seal_again(
        self, inode: Inode, path: bytes, tier: Tier, replica: Replica
    ) -> Inode | None:
        """The row with the length of the last seal, if a replica has that content.

        The replica gets the record again, which it lost when it was opened for writing.
        """
        absolute = tier.locate(path, bool(replica.fanned))

        def check() -> Inode | None:
            content = content_of(tier.files, absolute, replica.codec)
            if content is None or content.checksum != inode.checksum:
                return None
            sealed = inode._replace(size_bytes=content.length_bytes)
            tier.write_seal(absolute, seal_from(sealed, replica.codec))
            failpoints.hit("recovery.resealed")
            if tier.durable:
                sync_block(tier, [absolute])
            return sealed

        return await tier.run_in_thread(check)

    def _revive(self, inode: Inode, path: bytes, rewritten: list[Replica]) -> None:
        self.replicas.forget_replicas(
            inode.id, path, rewritten, state=int(BlockState.SEALED), size_bytes=inode.size_bytes
        )

    def _discard(self, inode: Inode, path: bytes, event: str) -> None:
        self.replicas.remove_block(inode, path)
        self.volume.counters.count(event)
        self.volume.settling_due.set()

    def _forget(self, inode: Inode) -> None:
        with self.volume.catalog.transaction("forget_row"):
            self.volume.catalog.delete(inode.id)
        self.volume.blocks -= 1
