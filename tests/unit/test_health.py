"""What the answers of a medium say of its tier."""

from __future__ import annotations

import errno
import os

import pytest

from kvfs.errors import MEDIUM_ERRNOS, TierDeadline, errno_of
from kvfs.tiers.health import FULL_ERRNOS, Health, is_full, is_of_medium


@pytest.fixture
def health(expect_log: list[str]) -> Health:
    expect_log.append("tier hdd is ")
    return Health("hdd")


def answer(number: int) -> OSError:
    return OSError(number, os.strerror(number))


HUNG = TierDeadline("no answer within 1 s")


def counted(health: Health) -> dict[str, int]:
    """Reasons counted against the tier."""
    reasons = health.incidents.counters.reasons
    return {
        r: n for (event, r, tier), n in reasons.items() if (event, tier) == ("tier_errors", "hdd")
    }


def test_three_errors_in_a_row_take_it_offline(health: Health) -> None:
    states = []
    for _ in range(3):
        health.failed(answer(errno.EIO))
        states.append((health.state, health.online, health.shown))
    assert states[:2] == [("degraded", True, "degraded")] * 2
    assert states[2] == ("offline", False, "offline")
    assert health.behind, "renames may be promised to it from now on"
    assert counted(health) == {"EIO": 3}


def test_an_answer_between_them_ends_the_row(health: Health) -> None:
    for _ in range(5):
        health.failed(answer(errno.EIO))
        health.failed(answer(errno.EIO))
        health.worked()
        assert health.state == "online"
    assert not health.behind


def test_only_a_probe_brings_it_back(health: Health) -> None:
    for _ in range(3):
        health.failed(answer(errno.ENOTCONN))
    health.worked()
    assert health.state == "offline", "a call that began before"
    health.probed("")
    assert health.shown == "online"
    health.failed(answer(errno.ENOTCONN))
    assert health.shown == "degraded", "the row begins anew"


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOSPC, errno.ENAMETOOLONG])
def test_what_concerns_one_file_says_nothing_of_the_tier(health: Health, number: int) -> None:
    for _ in range(5):
        health.failed(answer(number))
    assert health.shown == "online"
    assert counted(health) == {}


def test_a_read_only_tier_goes_on_being_read(health: Health) -> None:
    for _ in range(5):
        health.failed(answer(errno.EROFS))
    assert (health.online, health.state, health.shown) == (True, "online", "read-only")
    assert counted(health) == {"EROFS": 5}
    health.worked()
    assert health.shown == "read-only", "an answer to a read does not make it writable"
    health.probed("")
    assert health.shown == "online"


def test_a_full_tier_takes_nothing_until_a_probe_could_write(health: Health) -> None:
    health.refuse("full", answer(errno.EDQUOT))
    assert (health.shown, health.online) == ("full", True)
    health.probed("full", answer(errno.EDQUOT))
    assert health.shown == "full"
    health.probed("")
    assert health.shown == "online"


def test_calls_that_hang_take_it_offline(health: Health) -> None:
    for _ in range(3):
        health.hung(HUNG, health.answers)
    assert health.state == "offline"
    assert counted(health) == {"deadline": 3}


def test_a_slow_call_on_a_tier_that_answers_others_is_counted_only(health: Health) -> None:
    for _ in range(5):
        answers = health.answers
        health.worked()
        health.hung(HUNG, answers)
    assert health.state == "online"
    assert counted(health) == {"deadline": 5}


def test_an_error_of_a_file_is_an_answer_too(health: Health) -> None:
    answers = health.answers
    health.failed(answer(errno.ENOENT))
    health.hung(HUNG, answers)
    assert health.state == "online"


def test_a_tier_that_is_known_to_be_gone_is_offline_at_once(health: Health) -> None:
    health.lost("not mounted")
    assert (health.state, health.last_error, health.behind) == ("offline", "not mounted", True)


@pytest.mark.parametrize("number", sorted(MEDIUM_ERRNOS))
def test_whoever_asks_the_mount_is_told_eio_of_any_medium(number: int) -> None:
    assert is_of_medium(answer(number))
    assert errno_of(answer(number)) == errno.EIO


@pytest.mark.parametrize("number", sorted(FULL_ERRNOS))
def test_a_quota_is_full_as_a_disk_is(number: int) -> None:
    assert is_full(answer(number))
    assert not is_of_medium(answer(number))
