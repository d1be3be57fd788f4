"""A thousand moves of the same blocks while other processes open, read and compare them."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from kvfs.control import ControlClient, find_mount
from tests.mount.live import TIERS, call
from tests.mount.readers import content_of
from tests.mounting import MountedKvfs, check_accounts, run_kvfs
from tests.soak import Did, longer

BLOCKS = 48
READERS = 3
MOVES = longer(1000)
# Blocks that are open are not moved; this many orders would move ten times what is asked for.
MOST_ORDERS = MOVES


def start_reader(directory: Path, seed: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.mount.readers", str(directory), str(seed)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def move(mount: MountedKvfs, directory: bytes, readers: list[subprocess.Popen[str]]) -> int:
    """Promote and demote everything until enough has moved or a reader gave up; how many moved."""
    dice = random.Random(1)
    moved = 0
    with ControlClient(find_mount(mount.path).socket_path) as client:
        for _ in range(MOST_ORDERS):
            for verb, to in (("demote", dice.choice(TIERS[1:])), ("promote", "nvme")):
                order = {"paths": [directory], "to": to}
                moved += client.call(verb, order, timeout_s=60)["moved"]
            if moved >= MOVES or any(reader.poll() is not None for reader in readers):
                break
    return moved


@pytest.mark.soak
@pytest.mark.semantics("S-moves-1")
def test_no_open_fails_and_no_byte_is_wrong_while_blocks_move(
    shared: MountedKvfs, there: Path, record_property: Did
) -> None:
    for number in range(BLOCKS):
        name = f"block-{number}"
        (there / f"{name}.tmp").write_bytes(content_of(name))
        (there / f"{name}.tmp").rename(there / name)
    shared.wait_sealed()
    readers = [start_reader(there, seed) for seed in range(READERS)]
    moved = move(shared, there.name.encode(), readers)
    results = [(*reader.communicate(), reader.returncode) for reader in readers]
    assert [(errors, status) for _, errors, status in results] == [("", 0)] * READERS
    assert all(int(count) > BLOCKS for count, _, _ in results)
    assert moved >= MOVES
    record_property("moves", moved)
    record_property("reads", sum(int(count) for count, _, _ in results))
    counters = call(shared, "status")["counters"]
    mode = "passthrough" if call(shared, "status")["data_path"]["passthrough"] else "served"
    assert counters[f"opens_{mode}"] > 0
    for path in there.iterdir():
        assert path.read_bytes() == content_of(path.name)
    check_accounts(shared)
    assert run_kvfs("fsck", shared.path).returncode == 0
