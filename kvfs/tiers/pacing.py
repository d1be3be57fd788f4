"""Pacing: background reading takes no more than a number of bytes a second."""

from __future__ import annotations

from collections.abc import Callable

import trio

# What may be read at once after a pause.
BURST_S = 0.25


class Pacer:
    """Owned by the trio loop. `rate` is asked each time, so that a reload changes it: bytes a
    second, 0 for as fast as it goes."""

    def __init__(self, rate: Callable[[], int]) -> None:
        self._rate = rate
        self._paid_until_s = 0.0

    async def spend(self, size_bytes: int) -> None:
        """These bytes were read: return when more may be."""
        rate = self._rate()
        if rate == 0:
            return
        now_s = trio.current_time()
        self._paid_until_s = max(self._paid_until_s, now_s - BURST_S) + size_bytes / rate
        if self._paid_until_s > now_s:
            await trio.sleep(self._paid_until_s - now_s)
