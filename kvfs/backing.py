"""Backing files of blocks on a tier: make, open, rename, fetch. Functions for `Tier.run`."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from typing import TypeVar

from kvfs import layout
from kvfs.copying import copy_file
from kvfs.rows import Inode
from kvfs.tier import Tier

T = TypeVar("T")


def create_file(tier: Tier, path: bytes, fanned: bool, inode: Inode) -> int:
    """A new backing file, open for reading and writing. Blocking.

    A file that is there already belongs to no block (the catalog was asked): its readers keep it,
    its name goes.
    """
    absolute = tier.locate(path, fanned)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = in_directory(tier, absolute, lambda: _open_new(absolute, flags))
    if os.geteuid() == 0 and (inode.uid, inode.gid) != (0, 0):
        os.fchown(descriptor, inode.uid, inode.gid)
    return descriptor


def continue_file(tier: Tier, path: bytes, fanned: bool, inode: Inode, source: int) -> int:
    """A new backing file with what `source` has so far; nothing is left when that fails. Blocking.

    The source is duplicated: its number may be another file's when a slow tier answers at last.
    """
    source = os.dup(source)
    try:
        descriptor = create_file(tier, path, fanned, inode)
        try:
            copy_file(source, descriptor)
        except BaseException:
            os.close(descriptor)
            tier.remove(path, fanned)
            raise
    finally:
        os.close(source)
    return descriptor


def _open_new(absolute: bytes, flags: int) -> int:
    try:
        return os.open(absolute, flags, 0o600)
    except FileExistsError:
        os.unlink(absolute)
        return os.open(absolute, flags, 0o600)


def in_directory(tier: Tier, absolute: bytes, act: Callable[[], T]) -> T:
    """Do something with a path whose directories may be missing; they are made then. Blocking.

    Directories exist on a tier while a file needs them: other threads remove those that are
    empty, under the same lock.
    """
    try:
        return act()
    except FileNotFoundError:
        with tier.directory_lock:
            os.makedirs(os.path.dirname(absolute), exist_ok=True)
            return act()


def rename_into_place(tier: Tier, source: bytes, target: bytes) -> None:
    """rename(2) that makes missing directories, even while others remove empty ones. Blocking."""
    try:
        os.rename(source, target)
    except FileNotFoundError:
        os.lstat(source)
        in_directory(tier, target, lambda: os.rename(source, target))
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        _merge_directory(tier, source, target)


def _merge_directory(tier: Tier, source: bytes, target: bytes) -> None:
    """Move what is in a directory into another that has left-overs. Blocking."""
    for name in os.listdir(source):
        rename_into_place(tier, source + b"/" + name, target + b"/" + name)
    os.rmdir(source)


def open_file(tier: Tier, path: bytes, fanned: bool, flags: int, expected: int | None) -> int:
    """Open a backing file. One that has not the length of its seal is as good as missing."""
    absolute = tier.locate(path, fanned)
    descriptor = os.open(absolute, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    if expected is not None and (size := os.fstat(descriptor).st_size) != expected:
        os.close(descriptor)
        reason = f"{size} bytes, sealed with {expected}"
        raise FileNotFoundError(errno.ENOENT, reason, os.fsdecode(absolute))
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
