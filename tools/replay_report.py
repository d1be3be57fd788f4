"""What a replay found, as one structure and one table.

Owns the field names of `--json` and the columns of the final table. Never measures. Called by the
replay and demo commands.
"""

from __future__ import annotations

from typing import Any

import msgspec
from rich.table import Table
from rich.text import Text

from kvfs.tools.mount_stats import TierActivity
from kvfs.tools.render import count_text, fields, name_text, share_text, show, size_text, table
from kvfs.tools.replay import Failure, Replay, StopReason
from kvfs.units import format_rate, format_size


class ReplayReport(msgspec.Struct, frozen=True):
    """The result of a run; `tiers` is empty where the directory is a plain one."""

    source: str
    directory: str
    kind: str
    block_bytes: int
    direct: bool
    workers: int
    requests: int
    blocks: int
    hits: int
    loaded: int
    lost: int
    stored: int
    present: int
    refused: int
    hit_rate: float
    bytes_written: int
    bytes_read: int
    bytes_compared: int
    failures: int
    first_failure: Failure | None
    stop_reason: StopReason
    elapsed_s: float
    tiers: tuple[TierActivity, ...]

    @property
    def passed(self) -> bool:
        """Whether every byte read was compared with what was written, and was the same."""
        return not self.failures and self.bytes_compared == self.bytes_read

    def document(self) -> dict[str, Any]:
        return {**msgspec.to_builtins(self), "passed": self.passed}


def report_of(replay: Replay, source: str, tiers: tuple[TierActivity, ...]) -> ReplayReport:
    tally = replay.tally()
    directory = replay.directory
    return ReplayReport(
        source=source,
        directory=str(directory.root),
        kind="kvfs" if tiers else "plain directory",
        block_bytes=directory.pattern.block_bytes,
        direct=directory.direct,
        workers=replay.settings.workers,
        requests=tally.requests,
        blocks=tally.blocks,
        hits=tally.hits,
        loaded=tally.loaded,
        lost=tally.lost,
        stored=tally.stored,
        present=tally.present,
        refused=tally.refused,
        hit_rate=tally.hit_rate,
        bytes_written=tally.bytes_written,
        bytes_read=tally.bytes_read,
        bytes_compared=tally.bytes_compared,
        failures=tally.failures,
        first_failure=replay.first_failure,
        stop_reason=replay.stop_reason,
        elapsed_s=replay.elapsed_s,
        tiers=tiers,
    )


def print_report(report: ReplayReport, *, passed: bool) -> None:
    """The table, the totals, and the verdict as the last line."""
    if report.tiers:
        show(_tier_table(report.tiers))
    else:
        show(Text(f"{report.directory}: plain directory, no tiers"))
    show(fields(_totals(report)))
    if report.first_failure is not None:
        path, reason = name_text(report.first_failure.path), report.first_failure.reason
        show(Text(f"first failure: {path}: {reason}", style="red"))
    show(Text("PASS", style="bold green") if passed else Text("FAIL", style="bold red"))


def _tier_table(tiers: tuple[TierActivity, ...]) -> Table:
    # Eight columns are what a terminal of 80 shows whole; the JSON has everything.
    numbers = ("blocks", "bytes", "hit share", "promoted", "demoted", "evicted", "moved in")
    result = table("tier", *(f">{name}" for name in numbers))
    for tier in tiers:
        result.add_row(
            tier.name,
            count_text(tier.blocks),
            size_text(tier.used_bytes),
            share_text(tier.hit_share),
            count_text(tier.promotions),
            count_text(tier.demotions),
            count_text(tier.evictions),
            size_text(tier.moved_in_bytes),
        )
    return result


def _totals(report: ReplayReport) -> dict[str, str]:
    seconds = max(report.elapsed_s, 1e-9)
    rate = format_rate((report.bytes_read + report.bytes_written) / seconds)
    return {
        "requests": f"{report.requests:,} ({report.source}), stopped by: {report.stop_reason}",
        "blocks": f"{report.blocks:,} asked for, {report.loaded:,} loaded, "
        f"{report.lost:,} evicted before their load",
        "hit rate": f"{report.hit_rate:.1%}",
        "written": f"{report.stored:,} blocks, {format_size(report.bytes_written)}; "
        f"{report.refused:,} refused for lack of space",
        "read": f"{format_size(report.bytes_read)} ({report.bytes_read:,} bytes)",
        "compared": f"{format_size(report.bytes_compared)} ({report.bytes_compared:,} bytes) "
        f"with what was written, {report.failures:,} failed",
        "elapsed": f"{report.elapsed_s:.1f} s, {rate}",
    }
