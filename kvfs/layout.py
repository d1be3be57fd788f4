"""The on-disk layout of a tier: the only module that knows it.

A block's bytes lie at the same relative path as in the mount. Everything of kvfs' own is under
`TIER/.kvfs/`, and the overflow of a crowded directory under `DIR/.kvfs.d/HH/`:

    TIER/vllm/ab/cd.bin             a block
    TIER/sglang/.kvfs.d/7f/NAME     a block of a directory with more than FAN_OUT_NAMES names
    TIER/.kvfs/tier.json            identity of the tier
    TIER/.kvfs/lock                 held with flock by the daemon that uses the tier
    TIER/.kvfs/catalog.sqlite       on the fastest tier only
    TIER/.kvfs/staging/             copies that are not complete yet, named by block id
    TIER/.kvfs/quarantine/          files that are never served again, TIME.REASON.NAME
    TIER/.kvfs/meta/HH/INO.seal     seal records where the filesystem has no xattrs

Pure functions on `bytes`; paths are relative to the mount, without a leading slash, root is `b""`.
"""

from __future__ import annotations

import errno
import posixpath

import xxhash

from kvfs.errors import FilesystemError, InvalidOperation, NotPermitted

PRIVATE_DIR = b".kvfs"
FAN_OUT_DIR = b".kvfs.d"
RESERVED_NAMES = frozenset({PRIVATE_DIR, FAN_OUT_DIR})

IDENTITY_FILE = b".kvfs/tier.json"
LOCK_FILE = b".kvfs/lock"
CATALOG_FILE = b".kvfs/catalog.sqlite"
STAGING_DIR = b".kvfs/staging"
QUARANTINE_DIR = b".kvfs/quarantine"
META_DIR = b".kvfs/meta"

NAME_MAX_BYTES = 255
PATH_MAX_BYTES = 4000
# ext4's two-level htree refuses names at some 7.5 million files with space and inodes free.
FAN_OUT_NAMES = 1 << 20


def check_name(name: bytes) -> None:
    """Raise for a name that no file of the mount may have. The kernel asks for none without
    characters, or with those that mean something in a path; clients of the control socket might.
    """
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise InvalidOperation(f"{name!r} is no name of a file")
    if len(name) > NAME_MAX_BYTES:
        raise FilesystemError(errno.ENAMETOOLONG)
    if name in RESERVED_NAMES:
        raise NotPermitted(f"{name.decode()} is reserved for kvfs")


def join(parent: bytes, name: bytes) -> bytes:
    """The path of `name` in the directory at `parent`."""
    return parent + b"/" + name if parent else name


def split(path: bytes) -> tuple[bytes, bytes]:
    """The parent's path and the last name."""
    head, _, tail = path.rpartition(b"/")
    return head, tail


def stored_path(path: bytes, fanned: bool) -> bytes:
    """Where the file of `path` lies below a tier's root."""
    if not fanned:
        return path
    head, name = split(path)
    bucket = b"%02x" % (xxhash.xxh3_64_intdigest(name) >> 56)
    return join(join(head, FAN_OUT_DIR), join(bucket, name))


def logical_path(stored: bytes) -> tuple[bytes, bool]:
    """The inverse of `stored_path`: the path in the mount, and whether it was fanned out."""
    head, name = split(stored)
    bucket_parent, _ = split(head)
    directory, last = split(bucket_parent)
    if last == FAN_OUT_DIR:
        return join(directory, name), True
    return stored, False


def is_within(path: bytes, ancestor: bytes) -> bool:
    """Whether `path` is `ancestor` or lies below it."""
    return not ancestor or path == ancestor or path.startswith(ancestor + b"/")


def namespace_of(path: bytes) -> bytes:
    """The top-level directory: one engine, model and layout."""
    return path.split(b"/", 1)[0]


def is_temporary(name: bytes) -> bool:
    """Names that engines write before they rename: never moved, removed when forgotten."""
    return name.endswith(b".tmp")


def staging_path(inode: int, generation: int) -> bytes:
    """Where the copy of a block is put together on the target tier."""
    return STAGING_DIR + b"/%d.%d" % (inode, generation)


def quarantine_name(time_ns: int, reason: str, path: bytes) -> bytes:
    """What a file is called in quarantine: in the order of time, readable, short enough."""
    return b"%d.%s.%s" % (time_ns, reason.encode(), split(path)[1][-180:])


def parse_quarantine_name(name: bytes) -> tuple[int, str, bytes] | None:
    """(time, reason, end of the former name); None for what kvfs did not put there."""
    moment, _, rest = name.partition(b".")
    reason, dot, last = rest.partition(b".")
    if not dot or not (moment.isdigit() and moment.isascii()) or not reason.isalpha():
        return None
    return int(moment), reason.decode(), last


def sidecar_path(file_number: int) -> bytes:
    """Where the seal record of the backing file with this inode number lies."""
    return posixpath.join(META_DIR, b"%02x" % (file_number & 0xFF), b"%d.seal" % file_number)
