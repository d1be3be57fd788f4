"""What can go wrong on the faulty filesystem, and the messages that say so. Pure."""

from __future__ import annotations

import errno
import re
from typing import Literal, get_args

import msgspec

Operation = Literal[
    "lookup", "getattr", "setattr", "create", "open", "read", "write", "flush", "fsync", "release",
    "rename", "unlink", "mkdir", "rmdir", "opendir", "readdir", "statfs", "setxattr", "getxattr",
    "listxattr", "removexattr",
]  # fmt: skip
CHANGES: tuple[Operation, ...] = (
    "setattr", "create", "write", "rename", "unlink", "mkdir", "rmdir", "setxattr", "removexattr",
)  # fmt: skip


class Fault(msgspec.Struct, frozen=True):
    """One thing that goes wrong, until the faults are set again.

    error   the operation is answered with `errno` and not done
    short   a write takes only half of its bytes
    delay   the operation begins `delay_s` later
    hang    the operation begins when the faults are set again
    flip    a read answers with one bit of its first byte turned
    """

    kind: Literal["error", "short", "delay", "hang", "flip"]
    # None: all.
    operations: tuple[Operation, ...] | None = None
    errno: int = 0
    delay_s: float = 0.0
    # A regular expression that the path below the root has to contain.
    path: str = ""
    # Only opens for writing, not those for reading.
    for_writing: bool = False

    def concerns(self, operation: str, path: bytes, *, for_writing: bool) -> bool:
        """Whether this call goes wrong."""
        return (
            (self.operations is None or operation in self.operations)
            and (for_writing or not self.for_writing)
            and re.search(self.path.encode(), path) is not None
        )


def failing(number: int, *operations: Operation, path: str = "") -> tuple[Fault, ...]:
    """These operations, or all, are answered with an errno."""
    return (Fault("error", operations or None, errno=number, path=path),)


def hanging(*operations: Operation, path: str = "") -> tuple[Fault, ...]:
    """These operations, or all, are not answered."""
    return (Fault("hang", operations or None, path=path),)


def slow(delay_s: float, *operations: Operation) -> tuple[Fault, ...]:
    """These operations, or all, take so much longer."""
    return (Fault("delay", operations or None, delay_s=delay_s),)


# A local disk: what the kernel has in memory, such as attributes of open files, it still answers.
DISK_HANGS = hanging(*(o for o in get_args(Operation) if o not in ("getattr", "statfs")))
READ_ONLY = (
    Fault("error", CHANGES, errno=errno.EROFS),
    Fault("error", ("open",), errno=errno.EROFS, for_writing=True),
)
GONE = failing(errno.ENOTCONN)
SHORT_WRITES = (Fault("short", ("write",)),)
BIT_FLIPS = (Fault("flip", ("read",)),)
# No new file and no byte more, as of a disk or a quota that is used up.
NO_SPACE = failing(errno.ENOSPC, "create", "mkdir", "write", "setxattr")
NO_QUOTA = failing(errno.EDQUOT, "create", "mkdir", "write", "setxattr")


class Order(msgspec.Struct, frozen=True):
    """From the test to the filesystem: the faults from now on."""

    faults: tuple[Fault, ...]


class Report(msgspec.Struct, frozen=True):
    """The answer: how many calls of each operation were answered, and how many hang."""

    calls: dict[str, int]
    hanging: int
