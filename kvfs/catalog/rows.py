"""The catalog's rows as values, and what their numbers mean."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

ROOT_INODE = 1
# States of a replica: a suspect one is older than the reopened block's.
GOOD, SUSPECT = 0, 1
# Codecs of a replica: the bytes of its block as they are, or compressed (docs/FORMAT.md).
RAW, ZSTD = 0, 1


class Kind(IntEnum):
    DIRECTORY = 0
    BLOCK = 1


class BlockState(IntEnum):
    """writing -> published -> sealed; a sealed block opened for writing is reopened."""

    WRITING = 0
    PUBLISHED = 1
    SEALED = 2
    REOPENED = 3


class Inode(NamedTuple):
    """One row of `inode`."""

    id: int
    kind: int
    mode: int
    uid: int
    gid: int
    size_bytes: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    generation: int
    state: int
    checksum: bytes | None
    pin: str | None
    ttl_s: float | None


class Replica(NamedTuple):
    """One row of `replica`."""

    inode: int
    tier: int
    allocated_bytes: int
    state: int
    fanned: int
    tau: float
    verified: int
    mtime_ns: int
    codec: int = RAW
    saved_bytes: int = 0


class Placed(NamedTuple):
    """A replica on one tier, with what its file is expected to be."""

    inode: int
    fanned: int
    codec: int
    size_bytes: int
    state: int
    checksum: bytes | None


class Intent(NamedTuple):
    """One row of `intent`."""

    id: int
    tier: int
    kind: str
    inode: int
    path: bytes
    target: bytes | None
