"""What the client library costs: the rows of `make bench` for lookups, leases and puts.

One mount; a client in this process, beside calls that go through the mount for the same blocks, in
turn. The times are those of one name or block.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from kvfs.client import Client
from kvfs.errors import KvfsError
from kvfs.tools.bench_load import LOOPS, Share, stay_awake
from kvfs.tools.bench_mounts import Target, kvfs_mount, scratch_directory
from kvfs.tools.render import table

KIB, MIB = 1 << 10, 1 << 20
NAMES = 1000
BATCH = 64
# In a round: what takes microseconds is done often.
CYCLES, PUTS = 20, 10
# Between two leases an engine reads; the daemon has the time for what was given back before.
PAUSE_S = 0.01
LOOKUP_BAR_US, LEASE_BAR_US = 5.0, 20.0
BLOCK_BYTES = 4 * KIB
CAPACITY_BYTES = 2 << 30
CONFIG = """\
[[tier]]
name = "nvme"
medium = "nvme"
path = "{path}"
capacity = {capacity_bytes}
"""


@dataclass(frozen=True, slots=True)
class ClientRow:
    """One thing through the client and, where it can be done, through the mount; microseconds for
    each name or block, medians."""

    what: str
    client_us: float
    mount_us: float | None = None
    bar_us: float | None = None

    @property
    def verdict(self) -> str:
        if self.bar_us is None:
            return ""
        return "ok" if self.client_us <= self.bar_us else "NOT MET"

    def document(self) -> dict[str, Any]:
        return asdict(self)


class Rounds:
    """The laps of all rounds, by what was done and through what."""

    def __init__(self, client: Client, mountpoint: Path) -> None:
        self.client = client
        self.mountpoint = mountpoint
        self.flat = [f"flat/{number:06d}.bin" for number in range(NAMES)]
        self.apart = [f"apart/{number:03x}/{number:06d}.bin" for number in range(NAMES)]
        self._laps: dict[tuple[str, bool], list[float]] = {}

    def prepare(self) -> None:
        for path in (*self.flat, *self.apart):
            self.client.put(path, os.urandom(BLOCK_BYTES))

    def run(self) -> None:
        """One round."""
        self._lookups("lookup of 1,000 names, one directory", self.flat)
        self._lookups("lookup of 1,000 names, a directory each", self.apart)
        self._accesses()
        self._leases()
        for size in (64 * KIB, 2 * MIB):
            self._puts(size)

    def _note(self, what: str, seconds: float, count: int, *, mount: bool = False) -> None:
        self._laps.setdefault((what, mount), []).append(1e6 * seconds / count)

    def _lookups(self, what: str, paths: Sequence[str]) -> None:
        for _ in range(CYCLES):
            start_s = time.perf_counter()
            found = len(self.client.lookup(paths))
            self._note(what, time.perf_counter() - start_s, len(paths))
            if found != len(paths):
                raise KvfsError(f"{found} of {len(paths)} blocks were found")

    def _accesses(self) -> None:
        """A name that nobody has asked for: the kernel answers for the others."""
        for directory, what in (
            ("flat", "lookup of 1,000 names, one directory"),
            ("apart/000", "lookup of 1,000 names, a directory each"),
        ):
            below = self.mountpoint / directory
            paths = tuple(f"{below}/{uuid.uuid4().hex}.bin" for _ in range(NAMES))
            self._note(what, _seconds(Share("access_unknown", paths)), NAMES, mount=True)

    def first_leases(self) -> None:
        """Of blocks that nobody had open before: once."""
        what = f"lease of {BATCH} blocks, their first"
        for start in range(BATCH, NAMES - BATCH, BATCH):
            stay_awake(PAUSE_S)
            start_s = time.perf_counter()
            with self.client.lease(self.flat[start : start + BATCH]) as leased:
                self._note(what, time.perf_counter() - start_s, BATCH)
                if len(leased) != BATCH:
                    raise KvfsError(f"{len(leased)} of {BATCH} blocks were leased")

    def _leases(self) -> None:
        some, one = self.flat[:BATCH], self.flat[:1]
        for _ in range(CYCLES):
            stay_awake(PAUSE_S)
            start_s = time.perf_counter()
            with self.client.lease(some) as leased:
                leased_s = time.perf_counter()
                if len(leased) != BATCH:
                    raise KvfsError(f"{len(leased)} of {BATCH} blocks were leased")
            end_s = time.perf_counter()
            self._note(f"lease of {BATCH} blocks", leased_s - start_s, BATCH)
            self._note("to give it back", end_s - leased_s, BATCH)
        both = {f"lease of {BATCH} and back, without a pause": some, "lease of 1 and back": one}
        for what, blocks in both.items():
            self._cycles(what, blocks)
        paths = tuple(f"{self.mountpoint}/{path}" for path in some)
        for _ in range(CYCLES):
            spent_s = _seconds(Share("open_close", paths))
            for what in both:
                self._note(what, spent_s, BATCH, mount=True)

    def _cycles(self, what: str, paths: Sequence[str]) -> None:
        for _ in range(CYCLES):
            start_s = time.perf_counter()
            with self.client.lease(paths):
                pass
            self._note(what, time.perf_counter() - start_s, len(paths))

    def _puts(self, size: int) -> None:
        what, data = f"put of {size // KIB} KiB", os.urandom(size)
        for _ in range(PUTS):
            start_s = time.perf_counter()
            self.client.put(f"put/{uuid.uuid4().hex}.bin", data)
            self._note(what, time.perf_counter() - start_s, 1)
            path = f"{self.mountpoint}/put/{uuid.uuid4().hex}.bin"
            self._note(what, _seconds(Share("put", (path,), size)), 1, mount=True)

    def rows(self) -> Iterator[ClientRow]:
        for what in dict.fromkeys(what for what, mount in self._laps if not mount):
            mount = self._laps.get((what, True))
            yield ClientRow(
                what, median(self._laps[what, False]), median(mount) if mount else None,
                _bar_us(what),
            )  # fmt: skip


def _seconds(share: Share) -> float:
    """Of a loop over all its paths."""
    loop: Callable[[Share], object] = LOOPS[share.loop]
    start_s = time.perf_counter()
    loop(share)
    return time.perf_counter() - start_s


def _bar_us(what: str) -> float | None:
    if what.startswith("lookup"):
        return LOOKUP_BAR_US
    return LEASE_BAR_US if what == f"lease of {BATCH} blocks" else None


def measure_client(scratch: Path | None, rounds: int) -> list[ClientRow]:
    """Medians over all rounds."""
    with scratch_directory(scratch) as root, ExitStack() as stack:
        tier, mountpoint, config = root / "tier", root / "mnt", root / "kvfs.toml"
        tier.mkdir()
        config.write_text(CONFIG.format(path=tier, capacity_bytes=CAPACITY_BYTES))
        mounted = stack.enter_context(kvfs_mount(mountpoint, config))
        client = stack.enter_context(Client(mountpoint))
        measured = Rounds(client, mountpoint)
        measured.prepare()
        measured.first_leases()
        target = Target("kvfs", mountpoint, tier, mounted.pid)
        for turn in range(1, rounds + 1):
            measured.run()
            # Sealing the puts of one round is not measured with the next one.
            target.settle(2 * NAMES + turn * 4 * PUTS)
            os.sync()
        return list(measured.rows())


def client_table(rows: Sequence[ClientRow]) -> Table:
    view = table("Client, per name or block", ">client", ">mount", ">bar", "")
    for row in rows:
        mount = "" if row.mount_us is None else f"{row.mount_us:,.1f} µs"
        bar = "" if row.bar_us is None else f"<= {row.bar_us:g} µs"
        view.add_row(row.what, f"{row.client_us:,.1f} µs", mount, bar, row.verdict)
    return view
