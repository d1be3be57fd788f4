"""The same failpoints in a daemon with a real mount, armed by its environment, under a load.

What a crash leaves on the tiers is tested without a mount, point by point (test_failpoints.py).
Here is what only a mount has: clients that are cut off, a dead mount, and the daemon's services.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs.failpoints import VARIABLE
from tests.crash.load import Load
from tests.crash.mounted import SEED, check_integrity, in_background, move_at_random, recover
from tests.crash.points import all_points
from tests.mount.live import config_in, live
from tests.mounting import MountedKvfs, has_ended, wait_until
from tests.soak import SOAKING

# Those that a load of publishing, removing, reading and moving passes; the rest in a soak.
USUAL = ("create.committed", "rename.committed", "seal.recorded", "move.placed", "remove.changed")
MORE = (
    "file.made", "create.changed", "close.changed", "close.committed", "rename.changed",
    "intent.renamed", "seal.hashed", "seal.changed", "seal.committed", "remove.inline_removed",
    "remove.committed", "move.reserved", "move.copied", "move.recorded", "move.synced",
    "move.verified", "move.directory_synced", "move.changed", "move.committed", "drop.removed",
    "forget_replicas.changed", "forget_replicas.committed", "intent.removed", "intent.applied",
    "intents_done.changed", "intents_done.committed", "mkdir.changed", "mkdir.committed",
    "mkdir.made", "flush_times.changed", "flush_times.committed", "flush_heat.changed",
    "flush_heat.committed",
)  # fmt: skip
PASSED_AT_MOST_S = 60.0


@pytest.fixture
def mount(tmp_path: Path, expect_log: list[str]) -> Iterator[MountedKvfs]:
    expect_log += ["failpoints are armed", "tier nvme lost 'load/"]
    with live(MountedKvfs(tmp_path, config_in(tmp_path)), expect_log) as mounted:
        yield mounted


def test_the_names_are_known() -> None:
    assert {*USUAL, *MORE} - set(all_points()) == set()


@pytest.mark.soak
@pytest.mark.parametrize("point", USUAL + MORE * SOAKING)
def test_a_daemon_killed_there(
    point: str, mount: MountedKvfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(f"{SEED}/{point}")
    root = mount.path / "load"
    root.mkdir()
    mount.stop()
    monkeypatch.setenv(VARIABLE, f"{point}:{rng.randrange(1, 4)}")
    mount.start()
    monkeypatch.delenv(VARIABLE)
    pid = int(mount.status()["pid"])
    load = Load(root, seed=rng.randrange(1 << 30))
    load.start(0)
    mover = in_background(lambda: move_at_random(mount, rng))
    wait_until(lambda: has_ended(pid), f"{point} is passed", PASSED_AT_MOST_S)
    load.join()
    mover.join(60)
    recover(mount)
    load.verify()
    check_integrity(mount)
