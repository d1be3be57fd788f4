"""Files whose lease or put ended, but which somebody may still have open.

Nobody can take a descriptor back, and who says that he closed one may be wrong. So the block stays
in the table of open blocks, where mover and eviction leave it alone and its space is counted, until
the kernel grants a write lease on its file: that is refused while any other description is left.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections import Counter
from dataclasses import dataclass, field

import trio

from kvfs.blocks.blocks import Blocks
from kvfs.tiers.backing import Expected
from kvfs.volume.open_block import OpenBlock

RETRY_S = 1.0
BATCH = 64
# What a file that cannot have a write lease answers: on such a tier nobody can tell.
NO_LEASES = frozenset({errno.EINVAL, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK})


@dataclass(slots=True)
class Ended:
    """What was lent of one block: readers in the table by uid, and duplicates of what clients
    had."""

    users: Counter[int] = field(default_factory=Counter)
    descriptors: list[int] = field(default_factory=list)
    expected: Expected | None = None


class Lingering:
    """Owned by the trio loop."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self._ended: dict[OpenBlock, Ended] = {}
        # Files that a user may have open still, by uid.
        self.of_user: Counter[int] = Counter()
        self.total = 0
        self._due = trio.Event()

    def take(
        self, block: OpenBlock, uid: int, descriptor: int = -1, expected: Expected | None = None
    ) -> None:
        """A reader of a block. `descriptor` shares its description with a client; without one the
        block has a descriptor (`reader_fd`) of the daemon's own."""
        ended = self._ended.setdefault(block, Ended())
        ended.users[uid] += 1
        ended.expected = ended.expected or expected
        if descriptor >= 0:
            ended.descriptors.append(descriptor)
        self.of_user[uid] += 1
        self.total += 1
        self._due.set()

    async def run(self) -> None:
        """Let go of what nobody has open."""
        while True:
            with trio.move_on_after(RETRY_S):
                await self._due.wait()
            self._due = trio.Event()
            await self.settle()

    async def settle(self) -> None:
        """Ask once for each."""
        for count, block in enumerate(list(self._ended), start=1):
            if block in self._ended and self._nobody_has(block, self._ended[block]):
                self._let_go(block)
            if count % BATCH == 0:
                await trio.lowlevel.checkpoint()

    def clear(self) -> None:
        """Whoever has it open or not: the daemon ends."""
        for block in list(self._ended):
            self._let_go(block)

    def _let_go(self, block: OpenBlock) -> None:
        ended = self._ended.pop(block)
        for descriptor in ended.descriptors:
            os.close(descriptor)
        for uid, count in ended.users.items():
            self.of_user[uid] -= count
            self.total -= count
            if not self.of_user[uid]:
                del self.of_user[uid]
            for _ in range(count):
                self.blocks.part(block)

    def _nobody_has(self, block: OpenBlock, ended: Ended) -> bool:
        """Whether the daemon's own description is the only one. Until then it is kept in place of
        the duplicates, which would hide that a client has theirs."""
        if block.lock.locked():
            return False  # somebody is opening it
        if block.reader_fd < 0:
            # Without a descriptor to spare it is tried again.
            with contextlib.suppress(OSError):
                source = f"/proc/self/fd/{ended.descriptors[0]}"
                block.reader_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
                block.sealed = ended.expected
        if block.reader_fd < 0:
            return False
        while ended.descriptors:
            # Of a local file, also where the block's tier is not: nothing waits.
            os.close(ended.descriptors.pop())
        if block.users > ended.users.total():
            return False
        try:
            fcntl.fcntl(block.reader_fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError as error:
            return error.errno in NO_LEASES
        fcntl.fcntl(block.reader_fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return True
