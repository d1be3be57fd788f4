"""Walking a tier: what files lie there, and which that should are missing. For worker threads."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import trio

from kvfs import layout
from kvfs.seal import SEAL_XATTR, Seal
from kvfs.tier import Tier

T = TypeVar("T")

BATCH = 500


@dataclass(frozen=True, slots=True)
class Found:
    """A file or directory on a tier. `seal` is None unless it is one of this content."""

    path: bytes
    fanned: bool
    is_directory: bool
    status: os.stat_result
    seal: Seal | None
    xattrs: tuple[tuple[bytes, bytes], ...]


def walk_tier(tier: Tier) -> Iterator[Found]:
    """Every directory before what is in it; kvfs' own files are left out."""
    pending = [b""]
    while pending:
        directory = pending.pop()
        try:
            entries = list(os.scandir(tier.root + b"/" + directory))
        except FileNotFoundError:
            continue
        for entry in entries:
            if not directory and entry.name in (layout.PRIVATE_DIR, b"lost+found"):
                continue
            stored = layout.join(directory, entry.name)
            if entry.is_dir(follow_symlinks=False):
                pending.append(stored)
                if not _is_fan_out(stored):
                    found = look(tier, stored)
                    if found:
                        yield found
            elif entry.is_file(follow_symlinks=False):
                found = look(tier, stored)
                if found:
                    yield found


def _is_fan_out(stored: bytes) -> bool:
    head, name = layout.split(stored)
    return name == layout.FAN_OUT_DIR or layout.split(head)[1] == layout.FAN_OUT_DIR


def look(tier: Tier, stored: bytes) -> Found | None:
    """What lies at a stored path; None when nothing does. Blocking."""
    absolute = tier.root + b"/" + stored
    try:
        status = os.lstat(absolute)
        is_directory = stat.S_ISDIR(status.st_mode)
        seal = None if is_directory else tier.read_seal(absolute)
        xattrs = read_xattrs(tier, absolute)
    except FileNotFoundError:
        return None
    if seal is not None and seal.length_bytes != status.st_size:
        seal = None
    path, fanned = (stored, False) if is_directory else layout.logical_path(stored)
    return Found(path, fanned, is_directory, status, seal, xattrs)


def is_there(tier: Tier, found: Found) -> bool:
    """Whether a path still names the file that was found there. Blocking."""
    try:
        return os.lstat(tier.locate(found.path, found.fanned)).st_ino == found.status.st_ino
    except (FileNotFoundError, NotADirectoryError):
        return False


def read_xattrs(tier: Tier, absolute: bytes) -> tuple[tuple[bytes, bytes], ...]:
    """The user.* xattrs that belong to the block, pin and ttl included."""
    if not tier.identity.probe.xattrs:
        return ()
    names = [
        name for name in os.listxattr(absolute)
        if name.startswith("user.") and name != SEAL_XATTR
    ]  # fmt: skip
    return tuple((os.fsencode(name), os.getxattr(absolute, name)) for name in names)


def missing_files(tier: Tier, expected: list[tuple[int, bytes, bool, int]]) -> list[int]:
    """Of (inode, path, fanned, size or -1): those without such a file. Blocking."""
    missing = []
    for inode, path, fanned, size in expected:
        try:
            status = os.lstat(tier.locate(path, fanned))
        except (FileNotFoundError, NotADirectoryError):
            missing.append(inode)
            continue
        if not stat.S_ISREG(status.st_mode) or (size >= 0 and status.st_size != size):
            missing.append(inode)
    return missing


async def in_batches(tier: Tier, iterator: Iterator[T]) -> list[T]:
    """The next BATCH items of a blocking iterator; empty at its end."""
    return await trio.to_thread.run_sync(
        lambda: list(islice(iterator, BATCH)), limiter=tier.limiter, abandon_on_cancel=tier.remote
    )
