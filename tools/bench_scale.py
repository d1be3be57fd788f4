"""`python -m kvfs.tools.bench_scale`: a mount over a million blocks, against its bars.

Owns a scratch directory with a catalog that it fills directly. After an orderly unmount a mount
takes the catalog's word, so the million blocks need no files; only the directory that is listed at
the end has them. Nothing is opened, and the daemon is told to move nothing by itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvfs.catalog.catalog import Catalog
from kvfs.catalog.rows import GOOD, ROOT_INODE, BlockState, Inode, Kind, Replica
from kvfs.errors import KvfsError, exit_code_of
from kvfs.tools.bench_mounts import (
    kvfs_mount,
    process_cpu_s,
    resident_bytes,
    run_kvfs,
    scratch_directory,
    wait_until,
)
from kvfs.tools.render import count_text, json_text, show, table

MIB = 1 << 20
BLOCKS = 1_000_000
BLOCKS_PER_DIRECTORY = 1000
LISTED_BLOCKS = 100_000
BLOCK_BYTES = 16 << 10
LISTED_BYTES = 4 << 10
INSERT_ROWS = 50_000
# One block in five is on the first tier; both are fuller than their high watermark of 95 %.
FIRST_TIER_EVERY = 5
FULL = 0.97
ROUNDS = 3

CONFIG = """\
[[tier]]
name = "nvme"
medium = "nvme"
path = "{root}/nvme"
capacity = {nvme_bytes}
[[tier]]
name = "hdd"
medium = "hdd"
path = "{root}/hdd"
capacity = {hdd_bytes}
[tiering]
interval = "1h"
high_watermark = {high}
low_watermark = {low}
promote_heat = {promote_heat:.1f}
"""


@dataclass(frozen=True, slots=True)
class Measured:
    """One figure and what it must reach."""

    what: str
    value: float
    unit: str
    bar: float | None = None
    at_least: bool = False

    @property
    def verdict(self) -> str:
        if self.bar is None:
            return ""
        good = self.value >= self.bar if self.at_least else self.value <= self.bar
        return "ok" if good else "NOT MET"

    @property
    def bar_text(self) -> str:
        if self.bar is None:
            return "-"
        return f"{'>=' if self.at_least else '<='} {self.bar:,g} {self.unit}"


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is made: a million blocks unless it is a trial."""

    blocks: int
    listed: int

    @property
    def nvme_bytes(self) -> int:
        listed_bytes = self.listed * LISTED_BYTES
        return int((self.blocks // FIRST_TIER_EVERY * BLOCK_BYTES + listed_bytes) / FULL)

    @property
    def hdd_bytes(self) -> int:
        return int((self.blocks - self.blocks // FIRST_TIER_EVERY) * BLOCK_BYTES / FULL)


class Filler:
    """Rows of the catalog of a clean, unmounted kvfs. The only user of the catalog meanwhile."""

    def __init__(self, root: Path) -> None:
        self._catalog = Catalog(root / "nvme" / ".kvfs" / "catalog.sqlite")
        self._tiers = {name: number for number, _, name, _ in self._catalog.known_tiers()}
        self._now_s = time.time()
        self._next = ROOT_INODE + 1

    def close(self) -> None:
        self._catalog.close()

    def directory(self, parent: int, name: bytes) -> int:
        """A directory in its own transaction; its number."""
        number = self._next
        self._next += 1
        with self._catalog.transaction("benchmark"):
            self._catalog.insert_inode(
                Kind.DIRECTORY, 0o755, 0, 0, int(self._now_s * 1e9), inode=number
            )
            self._catalog.link(parent, name, number)
        return number

    def blocks(self, directory: int, names: list[bytes], size_bytes: int, first_every: int) -> None:
        """Sealed blocks of one directory; their heat spreads over the last day."""
        numbers = range(self._next, self._next + len(names))
        self._next += len(names)
        now_ns = int(self._now_s * 1e9)
        tiers = (self._tiers["nvme"], self._tiers["hdd"])
        columns = ", ".join("?" * len(Inode._fields))
        write = self._catalog.connection.executemany
        with self._catalog.transaction("benchmark"):
            write(f"INSERT INTO inode VALUES ({columns})", (
                (number, Kind.BLOCK, 0o644, 0, 0, size_bytes, now_ns, now_ns, now_ns, 1,
                 BlockState.SEALED, number.to_bytes(16, "big"), None, None)
                for number in numbers
            ))  # fmt: skip
            write("INSERT INTO dirent VALUES (?, ?, ?)", (
                (number, directory, name) for number, name in zip(numbers, names, strict=True)
            ))  # fmt: skip
            columns = ", ".join("?" * len(Replica._fields))
            write(f"INSERT INTO replica VALUES ({columns})", (
                Replica(number, tiers[bool(number % first_every)], size_bytes, GOOD, 0,
                        self._tau(number), verified=0, mtime_ns=0)
                for number in numbers
            ))  # fmt: skip

    def _tau(self, number: int) -> float:
        return self._now_s - number * 7919 % 86_400


def write_config(root: Path, scale: Scale, *, at_rest: bool) -> Path:
    """The configuration under which the daemon rests, or under which everything should move."""
    file = root / "kvfs.toml"
    high, low, promote_heat = (0.99, 0.98, 1e6) if at_rest else (0.95, 0.85, 0.1)
    file.write_text(CONFIG.format(
        root=root, nvme_bytes=scale.nvme_bytes, hdd_bytes=scale.hdd_bytes,
        high=high, low=low, promote_heat=promote_heat,
    ))  # fmt: skip
    return file


def build(root: Path, scale: Scale, say: Callable[[str], None]) -> None:
    """Two tiers, a catalog of `scale` in a clean state, and files for the directory to be listed.

    The tiers and the catalog are made by a first mount: only kvfs knows what belongs into them.
    """
    for tier in ("nvme", "hdd"):
        (root / tier).mkdir()
    with kvfs_mount(root / "mnt", write_config(root, scale, at_rest=True)):
        pass
    filler = Filler(root)
    try:
        model = filler.directory(ROOT_INODE, b"model")
        for start in range(0, scale.blocks, BLOCKS_PER_DIRECTORY):
            directory = filler.directory(model, b"%05x" % (start // BLOCKS_PER_DIRECTORY))
            end = min(start + BLOCKS_PER_DIRECTORY, scale.blocks)
            filler.blocks(
                directory, [block_name(n) for n in range(start, end)], BLOCK_BYTES, FIRST_TIER_EVERY
            )
            if end % (10 * BLOCKS_PER_DIRECTORY) == 0:
                say(f"{end:,} of {scale.blocks:,} blocks in the catalog")
        listed = filler.directory(ROOT_INODE, b"listed")
        names = [block_name(number) for number in range(scale.blocks, scale.blocks + scale.listed)]
        filler.blocks(listed, names, LISTED_BYTES, 1)
    finally:
        filler.close()
    say(f"{scale.listed:,} files")
    (root / "nvme" / "listed").mkdir()
    prefix = os.fsencode(root / "nvme" / "listed") + b"/"
    for name in names:
        file = os.open(prefix + name, os.O_CREAT | os.O_WRONLY, 0o600)
        os.write(file, bytes(LISTED_BYTES))
        os.close(file)


def block_name(number: int) -> bytes:
    """As long as an engine's hash of 128 bits."""
    return b"%032x.bin" % (number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % (1 << 128))


def timed(function: Callable[[], object]) -> float:
    start_s = time.monotonic()
    function()
    return time.monotonic() - start_s


def count_found(directory: Path) -> int:
    """Entries that `find` prints."""
    done = subprocess.run(["find", directory], stdout=subprocess.PIPE, check=True)
    return done.stdout.count(b"\n")


def list_unsorted(directory: Path) -> int:
    """Names that `ls -f` prints, without "." and ".."."""
    done = subprocess.run(["ls", "-f", directory], stdout=subprocess.PIPE, check=True)
    return done.stdout.count(b"\n") - 2


def expect(found: int, wanted: int, what: str) -> None:
    if found != wanted:
        raise KvfsError(f"{what}: {found:,} entries instead of {wanted:,}")


def measure(root: Path, scale: Scale, say: Callable[[str], None]) -> Iterator[Measured]:
    """Every figure, each with its bar."""
    mountpoint = root / "mnt"
    say("mounting")
    with kvfs_mount(mountpoint, write_config(root, scale, at_rest=True)) as mounted:
        pid = mounted.pid
        yield Measured("mount until it answers", mounted.took_s, "s", 5)
        yield Measured("daemon after mount", resident_bytes(pid) / MIB, "MiB", 200)
        say("planning")
        yield Measured("plan of a tiering pass", planning_s(root, scale, pid), "s", 1)
        say("ls -f")
        listed = mountpoint / "listed"
        rates = []
        for _ in range(ROUNDS):
            laps_s = timed(lambda: expect(list_unsorted(listed), scale.listed, "ls -f"))
            rates.append(scale.listed / laps_s)
        yield Measured("ls -f", sorted(rates)[len(rates) // 2], "names/s", 25_000, at_least=True)
        say("find")
        directories = -(-scale.blocks // BLOCKS_PER_DIRECTORY) + 3
        wanted = scale.blocks + scale.listed + directories
        cpu_s = process_cpu_s(pid)
        find_s = timed(lambda: expect(count_found(mountpoint), wanted, "find"))
        yield Measured("daemon after find", resident_bytes(pid) / MIB, "MiB", 500)
        yield Measured("find over all", find_s, "s")
        yield Measured("daemon's CPU for it", process_cpu_s(pid) - cpu_s, "s")


def planning_s(root: Path, scale: Scale, pid: int) -> float:
    """Median of the time a dry run takes to plan, with both tiers above their watermarks."""
    write_config(root, scale, at_rest=False)
    os.kill(pid, signal.SIGHUP)
    log_file = root / "kvfs.log"
    wait_until(lambda: "reloaded" in log_file.read_text(), "the configuration to be reloaded")
    plans = [
        json.loads(run_kvfs("tier", "run", root / "mnt", "--dry-run", "--json"))
        for _ in range(ROUNDS)
    ]
    if not all(plan["moves"] for plan in plans):
        raise KvfsError("the tiering pass found nothing to move")
    return float(sorted(plan["planning_s"] for plan in plans)[ROUNDS // 2])


def run_scale(scale: Scale, scratch: Path | None, console: Console) -> list[Measured]:
    """Build and measure in a scratch directory."""

    def say(text: str) -> None:
        if console.is_terminal:
            status.update(text)

    with scratch_directory(scratch) as root, console.status("") as status:
        start_s = time.monotonic()
        build(root, scale, say)
        console.print(f"catalog of {scale.blocks:,} blocks built in "
                      f"{time.monotonic() - start_s:.0f} s")  # fmt: skip
        return list(measure(root, scale, say))


def print_measured(figures: list[Measured]) -> None:
    view = table("Over a large catalog", ">Measured", ">Bar", "")
    for figure in figures:
        value = f"{figure.value:,.0f}" if figure.value >= 100 else f"{figure.value:.2f}"
        view.add_row(figure.what, f"{value} {figure.unit}", figure.bar_text, figure.verdict)
    show(view)


def main(
    blocks: Annotated[int, typer.Option(help="Blocks in the catalog.")] = BLOCKS,
    listed: Annotated[int, typer.Option(help="Names of the directory for ls.")] = LISTED_BLOCKS,
    scratch: Annotated[
        Path | None, typer.Option(metavar="DIR", help="On the disk to measure.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there.")
    ] = None,
) -> None:
    """Mount kvfs over a catalog of a million blocks and compare with the bars."""
    console = Console(stderr=True, markup=False, highlight=False)
    try:
        figures = run_scale(Scale(blocks, listed), scratch, console)
    except KvfsError as error:
        sys.stderr.write(f"bench: {error}\n")
        raise typer.Exit(exit_code_of(error)) from None
    print_measured(figures)
    if json_file is not None:
        json_file.write_text(json_text([asdict(figure) for figure in figures]) + "\n")
        typer.echo(f"{count_text(len(figures))} figures in {json_file}")


if __name__ == "__main__":
    typer.run(main)
