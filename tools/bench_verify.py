"""What the checks cost: the rows of `make bench` for opens with and without verification, for
sealing and for a scrub.

Two mounts on the same disk, one with `verify = "first-open"` and one with `never`, in turn. The
blocks are in the page cache: where they are not, the disk is what is measured.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from kvfs.control import ControlClient, find_mount
from kvfs.tools.bench_mounts import kvfs_mount, scratch_directory, wait_until
from kvfs.tools.render import table

KIB, MIB = 1 << 10, 1 << 20
BLOCKS = {64 * KIB: 512, 2 * MIB: 64}
POLICIES = ("first-open", "never")
OPENS_AGAIN = 4
CAPACITY_BYTES = 2 << 30
CONFIG = """\
[[tier]]
name = "nvme"
medium = "nvme"
path = "{path}"
capacity = {capacity_bytes}
[tiering]
verify = "{policy}"
"""


@dataclass(frozen=True, slots=True)
class CheckRow:
    """One thing with verification and, where it makes a difference, without."""

    what: str
    unit: str
    with_checks: float
    without: float | None = None

    def document(self) -> dict[str, Any]:
        return asdict(self)


def measure_checks(scratch: Path | None, rounds: int) -> list[CheckRow]:
    """Medians of the rounds; a block's first open can be measured once a mount."""
    laps: dict[tuple[str, str], list[float]] = {}
    with scratch_directory(scratch) as root:
        sealing = {policy: _prepare(root, policy) for policy in POLICIES}
        for _ in range(rounds):
            for policy in POLICIES:
                for what, seconds in _round(root, policy):
                    laps.setdefault((what, policy), []).append(seconds)
        for policy in POLICIES:
            shutil.rmtree(root / policy)
    rows = [
        CheckRow(what, "us", *(1e6 * median(laps[what, policy]) for policy in POLICIES))
        for what in dict.fromkeys(what for what, policy in laps if policy == POLICIES[-1])
    ]
    seconds = median(sealing.values())
    rows.append(CheckRow("sealing, thread time per GB", "ms", 1e3 * seconds))
    rows.append(CheckRow("scrub", "MB/s", median(laps["scrub", POLICIES[0]]) / 1e6))
    return rows


def _prepare(root: Path, policy: str) -> float:
    """Blocks in a tier; the seconds of worker threads that sealing a GB of them took."""
    (root / policy).mkdir()
    config = root / f"{policy}.toml"
    config.write_text(
        CONFIG.format(path=root / policy, capacity_bytes=CAPACITY_BYTES, policy=policy)
    )
    mountpoint = root / f"{policy}.mnt"
    with kvfs_mount(mountpoint, config):
        for size, count in BLOCKS.items():
            directory = mountpoint / str(size)
            directory.mkdir()
            for number in range(count):
                (directory / str(number)).write_bytes(os.urandom(size))

        def sealed() -> bool:
            return bool(_status(mountpoint)["unsealed"] == 0)

        wait_until(sealed, "everything sealed")
        costs = _status(mountpoint)["seal"]
        return float(costs["seconds"]) / float(costs["size_bytes"]) * 1e9


def _status(mountpoint: Path) -> dict[str, Any]:
    return dict(json.loads((mountpoint / ".kvfs" / "stats").read_bytes()))


def _round(root: Path, policy: str) -> Iterator[tuple[str, float]]:
    """A mount in which nothing was verified yet: seconds for each open, and bytes a second."""
    mountpoint = root / f"{policy}.mnt"
    for file in (root / policy).rglob("*"):
        if file.is_file():
            file.read_bytes()
    with kvfs_mount(mountpoint, root / f"{policy}.toml"):
        for size, count in BLOCKS.items():
            paths = [str(mountpoint / str(size) / str(number)) for number in range(count)]
            for path in paths:
                os.stat(path)
            name = f"{size // KIB} KiB"
            yield f"first open + close of a mount, {name}", _seconds(paths)
            again = [_seconds(paths) for _ in range(OPENS_AGAIN)]
            yield f"open + close after that, {name}", min(again)
        if policy == POLICIES[0]:
            with ControlClient(find_mount(mountpoint).socket_path) as client:
                start_s = time.perf_counter()
                read_bytes = client.call("scrub", {"restart": True})["bytes"]
                yield "scrub", read_bytes / (time.perf_counter() - start_s)


def _seconds(paths: Sequence[str]) -> float:
    """For each of them."""
    start_s = time.perf_counter()
    for path in paths:
        os.close(os.open(path, os.O_RDONLY))
    return (time.perf_counter() - start_s) / len(paths)


def checks_table(rows: Sequence[CheckRow]) -> Table:
    view = table("Checks", ">first-open", ">never", ">ratio", "")
    for row in rows:
        without = "" if row.without is None else f"{row.without:,.0f} {row.unit}"
        ratio = "" if not row.without else f"{row.with_checks / row.without:.2f}"
        view.add_row(row.what, f"{row.with_checks:,.0f} {row.unit}", without, ratio, "")
    return view
