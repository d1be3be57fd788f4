"""The store: the parts that change the namespace, put together. Used by the mount and by fsck."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

import trio

from kvfs import layout
from kvfs.attributes import Attributes
from kvfs.blocks import Blocks
from kvfs.errors import TierOffline
from kvfs.mover import Mover
from kvfs.namespace import Namespace
from kvfs.recovery import Recovery
from kvfs.replicas import Replicas
from kvfs.rows import Inode
from kvfs.sealer import Sealer
from kvfs.volume import Volume
from kvfs.walk import look


@dataclass(frozen=True, slots=True)
class Room:
    """What statfs answers."""

    size_bytes: int
    free_bytes: int
    available_bytes: int
    files: int
    free_files: int


class Store:
    """Owned by the trio loop."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.replicas = Replicas(volume)
        self.blocks = Blocks(volume, self.replicas)
        self.namespace = Namespace(volume, self.replicas, self.blocks)
        self.attributes = Attributes(volume, self.replicas, self.blocks, self.namespace)
        self.sealer = Sealer(volume, self.replicas)
        self.mover = Mover(volume, self.replicas)
        self.recovery = Recovery(volume, self.replicas)

    async def find_on_tiers(self, parent: int, name: bytes) -> Inode | None:
        """Until the walk after a crash has finished, a miss is answered from the tiers."""
        directory = self.volume.catalog.directory_path(parent)
        if directory is None:
            return None
        path = layout.join(directory, name)
        for tier in self.volume.tiers:
            if not tier.online:
                continue
            for fanned in (False, True):
                with contextlib.suppress(OSError, TierOffline):
                    found = await tier.run(look, tier, layout.stored_path(path, fanned))
                    if found is not None and (found.is_directory or found.seal is not None):
                        await self.recovery.absorb(tier, found)
        return self.namespace.lookup(parent, name)

    async def sync_directory(self, inode: int) -> None:
        """fsync of a directory: of the one on the fastest tier, where new names go."""
        path = self.volume.catalog.directory_path(inode)
        first = self.volume.tiers[0]
        if path is not None and first.online:
            await trio.to_thread.run_sync(
                _sync_directory, first.locate(path), limiter=first.limiter
            )

    def room(self) -> Room:
        """Free space as engines should see it: a full cache that evicts is not a full disk."""
        volume = self.volume
        accounts = [volume.space[tier.index] for tier in volume.tiers if tier.online]
        size = sum(account.capacity_bytes for account in accounts)
        free = sum(account.free_bytes for account in accounts) + volume.space.duplicate_bytes
        busy = sum(account.reserved_bytes + account.held_bytes for account in accounts)
        evicts = volume.config.tiering.on_full == "evict"
        first = volume.tiers[0]
        free_files = os.statvfs(first.root).f_favail if first.inline and first.online else 1 << 32
        return Room(
            size_bytes=size,
            free_bytes=min(free, size),
            available_bytes=max(0, size - busy) if evicts else min(free, size),
            files=volume.blocks + volume.directories,
            free_files=free_files,
        )


def _sync_directory(absolute: bytes) -> None:
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(absolute, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
