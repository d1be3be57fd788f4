"""Seal records and the lease probe: what makes a closed file a block.

A seal record travels with the replica (an xattr, or a sidecar where the tier has none). With it a
walk of the tiers alone can tell sealed from torn and new from stale. Blocking calls on descriptors;
the sealer, the mover and recovery run them in worker threads.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import struct
from dataclasses import dataclass, replace

import xxhash

from kvfs.catalog.rows import RAW, ROOT_INODE, ZSTD, Inode
from kvfs.errors import BlockCorrupt
from kvfs.tiers.beneath import Root
from kvfs.tiers.forms import digest_of, may_hold

SEAL_XATTR = "user.kvfs.seal"

_RECORD = struct.Struct("<4sBBHQQQ16sIIIq")
_MAGIC = b"KVFS"
_VERSION = 1
_CHECK = struct.Struct("<I")
# No kvfs gives such numbers; one that was taken in would leave none for new blocks.
_BEYOND = 1 << 56
_MODES = 0o7777
SEAL_BYTES = _RECORD.size + _CHECK.size


@dataclass(frozen=True, slots=True)
class Seal:
    """What is known of a sealed block. `generation` decides between two replicas of one block."""

    inode: int
    generation: int
    length_bytes: int
    checksum: bytes
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    codec: int = RAW

    def encode(self) -> bytes:
        """72 bytes, closed by their own checksum."""
        body = _RECORD.pack(
            _MAGIC, _VERSION, self.codec, 0, self.inode, self.generation, self.length_bytes,
            self.checksum, self.mode, self.uid, self.gid, self.mtime_ns,
        )  # fmt: skip
        return body + _CHECK.pack(xxhash.xxh32_intdigest(body))

    def at_generation(self, generation: int) -> Seal:
        """The same content under a new generation."""
        return replace(self, generation=generation)


def seal_from(inode: Inode, codec: int) -> Seal:
    """The seal record of a sealed row, for a replica of this codec."""
    assert inode.checksum is not None, "a sealed block has a checksum"
    return Seal(
        inode.id, inode.generation, inode.size_bytes, inode.checksum,
        inode.mode, inode.uid, inode.gid, inode.mtime_ns, codec,
    )  # fmt: skip


def fits(seal: Seal, descriptor: int) -> bool:
    """Whether a file, by its looks, can be what the record says. Blocking. Raises OSError."""
    return may_hold(descriptor, seal.codec, seal.length_bytes, seal.checksum)


def decode_seal(data: bytes) -> Seal | None:
    """The record, or None when it is not one (torn, rotten, of an unknown version)."""
    if len(data) != SEAL_BYTES:
        return None
    body = data[: _RECORD.size]
    if _CHECK.unpack(data[_RECORD.size :])[0] != xxhash.xxh32_intdigest(body):
        return None
    magic, version, codec, _, inode, generation, length, checksum, mode, uid, gid, mtime = (
        _RECORD.unpack(body)
    )
    if magic != _MAGIC or version != _VERSION or codec not in (RAW, ZSTD):
        return None
    if inode <= ROOT_INODE or mode > _MODES or max(inode, generation, length) >= _BEYOND:
        return None
    return Seal(inode, generation, length, checksum, mode, uid, gid, mtime, codec)


@dataclass(frozen=True, slots=True)
class Content:
    """What a file contains, as a seal record says it."""

    length_bytes: int
    checksum: bytes


def content_of(root: Root, absolute: bytes, codec: int) -> Content | None:
    """Length and checksum of the block in a file now; None when there is none. Blocking."""
    try:
        descriptor = root.open(absolute, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        digest = digest_of(descriptor, codec)
        digest.advance()
        return Content(digest.length_bytes, digest.checksum())
    except BlockCorrupt:
        return None
    finally:
        os.close(descriptor)


def no_writer_left(descriptor: int) -> bool:
    """Whether nobody can write this file any more: no open descriptor, no shared mapping.

    A read lease is granted only then. It is given back at once; whether the content stayed the
    same until the seal was committed is checked by the caller. `descriptor` must be read-only.
    Raises OSError where the filesystem has no leases.
    """
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EBUSY):
            return False
        raise
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True


def ignore_lease_breaks() -> None:
    """A lease broken in the instant it is held raises SIGIO, whose default ends the process."""
    signal.signal(signal.SIGIO, signal.SIG_IGN)
