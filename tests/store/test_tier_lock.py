"""The lock of a tier: one holder, and what a killed one leaves."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs.tiers import tier_lock
from kvfs.tiers.beneath import Root
from kvfs.tiers.tier_lock import has_ended, is_left_over, take


@pytest.fixture
def files(tmp_path: Path) -> Root:
    return Root(os.fsencode(tmp_path))


@pytest.fixture
def path(tmp_path: Path) -> bytes:
    return os.fsencode(tmp_path / "lock")


@pytest.fixture
def held(files: Root, path: bytes) -> Iterator[int]:
    """A lock that somebody has: this process."""
    descriptor = take(files, path)
    yield descriptor
    os.close(descriptor)


def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, held: int, *states: str) -> None:
    """The kernel's table says that processes in these states hold the lock."""
    proc, status = tmp_path / "proc", os.fstat(held)
    proc.mkdir()
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    lines = [
        "1: POSIX  ADVISORY  WRITE 1 00:01:1 0 EOF",
        "2: -> FLOCK  ADVISORY  WRITE 1 00:01:1 0 EOF",
    ]
    for number, state in enumerate(states, start=100):
        (proc / str(number)).mkdir()
        (proc / str(number) / "stat").write_text(f"{number} (a ) Z b) {state} 1 1")
        lines.append(f"{number}: FLOCK  ADVISORY  WRITE {number} {device} 0 EOF")
    (proc / "locks").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(tier_lock, "PROC", proc)


@pytest.mark.usefixtures("held")
def test_there_is_one_holder(files: Root, path: bytes) -> None:
    with pytest.raises(BlockingIOError):
        take(files, path)


def test_it_is_free_when_its_holder_closed_it(files: Root, path: bytes) -> None:
    os.close(take(files, path))
    os.close(take(files, path))


@pytest.mark.parametrize("state", ["R", "S", "D", "T"])
def test_that_of_a_process_that_runs_is_respected(
    files: Root, path: bytes, held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    pretend(monkeypatch, tmp_path, held, state)
    with pytest.raises(BlockingIOError):
        take(files, path)


def test_that_of_a_killed_process_is_taken_over_once(
    files: Root, path: bytes, held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, tmp_path, held, "Z")
    mine = take(files, path)
    assert os.fstat(mine).st_ino == os.stat(path).st_ino != os.fstat(held).st_ino
    with pytest.raises(BlockingIOError):
        take(files, path)
    os.close(mine)


def test_one_of_two_holders_that_runs_is_enough(
    held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, tmp_path, held, "Z", "S")
    assert not is_left_over(os.fstat(held))


def test_a_holder_that_the_table_does_not_know_may_run(
    held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, tmp_path, held)
    assert not is_left_over(os.fstat(held))


def test_who_takes_over_keeps_others_from_it_meanwhile(
    files: Root, path: bytes, held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, tmp_path, held, "Z")
    guard = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(guard, fcntl.LOCK_EX)
    with pytest.raises(BlockingIOError):
        take(files, path)
    os.close(guard)


def test_the_kernel_knows_who_holds_it(held: int) -> None:
    assert not is_left_over(os.fstat(held)), "this process runs"


def test_a_process_has_ended_when_it_waits_to_be_collected() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert has_ended(process.pid)
    process.wait()
    assert has_ended(process.pid)
    assert not has_ended(os.getpid())
    assert not has_ended(-1), "of another pid namespace"
