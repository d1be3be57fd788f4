"""What a directory tree must hold after a sequence of operations: the exerciser's expectation.

Pure: it knows no filesystem. A comparison that fails raises Mismatch with name and offset.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Literal

import msgspec

# A file's time may be taken from a clock that lags by up to a timer tick.
TICK_NS = 20_000_000
# Times that were set lie before it, so that "now" is never one of them.
NEWEST_SET_NS = 1_500_000_000 * 10**9
_COMPARED_BYTES = 4096

Change = Literal["no", "maybe", "yes"]
Buffer = bytes | bytearray | memoryview


class Mismatch(Exception):
    """What was found is not what must be there."""

    def __init__(self, name: str, what: str, offset: int | None = None) -> None:
        place = name if offset is None else f"{name} at offset {offset}"
        super().__init__(f"{place}: {what}")
        self.name = name
        self.offset = offset


def first_difference(expected: Buffer, found: Buffer) -> int | None:
    """The first position at which two strings of bytes differ, be it the end of one; or None."""
    left, right = memoryview(expected), memoryview(found)
    if left == right:
        return None
    shared = min(len(left), len(right))
    for start in range(0, shared, _COMPARED_BYTES):
        end = min(start + _COMPARED_BYTES, shared)
        if left[start:end] != right[start:end]:
            return next(at for at in range(start, end) if left[at] != right[at])
    return shared


def compare(name: str, expected: Buffer, found: Buffer, start: int = 0) -> None:
    """Fail unless the bytes of a file from `start` on are those that were written."""
    at = first_difference(expected, found)
    if at is None:
        return
    left, right = memoryview(expected), memoryview(found)
    if at == min(len(left), len(right)):
        raise Mismatch(name, f"{len(right)} bytes from {start} instead of {len(left)}", start + at)
    what = f"{bytes(right[at : at + 4]).hex()} instead of {bytes(left[at : at + 4]).hex()}"
    raise Mismatch(name, what, start + at)


class ExpectedFile(msgspec.Struct, eq=False):
    """One file, with or without a name; `name` is the last one it had.

    `mtime_ns` is the time last seen or set, `changed` whether it has moved on since: it may have,
    or it has to. `late`: there were stores through a mapping, which a network filesystem or FUSE
    learns of when the file is closed or later, and of the last ones later than of the first.
    """

    name: str
    content: bytearray = msgspec.field(default_factory=bytearray)
    xattrs: dict[str, bytes] = {}
    mtime_ns: int = 0
    changed: Change = "yes"
    late: bool = False

    @property
    def size(self) -> int:
        return len(self.content)

    def write(self, offset: int, data: Buffer) -> None:
        """Put `data` at `offset`; what lies between the old end and it is zeros."""
        self._put(offset, data)
        self.changed = "yes"

    def store(self, offset: int, data: Buffer) -> None:
        """The same through a shared mapping."""
        self._put(offset, data)
        self.late = True

    def _put(self, offset: int, data: Buffer) -> None:
        if offset > len(self.content):
            self.content.extend(bytes(offset - len(self.content)))
        view = memoryview(data)
        self.content[offset : offset + len(view)] = view

    def resize(self, size: int) -> None:
        """Cut off or fill up with zeros. The same size again may leave the time alone."""
        if size == self.size:
            self.touched()
            return
        del self.content[size:]
        self.content.extend(bytes(size - self.size))
        self.changed = "yes"

    def touched(self) -> None:
        """Something happened after which a filesystem may, but need not, set the time."""
        if self.changed == "no":
            self.changed = "maybe"

    def set_mtime(self, mtime_ns: int) -> None:
        self.mtime_ns, self.changed, self.late = mtime_ns, "no", False

    def part(self, offset: int, length: int) -> bytes:
        """What a read must return."""
        return bytes(self.content[offset : offset + length])

    def check_mtime(self, found_ns: int, *, settled: bool = False) -> None:
        """Fail when the time moved without a change, not at all with one, or backwards.

        `settled`: nobody has the file open and it was looked up anew, so nothing is late.
        """
        known, late = self.mtime_ns, self.late
        stayed, advanced = found_ns == known, found_ns >= known - TICK_NS
        if self.changed == "yes" or (late and settled):
            right = advanced and not (stayed and known < NEWEST_SET_NS)
        else:
            right = stayed or (advanced and (late or self.changed == "maybe"))
        if not right:
            when = ", or late" if late else ""
            raise Mismatch(
                self.name, f"mtime {found_ns} after {known}, changed since: {self.changed}{when}"
            )
        self.set_mtime(found_ns)
        self.late = late and not settled

    def check_blocks(self, blocks: int, slack_bytes: int) -> None:
        """Fail when the allocation is not plausible: none for data, or far more than the size."""
        if blocks == 0 and self.content.count(0) < self.size:
            raise Mismatch(self.name, f"no blocks for {self.size} bytes of data")
        if blocks * 512 > self.size + slack_bytes:
            raise Mismatch(self.name, f"{blocks} blocks for {self.size} bytes")


class ExpectedTree(msgspec.Struct, eq=False):
    """Names and files below a directory; the root is ''. Can be stored as a manifest."""

    directories: set[str] = msgspec.field(default_factory=lambda: {""})
    files: dict[str, ExpectedFile] = {}

    def children(self, directory: str) -> list[str]:
        """The names in a directory, sorted."""
        everything = (*self.directories - {""}, *self.files)
        return sorted(name_of(path) for path in everything if parent_of(path) == directory)

    def below(self, directory: str) -> Iterator[str]:
        """All paths below a directory."""
        prefix = f"{directory}/" if directory else ""
        for path in (*self.directories - {""}, *self.files):
            if path.startswith(prefix):
                yield path

    def create(self, path: str) -> ExpectedFile:
        """A new empty file; whatever had the name has lost it."""
        self.files[path] = ExpectedFile(path)
        return self.files[path]

    def rename_file(self, old: str, new: str) -> None:
        file = self.files.pop(old)
        file.name = new
        self.files[new] = file

    def rename_directory(self, old: str, new: str) -> None:
        """Take everything along; `new` is absent or an empty directory."""
        for path in list(self.below(old)):
            moved = new + path[len(old) :]
            if path in self.files:
                self.rename_file(path, moved)
            else:
                self.directories.remove(path)
                self.directories.add(moved)
        self.directories.remove(old)
        self.directories.add(new)


def parent_of(path: str) -> str:
    return path.rpartition("/")[0]


def name_of(path: str) -> str:
    return PurePosixPath(path).name
