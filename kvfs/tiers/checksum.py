"""XXH3-128 of files: of the bytes that readers get, or of those that the medium has.

Blocking calls for worker threads. Other threads run meanwhile: xxhash and pread hold no lock of
Python's while they work on a piece of this size. Measured, in pieces of 1 MiB from the page cache:
20 GB/s on one core, and a Python loop beside it keeps 98 % of its speed.
"""

from __future__ import annotations

import ctypes
import mmap
import os

import xxhash

from kvfs.tiers.deadlines import is_wanted

PIECE_BYTES = 1 << 20
PAGE_BYTES = mmap.PAGESIZE
# The same on every architecture that Linux has.
_CACHESTAT = 451


def checksum_of(descriptor: int, *, past_page_cache: bool = False) -> bytes:
    """The checksum of a whole file, 16 bytes.

    `past_page_cache` drops the (already written) pages first, so that the medium is read.
    """
    if past_page_cache:
        drop_cached(descriptor)
    digest = Digest(descriptor)
    digest.advance()
    return digest.checksum()


class Digest:
    """The checksum of a file, made slice by slice. Used by one thread at a time.

    `direct`: the descriptor was opened with O_DIRECT, which wants aligned requests.
    """

    def __init__(self, descriptor: int, *, direct: bool = False) -> None:
        self.length_bytes = 0
        self.done = False
        self._descriptor = descriptor
        self._digest = xxhash.xxh3_128()
        self._buffer = mmap.mmap(-1, PIECE_BYTES) if direct else None

    def advance(self, most_bytes: int | None = None) -> int:
        """Read on, at least to the end of a piece; bytes read. `done` at the end of the file."""
        start = self.length_bytes
        while not self.done and (most_bytes is None or self.length_bytes - start < most_bytes):
            if not is_wanted():
                break  # the descriptor may be another file's by now
            piece = self._read()
            self.length_bytes += len(piece)
            # After the tail of a file the next aligned request would be none.
            self.done = not piece or (self._buffer is not None and len(piece) % PAGE_BYTES != 0)
            self._digest.update(piece)
        return self.length_bytes - start

    def _read(self) -> bytes | memoryview:
        if self._buffer is None:
            return os.pread(self._descriptor, PIECE_BYTES, self.length_bytes)
        size = os.preadv(self._descriptor, [self._buffer], self.length_bytes)
        return memoryview(self._buffer)[:size]

    def checksum(self) -> bytes:
        """Of what was read so far."""
        return self._digest.digest()


def drop_cached(descriptor: int) -> None:
    """Give back the pages of a file that need not be written any more."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


class _Range(ctypes.Structure):
    """struct cachestat_range; a length of 0 is the whole file."""

    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _CacheStatus(ctypes.Structure):
    """struct cachestat, in pages."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")
    )


_syscall = ctypes.CDLL(None, use_errno=True).syscall


def cached_bytes(descriptor: int, size_bytes: int) -> int:
    """How much of a file is in the page cache; all of it where the kernel (before 6.5) cannot say.

    Asked before a file is read, for what the medium will have to deliver.
    """
    whole, status = _Range(0, 0), _CacheStatus()
    number = ctypes.c_long(_CACHESTAT)
    if _syscall(number, descriptor, ctypes.byref(whole), ctypes.byref(status), 0) != 0:
        return size_bytes
    return min(size_bytes, int(status.cached) * PAGE_BYTES)
