"""Seal records, the lease probe and checksums: what makes a closed file a block.

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

SEAL_XATTR = "user.kvfs.seal"
PIECE_BYTES = 1 << 20

_RECORD = struct.Struct("<4sBBHQQQ16sIIIq")
_MAGIC = b"KVFS"
_VERSION = 1
_CHECK = struct.Struct("<I")


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
    codec: int = 0

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


def decode_seal(data: bytes) -> Seal | None:
    """The record, or None when it is not one (torn, rotten, of an unknown version)."""
    if len(data) != _RECORD.size + _CHECK.size:
        return None
    body = data[: _RECORD.size]
    if _CHECK.unpack(data[_RECORD.size :])[0] != xxhash.xxh32_intdigest(body):
        return None
    magic, version, codec, _, inode, generation, length, checksum, mode, uid, gid, mtime = (
        _RECORD.unpack(body)
    )
    if magic != _MAGIC or version != _VERSION:
        return None
    return Seal(inode, generation, length, checksum, mode, uid, gid, mtime, codec)


def checksum_of(descriptor: int, *, past_page_cache: bool = False) -> bytes:
    """XXH3-128 of the whole file, 16 bytes. xxhash and pread both let other threads run.

    `past_page_cache` drops the (already written) pages first, so that the medium is read.
    """
    if past_page_cache:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    digest = xxhash.xxh3_128()
    offset = 0
    while piece := os.pread(descriptor, PIECE_BYTES, offset):
        digest.update(piece)
        offset += len(piece)
    return digest.digest()


@dataclass(frozen=True, slots=True)
class Content:
    """What a file contains, as a seal record says it."""

    length_bytes: int
    checksum: bytes


def content_of(absolute: bytes) -> Content | None:
    """Length and checksum of a file now; None when there is none. Blocking."""
    try:
        descriptor = os.open(absolute, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        return Content(os.fstat(descriptor).st_size, checksum_of(descriptor))
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
