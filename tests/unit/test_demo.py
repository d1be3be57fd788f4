"""The demo's own parts: its configuration, and that nothing stays however it ends."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvfs.config import check_config, load_config
from kvfs.errors import MountpointError, TierError
from kvfs.tools import demo
from kvfs.tools.demo import Scratch, mounted, play, scratch_directory
from kvfs.tools.replay import ReplaySettings
from kvfs.tools.trace import chat_workload


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """`mounted` ignores signals at its end, which is the end of the demo but not of the tests."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Stands in for the kvfs command: a plain directory with a statistics document."""
    made: list[tuple[str, ...]] = []

    def run_kvfs(*arguments: str) -> None:
        made.append(arguments)
        mountpoint = Path(arguments[1])
        if arguments[0] == "mount":
            write_stats(mountpoint)
        mounts = [mountpoint] if arguments[0] == "mount" else []
        monkeypatch.setattr(demo, "kvfs_mountpoints", lambda: mounts)

    monkeypatch.setattr(demo, "run_kvfs", run_kvfs)
    return made


def write_stats(mountpoint: Path) -> None:
    (mountpoint / ".kvfs").mkdir()
    numbers = (
        "used_bytes reserved_bytes held_bytes blocks opens promotions demotions evictions "
        "bytes_read bytes_written moved_in_bytes moved_out_bytes"
    )
    zeros = dict.fromkeys(numbers.split(), 0)
    tiers: list[dict[str, Any]] = [
        {"name": name, "medium": name, "capacity_bytes": capacity, **zeros}
        for name, capacity in demo.TIER_BYTES.items()
    ]
    document = {"tiers": tiers, "moves": {"running": [], "queued": 0}}
    (mountpoint / ".kvfs" / "stats").write_text(json.dumps(document))


def test_the_configuration_is_one_that_kvfs_accepts(tmp_path: Path) -> None:
    with scratch_directory(tmp_path, keep=False) as scratch:
        config = load_config(scratch.config)
        check_config(config, scratch.mountpoint)
        capacities = {tier.medium: tier.capacity_bytes for tier in config.tier}
        assert capacities == demo.TIER_BYTES
        assert all(tier.path.is_dir() for tier in config.tier)
    assert not list(tmp_path.iterdir())


def test_what_a_run_writes_does_not_fit_into_the_tiers() -> None:
    capacity_bytes = sum(demo.TIER_BYTES.values())
    assert 2 * capacity_bytes < demo.WRITTEN_MAX_BYTES
    assert demo.SCRATCH_BYTES <= 2_000_000_000
    blocks = {hash_id for request in demo.generated_chat() for hash_id in request.hash_ids}
    assert len(blocks) * demo.BLOCK_BYTES > 2 * capacity_bytes


@pytest.mark.parametrize("ending", [KeyboardInterrupt, RuntimeError])
def test_unmounts_and_removes_however_it_ends(
    tmp_path: Path, calls: list[tuple[str, ...]], ending: type[BaseException]
) -> None:
    with (
        pytest.raises(ending),
        scratch_directory(tmp_path, keep=False) as scratch,
        mounted(scratch),
    ):
        raise ending
    assert [call[0] for call in calls] == ["mount", "umount"]
    assert not list(tmp_path.iterdir())


def test_a_failed_mount_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: str) -> None:
        raise MountpointError("refused")

    monkeypatch.setattr(demo, "run_kvfs", refuse)
    with (
        pytest.raises(MountpointError),
        scratch_directory(tmp_path, keep=False) as scratch,
        mounted(scratch),
    ):
        pytest.fail("it must not go on without a mount")
    assert not list(tmp_path.iterdir())


def test_keep_leaves_the_scratch_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with scratch_directory(tmp_path, keep=True) as scratch:
        pass
    assert scratch.config.is_file()
    assert str(scratch.root) in capsys.readouterr().err


def test_a_full_disk_is_refused_before_anything_is_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "SCRATCH_BYTES", 1 << 62)
    with pytest.raises(TierError, match="--scratch"), scratch_directory(tmp_path, keep=False):
        pytest.fail("it must not go on without space")
    assert not list(tmp_path.iterdir())


def test_the_kvfs_command_is_the_one_beside_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(MountpointError, match="make setup"):
        demo.run_kvfs("status")
    command = tmp_path / "kvfs"
    command.write_text("#!/bin/sh\nexit 5\n")
    os.chmod(command, 0o755)
    with pytest.raises(MountpointError, match="exit code 5"):
        demo.run_kvfs("status")


def test_play_reports_what_was_compared(
    tmp_path: Path, calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "SETTLE_STEP_S", 0.01)
    with scratch_directory(tmp_path, keep=False) as scratch, mounted(scratch):
        report = play(scratch, chat_workload(1, 5), ReplaySettings(workers=2), "chat")
    assert (report.kind, report.passed, report.failures) == ("kvfs", True, 0)
    assert report.bytes_compared == report.bytes_read > 0
    assert [tier.name for tier in report.tiers] == list(demo.TIER_BYTES)
    assert calls[-1] == ("umount", str(Scratch(scratch.root).mountpoint))
