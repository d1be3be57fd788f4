"""Closing: the last writer's file is recorded and handed to the sealer, the last user's let go."""

from __future__ import annotations

import os

from kvfs import layout
from kvfs.blocks.idle_blocks import IdleBlocks
from kvfs.errors import TierOffline, reason_of
from kvfs.tiers.space import PAGE_BYTES
from kvfs.volume.open_block import OpenBlock
from kvfs.volume.replicas import Replicas, largest
from kvfs.volume.volume import Volume


class Closing:
    """Owned by the trio loop."""

    def __init__(self, volume: Volume, replicas: Replicas, idle: IdleBlocks) -> None:
        self.volume = volume
        self.replicas = replicas
        self.idle = idle

    async def close(self, block: OpenBlock, *, writer: bool) -> None:
        """One handle is gone. Never raises for what the tier does: nobody would hear it."""
        if not writer:
            self.drop_user(block, writer=False)
            return
        if block.writers == 1 and block.writer_fd >= 0:
            try:
                async with block.lock:
                    if block.writers == 1:
                        await self._finish_writing(block)
            finally:
                self.drop_user(block, writer=True)
            return
        self.drop_user(block, writer=True)

    def drop_user(self, block: OpenBlock, *, writer: bool) -> None:
        if writer:
            block.writers -= 1
        else:
            block.readers -= 1
        if block.users:
            return
        if self.replicas.open_blocks.get(block.inode) is block:
            del self.replicas.open_blocks[block.inode]
            # With "always" each opening of the file is one to verify.
            if self.volume.config.tiering.verify != "always" and self.idle.put(block):
                return
        block.close_descriptors()
        if block.reservation:
            block.reservation.release()
        self.volume.space[block.tier.index].held_bytes -= block.held_bytes
        block.held_bytes = 0

    async def _finish_writing(self, block: OpenBlock) -> None:
        """The last writer closes: record size and allocation, let the sealer have it."""
        try:
            status = await block.tier.run(os.fstat, block.writer_fd)
        except (OSError, TierOffline) as error:
            self._close_failed(block, error)
            return
        block.look(status)
        if block.orphan is None:
            # What is not recorded now the sealer records.
            with self.volume.tolerate("recording a closed file"):
                self._record(block, status)
        try:
            if block.readers and block.reader_fd < 0:
                block.reader_fd = await block.tier.run_open(
                    os.open, f"/proc/self/fd/{block.writer_fd}", os.O_RDONLY | os.O_CLOEXEC
                )
            descriptor, block.writer_fd = block.writer_fd, -1
            # A network filesystem writes what it has of the file now.
            await block.tier.run(os.close, descriptor)
        except (OSError, TierOffline) as error:
            self._close_failed(block, error)
        block.unseen = False
        if block.reservation:
            block.reservation.release()
        if block.refused:
            self.volume.torn.add(block.inode)
        if block.orphan is None:
            self.volume.request_seal(block.inode)

    def _close_failed(self, block: OpenBlock, error: Exception) -> None:
        text, tier = f"close of inode {block.inode}: {error}", block.tier.name
        self.volume.incidents.note("closes_failed", text, reason=reason_of(error), tier=tier)
        block.retire_writer()

    def _record(self, block: OpenBlock, status: os.stat_result) -> None:
        volume = self.volume
        # With what the seal record may take, until it is there.
        allocated = status.st_blocks * 512 + PAGE_BYTES
        columns = {"size_bytes": status.st_size}
        row = volume.catalog.get(block.inode)
        if block.written and row is not None:
            # The mtime may have been set to an older one since.
            ctime_ns = max(row.ctime_ns, block.mtime_ns)
            columns |= {"mtime_ns": block.mtime_ns, "ctime_ns": ctime_ns}
        with volume.catalog.transaction("close"):
            volume.catalog.update(block.inode, **columns)
            volume.catalog.update_replica(
                block.inode, block.tier.number,
                allocated_bytes=allocated, mtime_ns=status.st_mtime_ns,
            )  # fmt: skip
        others = [r for r in volume.catalog.replicas(block.inode) if r.tier != block.tier.number]
        volume.space.resize(
            block.tier.index, block.accounted_bytes, allocated, beside_bytes=largest(others)
        )
        block.accounted_bytes = allocated
        entry = volume.catalog.entry(block.inode)
        path = volume.catalog.path_of(block.inode)
        if entry and path:
            volume.space.learn(status.st_size, entry[0], layout.namespace_of(path))
