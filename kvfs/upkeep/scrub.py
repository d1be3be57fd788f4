"""Scrub: read replicas from the medium, past the page cache, and see whether they are sound.

What rots after it was verified is found by this alone. A pass over a tier goes by inode number and
keeps its place in the catalog, so that it goes on where an unmount or Ctrl-C stopped it; a scrub of
a path does not. Accesses are not counted, and the page cache stays as it was. A bad replica goes to
quarantine.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import trio

from kvfs.blocks.namespace import Namespace
from kvfs.blocks.verify import Verifier
from kvfs.catalog.rows import Inode, Kind, Replica
from kvfs.errors import BlockCorrupt, TierOffline, reason_of
from kvfs.tiers.backing import Expected, open_file
from kvfs.tiers.checksum import cached_bytes, drop_cached
from kvfs.tiers.forms import digest_of
from kvfs.tiers.pacing import Pacer
from kvfs.tiers.tier import Tier, close_descriptor
from kvfs.volume.volume import Volume

log = logging.getLogger(__name__)

# Read between two looks at the pace.
SLICE_BYTES = 8 << 20
PAGE_NAMES = 500
SAVE_EVERY_S = 5.0
# In the background: from the beginning of one pass over all tiers to that of the next.
PASS_EVERY_S = 24 * 3600.0
IDLE_S = 5.0
# After so many blocks of the service an order that came meanwhile gets its turn.
SERVICE_BLOCKS = 16
MAX_BAD_NAMED = 100

Report = Callable[["Tally"], Awaitable[None]]


class Progress(msgspec.Struct):
    """How far the scrub of a tier is, as the catalog keeps it; `finished_s` is 0 while it goes."""

    after: int = 0
    blocks: int = 0
    size_bytes: int = 0
    bad: int = 0
    started_s: float = 0.0
    finished_s: float = 0.0


@dataclass(slots=True)
class Tally:
    """What one scrub did."""

    total: int
    blocks: int = 0
    size_bytes: int = 0
    bad: int = 0
    unreadable: int = 0
    resumed: bool = False
    path: bytes = b""
    named: list[dict[str, Any]] = field(default_factory=list)

    def name(self, path: bytes, tier: Tier, what: str) -> None:
        """Of many bad ones the first are named; the log has them all."""
        if len(self.named) < MAX_BAD_NAMED:
            self.named.append({"path": path, "tier": tier.name, "what": what})


class Scrubber:
    """Owned by the trio loop. One scrub at a time reads; the service waits while an order does."""

    def __init__(self, volume: Volume, verifier: Verifier, namespace: Namespace) -> None:
        self.volume = volume
        self.verifier = verifier
        self.namespace = namespace
        # What is being scrubbed, for those who look: a tier's name, or "".
        self.at = ""
        self._turn = trio.Lock()
        self._background = Pacer(lambda: volume.config.tiering.scrub_rate)

    # --- orders

    async def scrub(
        self, tiers: Iterable[Tier], pacer: Pacer, report: Report, *, restart: bool = False
    ) -> Tally:
        """Every block of some tiers, from where the last scrub of each was stopped."""
        chosen = [tier for tier in tiers if tier.online]
        total = sum(self.volume.space[tier.index].blocks for tier in chosen)
        tally = Tally(total)
        async with self._turn:
            for tier in chosen:
                if restart or self.progress(tier).finished_s:
                    self._save(tier, Progress(started_s=time.time()))
                tally.resumed |= self.progress(tier).blocks > 0
                tally.blocks += self.progress(tier).blocks
                await self._pass(tier, pacer, tally, report)
        return tally

    async def scrub_below(
        self, root: Inode, tiers: Iterable[Tier], pacer: Pacer, report: Report
    ) -> Tally:
        """A block, or every block below a directory, on some tiers."""
        chosen = {tier.number for tier in tiers if tier.online}
        tally = Tally(0)
        async with self._turn:
            async for number in self._below(root):
                for replica in self.volume.catalog.replicas(number):
                    if replica.tier in chosen:
                        tally.total += 1
                        tier = self.volume.by_number[replica.tier]
                        await self._scrub_one(tier, number, pacer, tally)
                        await report(tally)
        return tally

    async def _below(self, root: Inode) -> AsyncIterator[int]:
        """Depth first, a page of one directory at a time: memory does not grow with the tree."""
        if root.kind == Kind.BLOCK:
            yield root.id
            return
        pending = [(root.id, 0)]
        while pending:
            directory, after = pending.pop()
            page = self.namespace.children(directory, after, PAGE_NAMES)
            if len(page) == PAGE_NAMES:
                pending.append((directory, page[-1][1].id))
            for _, inode in page:
                if inode.kind == Kind.DIRECTORY:
                    pending.append((inode.id, 0))
                else:
                    yield inode.id
            await trio.lowlevel.checkpoint()

    # --- the service

    async def run(self) -> None:
        """Scrub all tiers once a day, as long as there is a rate to do it at."""
        while True:
            if self.volume.config.tiering.scrub_rate:
                for tier in self.volume.tiers:
                    with self.volume.tolerate("scrub", tier.name):
                        await self._continue(tier)
            await trio.sleep(IDLE_S)

    async def _continue(self, tier: Tier) -> None:
        progress = self.progress(tier)
        if progress.finished_s:
            if time.time() - progress.started_s < PASS_EVERY_S:
                return
            progress = Progress()
        if tier.online and not progress.started_s:
            self._save(tier, Progress(started_s=time.time()))
        while tier.online and not self.progress(tier).finished_s:
            async with self._turn:
                await self._page(tier, self._background, Tally(0), _nobody, most=SERVICE_BLOCKS)
            if not self.volume.config.tiering.scrub_rate:
                return

    # --- passes

    def progress(self, tier: Tier) -> Progress:
        """How far the scrub of a tier is."""
        text = self.volume.catalog.meta(_key(tier))
        return msgspec.json.decode(text, type=Progress) if text else Progress()

    def _save(self, tier: Tier, progress: Progress) -> None:
        self.volume.catalog.set_meta(_key(tier), msgspec.json.encode(progress).decode())

    async def _pass(self, tier: Tier, pacer: Pacer, tally: Tally, report: Report) -> None:
        while not self.progress(tier).finished_s:
            await self._page(tier, pacer, tally, report)

    async def _page(
        self, tier: Tier, pacer: Pacer, tally: Tally, report: Report, *, most: int = PAGE_NAMES
    ) -> None:
        """The next replicas of a tier; finished when there are none."""
        progress = self.progress(tier)
        rows = self.volume.catalog.replica_page(tier.number, progress.after)[:most]
        saved_s = trio.current_time()
        self.at = tier.name
        try:
            for number, *_ in rows:
                before = (tally.blocks, tally.size_bytes, tally.bad)
                await self._scrub_one(tier, number, pacer, tally)
                progress.after = number
                progress.blocks += tally.blocks - before[0]
                progress.size_bytes += tally.size_bytes - before[1]
                progress.bad += tally.bad - before[2]
                await report(tally)
                if trio.current_time() - saved_s > SAVE_EVERY_S:
                    self._save(tier, progress)
                    saved_s = trio.current_time()
            if not rows:
                progress.finished_s = time.time()
                log.info(
                    "tier %s: scrubbed %d blocks, %d bad",
                    tier.name, progress.blocks, progress.bad,
                )  # fmt: skip
        finally:
            self.at = ""
            with self.volume.tolerate("keeping the place of the scrub", tier.name):
                self._save(tier, progress)

    # --- one replica

    async def _scrub_one(self, tier: Tier, number: int, pacer: Pacer, tally: Tally) -> None:
        """Raises TierOffline: what is left of the tier waits until it is back."""
        tally.blocks += 1
        path = self.volume.catalog.path_of(number)
        replica = next(
            (r for r in self.volume.catalog.replicas(number) if r.tier == tier.number), None
        )
        if path is None or replica is None:
            return
        tally.path = path
        expected = self.verifier.expected(self.volume.catalog.get(number), replica)
        if expected is None:
            return  # not sealed: the sealer reads it
        try:
            try:
                await self._read(tier, path, replica, expected, pacer, tally)
            except (BlockCorrupt, FileNotFoundError) as error:
                # Renamed or rewritten while it was read, or bad.
                if await self.verifier.condemn(number, tier, direct=_direct(tier)):
                    tally.bad += 1
                    tally.name(path, tier, str(error))
        except TierOffline:
            raise
        except OSError as error:
            tally.unreadable += 1
            tally.name(path, tier, error.strerror or str(error))
            message = f"tier {tier.name}: {os.fsdecode(path)!r} cannot be read: {error}"
            self.volume.incidents.note(
                "scrub_failures", message,
                reason=reason_of(error), tier=tier.name,
            )  # fmt: skip
        self.volume.counters.count("scrubbed")

    async def _read(
        self, tier: Tier, path: bytes, replica: Replica, expected: Expected,
        pacer: Pacer, tally: Tally,
    ) -> None:  # fmt: skip
        """Raises BlockCorrupt, FileNotFoundError, OSError."""
        direct = _direct(tier)
        flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
        descriptor = await tier.run_open(
            open_file, tier, path, bool(replica.fanned), flags, expected
        )
        try:
            digest = digest_of(descriptor, expected.codec, direct=direct)
            leave = not direct and await tier.run_in_thread(
                _is_cached, descriptor, expected.file_bytes
            )
            while not digest.done:
                read_bytes = await tier.run_in_thread(digest.advance, SLICE_BYTES)
                tally.size_bytes += read_bytes
                self.volume.counters.count("scrubbed_bytes", read_bytes)
                await pacer.spend(read_bytes)
            if not direct and not leave:
                await tier.run_in_thread(drop_cached, descriptor)
            expected.compare(digest)
        finally:
            close_descriptor(tier, descriptor)


def _direct(tier: Tier) -> bool:
    return tier.identity.probe.o_direct


def _is_cached(descriptor: int, size_bytes: int) -> bool:
    return cached_bytes(descriptor, size_bytes) > size_bytes // 2


def _key(tier: Tier) -> str:
    return f"scrub.{tier.number}"


async def _nobody(_: Tally) -> None:
    """Nobody follows the service."""
