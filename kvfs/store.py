"""The store: the parts that change the namespace, put together. Used by the mount and by fsck."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from kvfs import layout
from kvfs.blocks.attributes import Attributes
from kvfs.blocks.blocks import Blocks
from kvfs.blocks.namespace import Namespace
from kvfs.blocks.quarantine import Quarantine
from kvfs.blocks.verify import Verifier
from kvfs.catalog.rows import Inode
from kvfs.leasing.leases import Leases
from kvfs.leasing.lending import Lender
from kvfs.leasing.lingering import Lingering
from kvfs.leasing.lookup import Lookup
from kvfs.leasing.prefetch import Prefetcher
from kvfs.leasing.puts import Puts
from kvfs.leasing.quotas import Quotas
from kvfs.tiers.walk import look
from kvfs.upkeep.mover import Mover
from kvfs.upkeep.recovery import Recovery
from kvfs.upkeep.scrub import Scrubber
from kvfs.upkeep.sealer import Sealer
from kvfs.volume.replicas import Replicas
from kvfs.volume.volume import Volume


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
        self.quarantine = Quarantine(volume)
        self.verifier = Verifier(volume, self.replicas, self.quarantine)
        self.mover = Mover(volume, self.replicas, self.verifier)
        self.blocks = Blocks(volume, self.replicas, self.verifier, self.mover.unpack)
        self.namespace = Namespace(volume, self.replicas, self.blocks)
        self.attributes = Attributes(volume, self.replicas, self.blocks, self.namespace)
        self.sealer = Sealer(volume, self.replicas)
        self.scrubber = Scrubber(volume, self.verifier, self.namespace)
        self.recovery = Recovery(volume, self.replicas, self.verifier)
        # For clients that come by the control socket.
        self.lookup = Lookup(volume, self.find_on_tiers)
        self.prefetcher = Prefetcher(volume, self.mover)
        self.lingering = Lingering(self.blocks)
        self.quotas = Quotas(volume, self.lingering)
        lender = Lender(volume, self.blocks, self.sealer, self.prefetcher, self.lingering)
        self.leases = Leases(volume, self.lookup, lender, self.quotas)
        self.puts = Puts(
            volume, self.blocks, self.namespace, self.sealer, self.quotas, self.lingering
        )

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
                with self.volume.overlook("lookups_failed", tier):
                    found = await tier.run(look, tier, layout.stored_path(path, fanned))
                    if found is not None and (found.is_directory or found.seal is not None):
                        await self.recovery.absorb(tier, found)
        return self.namespace.lookup(parent, name)

    async def sync_directory(self, inode: int) -> None:
        """fsync of a directory: of the one on the fastest tier, where new names go."""
        path = self.volume.catalog.directory_path(inode)
        first = self.volume.tiers[0]
        if path is not None and first.online:
            with contextlib.suppress(FileNotFoundError):
                await first.run_in_thread(first.files.sync_directory, first.locate(path))

    def room(self) -> Room:
        """Free space as engines should see it: a full cache that evicts is not a full disk."""
        volume = self.volume
        self.blocks.growth.account_unseen()
        accounts = [volume.space[tier.index] for tier in volume.tiers if tier.online]
        size = sum(account.capacity_bytes for account in accounts)
        room = sum(account.room_bytes for account in accounts)
        free = sum(account.free_bytes for account in accounts) + volume.space.duplicate_bytes
        busy = sum(account.taken_bytes - account.used_bytes for account in accounts)
        evicts = volume.config.tiering.on_full == "evict"
        first = volume.tiers[0]
        free_files = 1 << 32
        if first.inline and first.online:
            with volume.overlook("lookups_failed", first), first.judged():
                free_files = os.statvfs(first.root).f_favail
        return Room(
            size_bytes=size,
            free_bytes=min(free, size),
            available_bytes=max(0, room - busy) if evicts else min(free, size),
            files=volume.blocks + volume.directories,
            free_files=free_files,
        )
