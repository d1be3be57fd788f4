"""The outside witness of tier capacities."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvfs.tools.watch_capacity import allocated_bytes, watch

DEADLINE_S = 30.0


def test_counts_what_regular_files_occupy(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    block = tmp_path / "a" / "b" / "block"
    block.write_bytes(os.urandom(100_000))
    os.sync()
    (tmp_path / "link").symlink_to(block)
    (tmp_path / "directory-link").symlink_to(tmp_path / "a")
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    assert allocated_bytes(str(tmp_path)) == block.stat().st_blocks * 512 >= 100_000


def test_files_and_directories_may_vanish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    (tmp_path / "block").write_bytes(b"x")
    scandir = os.scandir

    def vanishing(path: str) -> object:
        if path == str(tmp_path / "gone"):
            os.rmdir(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert allocated_bytes(str(tmp_path)) == (tmp_path / "block").stat().st_blocks * 512
    assert allocated_bytes(str(tmp_path / "never")) == 0


def test_keeps_the_largest_sample(tmp_path: Path) -> None:
    only_last = watch([str(tmp_path)], 0.01, lambda _: True)
    assert (only_last.samples, only_last.tiers[0].max_allocated_bytes) == (1, 0)


def test_the_command_writes_its_result_on_sigterm(tmp_path: Path) -> None:
    tier = tmp_path / "tier"
    tier.mkdir()
    out = tmp_path / "out.json"
    block = tier / "block"
    block.write_bytes(os.urandom(1 << 20))
    block_bytes = block.stat().st_blocks * 512
    command = [sys.executable, "-m", "kvfs.tools.watch_capacity", str(tier)]
    options = ["--interval-ms", "5", "--json", str(out)]
    with subprocess.Popen([*command, *options]) as process:
        # Before that a signal would just end it.
        deadline_s = time.monotonic() + DEADLINE_S
        while not out.exists():
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        process.terminate()
        assert process.wait(DEADLINE_S) == 0
    result = json.loads(out.read_text())
    assert result["samples"] >= 1
    assert result["tiers"][0]["path"] == str(tier)
    assert result["tiers"][0]["max_allocated_bytes"] == block_bytes
