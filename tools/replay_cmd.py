"""`kvfs replay`: play a trace of an inference service against a mount, and compare every byte read.

Owns the verb's options, its progress bar and its exit code. The load itself is `kvfs.tools.replay`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvfs.errors import UsageError
from kvfs.tools.mount_stats import activity, read_stats, stats_file
from kvfs.tools.render import print_json
from kvfs.tools.replay import BlockDirectory, Replay, ReplaySettings, Tally
from kvfs.tools.replay_report import ReplayReport, print_report, report_of
from kvfs.tools.trace import check_trace, read_trace
from kvfs.units import format_rate, parse_size


def register(app: typer.Typer) -> None:
    app.command("replay")(replay)


def replay(
    trace: Annotated[Path, typer.Argument(help="Mooncake-format trace, plain or zstd.")],
    mountpoint: Annotated[Path, typer.Argument(help="A mount, or any directory as a baseline.")],
    block_size: Annotated[str, typer.Option(help="Bytes of one block file.")] = "256KiB",
    speed_up: Annotated[str, typer.Option(help="Times real time; max: no waiting.")] = "max",
    requests: Annotated[int | None, typer.Option(min=1, help="Only the first N.")] = None,
    full: Annotated[bool, typer.Option("--full", help="All requests, any bytes.")] = False,
    max_bytes: Annotated[str, typer.Option(help="Stop after writing so much.")] = "2GB",
    workers: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 4,
    no_direct: Annotated[bool, typer.Option("--no-direct", help="Buffered I/O.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Replay TRACE the way an engine uses MOUNTPOINT; fails if one byte read is not as written."""
    if full and requests is not None:
        raise UsageError("--full and --requests exclude each other")
    settings = ReplaySettings(
        workers=workers,
        speed_up=parse_speed_up(speed_up),
        max_written_bytes=None if full else parse_size_option("--max-bytes", max_bytes),
    )
    block_bytes = parse_size_option("--block-size", block_size)
    directory = BlockDirectory(mountpoint, block_bytes, direct=not no_direct)
    summary = check_trace(trace, requests)
    run = Replay(directory, read_trace(trace, requests), settings)
    report = _run(run, trace, summary.requests)
    if as_json:
        print_json(report.document())
    else:
        print_report(report, passed=report.passed)
    if not report.passed:
        raise typer.Exit(1)


def parse_speed_up(text: str) -> float | None:
    """The factor, or None for `max`."""
    if text == "max":
        return None
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--speed-up is a number or max, not {text!r}") from None


def parse_size_option(name: str, text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from None


def _run(run: Replay, trace: Path, requests: int) -> ReplayReport:
    stats = stats_file(run.directory.root)
    before = read_stats(stats) if stats else None
    columns = (
        TextColumn("requests"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rates]}"),
        TimeElapsedColumn(),
    )
    errors = Console(stderr=True)
    with Progress(*columns, console=errors, disable=not errors.is_terminal) as progress:
        task = progress.add_task("requests", total=requests, rates="")

        def show(tally: Tally, elapsed_s: float) -> None:
            progress.update(task, completed=tally.requests, rates=rates(tally, elapsed_s))

        run.run(show)
    tiers = activity(before, read_stats(stats)) if stats and before else ()
    return report_of(run, trace.name, tiers)


def rates(tally: Tally, elapsed_s: float) -> str:
    """One short line for a progress display."""
    moved_bytes = tally.bytes_read + tally.bytes_written
    rate = format_rate(moved_bytes / max(elapsed_s, 1e-9))
    return f"{tally.loaded:,} hits ({tally.hit_rate:.0%})  {rate}"
