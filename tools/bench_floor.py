"""The least that a filesystem in pyfuse3 can do: what a round trip through it costs by itself.

A peer of `make bench`, for the rows that are nothing but round trips. It looks names up in one
directory and opens files there: no catalog, no heat, no checks. Run as a process of its own.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path

import pyfuse3
import trio

CACHED_S = 300.0


class Floor(pyfuse3.Operations):
    """One directory with its files, by inode number. Owned by the trio loop."""

    enable_writeback_cache = False

    def __init__(self, source: Path) -> None:
        super().__init__()
        self._source = os.fsencode(source)
        self._paths: dict[int, bytes] = {pyfuse3.ROOT_INODE: self._source}

    def _entry(self, inode: int, status: os.stat_result) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(inode)
        entry.st_mode = pyfuse3.ModeT(status.st_mode)
        entry.st_nlink, entry.st_size = 1, status.st_size
        entry.entry_timeout = entry.attr_timeout = CACHED_S
        return entry

    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._entry(inode, os.stat(self._paths[inode]))

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        path = self._paths[parent_inode] + b"/" + name
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            raise pyfuse3.FUSEError(errno.ENOENT) from None
        if not stat.S_ISDIR(status.st_mode) and not stat.S_ISREG(status.st_mode):
            raise pyfuse3.FUSEError(errno.ENOENT)
        self._paths[status.st_ino] = path
        return self._entry(status.st_ino, status)

    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(os.open(self._paths[inode], os.O_RDONLY)))

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        os.close(fh)


def main(source: Path, mountpoint: Path) -> None:
    """Serve `source` at `mountpoint` until it is unmounted."""
    options = {*pyfuse3.default_options, "fsname=floor"}
    pyfuse3.init(Floor(source), str(mountpoint), options)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
