"""How fast blocks come into an engine's memory: the rows of `make bench` for onboarding.

`HostDevice` with a client of the daemon, against threads that open and `preadv` the same files on
the tier: as many threads, files in the page cache, in turn. Where there is a GPU its rows follow
(`kvfs.tools.bench_gpu`).
"""

from __future__ import annotations

import json
import mmap
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from kvfs.client import Client
from kvfs.errors import KvfsError
from kvfs.gpu.host import HostDevice
from kvfs.gpu.onboarder import Onboarder
from kvfs.gpu.source import BlockSource
from kvfs.tools.bench_load import stay_awake
from kvfs.tools.bench_mounts import kvfs_mount, scratch_directory, wait_until
from kvfs.tools.render import table

KIB, MIB = 1 << 10, 1 << 20
THREADS = 4
# The daemon works on after a lease: not while the other way is measured.
PAUSE_S = 0.02
CAPACITY_BYTES = 1 << 30
CONFIG = """\
[[tier]]
name = "nvme"
medium = "nvme"
path = "{path}"
capacity = {capacity_bytes}
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """What is loaded in one call, and the least ratio that is good enough."""

    block_bytes: int
    blocks: int
    bar: float

    @property
    def title(self) -> str:
        mib = self.block_bytes // MIB
        return f"{self.blocks} x {f'{mib} MiB' if mib else f'{self.block_bytes // KIB} KiB'}"


SHAPES = (Shape(2 * MIB, 64, 0.9), Shape(64 * KIB, 64, 0.6))


@dataclass(frozen=True, slots=True)
class OnboardRow:
    """Onboarding beside what it is measured against; medians of the rounds, bytes a second."""

    what: str
    onboarder_bytes_per_s: float
    base: str
    base_bytes_per_s: float
    ratio: float
    bar: float | None = None

    @property
    def verdict(self) -> str:
        if self.bar is None:
            return ""
        return "ok" if self.ratio >= self.bar else "NOT MET"

    def document(self) -> dict[str, Any]:
        return asdict(self)


def measure_onboarding(scratch: Path | None, rounds: int) -> list[OnboardRow]:
    """Every shape on a mount of its own making."""
    with scratch_directory(scratch) as root:
        tier, mountpoint, config = root / "tier", root / "mnt", root / "kvfs.toml"
        tier.mkdir()
        config.write_text(CONFIG.format(path=tier, capacity_bytes=CAPACITY_BYTES))
        with kvfs_mount(mountpoint, config):
            names = {shape: _write(mountpoint, shape) for shape in SHAPES}
            wait_until(lambda: _unsealed(mountpoint) == 0, "everything sealed")
            with Client(mountpoint) as client:
                return [compare(client, tier, names[shape], shape, rounds) for shape in SHAPES]


def _write(mountpoint: Path, shape: Shape) -> list[str]:
    directory = str(shape.block_bytes)
    (mountpoint / directory).mkdir()
    names = [f"{directory}/{number:04d}.bin" for number in range(shape.blocks)]
    for name in names:
        temporary = mountpoint / f"{name}.tmp"
        temporary.write_bytes(os.urandom(shape.block_bytes))
        temporary.rename(mountpoint / name)
    return names


def _unsealed(mountpoint: Path) -> int:
    return int(json.loads((mountpoint / ".kvfs" / "stats").read_bytes())["unsealed"])


def compare(
    source: BlockSource, files: Path, names: Sequence[str], shape: Shape, rounds: int
) -> OnboardRow:
    """Onboarder and threads in turn, into memory whose pages are there."""
    size = shape.block_bytes
    memory = mmap.mmap(-1, size * shape.blocks)
    memory.write(bytes(len(memory)))
    rows = [memoryview(memory)[start : start + size] for start in range(0, len(memory), size)]

    def read_raw(number: int) -> None:
        descriptor = os.open(files / names[number], os.O_RDONLY)
        try:
            if os.preadv(descriptor, [rows[number]], 0) != size:
                raise KvfsError(f"{names[number]}: a short read")
        finally:
            os.close(descriptor)

    with HostDevice(THREADS) as device, ThreadPoolExecutor(THREADS) as pool:
        loader = Onboarder(source, device)

        def onboard() -> None:
            loader.read(names, rows).check()

        def read_all() -> None:
            list(pool.map(read_raw, range(shape.blocks)))

        onboard()
        read_all()
        laps = [(_seconds(onboard), _seconds(read_all)) for _ in range(rounds)]
    total = size * shape.blocks
    return OnboardRow(
        f"{shape.title}, host",
        total / median(ours for ours, _ in laps),
        f"preadv, {THREADS} threads",
        total / median(raw for _, raw in laps),
        median(raw / ours for ours, raw in laps),
        shape.bar,
    )


def _seconds(call: Callable[[], None]) -> float:
    stay_awake(PAUSE_S)
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def onboard_table(rows: Sequence[OnboardRow]) -> Table:
    view = table("Onboarding, warm", ">onboarder", ">against it", ">ratio", ">bar", "against")
    for row in rows:
        speeds = (row.onboarder_bytes_per_s, row.base_bytes_per_s)
        cells = (f"{speed / 1e6:,.0f} MB/s" for speed in speeds)
        bar = "" if row.bar is None else f">= {row.bar:g} {row.verdict}"
        view.add_row(row.what, *cells, f"{row.ratio:.2f}", bar, row.base)
    return view
