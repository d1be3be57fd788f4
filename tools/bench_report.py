"""What the benchmark makes of its measurements: medians, ratios and the table. Pure functions.

A ratio is taken within a round, where both sides had the same machine, and the median is that of
the rounds' ratios: so a load from elsewhere that comes and goes falls out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rich.table import Table

from kvfs.tools.render import UNKNOWN, table

RAW = "raw"


@dataclass(frozen=True, slots=True)
class Operation:
    """One row: what is done to how many blocks by how many workers.

    `block_bytes` is 0 where no bytes move; `cold` drops the blocks from every cache before.
    """

    loop: str
    what: str
    block_bytes: int
    workers: int
    count: int
    cold: bool = False

    @property
    def title(self) -> str:
        size = ""
        if self.block_bytes:
            mib = self.block_bytes >> 20
            size = f", {mib} MiB" if mib else f", {self.block_bytes >> 10} KiB"
        return f"{self.what}{size}, {self.workers} at a time"

    @property
    def key(self) -> str:
        """The stable name in JSON."""
        warmth = "_cold" if self.cold else ""
        return f"{self.loop}{warmth}_{self.block_bytes >> 10}k_x{self.workers}"


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of an operation on one target; CPU of workers and daemon together."""

    wall_s: float
    cpu_s: float


@dataclass
class Samples:
    """Per target, one sample a round, in the order of the rounds."""

    operation: Operation
    by_target: dict[str, list[Sample]] = field(default_factory=dict)

    def add(self, target: str, sample: Sample) -> None:
        self.by_target.setdefault(target, []).append(sample)

    def ratio(self, target: str) -> float | None:
        """Speed as a share of raw: the median over rounds. None when not measured."""
        pairs = zip(self.by_target[RAW], self.by_target.get(target, ()), strict=False)
        ratios = [raw.wall_s / sample.wall_s for raw, sample in pairs]
        return median(ratios) if ratios else None

    def wall_s(self, target: str) -> float:
        return median(sample.wall_s for sample in self.by_target[target])

    def cpu_ms(self, target: str) -> float | None:
        """CPU milliseconds for each block or call, of all processes involved."""
        samples = self.by_target.get(target)
        if not samples:
            return None
        return median(sample.cpu_s for sample in samples) * 1000 / self.operation.count

    def speed_text(self, target: str) -> str:
        """MB/s where bytes move, else microseconds for each call of one worker."""
        wall_s, operation = self.wall_s(target), self.operation
        if operation.block_bytes:
            return f"{operation.count * operation.block_bytes / wall_s / 1e6:,.0f} MB/s"
        return f"{wall_s * operation.workers / operation.count * 1e6:,.1f} µs"


def targets_of(results: Sequence[Samples]) -> list[str]:
    """Every target that was measured, raw first."""
    return list(dict.fromkeys(name for samples in results for name in samples.by_target))


def ratio_text(ratio: float | None) -> str:
    """Two significant digits where it is small."""
    if ratio is None:
        return UNKNOWN
    return f"{ratio:.2f}" if ratio >= 0.095 else f"{ratio:.3f}"


def speed_table(results: Sequence[Samples]) -> Table:
    """Speed: raw in its unit, everyone else as a ratio to it."""
    others = [name for name in targets_of(results) if name != RAW]
    view = table("Operation", ">raw", *(f">{name}" for name in others), "")
    for samples in results:
        ratios = (ratio_text(samples.ratio(name)) for name in others)
        view.add_row(samples.operation.title, samples.speed_text(RAW), *ratios, "")
    return view


def cpu_table(results: Sequence[Samples]) -> Table:
    """CPU milliseconds for each block or call, all processes together."""
    names = targets_of(results)
    view = table("CPU ms per block or call", *(f">{name}" for name in names), "")
    for samples in results:
        values = (samples.cpu_ms(name) for name in names)
        cells = (UNKNOWN if value is None else f"{value:.3f}" for value in values)
        view.add_row(samples.operation.title, *cells, "")
    return view


def document(results: Sequence[Samples], machine: Mapping[str, Any]) -> dict[str, Any]:
    """Everything measured, with stable names."""
    return {
        "version": 1,
        "machine": dict(machine),
        "operations": [
            {
                "name": samples.operation.key,
                "what": samples.operation.title,
                "block_bytes": samples.operation.block_bytes,
                "workers": samples.operation.workers,
                "count": samples.operation.count,
                "targets": {
                    name: {
                        "wall_s": [sample.wall_s for sample in rounds],
                        "cpu_s": [sample.cpu_s for sample in rounds],
                        "ratio": samples.ratio(name),
                        "cpu_ms": samples.cpu_ms(name),
                    }
                    for name, rounds in samples.by_target.items()
                },
            }
            for samples in results
        ],
    }
