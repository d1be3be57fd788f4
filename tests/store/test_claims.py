"""Claims on paths: who waits for whom."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from kvfs.volume.claims import Claims

paths = st.lists(st.sampled_from([b"a", b"b", b"ab"]), min_size=1, max_size=3).map(b"/".join)


@pytest.mark.parametrize("other", [b"a/b", b"a", b"a/b/c", b""])
async def test_a_path_its_parents_and_its_children_wait(other: bytes) -> None:
    claims = Claims()
    async with claims.hold(b"a/b"):
        assert not claims.is_free(other)
        assert not claims.is_free(b"elsewhere", other)
    assert claims.is_free(other)


@pytest.mark.parametrize("other", [b"a/bc", b"a/c", b"b", b"ab"])
async def test_others_do_not_wait(other: bytes) -> None:
    claims = Claims()
    async with claims.hold(b"a/b"):
        assert claims.is_free(other)
        with trio.testing.assert_no_checkpoints():
            await claims.wait(other)


async def test_waiting_ends_when_the_claim_does() -> None:
    claims = Claims()
    order = []

    async def second() -> None:
        async with claims.hold(b"a"):
            order.append("second")

    async with trio.open_nursery() as nursery, claims.hold(b"a/b"):
        nursery.start_soon(second)
        await trio.testing.wait_all_tasks_blocked()
        order.append("first")
    assert order == ["first", "second"]
    assert claims.is_free(b"")


async def test_a_claim_of_two_paths_waits_for_both() -> None:
    claims = Claims()
    got = trio.Event()

    async def both() -> None:
        async with claims.hold(b"a", b"b"):
            got.set()

    async with trio.open_nursery() as nursery, claims.hold(b"b"):
        async with claims.hold(b"a"):
            nursery.start_soon(both)
            await trio.testing.wait_all_tasks_blocked()
        await trio.testing.wait_all_tasks_blocked()
        assert not got.is_set()
    assert got.is_set()


async def test_a_claim_ends_with_an_error_and_with_cancellation() -> None:
    claims = Claims()
    with pytest.raises(ValueError, match="boom"):
        async with claims.hold(b"a"):
            raise ValueError("boom")
    with trio.CancelScope() as scope:
        async with claims.hold(b"a"):
            scope.cancel()
            await trio.sleep_forever()
    assert claims.is_free(b"a")


async def test_the_same_path_twice_is_one_claim() -> None:
    claims = Claims()
    async with claims.hold(b"a", b"a"):
        assert not claims.is_free(b"a")
    assert claims.is_free(b"a")


@given(held=st.lists(paths, min_size=1, max_size=4), asked=paths)
def test_exactly_relatives_conflict(held: list[bytes], asked: bytes) -> None:
    async def check() -> None:
        claims = Claims()
        async with claims.hold(*held):
            parts = asked.split(b"/")
            related = any(
                parts[: len(h.split(b"/"))] == h.split(b"/") or h.split(b"/")[: len(parts)] == parts
                for h in held
            )
            assert claims.is_free(asked) is not related

    trio.run(check)
