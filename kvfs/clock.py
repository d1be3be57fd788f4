"""Time for heat: the wall clock at start plus monotonic time since."""

from __future__ import annotations

import time


class Clock:
    """Seconds since the epoch that never jump while the daemon runs. Any thread may read it."""

    def __init__(self) -> None:
        self._offset_s = time.time() - time.monotonic()

    def now_s(self) -> float:
        return self._offset_s + time.monotonic()
