"""One replica read into the host's memory: raw or compressed, whole, verified if that is asked for.

Blocking functions on descriptors without state; any thread may call them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence

import xxhash

from kvfs.errors import BlockCorrupt, BlockTorn, KvfsError
from kvfs.gpu.device import RAW, Load
from kvfs.tiers.codec import PIECE_BYTES, open_compressed
from kvfs.units import printable

_MAX_VIEWS = os.sysconf("SC_IOV_MAX")
# What a filesystem says that cannot tell whether a read would wait.
_NO_NOWAIT = frozenset({errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL})


def read_cached(load: Load, views: Sequence[memoryview]) -> bool:
    """Read a raw replica out of the page cache; False if it is not all there.

    Raises BlockCorrupt, OSError.
    """
    try:
        done = os.preadv(load.fd, views[:_MAX_VIEWS], 0, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno in _NO_NOWAIT:
            return False
        raise
    if done != load.size_bytes:
        return False
    verify(load, views)
    return True


def read(load: Load, views: Sequence[memoryview]) -> None:
    """Read and decode a replica into `views`, and verify it.

    Raises BlockTorn, BlockCorrupt, OSError.
    """
    if load.codec == RAW:
        _read_raw(load, views)
    else:
        _decompress(load, views)
    verify(load, views)


def _read_raw(load: Load, views: Sequence[memoryview]) -> None:
    """Fill `views` from the beginning of a file. Raises BlockTorn, OSError."""
    rest = list(views)
    offset = 0
    while offset < load.size_bytes:
        done = os.preadv(load.fd, rest[:_MAX_VIEWS], offset)
        if done == 0:
            raise BlockTorn(f"its replica has {offset} bytes instead of {load.size_bytes}")
        offset += done
        rest = _after(rest, done)


def _after(views: list[memoryview], done: int) -> list[memoryview]:
    """What is left of `views` after `done` bytes."""
    for position, view in enumerate(views):
        if done < len(view):
            return [view[done:], *views[position + 1 :]]
        done -= len(view)
    return []


def _decompress(load: Load, views: Sequence[memoryview]) -> None:
    """Fill `views` from a compressed replica. Raises BlockCorrupt, OSError."""
    block = open_compressed(load.fd)
    if block.size_bytes != load.size_bytes:
        raise BlockCorrupt("its replica is of another length")
    pieces = (block.read(offset, PIECE_BYTES) for offset in range(0, load.size_bytes, PIECE_BYTES))
    _spread(pieces, views)


def _spread(pieces: Iterable[bytes], views: Sequence[memoryview]) -> None:
    """Copy `pieces`, which are as long as `views` together, into them."""
    targets = iter(views)
    target = memoryview(b"")
    for piece in pieces:
        rest = memoryview(piece)
        while rest:
            if not target:
                target = next(targets)
            count = min(len(rest), len(target))
            target[:count] = rest[:count]
            rest, target = rest[count:], target[count:]


def verify(load: Load, views: Sequence[memoryview]) -> None:
    """Raises BlockCorrupt unless the bytes have the checksum that is asked for, if one is."""
    if load.checksum is not None:
        digest = xxhash.xxh3_128()
        for view in views:
            digest.update(view)
        check(load, digest.digest())


def check(load: Load, digest: bytes) -> None:
    """Raises BlockCorrupt unless the block's bytes have the checksum of its seal."""
    if digest != load.checksum:
        raise BlockCorrupt("its bytes do not have the checksum of its seal")


def named(error: BaseException, load: Load) -> Exception:
    """The error of one block, saying which. Raises it if it is of a kind that no block has."""
    if isinstance(error, KvfsError):
        error.args = (f"{name_of(load)}: {error}",)
        return error
    if isinstance(error, OSError):
        error.filename = error.filename or name_of(load)
        return error
    raise error


def name_of(load: Load) -> str:
    """The block's path, for an error."""
    return printable(os.fsdecode(load.path))
