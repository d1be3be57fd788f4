"""Walking a tier: what files lie there, and which that should are missing. For worker threads."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeVar

from kvfs import layout
from kvfs.catalog.rows import RAW, ZSTD, BlockState, Inode, Placed
from kvfs.errors import BlockCorrupt
from kvfs.tiers.codec import Header, read_header
from kvfs.tiers.forms import may_hold
from kvfs.tiers.seal import SEAL_XATTR, Seal
from kvfs.tiers.tier import Tier

T = TypeVar("T")
Fault = Literal["missing-file", "wrong-size", "wrong-header"]

BATCH = 500


@dataclass(frozen=True, slots=True)
class Found:
    """A file or directory on a tier. `seal` is None unless it is one of this content; `header` is
    that of a compressed file."""

    path: bytes
    fanned: bool
    is_directory: bool
    status: os.stat_result
    seal: Seal | None
    xattrs: tuple[tuple[bytes, bytes], ...]
    header: Header | None = None

    @property
    def codec(self) -> int:
        return RAW if self.header is None else ZSTD

    def may_hold(self, row: Inode, codec: int) -> bool:
        """Whether it looks like a replica of this codec of a sealed block."""
        if codec == RAW:
            return self.status.st_size == row.size_bytes
        header = self.header
        return header is not None and (header.size_bytes, header.checksum) == (
            row.size_bytes, row.checksum,
        )  # fmt: skip


def walk_tier(tier: Tier) -> Iterator[Found]:
    """Every directory before what is in it; kvfs' own files are left out."""
    pending = [b""]
    while pending:
        directory = pending.pop()
        with contextlib.suppress(FileNotFoundError):
            for entry in tier.files.entries(tier.root + b"/" + directory):
                stored = layout.join(directory, os.fsencode(entry.name))
                if not _may_lie_there(stored, entry):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(stored)
                    if _is_fan_out(stored):
                        continue
                found = look(tier, stored)
                if found:
                    yield found


def _may_lie_there(stored: bytes, entry: os.DirEntry[str]) -> bool:
    """Whether kvfs puts such a thing there: it leaves alone what has no place in a namespace."""
    head, name = layout.split(stored)
    if name == layout.PRIVATE_DIR or stored == b"lost+found":
        return False
    if entry.is_dir(follow_symlinks=False):
        return not _is_fan_out(head) or layout.split(head)[1] == layout.FAN_OUT_DIR
    if layout.FAN_OUT_DIR in (name, layout.split(head)[1]):
        return False
    return entry.is_file(follow_symlinks=False)


def _is_fan_out(stored: bytes) -> bool:
    head, name = layout.split(stored)
    return name == layout.FAN_OUT_DIR or layout.split(head)[1] == layout.FAN_OUT_DIR


def look(tier: Tier, stored: bytes) -> Found | None:
    """What lies at a stored path; None when nothing does. Blocking."""
    absolute = tier.root + b"/" + stored
    try:
        status = tier.files.status(absolute)
        is_directory = stat.S_ISDIR(status.st_mode)
        seal = None if is_directory else tier.read_fitting_seal(absolute)
        xattrs = read_xattrs(tier, absolute)
        is_raw = is_directory or (seal is not None and seal.codec == RAW)
        header = None if is_raw else _header_of(tier, absolute)
    except FileNotFoundError:
        return None
    path, fanned = (stored, False) if is_directory else layout.logical_path(stored)
    return Found(path, fanned, is_directory, status, seal, xattrs, header)


def _header_of(tier: Tier, absolute: bytes) -> Header | None:
    """That of a compressed file; None of another one."""
    descriptor = tier.files.open(absolute, os.O_RDONLY)
    try:
        return read_header(descriptor)
    except BlockCorrupt:
        return None
    finally:
        os.close(descriptor)


def is_there(tier: Tier, found: Found) -> bool:
    """Whether a path still names the file that was found there. Blocking."""
    try:
        status = tier.files.status(tier.locate(found.path, found.fanned))
        return status.st_ino == found.status.st_ino
    except (FileNotFoundError, NotADirectoryError):
        return False


def read_xattrs(tier: Tier, absolute: bytes) -> tuple[tuple[bytes, bytes], ...]:
    """The user.* xattrs that belong to the block, pin and ttl included."""
    if not tier.identity.probe.xattrs:
        return ()
    descriptor = tier.files.open(absolute, os.O_RDONLY)
    try:
        names = [
            name for name in os.listxattr(descriptor)
            if name.startswith("user.") and name != SEAL_XATTR
        ]  # fmt: skip
        return tuple((os.fsencode(name), os.getxattr(descriptor, name)) for name in names)
    finally:
        os.close(descriptor)


def missing_files(tier: Tier, expected: list[tuple[bytes, Placed]]) -> list[Placed]:
    """Of replicas, by their paths: those without such a file. Blocking."""
    return [placed for path, placed in expected if fault_of(tier, path, placed)]


def fault_of(tier: Tier, path: bytes, placed: Placed) -> Fault | None:
    """What is wrong with the file of a replica by its looks. Blocking."""
    absolute = tier.locate(path, bool(placed.fanned))
    try:
        status = tier.files.status(absolute)
        if not stat.S_ISREG(status.st_mode):
            return "missing-file"
        if placed.state != BlockState.SEALED or placed.checksum is None:
            return None
        if placed.codec == RAW:
            return "wrong-size" if status.st_size != placed.size_bytes else None
        return "wrong-header" if not _has_header(tier, absolute, placed) else None
    except (FileNotFoundError, NotADirectoryError):
        return "missing-file"


def _has_header(tier: Tier, absolute: bytes, placed: Placed) -> bool:
    assert placed.checksum is not None, "a sealed block has a checksum"
    descriptor = tier.files.open(absolute, os.O_RDONLY)
    try:
        return may_hold(descriptor, placed.codec, placed.size_bytes, placed.checksum)
    finally:
        os.close(descriptor)


async def in_batches(tier: Tier, iterator: Iterator[T]) -> list[T]:
    """The next BATCH items of a blocking iterator; empty at its end."""
    return await tier.run_in_thread(lambda: list(islice(iterator, BATCH)))
