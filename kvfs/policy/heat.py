"""The heat of a block: a decayed count of its accesses, kept as one number in seconds.

Owns the arithmetic of `tau`: a block is as hot as one that was used once, at the time `tau`. All
heats decay at one rate, so the order of two taus changes only on access: "coldest first" is an
index scan, there is no decay sweep, and a changed half-life rewrites nothing. This is LRFU (Lee et
al., IEEE Trans. Computers, 2001).

Never reads a clock and never does I/O. Whoever counts accesses or compares blocks calls it.
"""

from __future__ import annotations

import math

never: float = -math.inf
"""The tau of a block that was never used: without heat at any time, and colder than every other."""

MAX_HALF_LIVES_AHEAD = 30
"""How far a tau may lie in the future: 2^30 accesses at once, more than a block can earn."""


def touch(a: float, b: float, half_life_s: float) -> float:
    """The tau with the heats of `a` and `b` together; each is a tau or the time of one access."""
    if a == never:
        return b
    if b == never:
        return a
    return max(a, b) + half_life_s * math.log2(1.0 + math.exp2(-abs(a - b) / half_life_s))


def heat_at(tau: float, t: float, half_life_s: float) -> float:
    """The decayed number of accesses at time `t`: 1.0 right after the first one."""
    # A half-life made shorter puts old taus many half-lives ahead: unbounded, this overflows.
    return math.exp2(min((tau - t) / half_life_s, MAX_HALF_LIVES_AHEAD))


def clamp(tau: float, t: float, half_life_s: float) -> float:
    """`tau`, but not so far after `t` that a clock that was wrong once does lasting harm."""
    return min(tau, t + MAX_HALF_LIVES_AHEAD * half_life_s)


def tau_for(heat: float, t: float, half_life_s: float) -> float:
    """The tau with this heat at time `t`: the inverse of `heat_at`, for thresholds in queries."""
    if heat <= 0.0:
        return never
    return t + half_life_s * math.log2(heat)
