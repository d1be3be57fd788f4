"""The directories that the benchmark compares: a raw one, a kvfs mount, and peers where installed.

Owns what is mounted for a run: everything is unmounted at its end, however it ends. Peers mount the
raw directory itself. Called by `kvfs.tools.bench` and `kvfs.tools.bench_scale`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfs.control import kvfs_mountpoints
from kvfs.errors import KvfsError, MountpointError

POLL_S = 0.02
SETTLE_MAX_S = 60.0
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
BINDFS = ("bindfs", "-f", "{source}", "{mountpoint}")
MERGERFS = (
    "mergerfs", "-f", "-o", "cache.files=off,category.create=ff", "{source}", "{mountpoint}",
)  # fmt: skip
PEERS = {command[0]: command for command in (BINDFS, MERGERFS)}
# What the round trips through pyfuse3 cost by themselves.
FLOOR = "pyfuse3"
FLOOR_COMMAND = (sys.executable, "-m", "kvfs.tools.bench_floor", "{source}", "{mountpoint}")


@dataclass(frozen=True, slots=True)
class Target:
    """One directory under test; `backing` is where its bytes lie."""

    name: str
    directory: Path
    backing: Path
    pid: int | None = None

    @property
    def keeps_blocks(self) -> bool:
        """Whether it has blocks of its own; the others show those of the raw directory."""
        return self.directory == self.backing or self.name == "kvfs"

    def daemon_cpu_s(self) -> float:
        """CPU time of the process that serves it."""
        return 0.0 if self.pid is None else process_cpu_s(self.pid)

    def statistics(self) -> dict[str, Any]:
        """The document of a kvfs mount."""
        return dict(json.loads((self.directory / ".kvfs" / "stats").read_bytes()))

    def settle(self, sealed: int) -> None:
        """Wait until a kvfs mount has sealed this many blocks since it was mounted."""
        if self.name == "kvfs":
            wait_until(
                lambda: self.statistics()["counters"].get("seals", 0) >= sealed, "sealed blocks"
            )


def process_cpu_s(pid: int) -> float:
    """User and system time of a process and of the children it waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(ticks) for ticks in fields[11:15]) * TICK_S


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise KvfsError(f"process {pid} has ended")


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = SETTLE_MAX_S) -> None:
    """Poll until it holds. Raises KvfsError."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise KvfsError(f"the benchmark waited {timeout_s:g} s in vain for {what}")
        time.sleep(POLL_S)


@contextmanager
def scratch_directory(parent: Path | None) -> Iterator[Path]:
    """A fresh directory on a disk, removed at the end unless something is still mounted in it."""
    # /tmp may be memory, where a raw directory has no cold reads.
    where = parent or Path(os.environ.get("TMPDIR", "/var/tmp"))
    where.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="kvfs-bench-", dir=where)).resolve()
    try:
        yield root
    finally:
        if any(is_mounted(path) for path in root.iterdir()):
            sys.stderr.write(f"bench: something is still mounted below {root}\n")
        else:
            shutil.rmtree(root)


def run_kvfs(*arguments: object) -> str:
    """Run the installed command; its output. Raises MountpointError."""
    command = [str(Path(sys.executable).with_name("kvfs")), *map(str, arguments)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise MountpointError(f"{command[0]} is not installed: run `make setup`") from None
    if done.returncode:
        raise MountpointError(f"`kvfs {' '.join(command[1:])}` failed: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True, slots=True)
class Mounted:
    """A kvfs mount: its daemon, and how long `kvfs mount` took to return."""

    pid: int
    took_s: float


@contextmanager
def kvfs_mount(mountpoint: Path, config: Path) -> Iterator[Mounted]:
    """Mounted by the installed command."""
    mountpoint.mkdir(exist_ok=True)
    log_file = config.with_suffix(".log")
    try:
        start_s = time.monotonic()
        run_kvfs("mount", mountpoint, "--config", config, "--log-file", log_file)
        took_s = time.monotonic() - start_s
        yield Mounted(int(json.loads(run_kvfs("status", mountpoint, "--json"))["pid"]), took_s)
    finally:
        if mountpoint in kvfs_mountpoints():
            run_kvfs("umount", mountpoint)


@contextmanager
def peer_mount(command: Sequence[str], source: Path, mountpoint: Path) -> Iterator[int]:
    """A peer's process in the foreground, its mount ended with it."""
    mountpoint.mkdir(exist_ok=True)
    words = [word.format(source=source, mountpoint=mountpoint) for word in command]
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        wait_until(
            lambda: is_mounted(mountpoint) or process.poll() is not None, words[0], timeout_s=10
        )
        if process.poll() is not None:
            raise MountpointError(f"{words[0]} ended with exit code {process.returncode}")
        yield process.pid
    finally:
        if is_mounted(mountpoint):
            unmounter = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
            subprocess.run([*unmounter, str(mountpoint)], check=False)
        process.terminate()
        process.wait()


def is_mounted(path: Path) -> bool:
    """Whether something is mounted exactly there; asks the kernel's table, not the mount."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == str(path) for line in lines)
