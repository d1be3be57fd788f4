"""Calls that hang: given up, and harmless when they are answered at last."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trio

from kvfs.catalog.rows import BlockState, Inode, Kind
from kvfs.errors import TierBusy, TierDeadline, TierOffline
from kvfs.tiers import backing
from kvfs.tiers import tier as tiers
from kvfs.tiers.backing import create_file
from kvfs.tiers.deadlines import Closer, answers, is_wanted, run_watched
from kvfs.tiers.tier import Tier
from tests.store.helpers import until
from tests.store.test_tier import make_tier

ROW = Inode(
    7, Kind.BLOCK, 0o644, os.getuid(), os.getgid(), 0, 0, 0, 0, 1, BlockState.WRITING, None, None,
    None,
)  # fmt: skip


@pytest.fixture
def hold() -> Iterator[threading.Event]:
    """What a call waits for; released in any case, so that no thread is left."""
    event = threading.Event()
    yield event
    event.set()


async def run_long(tier: Tier, hold: threading.Event) -> None:
    """What takes as long as it has bytes."""
    await tier.run_in_thread(hold.wait)


@pytest.fixture
def slow_tier(tmp_path: Path, expect_log: list[str]) -> Tier:
    """Not called on the loop, with a short deadline."""
    expect_log.append("tier tier is ")
    tier = make_tier(tmp_path / "tier", 1, "hdd")
    tier.reconfigure(msgspec.structs.replace(tier.config, deadline_s=0.1, concurrency=4))
    return tier


async def test_every_tier_that_is_not_called_on_the_loop_has_a_deadline(
    slow_tier: Tier, hold: threading.Event
) -> None:
    with pytest.raises(TierDeadline, match=r"no answer within 0\.1 s"):
        await slow_tier.run(hold.wait)


async def test_the_third_hang_takes_it_offline_and_then_it_answers_at_once(
    slow_tier: Tier, hold: threading.Event
) -> None:
    for _ in range(3):
        with pytest.raises(TierDeadline):
            await slow_tier.run(hold.wait)
    with pytest.raises(TierOffline, match="is offline"):
        await slow_tier.run(hold.wait)


async def test_what_takes_long_is_not_given_up_while_the_tier_answers(
    slow_tier: Tier, hold: threading.Event
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_long, slow_tier, hold)
        await trio.sleep(3 * slow_tier.config.deadline_s)
        assert slow_tier.state == "online"
        hold.set()


async def test_what_takes_long_is_given_up_when_the_tier_hangs(
    slow_tier: Tier, hold: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow_tier, "check_present", hold.wait)
    with pytest.raises(TierDeadline):
        await slow_tier.run_in_thread(hold.wait)


async def test_even_a_tier_that_answers_probes_is_not_waited_for_forever(
    slow_tier: Tier, hold: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "DEADLINES_OF_PATIENCE", 2)
    with pytest.raises(TierDeadline):
        await slow_tier.run_in_thread(hold.wait)


async def test_what_takes_long_leaves_the_tier_to_others(
    slow_tier: Tier, hold: threading.Event
) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(slow_tier.config.concurrency):
            nursery.start_soon(run_long, slow_tier, hold)
        await until(lambda: slow_tier.long_limiter.available_tokens == 0, "all at it")
        assert await slow_tier.run(os.getpid) == os.getpid()
        hold.set()


async def test_a_call_that_is_given_up_learns_of_it() -> None:
    """`is_wanted` between two steps."""
    begun, hold = threading.Event(), threading.Event()
    wanted: list[bool] = []

    def call() -> None:
        wanted.append(is_wanted())
        begun.set()
        hold.wait()
        wanted.append(is_wanted())

    async def watch() -> None:
        await trio.to_thread.run_sync(begun.wait)

    with pytest.raises(trio.TooSlowError):
        await run_watched(call, limiter=trio.CapacityLimiter(1), watch=watch)
    hold.set()
    await until(lambda: len(wanted) == 2, "the call goes on")
    assert wanted == [True, False]
    assert is_wanted(), "on the loop nobody gives up"


async def test_whoever_is_cancelled_waits_for_the_call_to_clean_up() -> None:
    begun, cleaned = threading.Event(), threading.Event()

    def call() -> None:
        begun.set()
        while is_wanted():
            pass
        cleaned.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            lambda: run_watched(call, limiter=trio.CapacityLimiter(1), watch=trio.sleep_forever)
        )
        await trio.to_thread.run_sync(begun.wait)
        nursery.cancel_scope.cancel()
    assert cleaned.is_set()


async def test_what_a_watched_call_raises_is_raised() -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "it fails")

    with pytest.raises(OSError, match="it fails"):
        await run_watched(fail, limiter=trio.CapacityLimiter(1), watch=trio.sleep_forever)


async def test_a_file_that_comes_too_late_is_taken_away(
    slow_tier: Tier, hold: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, ended = tiers.give_owner, threading.Event()

    def wait_first(*arguments: int) -> None:
        hold.wait()
        real(*arguments)

    def create() -> int:
        try:
            return create_file(slow_tier, b"ns/late", False, ROW)
        finally:
            ended.set()

    monkeypatch.setattr(backing, "give_owner", wait_first)
    with pytest.raises(TierDeadline):
        await slow_tier.run_open(create)
    hold.set()
    await trio.to_thread.run_sync(ended.wait)
    assert not Path(os.fsdecode(slow_tier.locate(b"ns/late"))).exists()


async def test_a_file_that_comes_too_late_leaves_the_one_that_came_since(
    slow_tier: Tier, hold: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, ended = backing._open_new, threading.Event()
    file = Path(os.fsdecode(slow_tier.locate(b"late")))

    def wait_first(*arguments: object) -> int:
        hold.wait()
        return real(*arguments)  # type: ignore[arg-type] # those of the caller

    def create() -> int:
        try:
            return create_file(slow_tier, b"late", False, ROW)
        finally:
            ended.set()

    monkeypatch.setattr(backing, "_open_new", wait_first)
    with pytest.raises(TierDeadline):
        await slow_tier.run_open(create)
    file.write_bytes(b"the next one")
    hold.set()
    await trio.to_thread.run_sync(ended.wait)
    assert file.read_bytes() == b"the next one"


async def test_a_descriptor_whose_close_fails_stops_none_after_it() -> None:
    closer = Closer()
    bad = os.open("/dev/null", os.O_RDONLY)
    os.close(bad)
    good = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    closer.close(10_000_000)
    closer.close(good)

    def is_closed() -> bool:
        try:
            os.fstat(good)
        except OSError:
            return True
        return False

    await until(is_closed, "closed")


async def test_so_many_may_wait_for_a_tier_and_no_more(
    slow_tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "MOST_WAITING", 2)
    accepts: list[bool] = []
    with slow_tier.admitted(), slow_tier.admitted():
        accepts.append(slow_tier.accepts)
        with pytest.raises(TierBusy, match="2 requests wait for it"), slow_tier.admitted():
            pass
    with slow_tier.admitted():
        accepts.append(slow_tier.accepts)
    assert accepts == [False, True], "new blocks go elsewhere meanwhile"
    assert slow_tier.waiting == 0


async def test_nobody_is_refused_on_the_fastest_tier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "MOST_WAITING", 0)
    fastest = make_tier(tmp_path / "tier", 0, "nvme")
    with fastest.admitted():
        assert fastest.waiting == 1


def test_answers_tells_what_hangs_or_fails_from_what_answers(hold: threading.Event) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "it fails")

    assert answers(os.getpid, 30)
    assert not answers(fail, 30)
    assert not answers(hold.wait, 0.05)
