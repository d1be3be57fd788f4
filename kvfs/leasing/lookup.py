"""Lookup: many paths at once -> inodes, as an engine asks for all blocks of a prompt.

A batch of names is one query, whatever directories they are in. Who asks needs permission to search
the directories, as with the kernel.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import trio

from kvfs import layout
from kvfs.catalog.rows import GOOD, ROOT_INODE, BlockState, Inode
from kvfs.leasing.credentials import SEARCH, Credentials
from kvfs.volume.volume import Volume

BATCH_NAMES = 128
# Queries are prepared for so many names; a smaller batch repeats its last one.
_SIZES = (1, 8, 32, BATCH_NAMES)
DIRECTORIES_REMEMBERED = 16_384

_ASKED = "WITH asked(place, parent, name) AS (VALUES {}) SELECT asked.place, {} FROM asked"
_JOIN_NAME = " CROSS JOIN dirent d ON d.parent = asked.parent AND d.name = asked.name"
_JOIN_REPLICA = " CROSS JOIN replica r ON r.inode = d.inode CROSS JOIN inode i ON i.id = d.inode"


class Status(IntEnum):
    """What came of a path; a byte on the wire."""

    FOUND = 0
    MISSING = 1
    DENIED = 2
    BUSY = 3
    OFFLINE = 4


@dataclass(slots=True)
class Hits:
    """The leading paths that are blocks which can be read: the index of each one's fastest tier.

    `stopped` is what came of the first path that is not; FOUND when all are.
    """

    tiers: bytearray
    stopped: Status = Status.FOUND


class Name(NamedTuple):
    """A path as the catalog has it: an inode, or (0) why there is none."""

    path: bytes
    inode: int
    status: Status


# Called with (directory inode, name) while a miss in the catalog says nothing yet.
FindOnTiers = Callable[[int, bytes], Awaitable[Inode | None]]


class Lookup:
    """Owned by the trio loop."""

    def __init__(self, volume: Volume, find_on_tiers: FindOnTiers) -> None:
        self.volume = volume
        self._find_on_tiers = find_on_tiers
        # Only a hint: the catalog is asked whether the directory still has that path.
        self._numbers: OrderedDict[bytes, int] = OrderedDict()

    async def leading(self, paths: Sequence[bytes], who: Credentials) -> Hits:
        """How many paths from the first one on are blocks, and where they are."""
        hits, directories = Hits(bytearray()), Directories(self, who)
        for start in range(0, len(paths), BATCH_NAMES):
            batch = [clean(path) for path in paths[start : start + BATCH_NAMES]]
            if start:
                await trio.lowlevel.checkpoint()
            found = self._look(batch, directories)
            if self.volume.walking and await self._ask_tiers(batch, found, leading=True):
                directories.forget()
                found = self._look(batch, directories)
            for place in found:
                if place < 0:
                    hits.stopped = Status(-place)
                    return hits
                hits.tiers.append(place)
        return hits

    def directories(self, who: Credentials) -> Directories:
        """For the batches of one request."""
        return Directories(self, who)

    async def names(self, batch: Sequence[bytes], directories: Directories) -> list[Name]:
        """The inode of each path, of at most BATCH_NAMES, with the rows of all in the catalog's
        memory. It is so when this returns."""
        batch = [clean(path) for path in batch]
        found = self._inodes(batch, directories)
        places = [-int(name.status) for name in found]
        if self.volume.walking and await self._ask_tiers(batch, places, leading=False):
            directories.forget()
            found = self._inodes(batch, directories)
        self.volume.catalog.load(name.inode for name in found if name.inode)
        return found

    def _look(self, batch: list[bytes], directories: Directories) -> list[int]:
        """For each path the index of the fastest tier, or a negative status."""
        asked, places = directories.ask(batch)
        by_number, good = self.volume.by_number, int(GOOD)
        columns, joins = "r.tier, r.state, i.state", _JOIN_NAME + _JOIN_REPLICA
        for place, number, state, block_state in self.query(asked, columns, joins):
            now = places[place]
            if block_state == BlockState.WRITING:
                places[place] = -Status.BUSY
                continue
            tier = by_number[number]
            if state != good or not tier.online:
                if now == -Status.MISSING:
                    places[place] = -Status.OFFLINE
            elif now < 0 or tier.index < now:
                places[place] = tier.index
        return places

    def _inodes(self, batch: list[bytes], directories: Directories) -> list[Name]:
        asked, places = directories.ask(batch)
        catalog, found, unknown = self.volume.catalog, {}, {}
        for place, parent, name in asked:
            number = catalog.known(parent, name)
            if number:
                found[place] = number
            else:
                unknown[place] = (place, parent, name)
        for place, number in self.query(list(unknown.values()), "d.inode", _JOIN_NAME):
            found[place] = number
            catalog.learn(*unknown[place][1:], number)
        return [
            Name(path, found[place], Status.FOUND) if place in found
            else Name(path, 0, Status(-places[place]))
            for place, path in enumerate(batch)
        ]  # fmt: skip

    async def _ask_tiers(self, batch: list[bytes], places: list[int], *, leading: bool) -> bool:
        """After a crash, until the walk has ended: whether the catalog has learnt of something.

        Of paths that are `leading`, none after the first that is nowhere.
        """
        learnt = False
        for path, place in zip(batch, places, strict=True):
            if place == -Status.MISSING:
                there = await self._is_on_tiers(path)
                learnt = learnt or there
                if leading and not there:
                    break
        return learnt

    async def _is_on_tiers(self, path: bytes) -> bool:
        number = ROOT_INODE
        for name in path.split(b"/"):
            row = self.volume.catalog.lookup(number, name)
            row = row or await self._find_on_tiers(number, name)
            if row is None:
                return False
            number = row.id
        return True

    def query(
        self, asked: Sequence[tuple[int, int, bytes]], columns: str, joins: str
    ) -> Iterable[tuple[int, ...]]:
        """Rows of some (place, parent, name): the place and what was asked for it."""
        connection = self.volume.catalog.connection
        for start in range(0, len(asked), BATCH_NAMES):
            part = asked[start : start + BATCH_NAMES]
            size = next(size for size in _SIZES if size >= len(part))
            arguments = [value for triple in part for value in triple]
            arguments += part[-1] * (size - len(part))
            text = _ASKED.format(",".join(["(?,?,?)"] * size), columns) + joins
            yield from connection.execute(text, arguments)

    def recall(self, path: bytes) -> int:
        """The inode of a directory whose path is remembered; 0 of others."""
        number = self._numbers.get(path, 0)
        if not number:
            return 0
        if self.volume.catalog.directory_path(number) != path:
            del self._numbers[path]
            return 0
        return number

    def remember(self, path: bytes, number: int) -> None:
        """A directory that was found at a path."""
        self._numbers[path] = number
        if len(self._numbers) > DIRECTORIES_REMEMBERED:
            self._numbers.popitem(last=False)


class Directories:
    """The directories that one request meets: inode, or a negative status, by path."""

    def __init__(self, lookup: Lookup, who: Credentials) -> None:
        self._lookup = lookup
        self._catalog = lookup.volume.catalog
        self._who = who
        self._found: dict[bytes, int] = {}

    def forget(self) -> None:
        """The catalog has learnt of new ones."""
        self._found.clear()

    def ask(self, batch: list[bytes]) -> tuple[list[tuple[int, int, bytes]], list[int]]:
        """(place, directory, name) of each path that may be asked for, and what is known of each
        place before: a negative status."""
        asked, places = [], []
        parts = [path.rpartition(b"/") for path in batch]
        self._resolve({head for head, _, _ in parts})
        for place, (head, _, name) in enumerate(parts):
            directory = self._found[head]
            if directory > 0:
                asked.append((place, directory, name))
                places.append(-int(Status.MISSING))
            else:
                places.append(directory)
        return asked, places

    def _resolve(self, heads: set[bytes]) -> None:
        """Level by level, from the root: each level is a query."""
        levels: list[set[bytes]] = []
        for head in heads:
            while head not in self._found:
                depth = head.count(b"/") + 1 if head else 0
                while len(levels) <= depth:
                    levels.append(set())
                if head in levels[depth]:
                    break
                levels[depth].add(head)
                head = layout.split(head)[0]
        for level in levels:
            self._resolve_level(level)

    def _resolve_level(self, level: set[bytes]) -> None:
        unknown: list[tuple[int, int, bytes]] = []
        paths: list[bytes] = []
        for path in level:
            above, name = layout.split(path)
            parent = ROOT_INODE if not path else self._found[above]
            if not path:
                self._found[path] = self._checked(ROOT_INODE)
            elif parent < 0:
                self._found[path] = parent
            elif number := self._lookup.recall(path):
                self._found[path] = self._checked(number)
            else:
                self._found[path] = -int(Status.MISSING)
                unknown.append((len(paths), parent, name))
                paths.append(path)
        for place, number in self._lookup.query(unknown, "d.inode", _JOIN_NAME):
            self._found[paths[place]] = self._checked(number)
            self._lookup.remember(paths[place], number)

    def _checked(self, number: int) -> int:
        """The directory, or DENIED."""
        row = self._catalog.get(number)
        if row is None:
            return -int(Status.MISSING)
        return number if self._who.may(row, SEARCH) else -int(Status.DENIED)


def clean(path: bytes | str) -> bytes:
    """A path as kvfs writes it. Raises TypeError for what is none."""
    return (path if type(path) is bytes else os.fsencode(path)).strip(b"/")
