"""Files below one directory, by paths that cannot lead out of it.

Whoever could write to a tier may have planted a symbolic link there that leads elsewhere. So kvfs
reaches nothing on a tier by a plain path: `openat2(2)` resolves it beneath the tier's root and
follows no link. Kernels before 5.6 and sandboxes that forbid the call get the same by a walk from
directory to directory. Blocking functions, for any thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import logging
import os
import stat
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

# The same on every architecture that Linux got after 2020, and on those before it that matter.
_OPENAT2 = 437
_RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x04, 0x08
# What stands in a path's way, or in a file's place.
_NOT_THERE = {
    errno.ELOOP: "behind a symbolic link",
    errno.EXDEV: "behind a symbolic link",
    errno.ENXIO: "not a regular file",
}
# Leases of kvfs' own are held for the time of two system calls.
LEASE_RETRIES, LEASE_RETRY_S = 5, 0.002
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_ANYTHING = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class _How(ctypes.Structure):
    """struct open_how of linux/openat2.h."""

    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.argtypes = (
    ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t,
)  # fmt: skip
_syscall.restype = ctypes.c_long


@functools.lru_cache(maxsize=64)
def _how(flags: int, mode: int) -> _How:
    return _How(flags, mode, _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS)


def _openat2(directory: int, path: bytes, flags: int, mode: int) -> int:
    """Raises OSError; one by a signal is repeated, as Python's own calls are."""
    how = _how(flags, mode)
    while True:
        opened: int = _syscall(_OPENAT2, directory, path, ctypes.byref(how), ctypes.sizeof(how))
        if opened >= 0:
            return opened
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def _has_openat2() -> bool:
    try:
        os.close(_openat2(-100, b".", _DIRECTORY, 0))
    except OSError as error:
        return error.errno not in (errno.ENOSYS, errno.EPERM)
    return True


HAS_OPENAT2 = _has_openat2()


class Root:
    """A directory and what is below it. Immutable, so it belongs to any thread; its descriptor is
    closed with the last reference, because a call in another thread may hang on it.

    Paths are absolute ones that start with `path`, so that errors name what an admin sees. What
    lies behind a symbolic link, or would lie outside, is not there: FileNotFoundError.
    """

    def __init__(self, path: bytes) -> None:
        """Links in `path` itself are followed: it comes from the configuration."""
        self.path = path
        self._prefix = path + b"/"
        self._descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)

    def open(self, path: bytes, flags: int, mode: int = 0o600) -> int:
        """A descriptor. Opening a fifo for reading does not wait for its writer, nor a file for
        somebody's lease: BlockingIOError, but for a lease of a moment (`kvfs.leasing.lingering`).
        """
        flags |= os.O_CLOEXEC | os.O_NONBLOCK
        mode = mode if flags & os.O_CREAT else 0
        for _ in range(LEASE_RETRIES):
            try:
                return self._resolve(path, flags, mode)
            except BlockingIOError:
                time.sleep(LEASE_RETRY_S)
        return self._resolve(path, flags, mode)

    def read(self, path: bytes, most_bytes: int) -> bytes:
        """A small file, or the beginning of a large one."""
        with os.fdopen(self.open(path, os.O_RDONLY), "rb") as file:
            return file.read(most_bytes)

    def write(self, path: bytes, data: bytes) -> None:
        """A new small file, durably. What has the name goes."""
        with contextlib.suppress(FileNotFoundError):
            self.unlink(path)
        with os.fdopen(self.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def status(self, path: bytes) -> os.stat_result:
        """lstat(2)."""
        descriptor = self._resolve(path, _ANYTHING)
        try:
            return os.fstat(descriptor)
        finally:
            os.close(descriptor)

    def exists(self, path: bytes) -> bool:
        """Whether anything has this name, a link that leads nowhere too."""
        try:
            self.status(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def unlink(self, path: bytes) -> None:
        """unlink(2): of a symbolic link, the link."""
        self._in_directory_of(path, lambda above, name: os.unlink(name, dir_fd=above))

    def rmdir(self, path: bytes) -> None:
        self._in_directory_of(path, lambda above, name: os.rmdir(name, dir_fd=above))

    def rename(self, old: bytes, new: bytes) -> None:
        """rename(2)."""
        self._below(old)
        self._below(new)
        old_head, _, old_name = old.rpartition(b"/")
        new_head, _, new_name = new.rpartition(b"/")
        source = self._resolve(old_head, _DIRECTORY)
        target = source
        try:
            if new_head != old_head:
                target = self._resolve(new_head, _DIRECTORY)
            os.rename(old_name, new_name, src_dir_fd=source, dst_dir_fd=target)
        except OSError as error:
            raise OSError(error.errno, error.strerror, old, None, new) from None
        finally:
            os.close(source)
            if target != source:
                os.close(target)

    def make_directories(self, path: bytes, mode: int = 0o755) -> None:
        """A directory and those above it, where they are missing.

        A symbolic link in the way belongs to no block, and goes.
        """
        with contextlib.suppress(FileNotFoundError):
            os.close(self._resolve(path, _DIRECTORY))
            return
        current = os.dup(self._descriptor)
        try:
            for name in filter(None, self._below(path).split(b"/")):
                following = _enter(current, name, mode)
                os.close(current)
                current = following
        finally:
            os.close(current)

    def entries(self, path: bytes) -> Iterator[os.DirEntry[str]]:
        """What is in a directory. The entries are of use while the iterator is at them."""
        descriptor = self.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with os.scandir(descriptor) as entries:
                yield from entries
        finally:
            os.close(descriptor)

    def names(self, path: bytes) -> list[bytes]:
        """listdir, for directories that are known to be small."""
        return [os.fsencode(entry.name) for entry in self.entries(path)]

    def sync_directory(self, path: bytes) -> None:
        """fsync of a directory."""
        descriptor = self.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    # --- resolving

    def _below(self, path: bytes) -> bytes:
        """The path as seen from the root."""
        if path == self.path:
            return b"."
        below = path[len(self._prefix) :]
        if not path.startswith(self._prefix) or b"\0" in below:
            raise FileNotFoundError(errno.ENOENT, "not below the tier", path)
        if b".." in below and b".." in below.split(b"/"):
            raise FileNotFoundError(errno.ENOENT, "leads out of the tier", path)
        return below or b"."

    def _resolve(self, path: bytes, flags: int, mode: int = 0) -> int:
        below = self._below(path)
        try:
            if HAS_OPENAT2:
                return _openat2(self._descriptor, below, flags, mode)
            return _walk(self._descriptor, below, flags, mode)
        except OSError as error:
            reason = _NOT_THERE.get(error.errno or 0)
            if reason:
                raise FileNotFoundError(errno.ENOENT, reason, path) from None
            raise OSError(error.errno, error.strerror, path) from None

    def _in_directory_of(self, path: bytes, act: Callable[[int, bytes], T]) -> T:
        """Do something with a name in its directory. Raises OSError that names the path."""
        self._below(path)
        head, _, name = path.rpartition(b"/")
        directory = self._resolve(head, _DIRECTORY)
        try:
            return act(directory, name)
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from None
        finally:
            os.close(directory)


def _walk(root: int, below: bytes, flags: int, mode: int) -> int:
    """What openat2 does, directory by directory. A link is ELOOP."""
    *directories, name = [part for part in below.split(b"/") if part] or [b"."]
    current = os.dup(root)
    try:
        for directory in directories:
            following = _open_at(current, directory, _DIRECTORY, 0)
            os.close(current)
            current = following
        return _open_at(current, name, flags, mode)
    finally:
        os.close(current)


def _open_at(directory: int, name: bytes, flags: int, mode: int) -> int:
    try:
        return os.open(name, flags | os.O_NOFOLLOW, mode, dir_fd=directory)
    except NotADirectoryError:
        if _is_link(directory, name):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from None
        raise


def _enter(directory: int, name: bytes, mode: int) -> int:
    """Open a directory in another one; it is made when it is missing, also in place of a link."""
    try:
        return os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        if not _is_link(directory, name):
            raise
        log.warning("a symbolic link was in place of the directory %r: removed", os.fsdecode(name))
        os.unlink(name, dir_fd=directory)
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, mode, dir_fd=directory)
    return os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)


def _is_link(directory: int, name: bytes) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False
