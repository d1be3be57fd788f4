"""Prefetching: promotions that a client asks for, because it will read the blocks soon.

They wait in a bounded queue and are carried out a few at a time, oldest first; one whose deadline
passed is dropped. Bytes move as with every other promotion, but no heat is asked for.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import trio

from kvfs.errors import BlockBusy, BlockNotFound, TierFull, is_expected, reason_of
from kvfs.tiers.tier import Tier
from kvfs.upkeep.mover import Mover
from kvfs.volume.volume import Volume

WORKERS = 4


@dataclass(slots=True)
class Wish:
    """One block to bring up, and until when (by trio's clock) that is of use."""

    until_s: float
    done: trio.Event = field(default_factory=trio.Event)


class Asked(NamedTuple):
    """What became of the blocks of one request."""

    accepted: int
    there: int
    refused: int


class Prefetcher:
    """The queue and its service. Owned by the trio loop."""

    def __init__(self, volume: Volume, mover: Mover) -> None:
        self.volume = volume
        self.mover = mover
        # Those that wait, and those that are carried out.
        self._wishes: dict[int, Wish] = {}
        self._waiting: deque[int] = deque()
        self._due = trio.Event()

    def __len__(self) -> int:
        return len(self._wishes)

    def ask(self, numbers: list[int], until_s: float) -> Asked:
        """Have blocks on the fastest tier by then; those for which there is no room in the queue
        are refused."""
        accepted = there = refused = 0
        for number in numbers:
            if not self._faster(number):
                there += 1
            elif self._wish(number, until_s) is None:
                refused += 1
            else:
                accepted += 1
        if refused:
            self.volume.counters.count("prefetches_dropped", refused, reason="queue")
        return Asked(accepted, there, refused)

    async def promote(self, number: int, until_s: float) -> None:
        """Return when the block is on a faster tier, or cannot come there now."""
        wish = self._wish(number, until_s)
        if wish is not None:
            await wish.done.wait()

    def _wish(self, number: int, until_s: float) -> Wish | None:
        """The block's place in the queue; None when that is full."""
        wish = self._wishes.get(number)
        if wish is not None:
            wish.until_s = max(wish.until_s, until_s)
            return wish
        if len(self._wishes) >= self.volume.config.leases.prefetches:
            return None
        wish = self._wishes[number] = Wish(until_s)
        self._waiting.append(number)
        self._due.set()
        return wish

    async def run(self) -> None:
        """Carry them out."""
        send, receive = trio.open_memory_channel[int](0)
        async with trio.open_nursery() as nursery:
            for _ in range(WORKERS):
                nursery.start_soon(self._work, receive)
            while True:
                await self._due.wait()
                self._due = trio.Event()
                while self._waiting:
                    await send.send(self._waiting.popleft())

    async def _work(self, receive: trio.MemoryReceiveChannel[int]) -> None:
        async for number in receive:
            wish = self._wishes[number]
            try:
                await self._bring(number, wish)
            finally:
                del self._wishes[number]
                wish.done.set()

    async def _bring(self, number: int, wish: Wish) -> None:
        if trio.current_time() > wish.until_s:
            self.volume.counters.count("prefetches_dropped", reason="deadline")
            return
        for target in self._faster(number):
            try:
                if await self._copy(number, target):
                    self.volume.counters.count("prefetches", tier=target.name)
                return
            except TierFull:
                self.volume.request_tiering()
        if self._faster(number):
            self.volume.counters.count("prefetches_dropped", reason="full")

    def _faster(self, number: int) -> list[Tier]:
        """The tiers that would serve the block faster than now, the fastest first."""
        there = self.mover.replicas.readable(number)
        index = there[0][0].index if there else 0
        return [tier for tier in self.volume.tiers[:index] if tier.accepts]

    async def _copy(self, number: int, target: Tier) -> bool:
        """Whether it is there now; what else hinders it is for the next reader to find out."""
        there = self.mover.replicas.readable(number)
        if not there:
            return False
        try:
            return await self.mover.copy(number, there[0][0], target, "promote") > 0
        except TierFull:
            raise
        except (BlockBusy, BlockNotFound, FileNotFoundError) as error:
            self.volume.counters.count("prefetches_dropped", reason=reason_of(error))
        except Exception as error:
            if not is_expected(error):
                raise
            path = os.fsdecode(self.volume.catalog.path_of(number) or b"?")
            self.volume.incidents.note(
                "prefetches_failed", f"prefetch of {path!r}: {error}",
                reason=reason_of(error), tier=target.name,
            )  # fmt: skip
        return False
