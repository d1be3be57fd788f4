"""Counters of the running daemon, and the Prometheus text made of the statistics document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric


@dataclass(slots=True)
class TierCounters:
    """What happened on one tier since the mount."""

    opens: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    promotions: int = 0
    demotions: int = 0
    evictions: int = 0
    moved_in_bytes: int = 0
    moved_out_bytes: int = 0


@dataclass(slots=True)
class Counters:
    """Since the mount. Owned by the trio loop."""

    events: Counter[str] = field(default_factory=Counter)
    # The same once more by (event, reason, tier), for events that have a reason.
    reasons: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    tiers: dict[int, TierCounters] = field(default_factory=dict)

    def tier(self, index: int) -> TierCounters:
        found = self.tiers.get(index)
        if found is None:
            found = self.tiers[index] = TierCounters()
        return found

    def count(self, event: str, by: int = 1, *, reason: str = "", tier: str = "") -> None:
        """`reason` is a word of the code or the name of an errno, never free text."""
        self.events[event] += by
        if reason:
            self.reasons[event, reason, tier] += by


TIER_GAUGES = (
    "capacity_bytes", "room_bytes", "used_bytes", "reserved_bytes", "held_bytes",
    "quarantine_bytes",
    "quarantine_files", "saved_bytes", "blocks", "waiting",
)  # fmt: skip
TIER_COUNTERS = (
    "opens", "bytes_read", "bytes_written", "promotions", "demotions", "evictions",
    "moved_in_bytes", "moved_out_bytes",
)  # fmt: skip

LEASE_GAUGES = ("leases", "blocks", "bytes", "lingering", "puts", "prefetches")

SEAL_COUNTERS = ("size_bytes", "medium_bytes", "seconds")

# Shown as 0 from the start: a rule of Prometheus does not see the first step of a new counter.
ALARMING_EVENTS = (
    "checksum_mismatches", "quarantined", "replicas_lost", "refused_full", "handler_failures",
    "moves_failed",
)  # fmt: skip


class _Statistics:
    """A collector over one statistics document."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document

    def collect(self) -> Iterator[Metric]:
        document = self._document
        for name in ("blocks", "directories", "unsealed", "uptime_s"):
            yield GaugeMetricFamily(f"kvfs_{name}", f"{name} of the mount", document[name])
        seal = document["seal"]
        yield GaugeMetricFamily(
            "kvfs_seal_lag_s", "age of the oldest block that waits to be sealed", seal["lag_s"]
        )
        for name in SEAL_COUNTERS:
            yield CounterMetricFamily(f"kvfs_seal_{name}", f"{name} of sealing", seal[name])
        for name in LEASE_GAUGES:
            value = document["leases"][name]
            yield GaugeMetricFamily(f"kvfs_lease_{name}", f"{name} of clients", value)
        for name in TIER_GAUGES:
            gauge = GaugeMetricFamily(f"kvfs_tier_{name}", f"{name} of a tier", labels=["tier"])
            for tier in document["tiers"]:
                gauge.add_metric([tier["name"]], tier[name])
            yield gauge
        online = GaugeMetricFamily(
            "kvfs_tier_online", "1 unless the tier is offline", labels=["tier"]
        )
        for tier in document["tiers"]:
            online.add_metric([tier["name"]], float(tier["state"] != "offline"))
        yield online
        accepts = GaugeMetricFamily(
            "kvfs_tier_accepts", "1 while new blocks may be put on the tier", labels=["tier"]
        )
        for tier in document["tiers"]:
            accepts.add_metric([tier["name"]], float(tier["accepts"]))
        yield accepts
        for name in TIER_COUNTERS:
            counter = CounterMetricFamily(
                f"kvfs_tier_{name}", f"{name} since mount", labels=["tier"]
            )
            for tier in document["tiers"]:
                counter.add_metric([tier["name"]], tier[name])
            yield counter
        events = CounterMetricFamily("kvfs_events", "events since mount", labels=["event"])
        counts = dict.fromkeys(ALARMING_EVENTS, 0) | document["counters"]
        for event, count in sorted(counts.items()):
            events.add_metric([event], count)
        yield events
        incidents = CounterMetricFamily(
            "kvfs_incidents", "events that have a reason", labels=["event", "reason", "tier"]
        )
        for row in document["incidents"]:
            incidents.add_metric([row["event"], row["reason"], row["tier"]], row["count"])
        yield incidents


def prometheus_text(document: dict[str, Any]) -> bytes:
    """The statistics document in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Statistics(document))
    return generate_latest(registry)
