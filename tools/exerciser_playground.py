"""Where the exerciser plays: its files as they must be, its open handles, and its dice."""

from __future__ import annotations

import errno
import os
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path

from kvfs.tools.exerciser_handle import PAGE_BYTES, Handle
from kvfs.tools.exerciser_model import ExpectedFile, ExpectedTree, Mismatch

KIB, MIB = 1 << 10, 1 << 20
FILE_NAMES = ("a", "b.bin", "c.tmp", "d", "e.bin", "f")
MAX_HANDLES = 12
MAX_FILE_BYTES = 5 * MIB // 2
DIRECT_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)


class Playground:
    """The tree, the open handles and the dice. One thread; owns everything below `root`."""

    def __init__(self, root: Path, seed: int, history: int) -> None:
        self.root = os.path.abspath(root)
        self.tree = ExpectedTree()
        self.done = 0
        self.dice = random.Random(seed)
        self.handles: list[Handle] = []
        self._history: deque[str] = deque(maxlen=history)

    # --- what happened

    def did(self, what: object) -> None:
        self._history.append(f"{self.done}: {what}")

    def history(self) -> str:
        return " | ".join(self._history)

    # --- dice

    def path(self, name: str) -> str:
        return os.path.join(self.root, name)

    def chance(self, share: float) -> bool:
        return self.dice.random() < share

    def a_directory(self) -> str:
        return self.dice.choice(sorted(self.tree.directories))

    def a_new_name(self) -> str:
        """A name for a file in a directory that exists; some file may have it."""
        directory, name = self.a_directory(), self.dice.choice(FILE_NAMES)
        return f"{directory}/{name}".lstrip("/")

    def a_file(self) -> str:
        """The name of a file; the first one is made."""
        if not self.tree.files:
            first = FILE_NAMES[0]
            os.close(os.open(self.path(first), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            self.tree.create(first)
        return self.dice.choice(sorted(self.tree.files))

    def a_length(self) -> int:
        kind = self.dice.random()
        largest = 5000 if kind < 0.5 else 256 * KIB if kind < 0.93 else 3 * MIB // 2
        return self.dice.randint(1, largest)

    def an_offset(self, file: ExpectedFile) -> int:
        """Somewhere in the file, at a page, at its end or beyond."""
        kind = self.dice.random()
        if kind < 0.5:
            return self.dice.randint(0, file.size)
        if kind < 0.7:
            return self.dice.randint(0, file.size // PAGE_BYTES) * PAGE_BYTES
        if kind < 0.85:
            return file.size
        return file.size + self.dice.randint(1, 200 * KIB)

    def some_bytes(self, offset: int) -> bytes:
        """Content for a write at `offset`: at least one byte, within the largest file."""
        return self.dice.randbytes(max(1, min(self.a_length(), MAX_FILE_BYTES - offset)))

    # --- handles

    def a_handle(self, suits: Callable[[Handle], bool], flags: int) -> Handle:
        """An open handle of a kind, or a new one with these flags."""
        suitable = [handle for handle in self.handles if suits(handle)]
        if suitable and self.chance(0.8):
            return self.dice.choice(suitable)
        return self.open_handle(self.a_file(), flags)

    def open_handle(self, name: str, flags: int) -> Handle:
        handle = self.opened(name, flags)
        self.keep(handle)
        return handle

    def keep(self, handle: Handle) -> None:
        """One more open handle; an old one is closed when there are too many."""
        self.handles.append(handle)
        if len(self.handles) > MAX_HANDLES:
            self.close_handle(self.handles[self.dice.randrange(MAX_HANDLES)])

    def close_handle(self, handle: Handle) -> None:
        self.did(f"close {handle}")
        self.handles.remove(handle)
        handle.close()

    def opened(self, name: str, flags: int) -> Handle:
        """Open a file that exists; without O_DIRECT where that is refused."""
        try:
            descriptor = os.open(self.path(name), flags)
        except OSError as error:
            if not flags & os.O_DIRECT or error.errno not in DIRECT_REFUSED:
                raise
            flags &= ~os.O_DIRECT
            descriptor = os.open(self.path(name), flags)
        return Handle(descriptor, self.tree.files[name], flags)

    def expect_error(self, number: int, name: str, call: Callable[[], object]) -> None:
        """A call that must fail with this errno."""
        try:
            call()
        except OSError as error:
            if error.errno == number:
                return
            raise
        raise Mismatch(name, f"no {errno.errorcode[number]}")

    # --- names

    def rename_over(self, old: str, new: str) -> None:
        os.rename(self.path(old), self.path(new))
        self.lose(new, by=old)
        self.tree.rename_file(old, new)

    def lose(self, name: str, by: str = "") -> None:
        """A name goes; its file lives on for whoever has it open."""
        if name != by and (file := self.tree.files.pop(name, None)) is not None:
            file.name = f"{name} (unlinked)"
