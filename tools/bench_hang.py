"""What reads from the fastest tier cost while a remote one hangs: the row of `make bench` for it.

The remote tier is a bindfs mount whose process is stopped, which is a server that does not answer.
Meanwhile many threads wait for blocks of it. The same reads are measured before that, in turn.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rich.table import Table

from kvfs.tools.bench_mounts import (
    BINDFS,
    kvfs_mount,
    peer_mount,
    run_kvfs,
    scratch_directory,
    wait_until,
)
from kvfs.tools.render import table

KIB, MIB = 1 << 10, 1 << 20
SIZES = (2 * MIB, 64 * KIB)
BLOCKS = 32
WAITING = 128
DEADLINE_S = 10
MEASURED_S = 2.0
CONFIG = """\
[[tier]]
name = "nvme"
medium = "nvme"
path = "{nvme}"
capacity = "512MiB"
[[tier]]
name = "remote"
medium = "remote"
path = "{remote}"
capacity = "512MiB"
deadline = "{deadline_s}s"
[tiering]
promote_heat = 1000000
"""


@dataclass(frozen=True, slots=True)
class HangRow:
    """Times of open, read and close of a block in the page cache: remote ones answer, or hang."""

    what: str
    answers_us: float
    hangs_us: float

    def document(self) -> dict[str, Any]:
        return asdict(self)


def measure_hang(scratch: Path | None, rounds: int) -> list[HangRow]:
    """Medians of the rounds; nothing where bindfs is not installed."""
    if shutil.which(BINDFS[0]) is None:
        return []
    laps: dict[tuple[str, bool], list[float]] = {}
    with scratch_directory(scratch) as root, _mounted(root) as (mountpoint, server):
        for _ in range(rounds):
            for hangs in (False, True):
                with _waiting(mountpoint, server) if hangs else _nobody_waits():
                    for what, value_us in _percentiles(mountpoint):
                        laps.setdefault((what, hangs), []).append(value_us)
    names = dict.fromkeys(what for what, _ in laps)
    return [HangRow(n, median(laps[n, False]), median(laps[n, True])) for n in names]


@contextmanager
def _mounted(root: Path) -> Iterator[tuple[Path, int]]:
    """A mount with blocks on both tiers, and the process that serves the remote one."""
    mountpoint, config = root / "mnt", root / "kvfs.toml"
    for name in ("nvme", "files", "remote"):
        (root / name).mkdir()
    config.write_text(
        CONFIG.format(nvme=root / "nvme", remote=root / "remote", deadline_s=DEADLINE_S)
    )
    with (
        peer_mount(BINDFS, root / "files", root / "remote") as server,
        kvfs_mount(mountpoint, config),
    ):
        for name, count, sizes in (("near", BLOCKS, SIZES), ("far", WAITING, (64 * KIB,))):
            for size in sizes:
                directory = mountpoint / name / str(size)
                directory.mkdir(parents=True)
                for number in range(count):
                    (directory / str(number)).write_bytes(os.urandom(size))
        wait_until(lambda: _status(mountpoint)["unsealed"] == 0, "everything sealed")
        run_kvfs("demote", mountpoint / "far", "--to", "remote")
        yield mountpoint, server


def _status(mountpoint: Path) -> dict[str, Any]:
    return dict(json.loads((mountpoint / ".kvfs" / "stats").read_bytes()))


def _remote_state(mountpoint: Path) -> str:
    return str(_status(mountpoint)["tiers"][1]["state"])


@contextmanager
def _nobody_waits() -> Iterator[None]:
    yield


@contextmanager
def _waiting(mountpoint: Path, server: int) -> Iterator[None]:
    """The remote tier hangs, and each of many threads waits for a block of it."""

    def read(number: int) -> None:
        try:
            (mountpoint / "far" / str(64 * KIB) / str(number)).read_bytes()
        except OSError:
            pass  # the deadline, as it should be

    threads = [threading.Thread(target=read, args=(number,)) for number in range(WAITING)]
    os.kill(server, signal.SIGSTOP)
    try:
        for thread in threads:
            thread.start()
        wait_until(
            lambda: _status(mountpoint)["tiers"][1]["waiting"] == WAITING, "requests that wait"
        )
        yield
    finally:
        os.kill(server, signal.SIGCONT)
        for thread in threads:
            thread.join()
        wait_until(lambda: _remote_state(mountpoint) == "online", "the remote tier")


def _percentiles(mountpoint: Path) -> Iterator[tuple[str, float]]:
    for size in SIZES:
        paths = [mountpoint / "near" / str(size) / str(number) for number in range(BLOCKS)]
        times_s = _read_for_a_while(paths, MEASURED_S)
        what = f"read {size // KIB} KiB from nvme"
        yield f"{what}, median", 1e6 * median(times_s)
        yield f"{what}, p99", 1e6 * quantiles(times_s, n=100)[98]


def _read_for_a_while(paths: Sequence[Path], seconds: float) -> list[float]:
    for path in paths:
        path.read_bytes()
    times_s: list[float] = []
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        for path in paths:
            start_s = time.perf_counter()
            path.read_bytes()
            times_s.append(time.perf_counter() - start_s)
    return times_s


def hang_table(rows: Sequence[HangRow]) -> Table:
    view = table(f"{WAITING} requests wait for a remote tier that hangs", ">without", ">with",
                 ">ratio")  # fmt: skip
    for row in rows:
        ratio = row.hangs_us / row.answers_us
        view.add_row(
            row.what, f"{row.answers_us:,.0f} us", f"{row.hangs_us:,.0f} us", f"{ratio:.2f}"
        )
    return view
