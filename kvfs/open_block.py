"""A block that somebody has open: the backing descriptors that all its handles share.

A block keeps the replica it was opened on until the last close, whatever moves meanwhile.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from kvfs.rows import Inode
from kvfs.space import Reservation, TierSpace
from kvfs.tier import Tier, close_descriptor


@dataclass(slots=True, eq=False)
class OpenBlock:
    """Owned by the trio loop. `lock` is held over every await that changes descriptors or bytes.

    `size_bytes` and `mtime_ns` are what writers made of the file: its attributes while it is open,
    without asking the tier. `accounted_bytes` is this replica's part of the tier's used bytes;
    `reservation` covers what writers may add to it. Once the name is gone (`orphan` keeps the
    attributes) the bytes are `held` until the last close.
    """

    inode: int
    tier: Tier
    size_bytes: int = 0
    mtime_ns: int = 0
    accounted_bytes: int = 0
    reader_fd: int = -1
    writer_fd: int = -1
    readers: int = 0
    writers: int = 0
    written: bool = False
    fetched: bool = False
    reservation: Reservation | None = None
    # How the kernel reads it, fixed while it is open: "passthrough" (with the id under which the
    # backing file is registered), "served" by the daemon, or "" while only kvfs has it open.
    mode: str = ""
    backing_id: int = 0
    unregister: Callable[[int], None] | None = None
    # A writer's bytes go past the daemon: the backing file tells size and time.
    unseen: bool = False
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

    def wrote(self, size_bytes: int) -> None:
        """A writer changed the file, which has this length now."""
        self.written = True
        self.size_bytes, self.mtime_ns = size_bytes, time.time_ns()

    def attributes_of(self, status: os.stat_result) -> None:
        """A writer went past the daemon: this is what it made of the file."""
        self.written = True
        self.size_bytes, self.mtime_ns = status.st_size, status.st_mtime_ns

    def attributes(self, inode: Inode) -> Inode:
        """The row as it will be when the writer closes."""
        if self.unseen and self.descriptor >= 0:
            self.attributes_of(os.fstat(self.descriptor))
        if not self.written:
            return inode
        return inode._replace(
            size_bytes=self.size_bytes,
            mtime_ns=self.mtime_ns,
            ctime_ns=max(inode.ctime_ns, self.mtime_ns),
        )

    def hold(self, space: TierSpace) -> None:
        """The name is gone: the bytes stay counted until the last close."""
        self.held_bytes = self.accounted_bytes
        space.held_bytes += self.held_bytes
        self.accounted_bytes = 0

    def retire_writer(self) -> None:
        """The last writer is gone and its tier fails: what readers are left keep its descriptor."""
        if self.writer_fd < 0:
            return
        if self.readers and self.reader_fd < 0:
            self.reader_fd = self.writer_fd
        else:
            close_descriptor(self.tier, self.writer_fd)
        self.writer_fd = -1

    def close_descriptors(self) -> None:
        if self.backing_id and self.unregister is not None:
            self.unregister(self.backing_id)
            self.backing_id = 0
        for descriptor in {self.reader_fd, self.writer_fd} - {-1}:
            if self.fetched and descriptor == self.reader_fd:
                os.close(descriptor)
            else:
                close_descriptor(self.tier, descriptor)
        self.reader_fd = self.writer_fd = -1
        if self.fetched and self.reservation:
            self.reservation.release()
        self.fetched = False
