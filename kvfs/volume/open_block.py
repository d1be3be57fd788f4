"""A block that somebody has open: the backing descriptors that all its handles share.

A block keeps the replica it was opened on until the last close, whatever moves meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from kvfs.catalog.rows import Inode
from kvfs.tiers.backing import Expected
from kvfs.tiers.decoder import Decoder
from kvfs.tiers.space import Reservation, TierSpace
from kvfs.tiers.tier import Tier, close_descriptor


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
    # Counts what may have changed the bytes: what was read before is old then.
    changes: int = 0
    # `reader_fd` is a copy in staging; or a compressed file, and this reads it.
    fetched: bool = False
    decoder: Decoder | None = None
    reservation: Reservation | None = None
    # How the kernel reads it, fixed while it is open: "passthrough" (with the id under which the
    # backing file is registered), "served" by the daemon, or "" while only kvfs has it open.
    mode: str = ""
    backing_id: int = 0
    unregister: Callable[[int], None] | None = None
    # A writer's bytes go past the daemon: the backing file, as it was when the daemon last
    # looked, tells size and time.
    unseen: bool = False
    looked_at: tuple[int, int] = (0, 0)
    # What the file of a sealed block was like when it was opened here; None where it cannot be
    # looked at again without waiting.
    sealed: Expected | None = None
    # A write of it failed: what it has is not what its writer meant.
    refused: bool = False
    # The catalog has changed it since: its next opener must look anew.
    outdated: bool = False
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
        return (self.tier.inline or self.fetched) and self.decoder is None

    def length_bytes(self) -> int:
        """The length of the block that is open here, for readers."""
        if self.decoder is not None:
            return self.decoder.size_bytes
        return os.fstat(self.descriptor).st_size

    def is_touched(self) -> bool:
        """Whether the file of a sealed block was changed beside kvfs, by its size and time."""
        if self.sealed is None or self.writers or self.reader_fd < 0:
            return False
        status = os.fstat(self.reader_fd)
        seen = (status.st_size, status.st_mtime_ns)
        return seen != (self.sealed.file_bytes, self.sealed.mtime_ns)

    def wrote(self, size_bytes: int) -> None:
        """A writer changed the file, which has this length now."""
        self.written = True
        self.changes += 1
        self.size_bytes, self.mtime_ns = size_bytes, time.time_ns()

    def lose_sight(self) -> None:
        """From here on a writer's bytes go past the daemon."""
        if not self.unseen:
            status = os.fstat(self.writer_fd)
            self.unseen, self.looked_at = True, (status.st_size, status.st_mtime_ns)

    def look(self, status: os.stat_result | None = None) -> None:
        """Take over what writers made of the file past the daemon; nothing when none could, or
        when its tier fails."""
        if not self.unseen or self.descriptor < 0:
            return
        with contextlib.suppress(OSError), self.tier.judged():
            status = status or os.fstat(self.descriptor)
        if status is None:
            return
        seen = (status.st_size, status.st_mtime_ns)
        if seen != self.looked_at:
            self.looked_at = seen
            self.written = True
            self.size_bytes, self.mtime_ns = seen

    def attributes(self, inode: Inode) -> Inode:
        """The row as it will be when the writer closes."""
        self.look()
        if not self.written:
            return inode
        return inode._replace(
            size_bytes=self.size_bytes,
            mtime_ns=self.mtime_ns,
            ctime_ns=max(inode.ctime_ns, self.mtime_ns),
        )

    def read_only_descriptor(self) -> int:
        """A descriptor of the bytes that is no writer's, for the kernel. Raises OSError."""
        if self.reader_fd < 0:
            self.reader_fd = os.open(f"/proc/self/fd/{self.writer_fd}", os.O_RDONLY | os.O_CLOEXEC)
        return self.reader_fd

    def hand_over(self) -> int:
        """The descriptor of the bytes for its only user, who shares it with nobody from here on;
        -1 where others have it."""
        if self.users != 1 or self.sealed is None:
            return -1
        self._unregister()
        self.mode = ""
        descriptor, self.reader_fd = self.reader_fd, -1
        return descriptor

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

    def _unregister(self) -> None:
        if self.backing_id and self.unregister is not None:
            self.unregister(self.backing_id)
            self.backing_id = 0

    def close_descriptors(self) -> None:
        self._unregister()
        if self.fetched and self.reservation:
            self.reservation.release()
        reader_fd, self.reader_fd = self.reader_fd, -1
        writer_fd, self.writer_fd = self.writer_fd, -1
        for descriptor in {reader_fd, writer_fd} - {-1}:
            if descriptor == reader_fd and self.fetched:
                os.close(descriptor)
            elif descriptor == reader_fd and self.decoder is not None:
                close_descriptor(self.decoder.tier, descriptor)
            else:
                close_descriptor(self.tier, descriptor)
        self.fetched, self.decoder = False, None

    def close_stand_in(self) -> None:
        """Of a block that a writer has opened: what readers had instead of its file."""
        if self.fetched:
            os.close(self.reader_fd)
        elif self.decoder is not None:
            close_descriptor(self.decoder.tier, self.reader_fd)
        else:
            return
        self.reader_fd, self.fetched, self.decoder = -1, False, None
