"""Leases in parts: what is leased when, and that all of it is released."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs.errors import QuotaExceeded
from kvfs.gpu.ahead import MAX_LEASED, PART_BYTES, leases_ahead, parts_of
from kvfs.gpu.source import BackingFiles, Leased
from tests.gpu.machines import publish_many
from tests.mounting import wait_until

PARTS = [range(2), range(2, 5), range(5, 6)]


@given(st.integers(1, 5000), st.integers(0, 64 << 20))
def test_the_parts_are_all_blocks_in_order_and_two_fit_in_a_lease(count: int, size: int) -> None:
    parts = parts_of(count, size)
    assert [number for part in parts for number in part] == list(range(count))
    assert all(parts)
    for one, two in pairwise(parts):
        assert len(one) + len(two) <= MAX_LEASED


@given(st.integers(1, MAX_LEASED), st.integers(1, 64 << 20))
def test_a_lease_is_divided_only_where_there_is_much_to_read_beside_it(
    count: int, size: int
) -> None:
    parts = parts_of(count, size)
    assert (len(parts) == 1) == (count <= 2 * -(-PART_BYTES // size))
    assert len(parts) == 1 or len(parts[0]) * size >= min(PART_BYTES, MAX_LEASED // 2 * size)


class Counting:
    """Files as a source that says which parts are leased, at most `most` at a time."""

    def __init__(self, directory: Path, most: int = 2) -> None:
        self._files = BackingFiles(directory)
        self._most = most
        self._lock = threading.Lock()
        self.leased: list[bytes] = []
        self.refused = 0

    @contextmanager
    def lease(self, paths: Sequence[bytes], *, direct: bool = False) -> Iterator[Leased]:
        with self._lock:
            if len(self.leased) == self._most:
                self.refused += 1
                raise QuotaExceeded("no more")
            self.leased.append(paths[0])
        with self._files.lease(paths, direct=direct) as leased:
            yield leased
        with self._lock:
            self.leased.remove(paths[0])


@pytest.fixture
def paths(tmp_path: Path) -> list[bytes]:
    return [name.encode() for name in publish_many(tmp_path, [b"x"] * PARTS[-1].stop)]


def test_the_next_part_is_leased_while_one_is_used(tmp_path: Path, paths: list[bytes]) -> None:
    source = Counting(tmp_path)
    with closing(leases_ahead(source, paths, PARTS, direct=False)) as leases:
        for number, leased in enumerate(leases):
            assert len(list(leased)) == len(PARTS[number])
            for part in PARTS[number : number + 2]:
                first = paths[part.start]
                wait_until(lambda path=first: path in source.leased, "it is leased")  # type: ignore[misc] # mypy infers no lambda with defaults
    assert source.leased == []


@pytest.mark.parametrize("used", [1, 2])
def test_what_is_leased_ahead_is_released_when_nobody_wants_it(
    tmp_path: Path, paths: list[bytes], used: int
) -> None:
    source = Counting(tmp_path)
    with closing(leases_ahead(source, paths, PARTS, direct=False)) as leases:
        for _ in range(used):
            next(leases)
    assert source.leased == []


def test_a_lease_that_is_refused_beside_another_is_had_after_it(
    tmp_path: Path, paths: list[bytes]
) -> None:
    source = Counting(tmp_path, most=1)
    with closing(leases_ahead(source, paths, PARTS, direct=False)) as leases:
        found = [len(list(leased)) for leased in leases]
    assert found == [len(part) for part in PARTS]
    assert source.refused == len(PARTS) - 1
    assert source.leased == []


def test_a_lease_that_is_refused_alone_is_an_error(tmp_path: Path, paths: list[bytes]) -> None:
    source = Counting(tmp_path, most=0)
    with pytest.raises(QuotaExceeded):
        next(leases_ahead(source, paths, PARTS, direct=False))
