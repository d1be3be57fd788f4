"""What was attempted and what was acknowledged, written down so that it outlives the writer.

Every block says in its own bytes which key and version it is, and its key is the first part of its
file name, wherever it is renamed to. So whatever is found after a crash can be judged.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.crash.load import HEADER_BYTES, content_of

DIRECTORY = 0
BIG_BYTES = 18 << 20


class Outcome(NamedTuple):
    """One way to find a key: at `path` with a version, `DIRECTORY` or a negative one (see
    `bytes_of`). An empty path: nowhere."""

    path: str
    version: int = DIRECTORY
    mark: str = ""
    mode: int = 0o644


NOWHERE = Outcome("")


def key_of(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0]


def bytes_of(key: str, version: int) -> bytes:
    """Of a version. A negative one was cut to half of it; `big` blocks outgrow a small tier. Those
    of a key that ends in an odd digit cannot be compressed."""
    if version < 0:
        whole = bytes_of(key, -version)
        return whole[: len(whole) // 2]
    data = content_of(key, version)
    if key[-1:] not in "13579":
        data = data[:HEADER_BYTES] + data[HEADER_BYTES:].hex().encode()
    if key.startswith("big"):
        return (data * (BIG_BYTES // len(data) + 1))[:BIG_BYTES]
    return data


class Ledger:
    """The writing side: one process appends lines, which the page cache keeps when it is killed."""

    def __init__(self, file: Path) -> None:
        self.now: dict[str, Outcome] = {}
        self._file = file.open("a", buffering=1)

    @contextmanager
    def change(self, *new: Outcome, beside: Iterable[Outcome] = ()) -> Iterator[None]:
        """Around a call: any of these may be found from now on, `new` is it once the call returned.

        `beside` may be found while it lasts. An absent key is named by `gone`.
        """
        keys = {key_of(outcome.path): outcome for outcome in new}
        with self._attempt(keys, beside):
            yield

    @contextmanager
    def gone(self, key: str) -> Iterator[None]:
        """Around a call that removes what has this key."""
        with self._attempt({key: NOWHERE}, ()):
            yield

    @contextmanager
    def _attempt(self, keys: Mapping[str, Outcome], beside: Iterable[Outcome]) -> Iterator[None]:
        for key, outcome in keys.items():
            self._write("try", key, outcome)
        for outcome in beside:
            self._write("try", key_of(outcome.path) or next(iter(keys)), outcome)
        yield
        for key, outcome in keys.items():
            self._write("done", key, outcome)
            self.now[key] = outcome

    def sealed(self, key: str) -> None:
        """What was done last for this key is sealed."""
        self._write("sealed", key, self.now[key])

    def maybe(self, key: str, *outcomes: Outcome) -> None:
        """A crash now may leave any of these."""
        for outcome in outcomes:
            self._write("try", key, outcome)

    def _write(self, word: str, key: str, outcome: Outcome) -> None:
        self._file.write(json.dumps([word, key, *outcome]) + "\n")


@dataclass
class Promise:
    """What is known of one key when the writer is dead."""

    possible: set[Outcome] = field(default_factory=lambda: {NOWHERE})
    ever: set[Outcome] = field(default_factory=lambda: {NOWHERE})
    sealed: bool = False


def read_ledger(file: Path) -> dict[str, Promise]:
    """The reading side."""
    promises: dict[str, Promise] = defaultdict(Promise)
    for line in file.read_text().splitlines() if file.exists() else ():
        word, key, *fields = json.loads(line)
        promise, outcome = promises[key], Outcome(*fields)
        promise.ever.add(outcome)
        if word == "try":
            promise.possible.add(outcome)
            promise.sealed = False
        elif word == "done":
            promise.possible = {outcome}
            promise.sealed = bool(outcome.path) and outcome.version == DIRECTORY
        else:
            promise.sealed = True
    return dict(promises)


class Found(NamedTuple):
    """What a name of the namespace turned out to be; `data` is None for a directory."""

    path: str
    data: bytes | None
    mark: str
    mode: int


def judge(promises: Mapping[str, Promise], found: list[Found], *, power_lost: bool) -> None:
    """Fail for what is torn, was never there, is gone though it was promised, or is there twice.

    `power_lost`: what was not sealed may be gone, and what was removed may be back.
    """
    by_key: dict[str, list[Found]] = defaultdict(list)
    for item in found:
        if item.data is None and key_of(item.path) not in promises:
            continue  # directories that are only there for what is in them
        if item.path.endswith(".tmp"):
            _judge_temporary(item)
        else:
            by_key[key_of(item.path)].append(item)
    unknown = by_key.keys() - promises.keys()
    assert not unknown, f"never made: {unknown}"
    for key, promise in promises.items():
        there = by_key.get(key, [])
        assert len(there) <= 1, f"{key} is there twice: {[item.path for item in there]}"
        _judge_one(key, promise, there[0] if there else None, power_lost=power_lost)


def _judge_temporary(item: Found) -> None:
    """A whole version that was about to be published: `KEY.bin_VERSION.tmp`."""
    version = int(item.path.rpartition("_")[2].removesuffix(".tmp"))
    assert item.data == bytes_of(key_of(item.path), version), f"{item.path}: torn"


def _judge_one(key: str, promise: Promise, item: Found | None, *, power_lost: bool) -> None:
    allowed = promise.possible
    if power_lost:
        allowed = promise.ever if not promise.sealed else promise.possible
    if item is None:
        assert any(not outcome.path for outcome in allowed), f"{key}: gone, may be {allowed}"
        return
    same = {
        outcome for outcome in allowed
        if outcome.path == item.path and _content(key, outcome) == item.data
    }  # fmt: skip
    size = "a directory" if item.data is None else f"{len(item.data)} bytes"
    assert same, f"{key}: {size} at {item.path}, may be {allowed}"
    if not power_lost:
        attributes = {(outcome.mark, outcome.mode) for outcome in same}
        assert (item.mark, item.mode) in attributes, f"{key}: {item.mark!r} {item.mode:o}"


def _content(key: str, outcome: Outcome) -> bytes | None:
    return None if outcome.version == DIRECTORY else bytes_of(key, outcome.version)
