"""The least that a filesystem in pyfuse3 can do: what its round trips cost by themselves.

A peer of `make bench`. It shows one directory, and its bytes go past it where those of kvfs do. It
has no catalog, no heat, no checks, no seals and no extended attributes; what was read stays open
and registered. Run as a process of its own.
"""

from __future__ import annotations

import errno
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import trio

from kvfs.mount.passthrough import BACKING_ID_SHIFT, Channel, Passthrough, preload

# Before pyfuse3, which is to use its replies.
HAS_REPLIES = preload()

import pyfuse3  # noqa: E402

from kvfs.mount import readiness  # noqa: E402

CACHED_S = 300.0
HANDLE_MASK = (1 << BACKING_ID_SHIFT) - 1


@dataclass(slots=True)
class File:
    """A file that was opened, and its number for the kernel; 0: its bytes come this way."""

    descriptor: int
    backing_id: int = 0
    written: bool = False


class Floor(pyfuse3.Operations):
    """One directory with its files, by inode number. Owned by the trio loop."""

    enable_writeback_cache = False

    def __init__(self, source: Path, passthrough: Passthrough | None) -> None:
        super().__init__()
        self._passthrough = passthrough
        self._paths: dict[int, bytes] = {pyfuse3.ROOT_INODE: os.fsencode(source)}
        self._files: dict[int, File] = {}

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
        self._paths[status.st_ino] = path
        return self._entry(status.st_ino, status)

    async def mkdir(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, mode: pyfuse3.ModeT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:  # fmt: skip
        os.mkdir(self._paths[parent_inode] + b"/" + name, mode)
        return await self.lookup(parent_inode, name, ctx)

    async def create(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, mode: pyfuse3.ModeT,
        flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:  # fmt: skip
        path = self._paths[parent_inode] + b"/" + name
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        status = os.fstat(descriptor)
        self._paths[status.st_ino] = path
        self._files[status.st_ino] = self._registered(File(descriptor, written=True))
        return self._info(status.st_ino), self._entry(status.st_ino, status)

    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        if inode not in self._files:
            descriptor = os.open(self._paths[inode], os.O_RDONLY)
            self._files[inode] = self._registered(File(descriptor))
        return self._info(inode)

    def _registered(self, file: File) -> File:
        if self._passthrough is not None:
            file.backing_id = self._passthrough.register(file.descriptor)
        return file

    def _info(self, inode: int) -> pyfuse3.FileInfo:
        handle = inode | self._files[inode].backing_id << BACKING_ID_SHIFT
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(handle))

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        return os.pread(self._files[fh & HANDLE_MASK].descriptor, size, off)

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        return os.pwrite(self._files[fh & HANDLE_MASK].descriptor, buf, off)

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        inode = fh & HANDLE_MASK
        file = self._files.get(inode)
        if file is None or not file.written:
            return
        del self._files[inode]
        if self._passthrough is not None:
            self._passthrough.unregister(file.backing_id)
        os.close(file.descriptor)

    async def rename(
        self, parent_inode_old: pyfuse3.InodeT, name_old: pyfuse3.FileNameT,
        parent_inode_new: pyfuse3.InodeT, name_new: pyfuse3.FileNameT, flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> None:  # fmt: skip
        target = self._paths[parent_inode_new] + b"/" + name_new
        os.rename(self._paths[parent_inode_old] + b"/" + name_old, target)
        self._paths[os.lstat(target).st_ino] = target


def mount(source: Path, mountpoint: Path) -> Channel | None:
    """With passthrough where kernel and privileges allow it, else as pyfuse3 does it."""
    if HAS_REPLIES and os.geteuid() == 0:
        try:
            channel = Channel(mountpoint, "floor", allow_other=False)
        except OSError as error:
            sys.stderr.write(f"bench_floor: without passthrough: mount(2) failed: {error}\n")
        else:
            passthrough = Passthrough()
            passthrough.use(channel)
            offered = passthrough if channel.offered else None
            pyfuse3.init(Floor(source, offered), channel.path, set())
            return channel
    options = {*pyfuse3.default_options, "fsname=floor"}
    pyfuse3.init(Floor(source, None), str(mountpoint), options)
    return None


async def serve(channel: Channel | None) -> None:
    """Until it is unmounted."""
    async with trio.open_nursery() as nursery:
        if channel is not None:
            nursery.start_soon(channel.finish)
        readiness.install(readiness.Readiness())
        await pyfuse3.main()


def main(source: Path, mountpoint: Path) -> None:
    """Serve `source` at `mountpoint` until it is unmounted."""
    channel = mount(source, mountpoint)
    try:
        trio.run(serve, channel)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
