"""What the client library does where no daemon can be asked: the same on the files of a mount.

Slower, as each block is opened through the kernel, and without a lease: an open file of the mount
stays readable as long. Nothing here knows a daemon or a tier.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import xxhash

from kvfs import layout
from kvfs.dialogue import Write
from kvfs.errors import BlockExists
from kvfs.leased import Hits, Leased, LeasedBlock, Outcome, Prefetched, Stored

TIER_XATTR, CHECKSUM_XATTR, PIN_XATTR = "user.kvfs.tier", "user.kvfs.checksum", "user.kvfs.pin"
CHECKSUM_PREFIX = b"xxh3-128:"
# What an open of the mount says of a block that is there, or is not.
OUTCOME_OF: dict[int | None, Outcome] = {
    errno.ENOENT: "missing",
    errno.ENOTDIR: "missing",
    errno.ENAMETOOLONG: "missing",
    errno.ESTALE: "missing",
    errno.EISDIR: "missing",
    errno.ENODATA: "missing",
    errno.EACCES: "denied",
    errno.EPERM: "denied",
}


class PlainFiles:
    """Blocks as files below a directory of a mount. Immutable; blocking."""

    def __init__(self, directory: Path, prefix: bytes) -> None:
        """Names that are asked for begin with `prefix`, which is the directory's own path."""
        self._directory = os.fsencode(directory)
        self._prefix_bytes = len(prefix)

    def _path(self, name: bytes) -> bytes:
        return layout.join(self._directory, name[self._prefix_bytes :])

    def lookup(self, names: Sequence[bytes]) -> Hits:
        """See `Client.lookup`."""
        tiers: list[str | None] = []
        for name in names:
            path = self._path(name)
            try:
                tiers.append(os.fsdecode(os.getxattr(path, TIER_XATTR)))
            except OSError as error:
                # There, but not for this user to read.
                if error.errno not in (errno.EACCES, errno.ENODATA) or not os.path.isfile(path):
                    return Hits(tuple(tiers), _outcome_of(error))
                tiers.append(None)
        return Hits(tuple(tiers))

    def lease(self, names: Sequence[bytes], *, direct: bool, sparse: bool) -> Leased:
        """See `Client.lease`. Raises OSError(EMFILE)."""
        blocks: list[LeasedBlock | None] = [None] * len(names)
        outcomes: list[Outcome] = []
        try:
            for place, name in enumerate(names):
                try:
                    blocks[place] = self._open(name, direct)
                    outcomes.append("found")
                except OSError as error:
                    if error.errno in (errno.EMFILE, errno.ENFILE):
                        raise
                    outcomes.append(_outcome_of(error))
                    if not sparse:
                        break
        except BaseException:
            for block in blocks:
                if block is not None:
                    os.close(block.fd)
            raise
        return Leased(tuple(blocks), tuple(outcomes))

    def _open(self, name: bytes, direct: bool) -> LeasedBlock:
        path = self._path(name)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
        try:
            if os.path.isdir(fd):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            return LeasedBlock(
                name, fd, os.fstat(fd).st_size, _checksum_of(fd), 0, _tier_of(fd), direct=direct
            )
        except BaseException:
            os.close(fd)
            raise

    def put(self, name: bytes, data: memoryview, *, mode: int, replace: bool) -> Stored:
        """See `Client.put`."""
        path, checksum = self._path(name), xxhash.xxh3_128_digest(data)
        if not replace and os.path.exists(path):
            return _existing(path, data, checksum)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = b"%s.%s.tmp" % (path[:3900], secrets.token_hex(8).encode())
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            try:
                Write(fd, data).carry_out()
            finally:
                os.close(fd)
            if not replace and os.path.exists(path):
                os.unlink(temporary)
                return _existing(path, data, checksum)
            os.rename(temporary, path)
        except BaseException:
            _unlink(temporary)
            raise
        return Stored(True, len(data), checksum, _tier_of(path))

    def touch(self, names: Sequence[bytes]) -> int:
        """See `Client.touch`: an open for reading counts."""
        for name in names:
            os.close(os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC))
        return len(names)

    def prefetch(self, names: Sequence[bytes]) -> Prefetched:
        """Nobody here can promote: nothing is accepted."""
        there = len([name for name in names if os.path.isfile(self._path(name))])
        return Prefetched(refused=there, missing=len(names) - there)

    def pin(self, names: Sequence[bytes], tier: str | None) -> int:
        """See `Client.pin`; the tiering brings the block to the tier later."""
        for name in names:
            os.setxattr(self._path(name), PIN_XATTR, (tier or "1").encode())
        return len(names)

    def unpin(self, names: Sequence[bytes]) -> int:
        """See `Client.unpin`."""
        for name in names:
            os.setxattr(self._path(name), PIN_XATTR, b"0")
        return len(names)


def _outcome_of(error: OSError) -> Outcome:
    return OUTCOME_OF.get(error.errno, "offline")


def _tier_of(file: bytes | int) -> str | None:
    try:
        return os.fsdecode(os.getxattr(file, TIER_XATTR))
    except OSError:
        return None


def _checksum_of(file: bytes | int) -> bytes | None:
    """As the mount knows it; a block that is not sealed has none."""
    try:
        value = os.getxattr(file, CHECKSUM_XATTR)
    except OSError:
        return None
    return bytes.fromhex(value.removeprefix(CHECKSUM_PREFIX).decode())


def _existing(path: bytes, data: memoryview, checksum: bytes) -> Stored:
    """The block that is there, if it is the same. Raises BlockExists."""
    known = _checksum_of(path)
    if known is None:
        with open(path, "rb") as file:
            known = xxhash.xxh3_128_digest(file.read())
    if known != checksum or os.path.getsize(path) != len(data):
        raise BlockExists(f"{os.fsdecode(path)}: there is another block of this name")
    return Stored(False, len(data), checksum, _tier_of(path))


def _unlink(path: bytes) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
