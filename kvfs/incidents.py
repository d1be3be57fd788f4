"""Trouble: every incident is counted with its reason and tier, and told in one line, at times.

The only place that decides how often. Of incidents that are alike (event, reason, tier) the first
is logged, and then at most one line a minute with how many there were meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kvfs.metrics import Counters

log = logging.getLogger(__name__)

QUIET_S = 60.0
# Events and reasons are words of the code and tiers are few: this is only a bound.
KINDS_REMEMBERED = 1024

Key = tuple[str, str, str]


@dataclass(slots=True)
class _Told:
    """The last line about one kind of incident, and what was not told since."""

    at_s: float
    level: int
    untold: int = 0
    message: str = ""


@dataclass(slots=True)
class Incidents:
    """Owned by the trio loop."""

    counters: Counters
    now_s: Callable[[], float] = time.monotonic
    _told: dict[Key, _Told] = field(default_factory=dict)

    def note(
        self, event: str, message: str, *, reason: str, tier: str = "",
        level: int = logging.ERROR,
    ) -> None:  # fmt: skip
        """Count an incident, and log it unless one like it was told a moment ago."""
        self.counters.count(event, reason=reason, tier=tier)
        key, now_s = (event, reason, tier), self.now_s()
        told = self._told.get(key)
        if told is not None and now_s - told.at_s < QUIET_S:
            told.untold += 1
            told.message = message
            return
        more = f" ({told.untold} more like it before)" if told and told.untold else ""
        log.log(level, "%s%s", message, more)
        self._remember(key, _Told(now_s, level))

    def _remember(self, key: Key, told: _Told) -> None:
        self._told.pop(key, None)
        if len(self._told) >= KINDS_REMEMBERED:
            del self._told[next(iter(self._told))]
        self._told[key] = told

    def tell(self, *, all_of_them: bool = False) -> None:
        """Log what was held back for a minute; at the end of the mount all of it."""
        now_s = self.now_s()
        for (event, _, _), told in self._told.items():
            if told.untold and (all_of_them or now_s - told.at_s >= QUIET_S):
                log.log(told.level, "%d more %s, the last: %s", told.untold, event, told.message)
                told.at_s, told.untold, told.message = now_s, 0, ""
