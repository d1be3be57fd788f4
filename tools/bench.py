"""`make bench`: how fast blocks are through a mount, as ratios to a raw directory on the same disk.

Owns the plan of a run: which operations, in which order, on which targets. Every round runs each
operation on every target in turn, so that all of them meet the same machine. Nothing here asserts a
time.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from kvfs.errors import KvfsError, TierError, exit_code_of
from kvfs.gpu.probe import probe
from kvfs.tools import bench_scale
from kvfs.tools.bench_client import ClientRow, client_table, measure_client
from kvfs.tools.bench_codec import CodecRow, codec_table, measure_codec
from kvfs.tools.bench_gpu import measure_gpu
from kvfs.tools.bench_hang import HangRow, hang_table, measure_hang
from kvfs.tools.bench_load import Share, Workers, shares_of, wall_s
from kvfs.tools.bench_mounts import (
    FLOOR,
    FLOOR_COMMAND,
    PEERS,
    Target,
    kvfs_mount,
    peer_mount,
    scratch_directory,
)
from kvfs.tools.bench_onboard import OnboardRow, measure_onboarding, onboard_table
from kvfs.tools.bench_report import (
    RAW,
    Operation,
    Sample,
    Samples,
    cpu_table,
    document,
    speed_table,
)
from kvfs.tools.bench_verify import CheckRow, checks_table, measure_checks
from kvfs.tools.render import json_text, show
from kvfs.units import format_size

KIB, MIB = 1 << 10, 1 << 20
LARGE, SMALL = 2 * MIB, 64 * KIB
LARGE_BLOCKS, SMALL_BLOCKS = 48, 512
CALLS = 2048
ROUNDS, QUICK_ROUNDS = 5, 2
MANY = 8
CAPACITY_BYTES = 4 << 30
NEEDED_BYTES = 8 << 30
CONFIG = """\
[[tier]]
name = "nvme"
medium = "nvme"
path = "{path}"
capacity = {capacity_bytes}
"""


def operations(*, quick: bool) -> list[Operation]:
    """The rows of the table. A quick run does half of each."""
    part = 2 if quick else 1
    large, small, calls = LARGE_BLOCKS // part, SMALL_BLOCKS // part, CALLS // part
    rows = [
        Operation("read", f"{warmth} read", size, workers, count, cold=warmth == "cold")
        for warmth in ("warm", "cold")
        for size, count in ((LARGE, large), (SMALL, small))
        for workers in (1, MANY)
    ]
    rows += [
        Operation("read_direct", "O_DIRECT read", LARGE, workers, large, cold=True)
        for workers in (1, MANY)
    ]
    rows += [
        Operation("put", "put (tmp, write, rename)", size, workers, count)
        for size, count in ((LARGE, large), (SMALL, small))
        for workers in (1, MANY)
    ]
    rows += [
        Operation("access_known", "access of a known name", 0, 1, calls),
        Operation("access_unknown", "access of an unknown name", 0, 1, calls),
        Operation("open_close", "open + close", 0, 1, calls),
    ]
    return rows


class Bench:
    """One run over the targets. Owned by the main thread; `workers` do the work."""

    def __init__(self, targets: Sequence[Target], workers: Workers) -> None:
        self._targets = targets
        self._workers = workers
        self._sealed = dict.fromkeys((target.name for target in targets), 0)

    def prepare(self, rows: Sequence[Operation]) -> None:
        """The blocks that are read, written through each target that keeps its own."""
        for size in (LARGE, SMALL):
            count = max(row.count for row in rows if (row.block_bytes or SMALL) == size)
            for target in self._targets:
                if target.keeps_blocks:
                    (target.directory / str(size)).mkdir()
                    self._workers.run(shares_of("put", block_paths(target, size, count), 1, size))
                    self._settle(target, count)
        os.sync()

    def _settle(self, target: Target, blocks: int) -> None:
        self._sealed[target.name] += blocks
        target.settle(self._sealed[target.name])

    def sample(self, row: Operation, target: Target) -> Sample:
        """Run one operation on one target."""
        run = {
            "put": self._put, "access_unknown": self._access_unknown,
        }.get(row.loop, self._on_known)  # fmt: skip
        return run(row, target)

    def _run(self, shares: Sequence[Share], target: Target) -> Sample:
        before_s = target.daemon_cpu_s()
        laps = self._workers.run(shares)
        cpu_s = sum(lap.cpu_s for lap in laps) + target.daemon_cpu_s() - before_s
        return Sample(wall_s(laps), cpu_s)

    def _on_known(self, row: Operation, target: Target) -> Sample:
        size = row.block_bytes or SMALL
        paths = block_paths(target, size, row.count)
        shares = shares_of(row.loop, paths, row.workers, size)
        if not row.cold:
            self._workers.run(shares)
            return self._run(shares, target)
        # Linux 6.18 reads a file that was dropped from its cache in large and in small pieces in
        # turn, on any filesystem: a lap of each, or the ratio is that of large to small ones.
        laps = []
        for _ in range(2):
            drop_caches(target, paths)
            laps.append(self._run(shares, target))
        return Sample(mean(lap.wall_s for lap in laps), mean(lap.cpu_s for lap in laps))

    def _access_unknown(self, row: Operation, target: Target) -> Sample:
        """Names that nobody has asked for: the answer is in no cache."""
        directory = target.directory / str(SMALL)
        paths = [f"{directory}/{uuid.uuid4().hex}.bin" for _ in range(row.count)]
        return self._run(shares_of(row.loop, paths, row.workers), target)

    def _put(self, row: Operation, target: Target) -> Sample:
        """New blocks. The CPU of sealing them counts, the time until they are sealed does not.

        They stay until the end: ext4 searches long for an inode when many were freed just now.
        """
        directory = target.directory / "put"
        directory.mkdir(exist_ok=True)
        paths = [f"{directory}/{uuid.uuid4().hex}.bin" for _ in range(row.count)]
        before_s = target.daemon_cpu_s()
        laps = self._workers.run(shares_of(row.loop, paths, row.workers, row.block_bytes))
        self._settle(target, row.count)
        cpu_s = sum(lap.cpu_s for lap in laps) + target.daemon_cpu_s() - before_s
        # Written back now, not while the next operation is measured.
        os.sync()
        return Sample(wall_s(laps), cpu_s)


def block_paths(target: Target, size: int, count: int) -> list[str]:
    return [f"{target.directory}/{size}/{number:06d}.bin" for number in range(count)]


def drop_caches(target: Target, paths: Sequence[str]) -> None:
    """Drop the blocks from the mount's page cache and from the backing filesystem's."""
    for path in paths:
        backing = str(target.backing / Path(path).relative_to(target.directory))
        for name in {path: None, backing: None}:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOATIME)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def run_rounds(
    bench: Bench, rows: Sequence[Operation], targets: Sequence[Target], rounds: int,
    progress: Callable[[str], None],
) -> list[Samples]:  # fmt: skip
    """Every round: each operation, on each target in turn; another target begins each time."""
    results = [Samples(row) for row in rows]
    for turn in range(rounds):
        for position, samples in enumerate(results):
            shift = (turn + position) % len(targets)
            for target in (*targets[shift:], *targets[:shift]):
                progress(f"round {turn + 1}/{rounds}: {samples.operation.title}, {target.name}")
                samples.add(target.name, bench.sample(samples.operation, target))
    for samples in results:
        measured = samples.by_target
        samples.by_target = {t.name: measured[t.name] for t in targets if t.name in measured}
    return results


@contextmanager
def targets_below(root: Path, say: Callable[[str], None]) -> Iterator[list[Target]]:
    """The raw directory, a kvfs mount, and what peers are installed, over the same disk."""
    free_bytes = shutil.disk_usage(root).free
    if free_bytes < NEEDED_BYTES:
        need, free = format_size(NEEDED_BYTES), format_size(free_bytes)
        raise TierError(f"the benchmark needs {need} at {root}, where {free} are free: --scratch")
    raw, tier, mountpoint = root / "raw", root / "tier", root / "kvfs"
    raw.mkdir()
    tier.mkdir()
    config = root / "kvfs.toml"
    config.write_text(CONFIG.format(path=tier, capacity_bytes=CAPACITY_BYTES))
    with ExitStack() as stack:
        targets = [Target(RAW, raw, raw)]
        mounted = stack.enter_context(kvfs_mount(mountpoint, config))
        targets.append(Target("kvfs", mountpoint, tier, mounted.pid))
        for name, command in PEERS.items():
            if shutil.which(name) is None:
                say(f"{name} is not installed: left out")
                continue
            peer = root / name
            pid = stack.enter_context(peer_mount(command, raw, peer))
            targets.append(Target(name, peer, raw, pid))
        floor = root / FLOOR
        pid = stack.enter_context(peer_mount(FLOOR_COMMAND, raw, floor))
        targets.append(Target(FLOOR, floor, raw, pid))
        yield targets


def machine_facts(root: Path) -> dict[str, Any]:
    """What a reader must know of the machine to judge the figures."""
    return {
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "filesystem": filesystem_of(root),
        "load_before": round(os.getloadavg()[0], 2),
    }


def filesystem_of(path: Path) -> str:
    """The type of the filesystem that holds `path`."""
    entries = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    covering = [(len(e[1]), e[2]) for e in entries if path.is_relative_to(e[1])]
    return max(covering)[1]


def run_bench(
    scratch: Path | None, rounds: int, *, quick: bool, console: Console
) -> tuple[list[Samples], dict[str, Any]]:
    """One interleaved run in a scratch directory, and the facts that belong to it."""
    rows = operations(quick=quick)
    columns = (BarColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with (
        Workers(MANY) as workers,
        scratch_directory(scratch) as root,
        targets_below(root, console.print) as targets,
        Progress(*columns, console=console, disable=not console.is_terminal) as bar,
    ):
        facts = {"rounds": rounds, **machine_facts(root)}
        task = bar.add_task("writing blocks", total=rounds * len(rows) * len(targets))
        bench = Bench(targets, workers)
        bench.prepare(rows)
        results = run_rounds(
            bench, rows, targets, rounds,
            lambda text: bar.update(task, advance=1, description=text),
        )  # fmt: skip
    return results, {**facts, "load_after": round(os.getloadavg()[0], 2)}


@dataclass(frozen=True)
class Figures:
    """What was measured, each part in a run of its own."""

    speed: Sequence[Samples]
    facts: Mapping[str, Any]
    checks: Sequence[CheckRow]
    codec: Sequence[CodecRow]
    hang: Sequence[HangRow]
    client: Sequence[ClientRow]
    onboarding: Sequence[OnboardRow]

    def show(self) -> None:
        typer.echo("Speed as a ratio to raw, higher is faster\n")
        show(speed_table(self.speed))
        views = [
            cpu_table(self.speed), checks_table(self.checks), codec_table(self.codec),
            client_table(self.client), onboard_table(self.onboarding),
        ]  # fmt: skip
        if self.hang:
            views.append(hang_table(self.hang))
        for view in views:
            typer.echo("")
            show(view)
        typer.echo("\nmedians; " + ", ".join(f"{name} {it}" for name, it in self.facts.items()))

    def document(self) -> dict[str, Any]:
        parts = ("checks", "codec", "hang", "client", "onboarding")
        return document(self.speed, self.facts) | {
            part: [row.document() for row in getattr(self, part)] for part in parts
        }


def measure(scratch: Path | None, rounds: int, *, quick: bool, console: Console) -> Figures:
    """Everything. Raises KvfsError."""
    speed, facts = run_bench(scratch, rounds, quick=quick, console=console)
    checks = measure_checks(scratch, rounds)
    codec = measure_codec(rounds)
    hang = measure_hang(scratch, rounds)
    client = measure_client(scratch, rounds)
    onboarding = measure_onboarding(scratch, rounds)
    if probe().usable:
        onboarding += measure_gpu(scratch, rounds)
    return Figures(speed, facts, checks, codec, hang, client, onboarding)


def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer rounds, less than a minute.")
    ] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="Interleaved rounds.")] = None,
    scale: Annotated[
        bool, typer.Option("--scale", help="Mount over a million blocks instead.")
    ] = False,
    scratch: Annotated[
        Path | None, typer.Option(metavar="DIR", help="On the disk to measure.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there.")
    ] = None,
) -> None:
    """Speed of a kvfs mount as ratios to a raw directory on the same disk."""
    if scale:
        bench_scale.main(scratch=scratch, json_file=json_file)
        return
    console = Console(stderr=True, markup=False, highlight=False)
    rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    try:
        figures = measure(scratch, rounds, quick=quick, console=console)
    except KvfsError as error:
        sys.stderr.write(f"bench: {error}\n")
        raise typer.Exit(exit_code_of(error)) from None
    figures.show()
    if json_file is not None:
        json_file.write_text(json_text(figures.document()) + "\n")


if __name__ == "__main__":
    typer.run(main)
