"""Backing files of blocks on a tier: make, open, fetch. Blocking functions for `Tier.run`."""

from __future__ import annotations

import errno
import logging
import os
import tempfile

from kvfs import layout
from kvfs.copying import copy_file
from kvfs.rows import Inode
from kvfs.tier import Tier

log = logging.getLogger(__name__)


def create_file(tier: Tier, path: bytes, fanned: bool, inode: Inode) -> int:
    """A new backing file, open for reading and writing. Blocking.

    A file that is there already belongs to no block (the catalog was asked): its readers keep it,
    its name goes.
    """
    absolute = tier.locate(path, fanned)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    for _ in range(8):
        try:
            descriptor = os.open(absolute, flags, 0o600)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(absolute), exist_ok=True)
        except FileExistsError:
            os.unlink(absolute)
        else:
            if os.geteuid() == 0 and (inode.uid, inode.gid) != (0, 0):
                os.fchown(descriptor, inode.uid, inode.gid)
            return descriptor
    raise OSError(errno.EBUSY, "its directory keeps vanishing", os.fsdecode(absolute))


def open_file(tier: Tier, path: bytes, fanned: bool, flags: int, expected: int | None) -> int:
    """Open a backing file. One that has not the length of its seal is as good as missing."""
    absolute = tier.locate(path, fanned)
    descriptor = os.open(absolute, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    if expected is not None and (size := os.fstat(descriptor).st_size) != expected:
        os.close(descriptor)
        log.error("%s has %d bytes, sealed with %d", os.fsdecode(absolute), size, expected)
        raise FileNotFoundError(errno.ENOENT, "not the sealed length", os.fsdecode(absolute))
    return descriptor


def fetch_file(tier: Tier, path: bytes, fanned: bool, expected: int, local_root: bytes) -> int:
    """Copy a backing file into a nameless local one; its descriptor. Blocking."""
    source = open_file(tier, path, fanned, os.O_RDONLY, expected)
    try:
        staging = os.fsdecode(local_root + b"/" + layout.STAGING_DIR)
        with tempfile.TemporaryFile(dir=staging) as target:
            copy_file(source, target.fileno())
            return os.dup(target.fileno())
    finally:
        os.close(source)
