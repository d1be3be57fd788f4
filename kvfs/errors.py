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

# Answers of a tier's filesystem that speak of its medium, not of the one file.
MEDIUM_ERRNOS = frozenset(
    {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT, errno.ENODEV,
     errno.ENXIO, errno.EREMOTEIO}
)  # fmt: skip
_DISK_CODES = frozenset(
    {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED,
     sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}
)  # fmt: skip

SHORTAGE_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class KvfsError(Exception):
    """An operating error with a one-line message that says what to do."""

    errno: int = errno.EIO
    exit_code: int = 1
    # What metrics call it.
    reason: str = "refused"


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
    reason = "offline"


class TierDeadline(TierOffline):
    """A tier did not answer a call within its deadline."""

    reason = "deadline"


class TierBusy(TierOffline):
    """So many requests wait for a tier already that one more would keep others from theirs."""

    reason = "waiting"


class StagingFailed(TierError):
    """The fastest tier could not hold what was to be fetched onto it."""

    reason = "staging"


class TierFull(TierError):
    """No tier has room for the bytes, and nothing may be evicted."""

    errno = errno.ENOSPC
    reason = "full"


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
    reason = "gone"


class BlockExists(KvfsError):
    """The name is taken."""

    errno = errno.EEXIST


class BlockStale(KvfsError):
    """The kernel asked for an inode that lost its last replica; it looks the name up again."""

    errno = errno.ESTALE
    reason = "gone"


class BlockCorrupt(KvfsError):
    """A replica's bytes do not have the checksum recorded at seal."""

    errno = errno.EIO
    reason = "checksum"


class BlockTorn(BlockCorrupt):
    """A replica's file has not the length that was recorded at seal."""

    reason = "size"


class BlockBusy(KvfsError):
    """The block is open, unsealed or changed while it was being moved."""

    errno = errno.EBUSY
    reason = "busy"


class DeviceError(KvfsError):
    """A GPU cannot be used, or it or a library for it failed."""


class QuotaExceeded(KvfsError):
    """A user has as many leases, bytes or waiting requests as he may have at one time."""

    errno = errno.EDQUOT
    reason = "quota"


class ClientForked(KvfsError):
    """A client was made in another process: its connection belongs to that one."""

    errno = errno.EBADF


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


class RecordBehind(OSError):
    """A file has its new name, but its seal record could not be written: that is to be repeated."""


def is_shortage(error: BaseException) -> bool:
    """Whether the daemon lacks descriptors or memory: it says nothing of a tier or a file."""
    return isinstance(error, OSError) and error.errno in SHORTAGE_ERRNOS


def errno_of(error: BaseException) -> int:
    """The errno a system call answers when `error` reached the mount edge."""
    if isinstance(error, KvfsError):
        return error.errno
    if isinstance(error, OSError):
        number = error.errno or errno.EIO
        # ENOTCONN of a tier, say, is not that of the mount.
        return errno.EIO if number in MEDIUM_ERRNOS else number
    if is_of_catalog_disk(error) and "full" in str(error):
        return errno.ENOSPC
    return errno.EIO


def reason_of(error: BaseException) -> str:
    """The word that metrics have for `error`: few and fixed, or the name of an errno."""
    if isinstance(error, KvfsError):
        return error.reason
    if isinstance(error, OSError):
        return errno.errorcode.get(error.errno or 0, "EIO")
    return "catalog" if is_of_catalog_disk(error) else "bug"


def is_expected(error: BaseException) -> bool:
    """Whether `error` is an answer rather than a bug: it needs no traceback in the log."""
    return isinstance(error, (KvfsError, OSError)) or is_of_catalog_disk(error)


def is_of_catalog_disk(error: BaseException) -> bool:
    """Whether the catalog's disk is full, fails or is busy: it may take the next statement."""
    if not isinstance(error, sqlite3.OperationalError):
        return False
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    return code & 0xFF in _DISK_CODES


def damaged_catalog(what: str) -> sqlite3.DatabaseError:
    """The error for rows that kvfs cannot have written, as if SQLite had found them."""
    error = sqlite3.DatabaseError(what)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


def is_of_damaged_catalog(error: BaseException) -> bool:
    """Whether SQLite found that the catalog's file is not what it wrote; alone or in a group."""
    if isinstance(error, BaseExceptionGroup):
        return any(is_of_damaged_catalog(inner) for inner in error.exceptions)
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK)
    return code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def exit_code_of(error: BaseException) -> int:
    """The exit code of the command when `error` ends it."""
    if isinstance(error, KvfsError):
        return error.exit_code
    if isinstance(error, PermissionError):
        return NotPermitted.exit_code
    if isinstance(error, FileNotFoundError):
        return BlockNotFound.exit_code
    return 1
