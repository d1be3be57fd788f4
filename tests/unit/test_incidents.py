"""Incidents: every one is counted, few are told."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Callable

import pytest

from kvfs import errors, incidents
from kvfs.errors import reason_of
from kvfs.incidents import QUIET_S, Incidents
from kvfs.metrics import Counters

Lines = Callable[[], list[str]]


class Hand:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def read(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Hand:
    return Hand()


@pytest.fixture
def told(clock: Hand) -> Incidents:
    return Incidents(Counters(), clock.read)


@pytest.fixture(autouse=True)
def announced(expect_log: list[str]) -> None:
    expect_log.append("")


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    return lambda: [record.getMessage() for record in caplog.records]


def test_the_first_is_told_and_those_after_it_are_counted(
    told: Incidents, clock: Hand, lines: Lines
) -> None:
    for number in range(5):
        told.note("moves_failed", f"move {number}", reason="EIO", tier="hdd")
        clock.now_s += QUIET_S / 10
    assert lines() == ["move 0"]
    assert told.counters.events == {"moves_failed": 5}
    assert told.counters.reasons == {("moves_failed", "EIO", "hdd"): 5}


def test_after_a_while_the_next_tells_how_many_were_held_back(
    told: Incidents, clock: Hand, lines: Lines
) -> None:
    for number in range(4):
        told.note("moves_failed", f"move {number}", reason="EIO", tier="hdd")
    clock.now_s += QUIET_S
    told.note("moves_failed", "move 4", reason="EIO", tier="hdd")
    told.note("moves_failed", "move 5", reason="EIO", tier="hdd")
    assert lines() == ["move 0", "move 4 (3 more like it before)"]


def test_another_event_reason_or_tier_is_another_incident(told: Incidents, lines: Lines) -> None:
    told.note("moves_failed", "a", reason="EIO", tier="hdd")
    told.note("moves_failed", "b", reason="ENOSPC", tier="hdd")
    told.note("moves_failed", "c", reason="EIO", tier="remote")
    told.note("quarantined", "d", reason="EIO", tier="hdd")
    assert lines() == ["a", "b", "c", "d"]


def test_what_was_held_back_is_told_when_the_minute_is_over(
    told: Incidents, clock: Hand, lines: Lines
) -> None:
    for number in range(3):
        told.note("moves_failed", f"move {number}", reason="EIO", tier="hdd")
    told.tell()
    assert lines() == ["move 0"], "it was told a moment ago"
    clock.now_s += QUIET_S
    told.tell()
    told.tell()
    assert lines() == ["move 0", "2 more moves_failed, the last: move 2"]


def test_at_the_end_everything_is_told(told: Incidents, lines: Lines) -> None:
    for number in range(2):
        told.note("moves_failed", f"move {number}", reason="EIO", tier="hdd")
    told.tell(all_of_them=True)
    assert lines() == ["move 0", "1 more moves_failed, the last: move 1"]


def test_memory_is_bounded(told: Incidents, monkeypatch: pytest.MonkeyPatch, lines: Lines) -> None:
    monkeypatch.setattr(incidents, "KINDS_REMEMBERED", 2)
    for reason in ("a", "b", "c", "a"):
        told.note("x", reason, reason=reason)
    assert lines() == ["a", "b", "c", "a"], "the oldest was forgotten, so it is told again"
    assert len(told._told) == 2


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EIO, ""), "EIO"),
        (OSError(errno.EDQUOT, ""), "EDQUOT"),
        (OSError("without a number"), "EIO"),
        (errors.TierOffline(""), "offline"),
        (errors.TierDeadline(""), "deadline"),
        (errors.TierFull(""), "full"),
        (errors.BlockCorrupt(""), "checksum"),
        (errors.UsageError(""), "refused"),
        (RuntimeError(""), "bug"),
        (sqlite3.DatabaseError("malformed"), "bug"),
    ],
)
def test_every_error_has_a_reason(error: BaseException, reason: str) -> None:
    assert reason_of(error) == reason
