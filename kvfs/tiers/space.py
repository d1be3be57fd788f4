"""Used, reserved and held bytes of each tier: what keeps a tier below its capacity.

used      allocated bytes of the replicas that the catalog knows
reserved  what open writers and copies under way may still write
held      files without a name that somebody still has open
quarantine  files that are never served again

A tier is as large as its capacity, or as its filesystem lets it be, which others may fill.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass

from kvfs.catalog.rows import RAW
from kvfs.config import TierConfig

PAGE_BYTES = 4096
FIRST_RESERVATION_BYTES = 32 << 20
DIRECTORIES_REMEMBERED = 4096


def rounded(size_bytes: int) -> int:
    """Bytes that a file of this size allocates."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


def sealed(size_bytes: int) -> int:
    """The most that a file of this size allocates once its seal record is attached."""
    return rounded(size_bytes) + PAGE_BYTES


def saved_by(codec: int, size_bytes: int, allocated_bytes: int) -> int:
    """What a replica of a block of this size allocates less because it is compressed."""
    return 0 if codec == RAW else max(0, size_bytes - allocated_bytes)


@dataclass(slots=True)
class TierSpace:
    """The account of one tier."""

    capacity_bytes: int
    used_bytes: int = 0
    reserved_bytes: int = 0
    held_bytes: int = 0
    quarantine_bytes: int = 0
    quarantine_files: int = 0
    blocks: int = 0
    # What compressed replicas would allocate more if they were raw.
    saved_bytes: int = 0
    # The most that its filesystem would hold of ours, and that it has inodes for at the average
    # size of what is there; None: no less than the capacity, or not looked at yet.
    limit_bytes: int | None = None
    crowd_bytes: int | None = None

    @property
    def room_bytes(self) -> int:
        """The most that may be taken now."""
        if self.limit_bytes is None:
            return self.capacity_bytes
        return max(PAGE_BYTES, min(self.capacity_bytes, self.limit_bytes))

    @property
    def planned_bytes(self) -> int:
        """What the watermarks are shares of: less than there is room for while inodes are scarce,
        so that files leave."""
        if self.crowd_bytes is None:
            return self.room_bytes
        return max(PAGE_BYTES, min(self.room_bytes, self.crowd_bytes))

    @property
    def stored_bytes(self) -> int:
        """What is on the medium, but for what open writers have added."""
        return self.used_bytes + self.held_bytes + self.quarantine_bytes

    @property
    def taken_bytes(self) -> int:
        return self.used_bytes + self.reserved_bytes + self.held_bytes + self.quarantine_bytes

    @property
    def free_bytes(self) -> int:
        return max(0, self.room_bytes - self.taken_bytes)


def limit_of(stored_bytes: int, status: os.statvfs_result, mark: float) -> tuple[int, int | None]:
    """How much of ours a filesystem would hold that has `stored_bytes` of it now: by its free
    bytes, and by its inodes when more than `mark` of them are used."""
    limit_bytes = stored_bytes + status.f_bavail * status.f_frsize
    # Some filesystems make inodes as they need them, and say 0.
    used = 1 - status.f_favail / status.f_files if status.f_files else 0.0
    return limit_bytes, int(stored_bytes / used) if used > mark else None


class Reservation:
    """Bytes set aside on one tier until they are used or given back. Owned by the trio loop."""

    __slots__ = ("_space", "size_bytes")

    def __init__(self, space: TierSpace, size_bytes: int) -> None:
        self._space = space
        self.size_bytes = size_bytes
        space.reserved_bytes += size_bytes

    def grow_to(self, size_bytes: int) -> bool:
        """Make it at least this large; False when the tier has no room."""
        more = size_bytes - self.size_bytes
        if more <= 0:
            return True
        if more > self._space.free_bytes:
            return False
        self._space.reserved_bytes += more
        self.size_bytes = size_bytes
        return True

    def overdraw(self, size_bytes: int) -> None:
        """These bytes are on the medium already, whether there was room for them or not."""
        self._space.reserved_bytes += max(0, size_bytes - self.size_bytes)
        self.size_bytes = max(size_bytes, self.size_bytes)

    def release(self) -> None:
        """Give it back; repeating is harmless."""
        self._space.reserved_bytes -= self.size_bytes
        self.size_bytes = 0
        assert self._space.reserved_bytes >= 0, "a reservation was given back twice"


class Space:
    """The accounts of all tiers, by index. Owned by the trio loop."""

    def __init__(self, configs: tuple[TierConfig, ...]) -> None:
        self.tiers = [TierSpace(config.capacity_bytes) for config in configs]
        # Bytes of replicas beyond the largest of each block: free space in all but name.
        self.duplicate_bytes = 0
        self._recent: OrderedDict[object, int] = OrderedDict()

    def __getitem__(self, index: int) -> TierSpace:
        return self.tiers[index]

    def add(
        self, index: int, allocated_bytes: int, *, beside_bytes: int = 0, saved_bytes: int = 0
    ) -> None:
        """A replica came; `beside_bytes` is the largest other replica of the block."""
        self.duplicate_bytes += min(allocated_bytes, beside_bytes)
        tier = self.tiers[index]
        tier.used_bytes += allocated_bytes
        tier.saved_bytes += saved_bytes
        tier.blocks += 1

    def remove(
        self, index: int, allocated_bytes: int, *, beside_bytes: int = 0, saved_bytes: int = 0
    ) -> None:
        """A replica went; `beside_bytes` is the largest replica that the block keeps."""
        self.duplicate_bytes -= min(allocated_bytes, beside_bytes)
        tier = self.tiers[index]
        tier.used_bytes -= allocated_bytes
        tier.saved_bytes -= saved_bytes
        tier.blocks -= 1
        assert tier.used_bytes >= 0, "more was removed from a tier than it had"
        assert tier.blocks >= 0, "more was removed from a tier than it had"

    def resize(
        self, index: int, before_bytes: int, after_bytes: int, *, beside_bytes: int = 0,
        saved_more_bytes: int = 0,
    ) -> None:  # fmt: skip
        """A replica's allocation changed."""
        self.duplicate_bytes += min(after_bytes, beside_bytes) - min(before_bytes, beside_bytes)
        self.tiers[index].used_bytes += after_bytes - before_bytes
        self.tiers[index].saved_bytes += saved_more_bytes

    def reserve(self, index: int, size_bytes: int) -> Reservation | None:
        """Set bytes aside; None when there is no room."""
        tier = self.tiers[index]
        if size_bytes > tier.free_bytes:
            return None
        return Reservation(tier, size_bytes)

    def expected_bytes(self, index: int, *keys: object) -> int:
        """How large a new file may become: what the first known of `keys` (its directory, its
        namespace) saw last; else 32 MiB or 1 % of the tier, whichever is less."""
        for key in keys:
            recent = self._recent.get(key)
            if recent is not None:
                return recent
        return min(FIRST_RESERVATION_BYTES, self.tiers[index].capacity_bytes // 100)

    def learn(self, size_bytes: int, *keys: object) -> None:
        """A file was closed with this size. Large ones are remembered for a while."""
        # With its record: of several that begin at once each has room for all of it, or none.
        size_bytes = sealed(size_bytes)
        for key in keys:
            before = self._recent.pop(key, 0)
            self._recent[key] = max(size_bytes, before * 3 // 4)
        while len(self._recent) > DIRECTORIES_REMEMBERED:
            self._recent.popitem(last=False)
