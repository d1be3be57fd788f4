"""Relief for a tier whose medium is fuller than its account says, because others fill it, or its
inodes.

What a filesystem still holds is looked at every few seconds, and a tier counts as no larger than
that. Between two looks a writer may meet ENOSPC: with `on_full = "evict"` the coldest go then.
"""

from __future__ import annotations

import os
from collections import defaultdict

import trio

from kvfs.errors import TierFull, TierOffline
from kvfs.tiers.health import is_full
from kvfs.tiers.space import PAGE_BYTES, limit_of, rounded
from kvfs.tiers.tier import Tier
from kvfs.volume.replicas import Replicas
from kvfs.volume.volume import Volume

# What is made free at a time: this part of the capacity, this much, or so many files.
HEADROOM_PART = 100
HEADROOM_BYTES = 64 << 20
HEADROOM_FILES = 16
ROUNDS = 8


class Relief:
    """Owned by the trio loop."""

    def __init__(self, volume: Volume, replicas: Replicas) -> None:
        self.volume = volume
        self.replicas = replicas
        # Of many writers that meet a full medium one sees to it.
        self._busy: defaultdict[int, trio.Lock] = defaultdict(trio.Lock)

    async def measure(self, tier: Tier) -> os.statvfs_result:
        """Ask a tier's filesystem how much it would still hold. Raises OSError, TierOffline."""
        status = await tier.run(os.statvfs, tier.root)
        account = self.volume.space[tier.index]
        _, mark = self.volume.config.tiering.watermarks(tier.config)
        stored_bytes = account.stored_bytes + self._written_bytes(tier)
        account.limit_bytes, account.crowd_bytes = limit_of(stored_bytes, status, mark)
        if account.taken_bytes > mark * account.planned_bytes:
            self.volume.request_tiering()
        return status

    def _written_bytes(self, tier: Tier) -> int:
        """What open writers have added that is in no account but their reservations."""
        total = 0
        for block in self.replicas.open_blocks.values():
            if block.tier is tier and block.writers:
                block.look()
                accounted_bytes = block.accounted_bytes + block.held_bytes
                total += max(0, rounded(block.size_bytes) - accounted_bytes)
        return total

    async def follows(self, error: Exception) -> bool:
        """A new file was refused: whether there may be room for it now."""
        if not isinstance(error, TierFull) and not is_full(error):
            return False
        for tier in reversed(self.volume.tiers):
            if tier.online and not tier.draining and tier.health.refuses == "full":
                return await self.make_way(tier)
        return False

    async def make_way(self, tier: Tier, at_least_bytes: int = 0) -> bool:
        """Evict the coldest from a tier whose medium is full; whether it takes new bytes then.

        False, too, when the medium was not full: it is the account that has no room.
        """
        if self.volume.config.tiering.on_full != "evict":
            return False
        account = self.volume.space[tier.index]
        was_full = tier.health.refuses == "full"
        async with self._busy[tier.number]:
            try:
                for _ in range(ROUNDS):
                    status = await self.measure(tier)
                    wanted_bytes = self._wanted_bytes(tier, status, at_least_bytes)
                    if not wanted_bytes:
                        if was_full:
                            await tier.examine()
                        return was_full and tier.accepts
                    was_full = True
                    before_bytes = account.used_bytes
                    await self.replicas.make_room(tier, account.free_bytes + wanted_bytes)
                    if account.used_bytes == before_bytes:
                        return False
            except (OSError, TierOffline):
                pass
        return False

    def _wanted_bytes(self, tier: Tier, status: os.statvfs_result, at_least_bytes: int) -> int:
        """How much has to go before a medium has room for something; 0 when it has."""
        account = self.volume.space[tier.index]
        headroom = min(account.capacity_bytes // HEADROOM_PART, HEADROOM_BYTES)
        wanted = max(0, max(headroom, at_least_bytes) - status.f_bavail * status.f_frsize)
        if status.f_files and status.f_favail < HEADROOM_FILES:
            files = HEADROOM_FILES - status.f_favail
            wanted = max(wanted, files * account.used_bytes // max(1, account.blocks))
        return max(wanted, PAGE_BYTES) if wanted else 0
