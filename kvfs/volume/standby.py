"""Which tier stands in for one that fails: the next one, for new files and for reads."""

from __future__ import annotations

import errno

from kvfs.errors import TierOffline, reason_of
from kvfs.tiers.health import is_full, is_of_medium
from kvfs.tiers.tier import Tier
from kvfs.volume.replicas import Replicas
from kvfs.volume.volume import Volume


def takes_over(volume: Volume, tier: Tier, error: BaseException) -> bool:
    """A tier failed to take a new file: whether a slower one is to be asked."""
    if isinstance(error, OSError) and is_full(error):
        tier.health.refuse("full", error)
    elif not _fails(error):
        return False
    elif isinstance(error, OSError) and error.errno != errno.EROFS:
        # It may well go on answering reads: a probe that writes says when it is well again.
        tier.health.refuse("failing", error)
    if not any(other.accepts and other.index > tier.index for other in volume.tiers):
        return False
    volume.counters.count("creates_redirected", reason=reason_of(error), tier=tier.name)
    return True


def stands_in(
    replicas: Replicas, inode: int, tier: Tier, error: BaseException, avoid: frozenset[Tier]
) -> bool:
    """A tier failed to open a block: whether a replica on another one, not yet tried, can."""
    if tier in avoid or not _fails(error):
        return False
    if not any(other not in avoid | {tier} for other, _ in replicas.readable(inode)):
        return False
    counters = replicas.volume.counters
    counters.count("opens_redirected", reason=reason_of(error), tier=tier.name)
    return True


def _fails(error: BaseException) -> bool:
    """Whether an error is the tier's, rather than that of one file."""
    return is_of_medium(error) or isinstance(error, TierOffline)
