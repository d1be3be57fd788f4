"""Failpoints: what arms them, what they do, and that they are found in the source."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs import failpoints
from kvfs.errors import UsageError
from tests import sources
from tests.crash import points


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.disarm()


def test_nothing_happens_unless_it_is_armed() -> None:
    failpoints.arm("move.copied=error EIO")
    failpoints.hit("move.synced")
    failpoints.disarm()
    failpoints.hit("move.copied")
    assert failpoints.armed() == ""


def test_an_error_is_raised_with_its_number_and_the_name() -> None:
    failpoints.arm("a.one=error ENOSPC, b.two=error EIO")
    assert failpoints.armed() == "a.one, b.two"
    with pytest.raises(OSError, match=r"failpoint.*a\.one") as raised:
        failpoints.hit("a.one")
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match=r"b\.two"):
        failpoints.hit("b.two")


def test_only_the_nth_pass_counts() -> None:
    failpoints.arm("a.one:3=error EIO")
    failpoints.hit("a.one")
    failpoints.hit("a.one")
    with pytest.raises(OSError, match=r"a\.one"):
        failpoints.hit("a.one")
    failpoints.hit("a.one")


def test_a_test_is_told_of_every_pass() -> None:
    passed: list[str] = []
    failpoints.on(failpoints.EVERY, passed.append)
    failpoints.arm("a.one=sleep 0")
    failpoints.hit("a.one")
    failpoints.hit("b.two")
    assert passed == ["a.one", "b.two"]


@pytest.mark.parametrize(
    "text", ["a.one:0", "a.one:x", "a.one=die", "a.one=error EWHAT", "a one", "=kill", "a=sleep -1"]
)
def test_what_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="KVFS_FAILPOINT"):
        failpoints.arm(text)


@pytest.mark.parametrize(("text", "code"), [("a.b", -signal.SIGKILL), ("a.b:2", 0), ("c.d", 0)])
def test_the_environment_kills_a_process(text: str, code: int) -> None:
    program = "from kvfs import failpoints; failpoints.hit('a.b')"
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, env={**os.environ, "KVFS_FAILPOINT": text}
    )
    assert done.returncode == code


def test_points_are_read_from_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    module = tmp_path / "kvfs/below/new.py"
    module.parent.mkdir(parents=True)
    module.write_text('failpoints.hit("new.done")\nwith c.transaction("old"):\n    pass\n')
    assert points.all_points() == ["new.done", "old.changed", "old.committed"]
    module.write_text("failpoints.hit(name)\n")
    with pytest.raises(AssertionError, match="literal"):
        points.all_points()
    module.write_text("with c.transaction():\n    pass\n")
    with pytest.raises(AssertionError, match="needs a name"):
        points.all_points()
