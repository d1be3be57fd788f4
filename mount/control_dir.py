"""`.kvfs/` at the root of the mount: read-only files made at open, a snapshot each.

It answers lookup but is not listed, so `rm -r`, `find` and an engine's listing never meet it.
"""

from __future__ import annotations

import errno
import stat
import time
from collections.abc import Callable, Mapping

import pyfuse3

from kvfs.errors import FilesystemError, NotPermitted

CONTROL_INODE = 1 << 62
PROBE = b"probe"


class ControlDirectory:
    """Owned by the trio loop. `files` maps a name to what makes its content."""

    def __init__(self, files: Mapping[bytes, Callable[[], bytes]]) -> None:
        self._files = dict(files)
        self._names = list(self._files)
        self._started_ns = time.time_ns()

    @staticmethod
    def owns(inode: int) -> bool:
        return inode >= CONTROL_INODE

    def lookup(self, name: bytes) -> int:
        """The inode of a file in it. Raises FilesystemError(ENOENT)."""
        if name not in self._files:
            raise FilesystemError(errno.ENOENT)
        return CONTROL_INODE + 1 + self._names.index(name)

    def entries(self) -> list[tuple[bytes, int]]:
        return [(name, self.lookup(name)) for name in self._names if name != PROBE]

    def content(self, inode: int) -> bytes:
        """A snapshot. Raises FilesystemError(EISDIR)."""
        if inode == CONTROL_INODE:
            raise FilesystemError(errno.EISDIR)
        return self._files[self._name(inode)]()

    def _name(self, inode: int) -> bytes:
        place = inode - CONTROL_INODE - 1
        if place >= len(self._names):
            raise FilesystemError(errno.ESTALE)
        return self._names[place]

    def attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        """Size 0, as in /proc: it is only known at open, and reads are not cut to it.

        Raises FilesystemError(ESTALE).
        """
        entry = pyfuse3.EntryAttributes()
        directory = inode == CONTROL_INODE
        if not directory:
            self._name(inode)
        entry.st_ino = pyfuse3.InodeT(inode)
        entry.st_mode = stat.S_IFDIR | 0o555 if directory else stat.S_IFREG | 0o444
        entry.st_nlink = 2 if directory else 1
        entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = self._started_ns
        entry.attr_timeout = entry.entry_timeout = 0
        return entry

    def is_probe(self, inode: int) -> bool:
        """The file that shows whether passthrough works."""
        return inode > CONTROL_INODE and self._name(inode) == PROBE

    def refuse(self) -> NotPermitted:
        """The answer to every change."""
        return NotPermitted(".kvfs is read-only")
