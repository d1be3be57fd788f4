"""A mount's `.kvfs/stats` as the load tools see it: what each tier did between two readings.

Owns the few fields of the document that replay and demo report. Never asks the daemon anything: a
directory without the document is a plain one. Called by the replay and demo commands.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from kvfs.errors import DaemonUnavailable


class TierStats(msgspec.Struct, frozen=True):
    """One tier at one time; counters run since the daemon's start."""

    name: str
    medium: str
    capacity_bytes: int
    used_bytes: int
    reserved_bytes: int
    held_bytes: int
    blocks: int
    opens: int
    promotions: int
    demotions: int
    evictions: int
    bytes_read: int
    bytes_written: int
    moved_in_bytes: int
    moved_out_bytes: int


class RunningMove(msgspec.Struct, frozen=True):
    """A move in flight."""

    kind: str
    source: str
    target: str | None


class Moves(msgspec.Struct, frozen=True):
    """What the mover does now, and has in store."""

    running: tuple[RunningMove, ...]
    queued: int

    @property
    def idle(self) -> bool:
        return not self.running and not self.queued


class MountStats(msgspec.Struct, frozen=True):
    """One reading of `.kvfs/stats`."""

    tiers: tuple[TierStats, ...]
    moves: Moves


class TierActivity(msgspec.Struct, frozen=True):
    """One tier over a run: blocks and bytes at its end, everything else during it."""

    name: str
    medium: str
    capacity_bytes: int
    used_bytes: int
    claimed_bytes: int
    blocks: int
    opens: int
    hit_share: float
    promotions: int
    demotions: int
    evictions: int
    bytes_read: int
    bytes_written: int
    moved_in_bytes: int
    moved_out_bytes: int


def stats_file(directory: Path) -> Path | None:
    """The `.kvfs/stats` that covers `directory`, which may lie below a mountpoint."""
    resolved = directory.resolve()
    candidates = (parent / ".kvfs" / "stats" for parent in (resolved, *resolved.parents))
    return next((path for path in candidates if path.is_file()), None)


def read_stats(file: Path) -> MountStats:
    try:
        return msgspec.json.decode(file.read_bytes(), type=MountStats)
    except (OSError, msgspec.MsgspecError) as error:
        raise DaemonUnavailable(f"cannot read {file}: {error}; see the daemon's log") from None


def activity(before: MountStats, after: MountStats) -> tuple[TierActivity, ...]:
    """Per tier, what happened between two readings; hit shares are of the blocks opened then."""
    earlier = {tier.name: tier for tier in before.tiers}
    pairs = [(earlier[tier.name], tier) for tier in after.tiers if tier.name in earlier]
    opens = sum(tier.opens - old.opens for old, tier in pairs)
    return tuple(_difference(old, tier, opens) for old, tier in pairs)


def _difference(old: TierStats, new: TierStats, all_opens: int) -> TierActivity:
    opens = new.opens - old.opens
    return TierActivity(
        name=new.name,
        medium=new.medium,
        capacity_bytes=new.capacity_bytes,
        used_bytes=new.used_bytes,
        claimed_bytes=new.reserved_bytes + new.held_bytes,
        blocks=new.blocks,
        opens=opens,
        hit_share=opens / all_opens if all_opens else 0.0,
        promotions=new.promotions - old.promotions,
        demotions=new.demotions - old.demotions,
        evictions=new.evictions - old.evictions,
        bytes_read=new.bytes_read - old.bytes_read,
        bytes_written=new.bytes_written - old.bytes_written,
        moved_in_bytes=new.moved_in_bytes - old.moved_in_bytes,
        moved_out_bytes=new.moved_out_bytes - old.moved_out_bytes,
    )


def total_moves(tiers: Sequence[TierActivity]) -> int:
    return sum(tier.promotions + tier.demotions + tier.evictions for tier in tiers)
