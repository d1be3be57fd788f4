"""Every error kvfs raises on purpose, and the one place that maps errors to errno and exit codes.

The mount edge turns whatever reaches it into an errno with `errno_of`; the command turns it into an
exit code with `exit_code_of`. Nothing else chooses either.

Exit codes of the command (documented in docs/OPERATIONS.md):

==  =====================================================================
0   done
1   it was tried and failed, or a check found something
2   wrong use: unknown option, bad argument (also what typer uses)
3   the configuration is wrong
4   a tier is wrong: missing, foreign, overlapping, too small
5   the mountpoint is wrong: not empty, a file, busy; or the path is in no kvfs mount
6   no daemon answers, or the mount is dead
7   the catalog cannot be used
8   no such block or directory
9   not permitted
==  =====================================================================
"""

from __future__ import annotations

import errno
import os
import sqlite3

_DISK_CODES = frozenset(
    {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED,
     sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}
)  # fmt: skip


class KvfsError(Exception):
    """An operating error with a one-line message that says what to do."""

    errno: int = errno.EIO
    exit_code: int = 1


class UsageError(KvfsError):
    """An argument makes no sense."""

    errno = errno.EINVAL
    exit_code = 2


class ConfigError(KvfsError):
    """A configuration file or option is refused; the message names file, key and reason."""

    errno = errno.EINVAL
    exit_code = 3


class TierError(KvfsError):
    """A tier directory cannot be used as configured."""

    exit_code = 4


class TierOffline(TierError):
    """The block lives only on a tier that does not answer."""

    errno = errno.EIO


class TierFull(TierError):
    """No tier has room for the bytes, and nothing may be evicted."""

    errno = errno.ENOSPC


class MountpointError(KvfsError):
    """The mountpoint cannot be mounted on, or is not a kvfs mount."""

    exit_code = 5


class DaemonUnavailable(KvfsError):
    """No daemon answers at the control socket."""

    errno = errno.ECONNREFUSED
    exit_code = 6


class CatalogError(KvfsError):
    """The catalog cannot be opened or is of a newer schema."""

    exit_code = 7


class BlockNotFound(KvfsError):
    """No block or directory has this name."""

    errno = errno.ENOENT
    exit_code = 8


class BlockExists(KvfsError):
    """The name is taken."""

    errno = errno.EEXIST


class BlockStale(KvfsError):
    """The kernel asked for an inode that lost its last replica; it looks the name up again."""

    errno = errno.ESTALE


class BlockCorrupt(KvfsError):
    """A replica's bytes do not have the checksum recorded at seal."""

    errno = errno.EIO


class BlockBusy(KvfsError):
    """The block is open, unsealed or changed while it was being moved."""

    errno = errno.EBUSY


class NotPermitted(KvfsError):
    """kvfs refuses this operation to everybody, or to this caller."""

    errno = errno.EPERM
    exit_code = 9


class InvalidOperation(KvfsError):
    """The operation is not one that kvfs has (RENAME_EXCHANGE, a bad xattr value)."""

    errno = errno.EINVAL
    exit_code = 2


class FilesystemError(KvfsError):
    """A POSIX answer of the namespace: ENOTDIR, EISDIR, ENOTEMPTY, ENAMETOOLONG, ENODATA, ..."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message or os.strerror(number))
        self.errno = number


def errno_of(error: BaseException) -> int:
    """The errno a system call answers when `error` reached the mount edge."""
    if isinstance(error, KvfsError):
        return error.errno
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    if is_of_catalog_disk(error) and "full" in str(error):
        return errno.ENOSPC
    return errno.EIO


def is_expected(error: BaseException) -> bool:
    """Whether `error` is an answer rather than a bug: it needs no traceback in the log."""
    return isinstance(error, (KvfsError, OSError)) or is_of_catalog_disk(error)


def is_of_catalog_disk(error: BaseException) -> bool:
    """Whether the catalog's disk is full, fails or is busy: it may take the next statement."""
    if not isinstance(error, sqlite3.OperationalError):
        return False
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    return code & 0xFF in _DISK_CODES


def exit_code_of(error: BaseException) -> int:
    """The exit code of the command when `error` ends it."""
    if isinstance(error, KvfsError):
        return error.exit_code
    if isinstance(error, PermissionError):
        return NotPermitted.exit_code
    if isinstance(error, FileNotFoundError):
        return BlockNotFound.exit_code
    return 1
