"""What a second process does to the exerciser's files, by fork with the handles open.

The child compares like the parent and ends at once: nothing that the parent has buffered or
registered is run twice. A child that finds something wrong is the parent's Mismatch.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass

from kvfs.tools.exerciser_handle import Handle
from kvfs.tools.exerciser_model import Mismatch

RECORDS, RECORD_BYTES = 8, 700
_RECORD = struct.Struct("<II")
STRIPES, STRIPE_BYTES = 6, 3000


class Child:
    """A forked process that does one thing. Started by the constructor; must be waited for."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._report, theirs = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            status = 1
            try:
                work()
                status = 0
            except BaseException as error:
                os.write(theirs, str(error).encode())
            finally:
                os._exit(status)
        os.close(theirs)

    def wait(self) -> None:
        """Raises Mismatch with what the child says is wrong."""
        with os.fdopen(self._report, "rb") as report:
            said = report.read().decode()
        _, status = os.waitpid(self._pid, 0)
        if status != 0:
            raise Mismatch("in the child", said or f"it ended with status {status}")


@dataclass(frozen=True)
class Step:
    """A write that the child makes through an inherited handle; `at` None: where it stands."""

    handle: Handle
    data: bytes
    at: int | None

    def __str__(self) -> str:
        return f"write {self.handle} {'on' if self.at is None else self.at}+{len(self.data)}"

    def play(self) -> None:
        if self.at is None:
            self.handle.write_on(self.data)
        else:
            self.handle.write_at(self.at, self.data)

    def mirror(self) -> None:
        """What the parent must find: the file is written, the shared position has moved."""
        handle = self.handle
        if self.at is not None:
            handle.file.write(self.at, self.data)
            return
        offset = handle.file.size if handle.appends else handle.position
        handle.file.write(offset, self.data)
        handle.position = offset + len(self.data)

    def look(self) -> None:
        handle = self.handle
        if handle.readable:
            handle.read_at(0, handle.file.size + 1)
        stands_at = os.lseek(handle.descriptor, 0, os.SEEK_CUR)
        if stands_at != handle.position:
            raise Mismatch(handle.file.name, f"stands at {stands_at}, not {handle.position}")


class Stripes:
    """Parent and child write every other stripe of a file, beginning at its start."""

    def __init__(self, handle: Handle, noise: bytes) -> None:
        self._handle = handle
        self._noise = noise

    def write(self) -> None:
        child = Child(lambda: self._write_every_other(1))
        self._write_every_other(0)
        child.wait()
        for number in range(2 * STRIPES):
            self._handle.file.write(number * STRIPE_BYTES, self._stripe(number))

    def _write_every_other(self, first: int) -> None:
        for number in range(first, 2 * STRIPES, 2):
            os.pwrite(self._handle.descriptor, self._stripe(number), number * STRIPE_BYTES)

    def _stripe(self, number: int) -> bytes:
        return self._noise[number : number + STRIPE_BYTES]


class Appends:
    """Parent and child append records; their order is found out, everything else is known."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def write(self) -> None:
        child = Child(lambda: self._append_all(1))
        self._append_all(0)
        child.wait()
        self._adopt()

    def _append_all(self, writer: int) -> None:
        for number in range(RECORDS):
            os.write(self._handle.descriptor, self._record(writer, number))

    def _record(self, writer: int, number: int) -> bytes:
        return _RECORD.pack(writer, number).ljust(RECORD_BYTES, b"%d" % writer)

    def _adopt(self) -> None:
        """Each writer's records are whole and in order. Raises Mismatch."""
        file, handle = self._handle.file, self._handle
        start, length = file.size, 2 * RECORDS * RECORD_BYTES
        found = os.pread(handle.descriptor, length + 1, start)
        if len(found) != length:
            raise Mismatch(file.name, f"{len(found)} bytes appended instead of {length}", start)
        following = [0, 0]
        for at in range(0, length, RECORD_BYTES):
            record = found[at : at + RECORD_BYTES]
            writer = record[0] & 1
            if record != self._record(writer, following[writer]):
                raise Mismatch(file.name, "not the next record of a writer", start + at)
            following[writer] += 1
        file.write(start, found)
        handle.read_at(0, file.size + 1)
