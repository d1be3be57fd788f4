"""What the daemon shows of itself: the statistics document, and the description of a block."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import msgspec

from kvfs.blocks.attributes import STATE_NAMES
from kvfs.catalog import scans
from kvfs.catalog.rows import BlockState, Inode, Kind
from kvfs.catalog.scans import Survey
from kvfs.policy.plan import PolicySettings, TierView, explain
from kvfs.store import Store

STATISTICS_VERSION = 1
# Moves that one plan may hold: few, so that the next one sees what changed meanwhile.
MAX_MOVES = 512


class Views:
    """Read-only, on the trio loop: point queries and accounts in memory."""

    def __init__(self, store: Store, mountpoint: str, socket_path: str) -> None:
        self.store = store
        self.mountpoint = mountpoint
        self.socket_path = socket_path
        self.started_s = time.time()
        self.queued_moves = 0
        # How reads reach the bytes; the mount says.
        self.data_path: Callable[[], dict[str, Any]] = dict

    def statistics(self) -> dict[str, Any]:
        """The document of `.kvfs/stats` and `kvfs status --json`."""
        store, volume = self.store, self.store.volume
        store.blocks.growth.account_unseen()
        counters = dict(volume.counters.events)
        return {
            "version": STATISTICS_VERSION,
            "mountpoint": self.mountpoint,
            "pid": os.getpid(),
            "started_at": self.started_s,
            "uptime_s": round(time.time() - self.started_s, 3),
            "state": self._state(),
            "socket": self.socket_path,
            "on_full": volume.config.tiering.on_full,
            "half_life_s": volume.config.tiering.half_life_s,
            "blocks": volume.blocks,
            "directories": volume.directories,
            "unsealed": volume.catalog.count_unsealed(),
            "open": len(store.replicas.open_blocks),
            "data_path": self.data_path(),
            "duplicate_bytes": volume.space.duplicate_bytes,
            "tiers": self.tiers(),
            "moves": {
                "running": [
                    {
                        "kind": move.kind,
                        "path": os.fsdecode(move.path),
                        "source": move.source,
                        "target": move.target,
                        "size_bytes": move.size_bytes,
                        "done_bytes": move.done_bytes,
                    }
                    for move in store.mover.running.values()
                ],
                "queued": self.queued_moves,
            },
            "seal": {"lag_s": round(store.sealer.lag_s(), 3), **asdict(store.sealer.costs)},
            "scrub": self._scrub(),
            "leases": self._leases(),
            "counters": counters,
            "incidents": [
                {"event": event, "reason": reason, "tier": tier, "count": count}
                for (event, reason, tier), count in sorted(volume.counters.reasons.items())
            ],
        }

    def _leases(self) -> dict[str, int]:
        """What clients of the library have now, and what they are waiting for."""
        store = self.store
        return {
            "leases": len(store.leases), "blocks": store.quotas.total.leases,
            "bytes": store.quotas.total.size_bytes, "lingering": store.lingering.total,
            "puts": len(store.puts), "prefetches": len(store.prefetcher),
        }  # fmt: skip

    def _scrub(self) -> dict[str, Any]:
        """How far the scrub of each tier is; `at` is the one that is being read."""
        scrubber = self.store.scrubber
        passes = [
            {"tier": tier.name, **msgspec.to_builtins(scrubber.progress(tier))}
            for tier in self.store.volume.tiers
        ]
        return {
            "at": scrubber.at, "rate": self.store.volume.config.tiering.scrub_rate,
            "passes": passes,
        }  # fmt: skip

    def _state(self) -> str:
        if self.store.volume.walking:
            return "recovering"
        well = all(tier.health.shown == "online" for tier in self.store.volume.tiers)
        return "ok" if well else "degraded"

    def tiers(self) -> list[dict[str, Any]]:
        """One row per tier, fastest first."""
        volume = self.store.volume
        all_opens = sum(volume.counters.tier(tier.index).opens for tier in volume.tiers)
        rows = []
        for tier in volume.tiers:
            account, counters = volume.space[tier.index], volume.counters.tier(tier.index)
            low, high = volume.config.tiering.watermarks(tier.config)
            rows.append({
                "name": tier.name,
                "medium": tier.config.medium,
                "path": str(tier.config.path),
                "uuid": tier.identity.uuid,
                "capacity_bytes": account.capacity_bytes,
                "room_bytes": account.room_bytes,
                "used_bytes": account.used_bytes,
                "reserved_bytes": account.reserved_bytes,
                "held_bytes": account.held_bytes,
                "quarantine_bytes": account.quarantine_bytes,
                "quarantine_files": account.quarantine_files,
                "free_bytes": account.free_bytes,
                "saved_bytes": account.saved_bytes,
                "high_watermark": high,
                "low_watermark": low,
                "blocks": account.blocks,
                "state": "draining" if tier.draining and tier.online else tier.health.shown,
                "last_error": tier.health.last_error,
                "waiting": tier.waiting,
                "accepts": tier.accepts,
                "hit_share": round(counters.opens / all_opens, 6) if all_opens else 0.0,
                **asdict(counters),
            })  # fmt: skip
        return rows

    def describe(self, inode: Inode, path: bytes, *, why: bool = False) -> dict[str, Any]:
        """What `kvfs info` and `kvfs ls` show of one inode."""
        attributes = self.store.attributes
        block = inode.kind == Kind.BLOCK
        names = attributes.replica_names(inode.id) if block else []
        entry = self.store.volume.catalog.entry(inode.id)
        by_directory = entry is not None and self.store.replicas.pinned_by_directory(entry[0])
        opened = self.store.replicas.open_blocks.get(inode.id)
        described = {
            "path": path,
            "size_bytes": inode.size_bytes,
            "tier": names[0] if names else None,
            "replicas": names,
            "codecs": attributes.replica_codecs(inode.id) if block else [],
            "heat": round(attributes.heat(inode.id), 4) if block else None,
            "state": STATE_NAMES[BlockState(inode.state)] if block else None,
            "pinned": inode.pin is not None or by_directory,
            "last_access": inode.atime_ns / 1e9,
            "kind": "block" if block else "directory",
            "pin": inode.pin,
            "ttl_s": inode.ttl_s,
            "generation": inode.generation,
            "checksum": inode.checksum.hex() if inode.checksum else None,
            "inode": inode.id,
            "open": opened is not None,
            "mode": opened.mode or None if opened else None,
        }
        if why:
            described["why"] = self._why(inode) if block else "it is a directory"
        return described

    def _why(self, inode: Inode) -> str:
        volume = self.store.volume
        resident = scans.resident(volume.catalog.connection, inode.id)
        if resident is None:
            return "it has no replica"
        survey = self.survey()
        snapshot = scans.snapshot(volume.catalog.connection, survey)
        view = scans.view(volume.catalog.connection, survey, resident)
        return explain(view, snapshot, survey.settings)

    def survey(self, budgets: dict[int, int] | None = None) -> Survey:
        """What a plan starts from; immutable, for a worker thread."""
        volume = self.store.volume
        now_s = volume.clock.now_s()
        tiering = volume.config.tiering
        return Survey(
            now_s=now_s,
            half_life_s=tiering.half_life_s,
            tiers=tuple(self._tier_views(budgets or {})),
            index_of={tier.number: tier.index for tier in volume.tiers},
            open_inodes=frozenset(self.store.replicas.open_blocks),
            pending_tau=volume.accesses.pending(),
            keep=tiering.keep,
            settings=PolicySettings(
                promote_heat=tiering.promote_heat,
                hysteresis=tiering.hysteresis,
                on_full=tiering.on_full,
                max_moves=MAX_MOVES,
            ),
        )

    def _tier_views(self, budgets: dict[int, int]) -> list[TierView]:
        volume = self.store.volume
        views = []
        for tier in volume.tiers:
            account = volume.space[tier.index]
            low, high = volume.config.tiering.watermarks(tier.config)
            views.append(TierView(
                index=tier.index, name=tier.name, capacity_bytes=account.planned_bytes,
                used_bytes=account.taken_bytes, high_watermark=high, low_watermark=low,
                promote_budget_bytes=budgets.get(tier.index, account.capacity_bytes),
                online=tier.online and not tier.draining, accepts=tier.accepts,
                read_only=tier.health.refuses == "read-only",
            ))  # fmt: skip
        return views
