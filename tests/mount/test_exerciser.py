"""The random file exerciser on a mount, while its blocks are moved by heat and by order."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs.control import ControlClient, find_mount
from tests.mount.live import TIERS, call, config_in, live, scratch
from tests.mounting import MountedKvfs, check_accounts, run_kvfs
from tests.soak import SOAKING, Did, longer

OPERATIONS = longer(5000)
# A soak tries others each time; what fails says its seed.
FIRST_SEED = int(time.time()) if SOAKING else 1
SEEDS = (FIRST_SEED, FIRST_SEED + 1)
EXERCISER = (sys.executable, "-m", "kvfs.tools.exerciser")


@pytest.fixture(params=["auto", "off"], ids=["passthrough", "served"])
def mount(request: pytest.FixtureRequest) -> Iterator[MountedKvfs]:
    """Tiers with room, of which the faster ones are nearly always above their watermark."""
    with scratch() as base:
        config = config_in(
            base, {"nvme": 256, "hdd": 512, "remote": 512}, passthrough=request.param,
            interval_s=0.1, half_life_s=5.0, low_watermark=0.002, high_watermark=0.004,
            promote_heat=1.0, on_full="refuse",
        )  # fmt: skip
        with live(MountedKvfs(base, config)) as mounted:
            yield mounted


def move_about(mount: MountedKvfs, running: list[subprocess.Popen[str]]) -> None:
    """Order moves of everything below a directory to any tier until all processes have ended."""
    dice = random.Random(0)
    with ControlClient(find_mount(mount.path).socket_path) as client:
        while any(process.poll() is None for process in running):
            verb, tiers = dice.choice((("promote", TIERS[:-1]), ("demote", TIERS[1:])))
            path = str(dice.choice(SEEDS)).encode()
            client.call(verb, {"paths": [path], "to": dice.choice(tiers)}, timeout_s=60)


def outcome(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate()
    return process.returncode, errors


@pytest.mark.soak
def test_whatever_is_done_to_files_has_its_effect_and_no_other(
    mount: MountedKvfs, tmp_path: Path, record_property: Did
) -> None:
    manifests = {seed: tmp_path / f"manifest-{seed}" for seed in SEEDS}
    running = []
    for seed, manifest in manifests.items():
        directory = mount.path / str(seed)
        directory.mkdir()
        options = ["--operations", OPERATIONS, "--seed", seed, "--manifest", manifest]
        command = [*EXERCISER, directory, *options]
        running.append(subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True))
    move_about(mount, running)
    assert [outcome(process) for process in running] == [(0, "")] * len(running)
    tiers = call(mount, "status")["tiers"]
    moves = {kind: sum(tier[kind] for tier in tiers) for kind in ("promotions", "demotions")}
    # A fast machine has done all operations before many blocks are moved.
    assert min(moves.values()) >= 1, moves
    assert sum(moves.values()) >= 20, moves
    record_property("operations", OPERATIONS * len(SEEDS))
    record_property("moves", sum(moves.values()))
    check_accounts(mount)
    mount.remount()
    for seed, manifest in manifests.items():
        command = [*EXERCISER, mount.path / str(seed), "--verify", "--manifest", manifest]
        subprocess.run([*map(str, command)], check=True)
    assert run_kvfs("fsck", mount.path).returncode == 0
