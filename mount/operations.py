"""The pyfuse3 handlers: decode, call the store, encode. No decision is made here.

Every handler is wrapped: what goes wrong becomes an errno, never the end of the mount.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import pyfuse3
import trio

from kvfs import layout
from kvfs.catalog.rows import ROOT_INODE, Inode, Kind
from kvfs.errors import (
    BlockExists,
    FilesystemError,
    InvalidOperation,
    NotPermitted,
    errno_of,
    is_expected,
    reason_of,
)
from kvfs.mount.control_dir import CONTROL_INODE, ControlDirectory
from kvfs.mount.data_path import DataPath
from kvfs.mount.handles import Handle, Handles
from kvfs.mount.inodes import InodeTable
from kvfs.mount.passthrough import BACKING_ID_SHIFT, Passthrough
from kvfs.mount.readiness import Readiness
from kvfs.store import Store

log = logging.getLogger(__name__)

Handler = TypeVar("Handler", bound=Callable[..., Awaitable[Any]])

STATFS_BLOCK_BYTES = 4096
LISTING_BATCH = 256
# What an engine is told of trouble, rather than of what it asked for.
FAILURES = frozenset({errno.EIO, errno.EROFS, errno.EDQUOT})
# Directory cookies: 1 and 2 are "." and "..", then inode + 2; inodes start at 1.
DOT, DOT_DOT, COOKIE_SHIFT = 1, 2, 2


def answered(handler: Handler) -> Handler:
    """Turn every error of a handler into the errno of its system call."""

    @functools.wraps(handler)
    async def wrapper(self: Operations, *args: Any) -> Any:
        self.readiness.answering = True
        try:
            return await handler(self, *args)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            number = errno_of(error)
            if not is_expected(error):
                log.exception("%s failed", handler.__name__)
                self.store.volume.counters.count("handler_failures", reason="bug")
            elif number in FAILURES:
                reason, text = reason_of(error), f"{handler.__name__}: {error}"
                self.store.volume.incidents.note("requests_failed", text, reason=reason)
            raise pyfuse3.FUSEError(number) from None
        finally:
            self.readiness.answering = False

    return wrapper  # type: ignore[return-value] # the wrapper has the handler's signature


class Operations(pyfuse3.Operations):
    """Called by pyfuse3 on the trio loop; owns the inode and handle tables."""

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, store: Store, control: ControlDirectory, passthrough: Passthrough) -> None:
        super().__init__()
        self.store = store
        self.control = control
        self.data_path = DataPath(store.blocks, passthrough)
        self.readiness = Readiness(store.volume.long_calls)
        # A registered file with the probe's token; 0: the daemon answers the probe.
        self.probe_id = 0
        self.inodes = InodeTable()
        self.handles = Handles(store.blocks)
        self._options = store.volume.config.mount

    # --- encoding

    def _entry(self, inode: Inode) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        directory = inode.kind == Kind.DIRECTORY
        entry.st_ino = inode.id
        entry.st_mode = inode.mode | (stat.S_IFDIR if directory else stat.S_IFREG)
        entry.st_nlink = 2 if directory else 1
        entry.st_uid = inode.uid
        entry.st_gid = inode.gid
        entry.st_size = inode.size_bytes
        entry.st_blksize = STATFS_BLOCK_BYTES
        entry.st_blocks = -(-inode.size_bytes // 512)
        entry.st_atime_ns = inode.atime_ns
        entry.st_mtime_ns = inode.mtime_ns
        entry.st_ctime_ns = inode.ctime_ns
        entry.attr_timeout = self._options.attr_timeout_s
        entry.entry_timeout = self._options.entry_timeout_s
        return entry

    def _given(self, inode: Inode) -> pyfuse3.EntryAttributes:
        """The answer that the kernel counts as one lookup. No await may follow."""
        self.inodes.add(inode.id)
        return self._entry(inode)

    def _nothing(self) -> pyfuse3.EntryAttributes:
        """A negative entry: the kernel remembers that the name does not exist."""
        timeout_s = 0.0 if self.store.volume.walking else self._options.negative_timeout_s
        if timeout_s == 0.0:
            raise pyfuse3.FUSEError(errno.ENOENT)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = 0
        entry.entry_timeout = timeout_s
        return entry

    def _check_parent(self, parent: int) -> None:
        if ControlDirectory.owns(parent):
            raise self.control.refuse()

    # --- names

    @answered
    async def lookup(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> Any:
        if ControlDirectory.owns(parent):
            inode = CONTROL_INODE if name in (b".", b"..") else self.control.lookup(name)
            return self.control.attributes(inode)
        if parent == ROOT_INODE and name == layout.PRIVATE_DIR:
            return self.control.attributes(CONTROL_INODE)
        if len(name) > layout.NAME_MAX_BYTES:
            raise FilesystemError(errno.ENAMETOOLONG)
        found = self.store.namespace.lookup(parent, name)
        if found is None and self.store.volume.walking:
            found = await self.store.find_on_tiers(parent, name)
        if found is None:
            self.store.volume.counters.count("lookups_negative")
            return self._nothing()
        return self._given(found)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        self.inodes.forget(inode_list)

    @answered
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Any:
        if ControlDirectory.owns(inode):
            return self.control.attributes(inode)
        found = self.store.namespace.get(inode)
        if found is None:
            raise FilesystemError(errno.ESTALE)
        return self._entry(found)

    @answered
    async def setattr(
        self, inode: int, attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields,
        fh: int | None, ctx: pyfuse3.RequestContext,
    ) -> Any:  # fmt: skip
        self._check_parent(inode)
        handle = self.handles[fh] if fh is not None else None
        changed = await self.store.attributes.set(
            inode, handle.block if handle else None,
            size=attr.st_size if fields.update_size else None,
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )  # fmt: skip
        return self._entry(changed)

    @answered
    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext) -> Any:
        self._check_parent(parent)
        mode, gid = self._inherited(parent, mode, ctx, directory=True)
        return self._given(await self.store.namespace.mkdir(parent, name, mode, ctx.uid, gid))

    def _inherited(
        self, parent: int, mode: int, ctx: pyfuse3.RequestContext, *, directory: bool = False
    ) -> tuple[int, int]:
        """Mode and group of a new file: a set-group-id directory passes its group on."""
        row = self.store.volume.catalog.get(parent)
        if row is None or not row.mode & stat.S_ISGID:
            return mode, ctx.gid
        return mode | (stat.S_ISGID if directory else 0), row.gid

    @answered
    async def rmdir(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._check_parent(parent)
        await self.store.namespace.rmdir(parent, name)

    @answered
    async def unlink(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._check_parent(parent)
        await self.store.namespace.unlink(parent, name)

    @answered
    async def rename(
        self, parent_old: int, name_old: bytes, parent_new: int, name_new: bytes,
        flags: int, ctx: pyfuse3.RequestContext,
    ) -> None:  # fmt: skip
        self._check_parent(parent_old)
        self._check_parent(parent_new)
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise InvalidOperation("only RENAME_NOREPLACE is supported")
        await self.store.namespace.rename(
            parent_old, name_old, parent_new, name_new, replace=not flags
        )

    @answered
    async def link(
        self, inode: int, new_parent: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> Any:
        raise NotPermitted("a block has one name: hard links are refused")

    @answered
    async def symlink(
        self, parent: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> Any:
        raise NotPermitted("symbolic links are refused")

    @answered
    async def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> Any:
        self._check_parent(parent)
        if not stat.S_ISREG(mode):
            raise NotPermitted("only regular files can be made")
        mode, gid = self._inherited(parent, mode, ctx)
        inode, block = await self.store.blocks.create(parent, name, mode, ctx.uid, gid)
        self.store.namespace.directory_changed(parent)
        await self.store.blocks.close(block, writer=True)
        return self._given(inode)

    # --- directories

    @answered
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        if not ControlDirectory.owns(inode):
            found = self.store.namespace.get(inode)
            if found is None:
                raise FilesystemError(errno.ESTALE)
        return inode

    @answered
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        if ControlDirectory.owns(fh):
            self._list_control(start_id, token)
            return
        if start_id < DOT_DOT and not self._list_dots(fh, start_id, token):
            return
        after = max(0, start_id - COOKIE_SHIFT)
        namespace = self.store.namespace
        while batch := namespace.children(fh, after, LISTING_BATCH):
            for name, inode in batch:
                cookie = inode.id + COOKIE_SHIFT
                if not pyfuse3.readdir_reply(token, name, self._entry(inode), cookie):
                    return
                self.inodes.add(inode.id)
            after = batch[-1][1].id

    def _list_dots(self, directory: int, start_id: int, token: pyfuse3.ReaddirToken) -> bool:
        """ "." and "..", which the kernel does not count; False when the buffer is full."""
        namespace = self.store.namespace
        for cookie, name in ((DOT, b"."), (DOT_DOT, b"..")):
            found = namespace.lookup(directory, name)
            if cookie <= start_id or found is None:
                continue
            if not pyfuse3.readdir_reply(token, name, self._entry(found), cookie):
                return False
        return True

    def _list_control(self, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        for cookie, (name, inode) in enumerate(self.control.entries(), start=1):
            if cookie > start_id:
                attributes = self.control.attributes(inode)
                if not pyfuse3.readdir_reply(token, name, attributes, cookie):
                    return

    @answered
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self.store.sync_directory(fh)

    async def releasedir(self, fh: int) -> None:
        """Nothing is kept for an open directory."""

    # --- files

    @answered
    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> Any:
        self._check_parent(parent)
        mode, gid = self._inherited(parent, mode, ctx)
        try:
            inode, block = await self.store.blocks.create(parent, name, mode, ctx.uid, gid)
        except BlockExists:
            # The kernel asks for creation on a cached negative entry without looking again.
            found = self.store.namespace.lookup(parent, name)
            if flags & os.O_EXCL or found is None:
                raise
            if found.kind == Kind.DIRECTORY:
                raise FilesystemError(errno.EISDIR) from None
            info = await self._open(found.id, flags, ctx.uid)
            return info, self._given(self.store.namespace.get(found.id) or found)
        self.store.namespace.directory_changed(parent)
        fh = self.handles.add(Handle(block, writer=True))
        return self.data_path.answer(block, fh, writer=True), self._given(inode)

    @answered
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> Any:
        if ControlDirectory.owns(inode):
            if flags & os.O_ACCMODE != os.O_RDONLY:
                raise self.control.refuse()
            fh = self.handles.add(Handle(snapshot=self.control.content(inode)))
            self.store.volume.counters.count("opens_control")
            if self.control.is_probe(inode):
                return pyfuse3.FileInfo(fh=fh | self.probe_id << BACKING_ID_SHIFT)
            return pyfuse3.FileInfo(fh=fh, direct_io=True)
        return await self._open(inode, flags, ctx.uid)

    async def _open(self, inode: int, flags: int, uid: int) -> pyfuse3.FileInfo:
        blocks = self.store.blocks
        if flags & os.O_ACCMODE == os.O_RDONLY:
            counted = not flags & os.O_NOATIME
            block = await blocks.open_reader(inode)
            if counted and uid not in self.store.volume.config.tiering.quiet_uids:
                self.store.volume.accesses.touch(inode, self.store.volume.clock.now_s())
            fh = self.handles.add(Handle(block))
            return self.data_path.answer(block, fh, writer=False)
        block = await blocks.open_writer(inode, truncate=bool(flags & os.O_TRUNC))
        fh = self.handles.add(Handle(block, writer=True))
        return self.data_path.answer(block, fh, writer=True)

    @answered
    async def read(self, fh: int, off: int, size: int) -> bytes:
        return await self.handles.read(self.handles[fh], off, size)

    @answered
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        block = self.handles[fh].block
        if block is None:
            raise self.control.refuse()
        return await self.store.blocks.write(block, off, buf)

    @answered
    async def flush(self, fh: int) -> None:
        """Written through already: the kernel need not ask at every close."""
        raise pyfuse3.FUSEError(errno.ENOSYS)

    @answered
    async def fsync(self, fh: int, datasync: bool) -> None:
        block = self.handles[fh].block
        if block is not None:
            await self.store.blocks.fsync(block, data_only=datasync)

    @answered
    async def release(self, fh: int) -> None:
        handle = self.handles.remove(fh)
        if handle.writer and handle.block is not None:
            await self.store.blocks.close(handle.block, writer=True)
        elif handle.block is not None:
            self.store.blocks.part(handle.block)

    # --- the whole

    @answered
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        room = self.store.room()
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = STATFS_BLOCK_BYTES
        answer.f_blocks = room.size_bytes // STATFS_BLOCK_BYTES
        answer.f_bfree = room.free_bytes // STATFS_BLOCK_BYTES
        answer.f_bavail = room.available_bytes // STATFS_BLOCK_BYTES
        answer.f_files = room.files + room.free_files
        answer.f_ffree = answer.f_favail = room.free_files
        answer.f_namemax = layout.NAME_MAX_BYTES
        return answer

    @answered
    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        """The kernel checks permissions itself (default_permissions)."""
        return True

    # --- xattrs

    @answered
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        if ControlDirectory.owns(inode):
            raise FilesystemError(errno.ENODATA)
        return self.store.attributes.get_xattr(inode, name)

    @answered
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        if ControlDirectory.owns(inode):
            return ()
        return self.store.attributes.list_xattrs(inode)

    @answered
    async def setxattr(
        self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        self._check_parent(inode)
        await self.store.attributes.set_xattr(inode, name, value)

    @answered
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._check_parent(inode)
        await self.store.attributes.remove_xattr(inode, name)

    async def close_all(self) -> None:
        """After the mount is gone: release whatever the kernel did not."""
        for number in list(self.handles.numbers()):
            handle = self.handles.remove(number)
            if handle.block is not None:
                tolerated = self.store.volume.tolerate("closing what was open")
                with tolerated, trio.CancelScope(shield=True):
                    await self.store.blocks.close(handle.block, writer=handle.writer)
        self.store.blocks.idle.clear()
