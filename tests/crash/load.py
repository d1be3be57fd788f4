"""A load that knows what a filesystem owes it at any moment, also when the daemon is killed.

Every block says in its own bytes which path and version it is. Writers note what they are about to
do, do it, and note that it was acknowledged; so whatever is found later can be judged.
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
from dataclasses import dataclass
from pathlib import Path

HEADER_BYTES = 16
GONE_EVERY = 5


def content_of(name: str, version: int) -> bytes:
    """The bytes of one version of a block; a size between none and some 250 KiB follows from it."""
    key = f"{name}/{version}".encode()
    size = int.from_bytes(hashlib.sha256(key).digest()[:4], "little") % 250_000
    return b"%-16d" % version + hashlib.shake_128(key).digest(size)


def version_in(name: str, data: bytes) -> int:
    """The version that `data` is, all of it. Raises AssertionError for anything else."""
    header = data[:HEADER_BYTES]
    assert header.strip().isdigit(), f"{name}: not a block ({len(data)} bytes)"
    version = int(header)
    assert data == content_of(name, version), f"{name}: torn or wrong ({len(data)} bytes)"
    return version


def is_absent(version: int) -> bool:
    """Every fifth version of a block is that it does not exist; so is the first."""
    return version % GONE_EVERY == 0


@dataclass
class Expected:
    """The last version that was acknowledged, and the one that is being tried."""

    acknowledged: int = 0
    attempted: int = 0

    def judge(self, name: str, data: bytes | None, *, since: int | None = None) -> None:
        """Whether this is a version that may be there; `since` is one that a reader knew of."""
        first = self.acknowledged if since is None else since
        possible = range(first, self.attempted + 1)
        if data is None:
            assert any(map(is_absent, possible)), f"{name}: gone, {possible} were acknowledged"
        else:
            assert version_in(name, data) in possible, f"{name}: not one of {possible}"


class Load:
    """Writer and reader threads below one directory; each writer owns its own blocks.

    `expected` belongs to the writers while they run and to the test afterwards. `failures` is what
    must stay empty.
    """

    def __init__(self, root: Path, seed: int, *, writers: int = 3, readers: int = 2) -> None:
        self.root = root
        self.expected: dict[str, Expected] = {}
        self.failures: list[str] = []
        self.cut_off = 0
        self._seed = seed
        self._counts = (writers, readers)
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, cycle: int) -> None:
        """Begin to write and read; ends by itself when the daemon does."""
        self._stop.clear()
        writers, readers = self._counts
        for kind, count in ((self._write, writers), (self._read, readers)):
            for number in range(count):
                rng = random.Random(f"{self._seed}/{cycle}/{kind.__name__}/{number}")
                thread = threading.Thread(target=self._guard, args=(kind, number, rng))
                thread.start()
                self._threads.append(thread)

    def join(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a client of the killed daemon hangs"
        self._threads.clear()

    def _guard(self, work: object, number: int, rng: random.Random) -> None:
        assert callable(work)
        try:
            while not self._stop.is_set():
                work(number, rng)
        except OSError:
            self.cut_off += 1
        except AssertionError as error:
            self.failures.append(str(error))

    def _write(self, number: int, rng: random.Random) -> None:
        """Publish the next version of a block, or remove it."""
        name = f"w{number}/{rng.randrange(4)}/{rng.randrange(12)}.bin"
        expected = self.expected.setdefault(name, Expected())
        # A try that was cut off may have happened.
        version = expected.attempted + 1
        path = self.root / name
        if is_absent(version):
            expected.attempted = version
            path.unlink(missing_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}_{version}.tmp")
            with temporary.open("wb", buffering=0) as file:
                file.write(content_of(name, version))
            expected.attempted = version
            temporary.rename(path)
        expected.acknowledged = version

    def _read(self, number: int, rng: random.Random) -> None:
        """Any block must be a version that was acknowledged before or was attempted meanwhile."""
        names = list(self.expected)
        if not names:
            return
        name = rng.choice(names)
        since = self.expected[name].acknowledged
        try:
            data = (self.root / name).read_bytes()
        except FileNotFoundError:
            data = None
        self.expected[name].judge(name, data, since=since)

    def verify(self) -> int:
        """Every block is a version that it may be; how many there are."""
        assert not self.failures, self.failures
        found = {
            os.path.relpath(os.path.join(parent, name), self.root)
            for parent, _, names in os.walk(self.root)
            for name in names
        }
        for name in found:
            assert name.endswith(".tmp") or name in self.expected, f"{name} was never published"
        for name, expected in self.expected.items():
            data = (self.root / name).read_bytes() if name in found else None
            expected.judge(name, data)
        return len(found)
