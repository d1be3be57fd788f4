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

# Version, codec and mode, inode, generation, length, checksum, uid, gid, mtime; then the record's
# own checksum. 60 bytes are what ext4 has for an xattr of this name in an inode of 256 bytes
# (measured): a longer one gets a page, 6 % of a block of 64 KiB and one more read of a walk.
_RECORD = struct.Struct("<BH7s7s7s16sIIq")
_VERSION = 2
_NUMBER_BYTES = 7
_CHECK = struct.Struct("<I")
# What was written before: magic, version, codec, 0, inode, generation, length, and so on.
_RECORD_1 = struct.Struct("<4sBBHQQQ16sIIIq")
_MAGIC_1 = b"KVFS\x01"
# No kvfs gives such numbers; one that was taken in would leave none for new blocks.
_BEYOND = 1 << 8 * _NUMBER_BYTES
_MODES = 0o7777
MOST_SEAL_BYTES = _RECORD_1.size + _CHECK.size


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
        """60 bytes, closed by their own checksum."""
        numbers = (self.inode, self.generation, self.length_bytes)
        body = _RECORD.pack(
            _VERSION, self.codec << 12 | self.mode,
            *(number.to_bytes(_NUMBER_BYTES, "little") for number in numbers),
            self.checksum, self.uid, self.gid, self.mtime_ns,
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
    body, check = data[: -_CHECK.size], data[-_CHECK.size :]
    if check != _CHECK.pack(xxhash.xxh32_intdigest(body)):
        return None
    seal = _decode(body)
    if seal is None or seal.codec not in (RAW, ZSTD):
        return None
    if seal.inode <= ROOT_INODE or seal.mode > _MODES:
        return None
    return seal if max(seal.inode, seal.generation, seal.length_bytes) < _BEYOND else None


def _decode(body: bytes) -> Seal | None:
    if len(body) == _RECORD.size and body[0] == _VERSION:
        _, codec_and_mode, *numbers, checksum, uid, gid, mtime = _RECORD.unpack(body)
        inode, generation, length = (int.from_bytes(number, "little") for number in numbers)
        codec, mode = codec_and_mode >> 12, codec_and_mode & _MODES
        return Seal(inode, generation, length, checksum, mode, uid, gid, mtime, codec)
    if len(body) == _RECORD_1.size and body.startswith(_MAGIC_1):
        _, _, codec, _, inode, generation, length, checksum, mode, uid, gid, mtime = (
            _RECORD_1.unpack(body)
        )
        return Seal(inode, generation, length, checksum, mode, uid, gid, mtime, codec)
    return None


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
