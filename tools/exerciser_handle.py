"""One open file of the exerciser, and every way to get bytes in and out of it.

Each way is compared with the expectation at once. Never knows kvfs: plain system calls.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from dataclasses import dataclass

from kvfs.tools.exerciser_model import ExpectedFile, Mismatch, compare

PAGE_BYTES = mmap.PAGESIZE
MS_SYNC, MAP_FAILED = 4, ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.msync.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass(eq=False)
class Handle:
    """An open descriptor and the file that must be behind it, whatever its name is by now."""

    descriptor: int
    file: ExpectedFile
    flags: int
    position: int = 0

    @property
    def readable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_WRONLY

    @property
    def writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY

    @property
    def appends(self) -> bool:
        return bool(self.flags & os.O_APPEND)

    @property
    def direct(self) -> bool:
        return bool(self.flags & os.O_DIRECT)

    def __str__(self) -> str:
        how = {os.O_RDONLY: "r", os.O_WRONLY: "w", os.O_RDWR: "rw"}[self.flags & os.O_ACCMODE]
        return f"{self.file.name}({how}{'a' * self.appends}{'d' * self.direct})"

    # --- reading

    def read_at(self, offset: int, length: int) -> None:
        """pread(2) must give what is there, short only at the end of the file."""
        self._expect(offset, length, os.pread(self.descriptor, length, offset))

    def read_on(self, length: int) -> None:
        """read(2) goes on where the descriptor stands."""
        found = os.read(self.descriptor, length)
        self._expect(self.position, length, found)
        self.position += len(found)

    def read_direct(self, offset: int, length: int) -> bool:
        """A read into an aligned buffer; False when the filesystem wants an aligned request."""
        with mmap.mmap(-1, length) as buffer:
            try:
                count = os.preadv(self.descriptor, [buffer], offset)
            except OSError as error:
                return self._refuse_unaligned(error, offset, length)
            self._expect(offset, length, buffer[:count])
        return True

    def send(self, length: int) -> None:
        """sendfile(2) from the start: the bytes do not come to this process by read."""
        target = os.memfd_create("exerciser")
        try:
            sent = 0
            while count := os.sendfile(target, self.descriptor, sent, length - sent):
                sent += count
            self._expect(0, length, os.pread(target, length, 0))
        finally:
            os.close(target)

    def _expect(self, offset: int, length: int, found: bytes) -> None:
        compare(self.file.name, self.file.part(offset, length), found, offset)

    def _refuse_unaligned(self, error: OSError, offset: int, length: int) -> bool:
        if error.errno != errno.EINVAL or (offset | length) % PAGE_BYTES == 0:
            raise error
        return False

    # --- writing

    def write_at(self, offset: int, data: bytes) -> None:
        """pwrite(2), of all the bytes."""
        self._wrote(offset, data, os.pwrite(self.descriptor, data, offset))

    def write_on(self, data: bytes) -> None:
        """write(2) where the descriptor stands, or at the end."""
        offset = self.file.size if self.appends else self.position
        self._wrote(offset, data, os.write(self.descriptor, data))
        self.position = offset + len(data)

    def write_direct(self, offset: int, data: bytes) -> bool:
        """A write from an aligned buffer; False when the filesystem wants an aligned request."""
        with mmap.mmap(-1, len(data)) as buffer:
            buffer.write(data)
            try:
                count = os.pwritev(self.descriptor, [buffer], offset)
            except OSError as error:
                self._refuse_unaligned(error, offset, len(data))
                self._adopt_refused(offset, data)
                return False
        self._wrote(offset, data, count)
        return True

    def _adopt_refused(self, offset: int, data: bytes) -> None:
        """A refused request may have set the time, and ext4 writes those extents that fit it."""
        start = offset - offset % PAGE_BYTES
        length = offset + len(data) - start
        with mmap.mmap(-1, length + -length % PAGE_BYTES) as buffer:
            count = os.preadv(self.descriptor, [buffer], start)
            found = buffer[: min(count, length)]
        before = self.file.part(start, length)
        if len(found) != len(before):
            raise Mismatch(self.file.name, "a refused write changed the size", offset)
        after = (before[: offset - start] + data)[: len(before)]
        for at, (old, is_now, new) in enumerate(zip(before, found, after, strict=True), start):
            if is_now not in (old, new):
                raise Mismatch(self.file.name, "neither old nor what was refused", at)
        self.file.touched()
        self.file.content[start : start + len(found)] = found

    def _wrote(self, offset: int, data: bytes, count: int) -> None:
        if count != len(data):
            raise Mismatch(self.file.name, f"{count} bytes written of {len(data)}", offset)
        self.file.write(offset, data)

    # --- the rest

    def truncate(self, size: int) -> None:
        os.ftruncate(self.descriptor, size)
        self.file.resize(size)

    def check(self) -> None:
        """Fail unless the descriptor shows the size and the time that the file must have."""
        status = os.fstat(self.descriptor)
        if status.st_size != self.file.size:
            raise Mismatch(self.file.name, f"size {status.st_size} instead of {self.file.size}")
        end = os.lseek(self.descriptor, 0, os.SEEK_END)
        os.lseek(self.descriptor, self.position, os.SEEK_SET)
        if end != self.file.size:
            raise Mismatch(self.file.name, f"SEEK_END {end} instead of {self.file.size}")
        self.file.check_mtime(status.st_mtime_ns)

    def close(self) -> None:
        os.close(self.descriptor)


class Mapping:
    """A mapping of a whole file that, unlike Python's, does not keep its descriptor open."""

    def __init__(self, descriptor: int, length: int, *, shared: bool) -> None:
        kind = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        address = _libc.mmap(None, length, protection, kind, descriptor, 0)
        if address in (None, MAP_FAILED):
            raise _error("mmap")
        self._address, self._length = address, length

    def load(self, offset: int, length: int) -> bytes:
        assert offset + length <= self._length
        return ctypes.string_at(self._address + offset, length)

    def store(self, offset: int, data: bytes) -> None:
        assert offset + len(data) <= self._length
        ctypes.memmove(self._address + offset, data, len(data))

    def sync(self) -> None:
        if _libc.msync(self._address, self._length, MS_SYNC) != 0:
            raise _error("msync")

    def close(self) -> None:
        if _libc.munmap(self._address, self._length) != 0:
            raise _error("munmap")


def _error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")
