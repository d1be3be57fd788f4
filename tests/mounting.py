"""A real mount, made and ended by the installed `kvfs` command."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvfs.catalog.catalog import Catalog
from kvfs.config import Config
from kvfs.mount.session import is_dead
from kvfs.tools.watch_capacity import allocated_bytes
from kvfs.units import format_duration

KVFS = Path(sys.executable).with_name("kvfs")
COMMAND_TIMEOUT_S = 60


def run_kvfs(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the installed command."""
    done = subprocess.run(
        [KVFS, *map(str, arguments)], capture_output=True, text=True,
        timeout=COMMAND_TIMEOUT_S, check=False,
    )  # fmt: skip
    if check and done.returncode != 0:
        raise AssertionError(f"kvfs {arguments}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 30.0) -> Any:
    """Poll until true; the value. A test that waits says for what."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout_s:g} s: {what}")


def toml_of(config: Config) -> str:
    """A configuration file with what tests change."""
    lines = []
    for tier in config.tier:
        lines += [
            "[[tier]]",
            f'name = "{tier.name}"',
            f'path = "{tier.path}"',
            f'medium = "{tier.medium}"',
            f"capacity = {tier.capacity_bytes}",
            f'deadline = "{tier.deadline_s:g}s"',
        ]
        if tier.durability is not None:
            lines.append(f'durability = "{tier.durability}"')
        if tier.compress != "none":
            lines.append(f'compress = "{tier.compress}"')
    tiering = config.tiering
    lines += [
        "[tiering]",
        f'interval = "{tiering.interval_s:g}s"',
        f'half_life = "{tiering.half_life_s:g}s"',
        f"high_watermark = {tiering.high_watermark}",
        f"low_watermark = {tiering.low_watermark}",
        f"promote_heat = {float(tiering.promote_heat)}",
        f"promote_bandwidth = {tiering.promote_bandwidth}",
        f'on_full = "{tiering.on_full}"',
        f'tmp_ttl = "{format_duration(tiering.tmp_ttl_s)}"',
        f"quiet_uids = {list(tiering.quiet_uids)}",
        f'verify = "{tiering.verify}"',
        f"scrub_rate = {tiering.scrub_rate}",
        f'unfinished = "{tiering.unfinished}"',
        "[mount]",
        f'passthrough = "{config.mount.passthrough}"',
    ]
    if config.mount.catalog is not None:
        lines.append(f'catalog = "{config.mount.catalog}"')
    return "\n".join(lines) + "\n"


class MountedKvfs:
    """One mountpoint with its configuration file and log."""

    def __init__(self, base: Path, config: Config) -> None:
        self.config = config
        self.path = base / "mnt"
        self.path.mkdir(exist_ok=True)
        self.config_file = base / "kvfs.toml"
        self.config_file.write_text(toml_of(config))
        self.log_file = base / "kvfs.log"
        self.tiers = {tier.name: tier.path for tier in config.tier}

    def start(self, *options: object) -> None:
        """Mount; returns when the mount answers."""
        run_kvfs(
            "mount", self.path, "--config", self.config_file, "--log-file", self.log_file, *options
        )

    def stop(self) -> None:
        """Unmount, in any state the test left it."""
        if self.is_mounted():
            run_kvfs("umount", self.path)

    def remount(self) -> None:
        self.stop()
        self.start()

    def is_mounted(self) -> bool:
        """Without touching the mount, which may be dead."""
        text = Path("/proc/self/mountinfo").read_text()
        return any(line.split()[4] == str(self.path) for line in text.splitlines())

    def status(self) -> dict[str, Any]:
        """`kvfs status --json`."""
        return dict(json.loads(run_kvfs("status", self.path, "--json").stdout))

    def info(self, name: str) -> dict[str, Any]:
        """`kvfs info --json` of a path below the mount."""
        return dict(json.loads(run_kvfs("info", self.path / name, "--json").stdout))

    def tier(self, name: str) -> dict[str, Any]:
        """One tier's part of the status."""
        return next(dict(tier) for tier in self.status()["tiers"] if tier["name"] == name)

    def wait_sealed(self) -> None:
        """Until nothing is left to seal."""
        wait_until(lambda: self.status()["unsealed"] == 0, "everything sealed")

    def kill(self) -> None:
        """SIGKILL the daemon and wait until its mount is dead."""
        pid = int(self.status()["pid"])
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: has_ended(pid), "daemon gone")
        # Its threads close the connection one by one; until then requests are still taken.
        wait_until(lambda: is_dead(self.path), "mount dead")

    def check_log(self, expected: list[str]) -> None:
        """Fail on a warning, error or traceback in the daemon's log that was not expected."""
        lines = self.log_file.read_text().splitlines() if self.log_file.exists() else []
        bad = [line for line in lines if re.search(r" (WARNING|ERROR|CRITICAL) |Traceback", line)]
        # On an old kernel or without root; test_passthrough.py says where that is a failure.
        expected = [*expected, "reads go through the daemon"]
        bad = [line for line in bad if not any(re.search(pattern, line) for pattern in expected)]
        assert not bad, "\n".join(bad)


def has_ended(pid: int) -> bool:
    """Whether a process is gone; one that nobody waits for stays as a zombie."""
    return not Path(f"/proc/{pid}").exists() or _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def check_accounts(mount: MountedKvfs) -> None:
    """Fail unless the daemon's accounts come to equal what a walk of the tiers finds.

    For a mount that nobody uses; moves under way are waited for. What kvfs keeps is no block.
    """

    def counted() -> dict[str, tuple[int, int, int]]:
        tiers = json.loads((mount.path / ".kvfs/stats").read_bytes())["tiers"]
        return {t["name"]: (t["used_bytes"], t["reserved_bytes"], t["held_bytes"]) for t in tiers}

    def walked() -> dict[str, tuple[int, int, int]]:
        return {
            name: (allocated_bytes(str(path)) - allocated_bytes(str(path / ".kvfs")), 0, 0)
            for name, path in mount.tiers.items()
        }

    try:
        wait_until(lambda: counted() == walked(), "accounts that equal a walk", timeout_s=15)
    except AssertionError as error:
        said = f"counted {counted()}, walked {walked()}"
        raise AssertionError("\n".join([said, *uncounted_files(mount)])) from error


def uncounted_files(mount: MountedKvfs) -> Iterator[str]:
    """Each file of a tier that the catalog has otherwise, or not at all."""
    place = next(iter(mount.tiers.values())) / ".kvfs"
    with tempfile.TemporaryDirectory() as copy:
        for file in place.glob("catalog.sqlite*"):
            shutil.copy(file, copy)
        catalog = Catalog(Path(copy) / "catalog.sqlite")
        for number, (name, root) in enumerate(mount.tiers.items(), 1):
            for file in root.rglob("*"):
                path = bytes(file.relative_to(root))
                if not file.is_file() or path.startswith(b".kvfs/"):
                    continue
                inode, found = catalog.replica_at(number, path), file.stat().st_blocks * 512
                replicas = catalog.replicas(inode) if inode else []
                counted = sum(r.allocated_bytes for r in replicas if r.tier == number)
                if counted != found:
                    yield f"{name}: {path!r}, inode {inode}: {counted} counted, {found} found"
        catalog.close()
