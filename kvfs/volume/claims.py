"""Which paths an operation that has to wait is changing.

Most operations finish between two checkpoints of the trio loop and need no lock. One that awaits a
slow tier half-way claims its paths; whatever touches those, or anything below or above them, waits.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from kvfs.layout import is_within


class Claims:
    """Claimed paths, each with the event its holder sets. Owned by the trio loop."""

    def __init__(self) -> None:
        self._held: dict[bytes, trio.Event] = {}

    def is_free(self, *paths: bytes) -> bool:
        """Whether nobody is changing one of these paths, a parent or a child of it."""
        if not self._held:
            return True
        return all(self._conflict(path) is None for path in paths)

    async def wait(self, *paths: bytes) -> None:
        """Return when all are free; no checkpoint when they are now."""
        while self._held:
            events = [event for event in map(self._conflict, paths) if event is not None]
            if not events:
                return
            await events[0].wait()

    @asynccontextmanager
    async def hold(self, *paths: bytes) -> AsyncIterator[None]:
        """Wait until all are free, then keep everybody else away from them."""
        await self.wait(*paths)
        event = trio.Event()
        claimed = set(paths)
        self._held.update(dict.fromkeys(claimed, event))
        try:
            yield
        finally:
            for path in claimed:
                del self._held[path]
            event.set()

    def _conflict(self, path: bytes) -> trio.Event | None:
        for held, event in self._held.items():
            if is_within(path, held) or is_within(held, path):
                return event
        return None
