"""What tests share that kill the daemon of a real mount: the kill, the recovery, what must hold."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvfs.control import ControlClient, find_mount
from kvfs.errors import KvfsError
from kvfs.tools.watch_capacity import allocated_bytes
from tests.mount.live import call, publish
from tests.mounting import MountedKvfs, check_accounts, has_ended, run_kvfs, wait_until

SEED = os.environ.get("KVFS_CRASH_SEED", "1")


def pid_of(mount: MountedKvfs) -> int:
    return int(call(mount, "status")["pid"])


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: has_ended(pid), "the daemon is gone")


def recover(mount: MountedKvfs) -> None:
    """Mount over the dead mount and wait until the walk has ended."""
    mount.start()
    wait_until(lambda: call(mount, "status")["state"] == "ok", "recovered")


def in_background(work: Callable[[], Any]) -> threading.Thread:
    """Run what ends with an error when the daemon is killed."""

    def run() -> None:
        try:
            work()
        except (KvfsError, OSError):
            pass  # the daemon was killed

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def wait_sealed(mount: MountedKvfs) -> None:
    wait_until(lambda: call(mount, "status")["unsealed"] == 0, "everything sealed")


def bytes_on(tier: Path) -> int:
    """What the blocks of a tier allocate, by a walk."""
    return allocated_bytes(str(tier)) - allocated_bytes(str(tier / ".kvfs"))


def check_integrity(mount: MountedKvfs) -> None:
    """Accounts, staging and fsck, once everything is sealed."""
    wait_sealed(mount)
    check_accounts(mount)
    for tier in mount.tiers.values():
        assert os.listdir(tier / ".kvfs/staging") == []
    run_kvfs("fsck", mount.path)


def blocks_in(directory: Path, count: int, size: int = 60_000) -> dict[Path, bytes]:
    """Publish blocks; what they hold by their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{SEED}/{directory.name}")
    blocks = {directory / f"{number}.bin": rng.randbytes(size + number) for number in range(count)}
    for path, data in blocks.items():
        publish(path, data)
    return blocks


def spread_blocks(mount: MountedKvfs) -> dict[Path, bytes]:
    """Sealed blocks on the first tier, the second, both, and the third."""
    blocks: dict[Path, bytes] = {}
    for name in ("first", "second", "both", "third"):
        blocks |= blocks_in(mount.path / "ns" / name, 8)
    order(mount, "demote", "ns/second", "hdd")
    order(mount, "demote", "ns/both", "hdd")
    order(mount, "promote", "ns/both", "nvme")
    order(mount, "demote", "ns/third", "remote")
    wait_sealed(mount)
    return blocks


def order(mount: MountedKvfs, verb: str, path: str, to: str) -> None:
    assert call(mount, verb, paths=[path.encode()], to=to)["skipped"] == []


def check_blocks(blocks: dict[Path, bytes]) -> None:
    for path, data in blocks.items():
        assert path.read_bytes() == data, path


def move_at_random(mount: MountedKvfs, rng: random.Random) -> None:
    """Promote and demote parts of the load until the daemon is gone."""
    with ControlClient(find_mount(mount.path).socket_path) as client:
        while True:
            verb, to = rng.choice([("demote", "hdd"), ("demote", "remote"), ("promote", "nvme")])
            path = f"load/w{rng.randrange(3)}/{rng.randrange(4)}".encode()
            try:
                client.call(verb, {"paths": [path], "to": to}, timeout_s=60)
            except KvfsError as error:
                if error.exit_code != 8:  # nothing has that name yet
                    raise
