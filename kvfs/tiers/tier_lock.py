"""The lock that gives a tier to one daemon.

A daemon that was killed while one of its calls hangs in the kernel keeps what it had open, locks
too, until that call is answered. None of its code runs any more, so its lock is taken over.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from kvfs.tiers.beneath import Root

PROC = Path("/proc")


def take(files: Root, path: bytes) -> int:
    """A descriptor that holds the lock as long as it is open. Raises BlockingIOError when another
    process has it. Blocking."""
    guard = files.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Held for this moment only: two that start at once must not both take over.
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            return _lock(files, path)
        except BlockingIOError:
            if not is_left_over(files.status(path)):
                raise
            files.unlink(path)
            return _lock(files, path)
    finally:
        os.close(guard)


def _lock(files: Root, path: bytes) -> int:
    descriptor = files.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_left_over(status: os.stat_result) -> bool:
    """Whether all who hold locks of a file have ended, as the kernel's table says. A filesystem
    whose numbers differ there (btrfs) is not found in it: then nobody is known to have ended."""
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    lines = (line.split() for line in (PROC / "locks").read_text().splitlines())
    # A waiting one has an arrow in front of the other fields.
    holders = [int(words[4]) for words in lines if words[1] != "->" and words[5] == device]
    return bool(holders) and all(has_ended(pid) for pid in holders)


def has_ended(pid: int) -> bool:
    """Whether none of a process's own code runs any more; one of another namespace is not known."""
    if pid <= 0:
        return False
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        # The leader of a process that ends waits as a zombie for threads that hang in the kernel.
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return True
