"""The faulty filesystem: a directory, mounted elsewhere, whose operations fail on order.

A process of its own: `python -m tests.faulty.filesystem DIRECTORY MOUNTPOINT SOCKET`. It says
"ready" on stdout when it answers. Nothing is cached by the kernel but pages of open files.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import sys
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import msgspec
import pyfuse3
import trio

from tests.faulty.faults import Fault, Operation, Order, Report

MAX_MESSAGE_BYTES = 1 << 16
MAX_TASKS = 1000
SET_TIMES = "update_atime", "update_mtime"
Handler = TypeVar("Handler", bound=Callable[..., Awaitable[Any]])


class Faults:
    """The faults in force. Owned by the trio loop."""

    def __init__(self) -> None:
        self._faults: tuple[Fault, ...] = ()
        self._changed = trio.Event()
        self.calls: Counter[str] = Counter()
        self.hanging = 0

    def replace(self, faults: tuple[Fault, ...]) -> None:
        """What hangs goes on under the new ones."""
        self._faults = faults
        self._changed.set()
        self._changed = trio.Event()

    async def before(
        self, operation: Operation, path: bytes, *, for_writing: bool = True
    ) -> set[str]:
        """Wait or fail as ordered; the kinds of what is left to the operation itself."""
        left: set[str] = set()
        for fault in self._faults:
            if not fault.concerns(operation, path, for_writing=for_writing):
                continue
            if fault.kind == "hang":
                self.hanging += 1
                try:
                    await self._changed.wait()
                finally:
                    self.hanging -= 1
                return await self.before(operation, path, for_writing=for_writing)
            if fault.kind == "delay":
                await trio.sleep(fault.delay_s)
            elif fault.kind == "error":
                raise pyfuse3.FUSEError(fault.errno)
            else:
                left.add(fault.kind)
        self.calls[operation] += 1
        return left


def answered(handler: Handler) -> Handler:
    """Turn an OSError of the directory into an answer."""

    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return await handler(*args, **kwargs)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None

    return wrapper  # type: ignore[return-value] # the wrapper has the handler's signature


class Mirror(pyfuse3.Operations):
    """A directory as it is, but for the faults. Owned by the trio loop."""

    enable_writeback_cache = False

    def __init__(self, directory: bytes, faults: Faults) -> None:
        super().__init__()
        self.faults = faults
        self._paths: dict[int, bytes] = {pyfuse3.ROOT_INODE: directory}
        self._lookups: Counter[int] = Counter()
        # Open files by inode: one without a name has no other way to it.
        self._open: defaultdict[int, list[int]] = defaultdict(list)
        self._root = directory

    def _below(self, inode: int, name: bytes = b"") -> bytes:
        path = self._paths.get(inode, b"")
        return os.path.relpath(os.path.join(path, name) if name else path or b"?", self._root)

    def _where(self, inode: int) -> bytes | int:
        """A descriptor where there is one, else the path."""
        if self._open.get(inode):
            return self._open[inode][0]
        if inode not in self._paths:
            raise FileNotFoundError(errno.ENOENT, "no such inode")
        return self._paths[inode]

    def _entry(self, status: os.stat_result, inode: int = 0) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode or status.st_ino
        for name in (
            "st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size", "st_blksize",
            "st_blocks", "st_atime_ns", "st_mtime_ns", "st_ctime_ns",
        ):  # fmt: skip
            setattr(entry, name, getattr(status, name))
        entry.attr_timeout = entry.entry_timeout = 0
        return entry

    def _given(self, path: bytes) -> pyfuse3.EntryAttributes:
        status = os.lstat(path)
        self._paths[status.st_ino] = path
        self._lookups[status.st_ino] += 1
        return self._entry(status)

    # --- names

    @answered
    async def lookup(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> Any:
        await self.faults.before("lookup", self._below(parent, name))
        return self._given(os.path.join(self._paths[parent], name))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for inode, count in inode_list:
            self._lookups[inode] -= count
            if self._lookups[inode] <= 0 and inode != pyfuse3.ROOT_INODE:
                del self._lookups[inode]
                self._paths.pop(inode, None)

    @answered
    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext) -> Any:
        await self.faults.before("mkdir", self._below(parent, name))
        path = os.path.join(self._paths[parent], name)
        os.mkdir(path, stat.S_IMODE(mode))
        return self._given(path)

    @answered
    async def rmdir(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self.faults.before("rmdir", self._below(parent, name))
        os.rmdir(os.path.join(self._paths[parent], name))

    @answered
    async def unlink(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self.faults.before("unlink", self._below(parent, name))
        os.unlink(os.path.join(self._paths[parent], name))

    @answered
    async def rename(
        self, parent_old: int, name_old: bytes, parent_new: int, name_new: bytes,
        flags: int, ctx: pyfuse3.RequestContext,
    ) -> None:  # fmt: skip
        await self.faults.before("rename", self._below(parent_old, name_old))
        if flags:
            raise pyfuse3.FUSEError(errno.EINVAL)
        old = os.path.join(self._paths[parent_old], name_old)
        new = os.path.join(self._paths[parent_new], name_new)
        os.rename(old, new)
        for inode, path in self._paths.items():
            if path == old or path.startswith(old + b"/"):
                self._paths[inode] = new + path[len(old) :]

    @answered
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        await self.faults.before("opendir", self._below(inode))
        return inode

    @answered
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        await self.faults.before("readdir", self._below(fh))
        for place, name in enumerate(sorted(os.listdir(self._paths[fh])), start=1):
            if place > start_id:
                path = os.path.join(self._paths[fh], name)
                if not pyfuse3.readdir_reply(token, name, self._entry(os.lstat(path)), place):
                    return
                self._given(path)

    async def releasedir(self, fh: int) -> None:
        """Nothing is kept for an open directory."""

    # --- attributes

    @answered
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Any:
        await self.faults.before("getattr", self._below(inode))
        return self._entry(os.stat(self._where(inode)), inode)

    @answered
    async def setattr(
        self, inode: int, attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields,
        fh: int | None, ctx: pyfuse3.RequestContext,
    ) -> Any:  # fmt: skip
        await self.faults.before("setattr", self._below(inode))
        where = fh if fh is not None else self._where(inode)
        if fields.update_size:
            os.truncate(where, attr.st_size)
        if fields.update_mode:
            os.chmod(where, stat.S_IMODE(attr.st_mode))
        if fields.update_uid or fields.update_gid:
            os.chown(
                where, attr.st_uid if fields.update_uid else -1,
                attr.st_gid if fields.update_gid else -1,
            )  # fmt: skip
        if fields.update_atime or fields.update_mtime:
            before = os.stat(where)
            os.utime(where, ns=(
                attr.st_atime_ns if fields.update_atime else before.st_atime_ns,
                attr.st_mtime_ns if fields.update_mtime else before.st_mtime_ns,
            ))  # fmt: skip
        return self._entry(os.stat(where), inode)

    @answered
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        await self.faults.before("statfs", b"")
        status, answer = os.statvfs(self._root), pyfuse3.StatvfsData()
        for name in (
            "f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree",
            "f_favail", "f_namemax",
        ):  # fmt: skip
            setattr(answer, name, getattr(status, name))
        return answer

    @answered
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        await self.faults.before("getxattr", self._below(inode))
        return os.getxattr(self._where(inode), name)

    @answered
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        await self.faults.before("listxattr", self._below(inode))
        return [os.fsencode(name) for name in os.listxattr(self._where(inode))]

    @answered
    async def setxattr(
        self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        await self.faults.before("setxattr", self._below(inode))
        os.setxattr(self._where(inode), name, value)

    @answered
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self.faults.before("removexattr", self._below(inode))
        os.removexattr(self._where(inode), name)

    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        return True

    # --- files

    @answered
    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> Any:
        await self.faults.before("create", self._below(parent, name))
        path = os.path.join(self._paths[parent], name)
        descriptor = os.open(path, _rights(flags) | os.O_CREAT | flags & os.O_EXCL, mode)
        entry = self._given(path)
        self._open[entry.st_ino].append(descriptor)
        return pyfuse3.FileInfo(fh=descriptor, keep_cache=False), entry

    @answered
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> Any:
        for_writing = flags & os.O_ACCMODE != os.O_RDONLY
        await self.faults.before("open", self._below(inode), for_writing=for_writing)
        descriptor = os.open(self._paths[inode], _rights(flags) | flags & os.O_TRUNC)
        self._open[inode].append(descriptor)
        return pyfuse3.FileInfo(fh=descriptor, keep_cache=False)

    @answered
    async def read(self, fh: int, off: int, size: int) -> bytes:
        left = await self.faults.before("read", self._name_of(fh))
        data = os.pread(fh, size, off)
        return bytes([data[0] ^ 1]) + data[1:] if "flip" in left and data else data

    @answered
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        left = await self.faults.before("write", self._name_of(fh))
        return os.pwrite(fh, buf[: max(1, len(buf) // 2)] if "short" in left else buf, off)

    @answered
    async def flush(self, fh: int) -> None:
        await self.faults.before("flush", self._name_of(fh))

    @answered
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self.faults.before("fsync", self._name_of(fh))
        os.fsync(fh)

    @answered
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self.faults.before("fsync", self._below(fh))

    @answered
    async def release(self, fh: int) -> None:
        await self.faults.before("release", self._name_of(fh))
        for inode, descriptors in self._open.items():
            if fh in descriptors:
                descriptors.remove(fh)
                if not descriptors:
                    del self._open[inode]
                break
        os.close(fh)

    def _name_of(self, fh: int) -> bytes:
        return os.path.relpath(os.readlink(b"/proc/self/fd/%d" % fh), self._root)


def _rights(flags: int) -> int:
    """To read as well: the kernel fills the rest of a page that is written in part."""
    return (os.O_RDONLY if flags & os.O_ACCMODE == os.O_RDONLY else os.O_RDWR) | os.O_CLOEXEC


async def take_orders(
    path: str, faults: Faults, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """One order a datagram, each answered with a report."""
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as orders:
        await orders.bind(path)
        task_status.started()
        while True:
            message, sender = await orders.recvfrom(MAX_MESSAGE_BYTES)
            if message:
                faults.replace(msgspec.json.decode(message, type=Order).faults)
            report = Report(dict(faults.calls), faults.hanging)
            await orders.sendto(msgspec.json.encode(report), sender)


async def serve(faults: Faults, socket_path: str) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(take_orders, socket_path, faults)
        print("ready", flush=True)
        await pyfuse3.main(min_tasks=2, max_tasks=MAX_TASKS)
        nursery.cancel_scope.cancel()


def main() -> None:
    directory, mountpoint, socket_path = sys.argv[1:]
    faults = Faults()
    options = {*pyfuse3.default_options, "fsname=faulty", "subtype=faulty", "allow_other"}
    pyfuse3.init(Mirror(os.fsencode(directory), faults), mountpoint, options)
    try:
        trio.run(serve, faults, socket_path)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main()
