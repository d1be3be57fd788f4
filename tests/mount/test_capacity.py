"""An engine's load at full speed on tiers that are too small, watched from outside.

Whatever is written, moved and evicted at once: no tier may ever hold more than its capacity and
what is under way, every byte read is compared, and at the end the accounts equal a walk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvfs.tools.replay import BlockDirectory, Replay, ReplaySettings, Tally
from kvfs.tools.trace import Request, chat_workload, read_trace
from tests.mount.live import KIB, MIB, call, config_in, live
from tests.mounting import MountedKvfs, check_accounts, wait_until

BLOCK_BYTES = 256 * KIB
PAGE_BYTES = 4 * KIB
CAPACITIES_MIB = {"nvme": 16, "hdd": 24, "remote": 32}
WORKERS = 4
MOVERS = 2
SAMPLE_MS = 50
# More than all tiers hold, so that blocks must go, and not for long.
SETTINGS = ReplaySettings(workers=WORKERS, max_written_bytes=160 * MIB, max_seconds=20.0)
# A block, and the page that its seal record may take.
STORED_BYTES = BLOCK_BYTES + PAGE_BYTES
# What writers (a block each; before the first one is known the lesser of 32 MiB and 1 % of the
# tier) and movers (a copy each) have reserved is within the capacity for the daemon. To the watcher
# a file that is renamed while it looks may have two names. `tier.json` is no block.
UNDER_WAY_BYTES = (WORKERS + MOVERS) * STORED_BYTES + PAGE_BYTES

trace_file = os.environ.get("KVFS_TRACE")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[MountedKvfs]:
    """Small tiers that move and evict all the time; the catalog lies beside them, unwatched."""
    config = config_in(tmp_path, CAPACITIES_MIB, interval_s=0.1, half_life_s=10.0, promote_heat=1.5)
    mounted = MountedKvfs(tmp_path, config)
    with mounted.config_file.open("a") as file:
        file.write(f'catalog = "{tmp_path / "catalog.sqlite"}"\n')
    with live(mounted):
        yield mounted


@contextmanager
def watched(mount: MountedKvfs, result: dict[str, Any]) -> Iterator[None]:
    """Another process samples the tiers meanwhile; what it saw is in `result` at the end."""
    out = mount.config_file.with_name("watch.json")
    command = [sys.executable, "-m", "kvfs.tools.watch_capacity", *map(str, mount.tiers.values())]
    options = ["--json", str(out), "--interval-ms", str(SAMPLE_MS)]
    with subprocess.Popen([*command, *options]) as watcher:
        try:
            wait_until(out.exists, "the watcher watches")
            yield
        finally:
            watcher.terminate()
    assert watcher.returncode == 0
    result.update(json.loads(out.read_text()))


def play(mount: MountedKvfs, requests: Iterable[Request]) -> tuple[Tally, dict[str, Any]]:
    """The load and what the watcher saw."""
    seen: dict[str, Any] = {}
    replay = Replay(BlockDirectory(mount.path, BLOCK_BYTES), requests, SETTINGS)
    with watched(mount, seen):
        tally = replay.run()
    assert replay.first_failure is None
    return tally, seen


def check(mount: MountedKvfs, tally: Tally, seen: dict[str, Any]) -> None:
    assert tally.failures == 0
    assert tally.bytes_read == tally.bytes_compared > 0
    assert tally.bytes_written > sum(CAPACITIES_MIB.values()) * MIB
    assert seen["samples"] > 10
    for tier, (name, capacity_mib) in zip(seen["tiers"], CAPACITIES_MIB.items(), strict=True):
        most_bytes, capacity_bytes = tier["max_allocated_bytes"], capacity_mib * MIB
        assert most_bytes <= capacity_bytes + UNDER_WAY_BYTES, name
        assert most_bytes > capacity_bytes // 2, f"{name} was hardly used"
    status = call(mount, "status")
    assert sum(tier["demotions"] for tier in status["tiers"]) > 0
    assert sum(tier["evictions"] for tier in status["tiers"]) > 0
    check_accounts(mount)


def test_tiers_stay_within_their_capacity(mount: MountedKvfs) -> None:
    check(mount, *play(mount, chat_workload(7, 400, turns=4, user_tokens=1500)))


@pytest.mark.skipif(trace_file is None, reason="KVFS_TRACE names no trace: not replayed")
def test_tiers_stay_within_their_capacity_under_a_real_trace(mount: MountedKvfs) -> None:
    assert trace_file is not None
    check(mount, *play(mount, read_trace(Path(trace_file))))
