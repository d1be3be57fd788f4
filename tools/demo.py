"""`make demo`: three small tiers, a mount, an engine-like load, and one table at the end.

Owns a scratch directory and the mount in it, from the first byte to the last: both are gone when it
ends, however it ends. Everything it shows about tiers it reads from the mount's `.kvfs/stats`, like
any admin. Uses the installed `kvfs` command; never reaches into the daemon.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from kvfs.control import kvfs_mountpoints
from kvfs.errors import KvfsError, MountpointError, TierError, exit_code_of
from kvfs.tools.mount_stats import MountStats, TierActivity, activity, read_stats, total_moves
from kvfs.tools.render import count_text, json_text, share_text, table, usage_bar
from kvfs.tools.replay import BlockDirectory, Replay, ReplaySettings, Tally
from kvfs.tools.replay_cmd import rates
from kvfs.tools.replay_report import ReplayReport, print_report, report_of
from kvfs.tools.trace import Request, chat_workload, check_trace, read_trace
from kvfs.units import format_size

MIB = 1 << 20
BLOCK_BYTES = 64 << 10
WORKERS = 4
REPLAY_MAX_S = 100.0
WRITTEN_MAX_BYTES = 2_000_000_000
# What a run writes is several times what all tiers together hold: the last one has to evict.
TIER_BYTES = {"nvme": 64 * MIB, "hdd": 128 * MIB, "remote": 256 * MIB}
# Catalog, staging and what writers have reserved come on top of the tiers.
SCRATCH_BYTES = sum(TIER_BYTES.values()) + 512 * MIB
SETTLE_MAX_S = 20.0
SETTLE_STEP_S = 0.5
SETTLE_STEPS = 4
LINE_EVERY_S = 5.0

TIERING = """\
[tiering]
interval = "0.5s"
half_life = "20s"
promote_bandwidth = "256MiB"
"""


class Scratch(msgspec.Struct, frozen=True):
    """The demo's directory: `tiers/NAME`, `kvfs.toml` and the mountpoint `mnt`."""

    root: Path

    @property
    def mountpoint(self) -> Path:
        return self.root / "mnt"

    @property
    def config(self) -> Path:
        return self.root / "kvfs.toml"

    @property
    def stats(self) -> Path:
        return self.mountpoint / ".kvfs" / "stats"

    def build(self) -> None:
        free_bytes = shutil.disk_usage(self.root).free
        if free_bytes < SCRATCH_BYTES:
            need, free = format_size(SCRATCH_BYTES), format_size(free_bytes)
            raise TierError(
                f"the demo needs {need} at {self.root}, where {free} are free: --scratch"
            )
        self.mountpoint.mkdir()
        tables = []
        for name, capacity_bytes in TIER_BYTES.items():
            path = self.root / "tiers" / name
            path.mkdir(parents=True)
            tables.append(
                f'[[tier]]\nname = "{name}"\nmedium = "{name}"\npath = "{path}"\n'
                f"capacity = {capacity_bytes}\n"
            )
        self.config.write_text("\n".join([*tables, TIERING]))


@contextmanager
def scratch_directory(parent: Path | None, *, keep: bool) -> Iterator[Scratch]:
    """A fresh directory, removed at the end unless something is still mounted in it."""
    # /tmp may be memory: tiers there would measure nothing.
    where = parent or Path(os.environ.get("TMPDIR", "/var/tmp"))
    where.mkdir(parents=True, exist_ok=True)
    scratch = Scratch(Path(tempfile.mkdtemp(prefix="kvfs-demo-", dir=where)).resolve())
    try:
        scratch.build()
        yield scratch
    finally:
        if keep or scratch.mountpoint in kvfs_mountpoints():
            sys.stderr.write(f"demo: kept {scratch.root}\n")
        else:
            shutil.rmtree(scratch.root)


@contextmanager
def mounted(scratch: Scratch) -> Iterator[None]:
    """The mount, which ends with the block: after Ctrl-C and after a failed mount as well."""
    try:
        run_kvfs("mount", str(scratch.mountpoint), "--config", str(scratch.config))
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if scratch.mountpoint in kvfs_mountpoints():
            run_kvfs("umount", str(scratch.mountpoint))


def run_kvfs(*arguments: str) -> None:
    command = [str(Path(sys.executable).with_name("kvfs")), *arguments]
    try:
        code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    except FileNotFoundError:
        raise MountpointError(f"{command[0]} is not installed: run `make setup`") from None
    if code:
        raise MountpointError(f"`kvfs {' '.join(arguments)}` failed with exit code {code}")


class View:
    """What the run looks like meanwhile: live bars on a terminal, else a line now and then.

    Owned by the main thread, which is also the one that waits for the replay.
    """

    def __init__(self, console: Console, stats: Path, before: MountStats) -> None:
        self._console = console
        self._stats = stats
        self._before = before
        self._last_line_s = 0.0
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> View:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, tally: Tally, elapsed_s: float, note: str = "") -> None:
        now_s = time.monotonic()
        if not self._console.is_terminal and now_s - self._last_line_s < LINE_EVERY_S:
            return
        self._last_line_s = now_s
        after = read_stats(self._stats)
        tiers = activity(self._before, after)
        doing = f"{len(after.moves.running)} moves running, {after.moves.queued} queued"
        head = f"{elapsed_s:5.0f} s  {tally.requests:,} requests  {rates(tally, elapsed_s)}"
        if self._console.is_terminal:
            self._live.update(Group(head, _bars(tiers), f"{doing} {note}"), refresh=True)
        else:
            self._console.print(head, *map(_short, tiers), note, sep="  ", soft_wrap=True)


def _bars(tiers: Iterable[TierActivity]) -> Table:
    numbers = ("blocks", "hit share", "promoted", "demoted", "evicted")
    result = table("tier", "used", *(f">{name}" for name in numbers))
    for tier in tiers:
        result.add_row(
            tier.name,
            usage_bar(tier.used_bytes, tier.claimed_bytes, tier.capacity_bytes),
            count_text(tier.blocks),
            share_text(tier.hit_share),
            count_text(tier.promotions),
            count_text(tier.demotions),
            count_text(tier.evictions),
        )
    return result


def _short(tier: TierActivity) -> str:
    moves = f"+{tier.promotions} -{tier.demotions} x{tier.evictions}"
    return f"{tier.name} {tier.used_bytes / tier.capacity_bytes:.0%} ({moves})"


def settle(scratch: Scratch, before: MountStats, replay: Replay, view: View) -> MountStats:
    """Wait until the daemon has not moved a block for a moment; return the last reading."""
    deadline_s = time.monotonic() + SETTLE_MAX_S
    after = read_stats(scratch.stats)
    quiet_steps = 0
    while quiet_steps < SETTLE_STEPS and time.monotonic() < deadline_s:
        time.sleep(SETTLE_STEP_S)
        moved = total_moves(activity(before, after))
        after = read_stats(scratch.stats)
        quiet = after.moves.idle and total_moves(activity(before, after)) == moved
        quiet_steps = quiet_steps + 1 if quiet else 0
        view.show(replay.tally(), replay.elapsed_s, "settling")
    return after


def play(
    scratch: Scratch, requests: Iterable[Request], settings: ReplaySettings, source: str
) -> ReplayReport:
    directory = BlockDirectory(scratch.mountpoint, BLOCK_BYTES)
    replay = Replay(directory, requests, settings)
    before = read_stats(scratch.stats)
    with View(Console(stderr=True), scratch.stats, before) as view:
        replay.run(view.show)
        after = settle(scratch, before, replay, view)
    return report_of(replay, source, activity(before, after))


def generated_chat() -> tuple[Request, ...]:
    """Users who paste documents: a quarter of the blocks is new, so the tiers fill early."""
    return chat_workload(2025, 4000, turns=3, user_tokens=2000)


def demo(
    trace: Annotated[Path | None, typer.Option(help="Mooncake-format trace; else a chat.")] = None,
    full: Annotated[bool, typer.Option("--full", help="All requests, however long.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the scratch directory.")] = False,
    hold: Annotated[bool, typer.Option("--hold", help="Stay mounted until Enter.")] = False,
    scratch_parent: Annotated[Path | None, typer.Option("--scratch", help="Where to work.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Mount three tiers, run a load, and check every byte read against what was written."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings = ReplaySettings(
        workers=WORKERS,
        max_seconds=None if full else REPLAY_MAX_S,
        max_written_bytes=None if full else WRITTEN_MAX_BYTES,
    )
    requests: Iterable[Request]
    if trace is not None:
        check_trace(trace)
        requests, source = read_trace(trace), trace.name
    else:
        requests, source = generated_chat(), "generated chat"
    with scratch_directory(scratch_parent, keep=keep) as scratch, mounted(scratch):
        report = play(scratch, requests, settings, source)
        passed = report.passed and report.bytes_compared > 0
        print_report(report, passed=passed)
        if hold:
            input(f"mounted at {scratch.mountpoint} until you press Enter ")
    if json_file is not None:
        json_file.write_text(json_text(report.document()) + "\n")
    if not passed:
        raise typer.Exit(1)


def main() -> None:
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(demo)
    try:
        app()
    except (KvfsError, OSError) as error:
        sys.stderr.write(f"demo: {error}\n")
        sys.exit(exit_code_of(error))


if __name__ == "__main__":
    main()
