"""How many bytes may still be promoted: a token bucket and a daily write budget.

Owns no state that changes: a budget is a value, and spending answers a new one. Never reads a
clock. The tiering service keeps the budgets of each tier, puts what they allow into the snapshot
(`TierView.promote_budget_bytes`), and spends what a promotion has written.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

UNLIMITED_BYTES = sys.maxsize
"""What is available where no budget is set."""

_DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class Budget:
    """A token bucket, full at first. A block larger than `burst_bytes` never fits in it."""

    rate_bytes_per_s: float
    burst_bytes: int
    owed_bytes: float = 0.0
    owed_at_s: float = 0.0

    def available(self, now: float) -> int:
        """The bytes that may be written at `now`."""
        return max(0, int(self.burst_bytes - self._owed(now)))

    def spend(self, now: float, n: int) -> Budget:
        """The budget after `n` bytes; what exceeds `available` is paid back first."""
        return replace(self, owed_bytes=self._owed(now) + n, owed_at_s=now)

    def _owed(self, now: float) -> float:
        elapsed_s = max(0.0, now - self.owed_at_s)
        return max(0.0, self.owed_bytes - elapsed_s * self.rate_bytes_per_s)


@dataclass(frozen=True, slots=True)
class DailyBudget:
    """Bytes that may be written in one day (UTC), as the endurance of an SSD is specified."""

    bytes_per_day: int
    day: int = 0
    spent_bytes: int = 0

    def available(self, now: float) -> int:
        """The bytes that may still be written on the day of `now`, a wall-clock time."""
        return max(0, self.bytes_per_day - self._spent(now))

    def spend(self, now: float, n: int) -> DailyBudget:
        """The budget after `n` bytes written at `now`."""
        return replace(self, day=_day_of(now), spent_bytes=self._spent(now) + n)

    def _spent(self, now: float) -> int:
        return self.spent_bytes if _day_of(now) == self.day else 0


def available_bytes(now: float, *budgets: Budget | DailyBudget | None) -> int:
    """What all `budgets` allow at `now`; None is a budget that is not set."""
    return min(
        (budget.available(now) for budget in budgets if budget is not None),
        default=UNLIMITED_BYTES,
    )


def _day_of(now: float) -> int:
    return int(now // _DAY_S)
