"""A block that somebody has open: the backing descriptors that all its handles share.

A block keeps the replica it was opened on until the last close, whatever moves meanwhile.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import trio

from kvfs.catalog import Inode
from kvfs.space import Reservation, TierSpace
from kvfs.tier import Tier


@dataclass(slots=True, eq=False)
class OpenBlock:
    """Owned by the trio loop. `lock` is held over every await that changes descriptors or bytes.

    `accounted_bytes` is this replica's part of the tier's used bytes; `reservation` covers what
    writers may add to it. Once the name is gone (`orphan` keeps the attributes) the bytes are
    `held` until the last close.
    """

    inode: int
    tier: Tier
    accounted_bytes: int = 0
    reader_fd: int = -1
    writer_fd: int = -1
    readers: int = 0
    writers: int = 0
    written: bool = False
    fetched: bool = False
    reservation: Reservation | None = None
    orphan: Inode | None = None
    held_bytes: int = 0
    lock: trio.Lock = field(default_factory=trio.Lock)

    @property
    def users(self) -> int:
        return self.readers + self.writers

    @property
    def descriptor(self) -> int:
        """Any open descriptor of the bytes; -1 while none is."""
        return self.writer_fd if self.writer_fd >= 0 else self.reader_fd

    @property
    def local(self) -> bool:
        """Whether reads may be made on the trio loop."""
        return self.tier.inline or self.fetched

    def hold(self, space: TierSpace) -> None:
        """The name is gone: the bytes stay counted until the last close."""
        self.held_bytes = self.accounted_bytes
        space.held_bytes += self.held_bytes
        self.accounted_bytes = 0

    def close_descriptors(self) -> None:
        for descriptor in {self.reader_fd, self.writer_fd} - {-1}:
            os.close(descriptor)
        self.reader_fd = self.writer_fd = -1
