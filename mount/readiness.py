"""How the tasks of pyfuse3 wait for the kernel's next request: awake for a moment while requests
follow one another, and without a round of the event loop for each.

Who sleeps until a request comes runs again 10 to 40 us later: as long as answering a small request
takes. So the reader looks again and again for a moment, where what came before lets expect that it
pays, and sleeps otherwise. In a loop of one client (docs/PERFORMANCE.md) that nearly halves the
time of an open or a lookup, and the daemon needs less CPU for it, not more.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pyfuse3
import trio

# A client in a loop asks again within 5 to 15 us.
AWAKE_S = 50e-6
# A sleeper is late itself.
SHORT_S = 2 * AWAKE_S
# Now and then a wait is spent awake against expectation, or a late sleeper would never find out.
TRIAL_WAITS = 32
# The waits that the next one is expected from, and how sure one can be of it.
HISTORY_BITS = 2
MOST_TRUST, ENOUGH_TRUST = 3, 2
# A request of the fastest tier is answered within so many rounds of the event loop.
ROUNDS_TO_ANSWER = 6
# Requests that are read before other tasks have a turn.
MOST_TURNS = 8


class Gaps:
    """Whether the next wait will be short, by what followed the last time that the two before it
    were like these: the two-level predictor that processors have for branches (Yeh and Patt, 1991).
    No I/O."""

    def __init__(self) -> None:
        self._history = 0
        self._trust = [0] * (1 << HISTORY_BITS)

    @property
    def next_is_short(self) -> bool:
        return self._trust[self._history] >= ENOUGH_TRUST

    def note(self, *, short: bool) -> None:
        """How long the wait was in the end."""
        trust = self._trust[self._history]
        self._trust[self._history] = min(trust + 1, MOST_TRUST) if short else max(trust - 1, 0)
        self._history = (self._history << 1 | short) & ((1 << HISTORY_BITS) - 1)


class Readiness:
    """How a reader waits for a descriptor. Owned by the trio loop; one task waits at a time."""

    def __init__(self, threads: Callable[[], int] = lambda: 0) -> None:
        """`threads`: how many of the daemon's other threads compute now."""
        self._threads = threads
        self._cores = len(os.sched_getaffinity(0))
        self.gaps = Gaps()
        self.waits = 0
        self.awake = 0
        # Set and taken back by handlers, as it is of the newest request; when an older one ends
        # meanwhile somebody looks out a little too early.
        self.answering = False
        self._poll = select.poll()
        self._descriptor = -1

    async def wait_readable(self, descriptor: int) -> None:
        """Return when it can be read, or has hung up. The loop stands still for AWAKE_S at most."""
        # A request is not to wait for who looks out for the next one; a slow tier does not count.
        for _ in range(ROUNDS_TO_ANSWER):
            if not self.answering:
                break
            await trio.lowlevel.checkpoint()
        self.waits += 1
        started_s = time.perf_counter()
        tempted = self.gaps.next_is_short or self.waits % TRIAL_WAITS == 0
        awake = tempted and self._has_core()
        if awake:
            self.awake += 1
            if self._comes(descriptor, started_s + AWAKE_S):
                self.gaps.note(short=True)
                return
        await trio.lowlevel.wait_readable(descriptor)
        self.gaps.note(short=not awake and time.perf_counter() - started_s < SHORT_S)

    def _has_core(self) -> bool:
        """Whether looking out takes none from the client, or from a thread with work to do."""
        return self._threads() + 2 <= self._cores

    def _comes(self, descriptor: int, until_s: float) -> bool:
        if descriptor != self._descriptor:
            self._poll = select.poll()
            self._poll.register(descriptor, select.POLLIN)
            self._descriptor = descriptor
        # Each look lets other threads run.
        while not self._poll.poll(0):
            if time.perf_counter() > until_s:
                return False
        return True


class ReaderLock:
    """One task reads at a time. Not fair, unlike trio's: who has answered what it read may read on,
    without a round of the event loop, MOST_TURNS times in a row. Owned by the trio loop."""

    def __init__(self) -> None:
        self._held = False
        self._turns = 0
        self._waiting = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        self._turns += 1
        if self._turns > MOST_TURNS:
            self._turns = 0
            await trio.lowlevel.checkpoint()
        while self._held:
            await self._waiting.park()
        self._held = True

    async def __aexit__(self, *_: object) -> None:
        self._held = False
        # It reads on if the one that goes is kept by its request.
        self._waiting.unpark()


def install(readiness: Readiness) -> None:
    """Have pyfuse3 wait like this. It lets its `trio` be replaced: its asyncio mode does it."""
    lowlevel = _with(trio.lowlevel, wait_readable=readiness.wait_readable)
    replaced = _with(trio, lowlevel=lowlevel, Lock=ReaderLock)
    pyfuse3.trio = replaced  # type: ignore[attr-defined]


def _with(module: Any, **others: Any) -> SimpleNamespace:
    """What a module has, with something else in places."""
    return SimpleNamespace(**(vars(module) | others))
