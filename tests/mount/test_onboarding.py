"""Onboarding and offloading past a real mount: a daemon, its client, the host's memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvfs.client import Client
from kvfs.errors import BlockExists
from kvfs.gpu.host import HostDevice
from kvfs.gpu.layout import PagedLayout
from kvfs.gpu.offloader import Offloader
from kvfs.gpu.onboarder import Onboarder
from kvfs.gpu.verification import VERIFY_ALL
from tests.mount.live import publish, put_on, wait_sealed
from tests.mounting import MountedKvfs

ROOT = Path(__file__).parents[2]
BLOCK = 512 << 10


def test_the_example_runs_and_runs_again(shared: MountedKvfs) -> None:
    example = ROOT / "docs" / "examples" / "onboard.py"
    command = [sys.executable, str(example), str(shared.path)]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert "320 of 464 tokens are cached" in done.stdout
        assert "all 2,621,440 bytes are what was stored" in done.stdout


def test_what_engines_wrote_by_path_is_loaded_from_every_tier(
    shared: MountedKvfs, there: Path
) -> None:
    wanted = [os.urandom(BLOCK) for _ in range(6)]
    paths = [publish(there / f"{n}.bin", content) for n, content in enumerate(wanted)]
    for path, tier in zip(paths, ("nvme", "hdd", "remote") * 2, strict=True):
        put_on(shared, path, tier)
    memory = np.zeros((7, BLOCK), np.uint8)
    with Client(shared.path) as client, HostDevice() as device:
        loader = Onboarder(client, device, VERIFY_ALL)
        done = loader.read([*paths, there / "missing.bin"], memory)
    done.check()
    assert (done.loaded, done.stopped) == (6, "missing")
    assert memory[:6].tobytes() == b"".join(wanted)


def test_pages_are_stored_as_files_that_the_mount_shows(shared: MountedKvfs, there: Path) -> None:
    keys = [np.random.default_rng(n).integers(0, 99, (8, 4096), np.int16) for n in range(3)]
    values = [np.random.default_rng(n + 9).integers(0, 99, (8, 4096), np.int16) for n in range(3)]
    layout = PagedLayout.kv_split(keys, values)
    paths = [there / f"{number}.bin" for number in range(4)]
    with Client(shared.path) as client, HostDevice() as device:
        offloader = Offloader(client, device)
        offloader.write(paths, layout.at([6, 1, 7, 0])).check()
        for path, page in zip(paths, [6, 1, 7, 0], strict=True):
            parts = (
                array[page].tobytes() for pair in zip(keys, values, strict=True) for array in pair
            )
            assert path.read_bytes() == b"".join(parts)
            wait_sealed(path)
        # The same again is nothing to do; another block under a name that is taken is refused.
        offloader.write(paths, layout.at([6, 1, 7, 0])).check()
        done = offloader.write([there / "new.bin", paths[1]], layout.at([2, 3]))
        assert done.stored == 1
        with pytest.raises(BlockExists):
            done.check()
