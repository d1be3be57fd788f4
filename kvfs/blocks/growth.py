"""Room for what writers add: a reservation grows, or the file goes on on the next tier.

Near a tier's capacity writes come through the daemon, which knows each byte before it is written.
Where there is room the kernel writes to the backing file by itself, and what it wrote is reserved
afterwards.
"""

from __future__ import annotations

import logging
import os

from kvfs import failpoints
from kvfs.blocks.paths import Paths
from kvfs.catalog.rows import Replica
from kvfs.errors import BlockStale, TierFull
from kvfs.tiers.backing import continue_file
from kvfs.tiers.space import Reservation, rounded, sealed
from kvfs.tiers.tier import Tier, close_descriptor
from kvfs.volume.open_block import OpenBlock
from kvfs.volume.relief import Relief
from kvfs.volume.replicas import Replicas
from kvfs.volume.volume import Volume

log = logging.getLogger(__name__)

# Writers are not seen while a tier has this part of its capacity free, or this much.
UNSEEN_FREE_PART = 64
UNSEEN_FREE_BYTES = 1 << 30
# The kernel passes on no more at once.
LARGEST_WRITE_BYTES = 1 << 20


class Growth:
    """Owned by the trio loop."""

    def __init__(self, volume: Volume, replicas: Replicas, paths: Paths, relief: Relief) -> None:
        self.volume = volume
        self.replicas = replicas
        self.paths = paths
        self.relief = relief

    def cover(self, block: OpenBlock, end: int) -> bool:
        """Whether a file of `end` bytes is within what the block has been granted."""
        assert block.reservation is not None, "an open writer has a reservation"
        return block.reservation.grow_to(sealed(end) - block.accounted_bytes - block.held_bytes)

    async def spill(self, block: OpenBlock, end: int) -> None:
        """The tier is full: the partial file goes on to the next one. `block.lock` is held."""
        if block.orphan is not None:
            raise TierFull("a file without a name does not move")
        if await self.replicas.relieve(block, end):
            return
        block.refused = True
        if block.backing_id:
            raise TierFull("the kernel reads its file: it stays where it is until the last close")
        try:
            target, reservation = await self.replicas.place(end, after=block.tier.index)
        except TierFull:
            if await self.relief.make_way(block.tier, LARGEST_WRITE_BYTES):
                return
            raise
        try:
            path = await self.paths.free_block(block.inode)
            async with self.volume.claims.hold(path):
                await self._continue_on(block, target, path, reservation)
        except BaseException:
            if block.reservation is not reservation:
                reservation.release()
            raise
        block.refused = False
        self.volume.counters.count("spills")

    async def _continue_on(
        self, block: OpenBlock, target: Tier, path: bytes, reservation: Reservation
    ) -> None:
        catalog, source = self.volume.catalog, block.tier
        row, replica = catalog.get(block.inode), self.replica_of(block)
        if row is None or replica is None:
            raise BlockStale("the block is gone")
        fanned = bool(replica.fanned)
        descriptor = await target.run_open(
            continue_file, target, path, fanned, row, block.writer_fd, patient=True
        )
        try:
            with catalog.transaction("spill"):
                replicas = catalog.replicas(row.id)
                promised = self.replicas.promise_removal(row.id, path, [replica])
                catalog.drop_replica(row.id, source.number)
                catalog.add_replica(row.id, target.number, 0, replica.tau, fanned=fanned)
        except BaseException:
            close_descriptor(target, descriptor)
            raise
        self.replicas.account_spill(replicas, source, target)
        block.close_descriptors()
        block.tier, block.writer_fd, block.accounted_bytes = target, descriptor, 0
        if block.reservation:
            block.reservation.release()
        block.reservation = reservation
        # Promised: a tier that fails now does it later.
        with self.volume.overlook("promises_delayed", source):
            await source.run(source.remove, path, fanned)
            failpoints.hit("spill.removed")
            catalog.intents.done(promised[source.number])

    # --- writers past the daemon

    def may_be_unseen(self, block: OpenBlock) -> bool:
        """Whether a writer's bytes may go past the daemon.

        Not where no lease can tell that the last writer is gone, nor on a tier or a disk that is
        nearly full.
        """
        if not block.tier.identity.probe.leases:
            return False
        account = self.volume.space[block.tier.index]
        wanted = min(account.room_bytes // UNSEEN_FREE_PART, UNSEEN_FREE_BYTES)
        disk = os.fstatvfs(block.writer_fd)
        return min(account.free_bytes, disk.f_bavail * disk.f_frsize) >= wanted

    def account_unseen(self) -> None:
        """Reserve what the kernel wrote past the daemon by now, also where there is no room."""
        for block in list(self.replicas.open_blocks.values()):
            if not block.unseen or block.writer_fd < 0 or block.reservation is None:
                continue
            with self.volume.tolerate(f"tier {block.tier.name}: looking at open files"):
                status = os.fstat(block.writer_fd)
                taken = max(rounded(status.st_size), status.st_blocks * 512)
                more = taken - block.accounted_bytes - block.held_bytes
                if not block.reservation.grow_to(more):
                    block.reservation.overdraw(more)
                    self.volume.counters.count("overdrafts")
                    self.volume.request_tiering()

    # --- rows

    def replica_of(self, block: OpenBlock) -> Replica | None:
        """The row of the replica that a block is open on; None when it is no more."""
        for replica in self.volume.catalog.replicas(block.inode):
            if replica.tier == block.tier.number:
                return replica
        return None
