"""Accounts of the tiers against a model that is a plain sum."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvfs.config import TierConfig
from kvfs.tiers.space import (
    DIRECTORIES_REMEMBERED,
    FIRST_RESERVATION_BYTES,
    PAGE_BYTES,
    Reservation,
    Space,
    TierSpace,
    limit_of,
    rounded,
    sealed,
)

CAPACITY_BYTES = 1 << 20


def make_space(capacity_bytes: int = CAPACITY_BYTES, tiers: int = 2) -> Space:
    return Space(
        tuple(TierConfig(f"t{i}", Path("/none"), "hdd", capacity_bytes) for i in range(tiers))
    )


class SpaceMachine(RuleBasedStateMachine):
    """Replicas come, grow and go; reservations are made, grow and are given back."""

    def __init__(self) -> None:
        super().__init__()
        self.space = make_space(tiers=3)
        self.blocks: dict[int, dict[int, int]] = {}
        self.reservations: list[tuple[int, Reservation]] = []
        self.next_block = 0

    def others(self, block: int, tier: int) -> int:
        return max((s for t, s in self.blocks[block].items() if t != tier), default=0)

    @rule(tier=st.integers(0, 2), size=st.integers(0, CAPACITY_BYTES // 4))
    def new_block(self, tier: int, size: int) -> None:
        self.space.add(tier, size)
        self.blocks[self.next_block] = {tier: size}
        self.next_block += 1

    @precondition(lambda self: self.blocks)
    @rule(data=st.data(), tier=st.integers(0, 2), size=st.integers(0, CAPACITY_BYTES // 4))
    def new_replica(self, data: st.DataObject, tier: int, size: int) -> None:
        block = data.draw(st.sampled_from(sorted(self.blocks)))
        if tier not in self.blocks[block]:
            self.space.add(tier, size, beside_bytes=self.others(block, tier))
            self.blocks[block][tier] = size

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def remove_replica(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.blocks)))
        tier = data.draw(st.sampled_from(sorted(self.blocks[block])))
        size = self.blocks[block][tier]
        self.space.remove(tier, size, beside_bytes=self.others(block, tier))
        del self.blocks[block][tier]
        if not self.blocks[block]:
            del self.blocks[block]

    @precondition(lambda self: self.blocks)
    @rule(data=st.data(), size=st.integers(0, CAPACITY_BYTES // 4))
    def resize(self, data: st.DataObject, size: int) -> None:
        block = data.draw(st.sampled_from(sorted(self.blocks)))
        tier = data.draw(st.sampled_from(sorted(self.blocks[block])))
        before = self.blocks[block][tier]
        self.space.resize(tier, before, size, beside_bytes=self.others(block, tier))
        self.blocks[block][tier] = size

    @rule(tier=st.integers(0, 2), size=st.integers(0, CAPACITY_BYTES))
    def reserve(self, tier: int, size: int) -> None:
        free = self.space[tier].free_bytes
        reservation = self.space.reserve(tier, size)
        assert (reservation is not None) == (size <= free)
        if reservation is not None:
            self.reservations.append((tier, reservation))

    @precondition(lambda self: self.reservations)
    @rule(data=st.data(), size=st.integers(-10, CAPACITY_BYTES))
    def grow(self, data: st.DataObject, size: int) -> None:
        tier, reservation = data.draw(st.sampled_from(self.reservations))
        before, free = reservation.size_bytes, self.space[tier].free_bytes
        granted = reservation.grow_to(size)
        assert granted == (size - before <= free or size <= before)
        assert reservation.size_bytes == (max(before, size) if granted else before)

    @precondition(lambda self: self.reservations)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sampled_from(self.reservations))
        chosen[1].release()
        chosen[1].release()
        self.reservations.remove(chosen)

    @invariant()
    def accounts_are_sums(self) -> None:
        for index, account in enumerate(self.space.tiers):
            sizes = [b[index] for b in self.blocks.values() if index in b]
            reserved = sum(r.size_bytes for tier, r in self.reservations if tier == index)
            assert (account.used_bytes, account.blocks) == (sum(sizes), len(sizes))
            assert account.reserved_bytes == reserved >= 0
            assert 0 <= account.free_bytes <= account.capacity_bytes
        duplicates = sum(sum(b.values()) - max(b.values()) for b in self.blocks.values())
        assert self.space.duplicate_bytes == duplicates


TestSpaceMachine = SpaceMachine.TestCase


@given(st.integers(0, 1 << 50))
def test_rounding_is_up_to_the_next_page(size: int) -> None:
    assert rounded(size) % PAGE_BYTES == 0
    assert size <= rounded(size) < size + PAGE_BYTES


def test_held_bytes_are_not_free() -> None:
    space = make_space()
    space[0].held_bytes = CAPACITY_BYTES - 100
    assert space[0].free_bytes == 100
    assert space.reserve(0, 101) is None
    space[0].held_bytes = CAPACITY_BYTES * 2
    assert space[0].free_bytes == 0


def test_the_first_file_may_take_a_hundredth_of_the_tier_or_32_mib() -> None:
    assert make_space(1 << 20).expected_bytes(0, "d") == (1 << 20) // 100
    assert make_space(1 << 50).expected_bytes(0, "d") == FIRST_RESERVATION_BYTES


def test_a_directory_tells_what_its_next_file_will_take() -> None:
    space = make_space()
    space.learn(10_000, "directory", "namespace")
    assert space.expected_bytes(0, "directory", "namespace") == sealed(10_000)
    assert space.expected_bytes(0, "new", "namespace") == sealed(10_000)
    assert space.expected_bytes(0, "new", "other") == CAPACITY_BYTES // 100


def test_a_large_file_is_remembered_for_a_while() -> None:
    space = make_space()
    space.learn(99 * PAGE_BYTES, "d")
    seen = []
    for _ in range(40):
        space.learn(PAGE_BYTES, "d")
        seen.append(space.expected_bytes(0, "d"))
    assert seen[0] == 75 * PAGE_BYTES
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == sealed(PAGE_BYTES)


def test_memory_of_directories_is_bounded() -> None:
    space = make_space()
    for number in range(DIRECTORIES_REMEMBERED + 10):
        space.learn(PAGE_BYTES, number)
    assert space.expected_bytes(0, 0) == CAPACITY_BYTES // 100, "the oldest is forgotten"
    assert space.expected_bytes(0, DIRECTORIES_REMEMBERED + 9) == PAGE_BYTES * 2


def filesystem(free: int, files: int = 0, free_files: int = 0) -> os.statvfs_result:
    """What statvfs says of one with so many free blocks of 4 KiB."""
    return os.statvfs_result(
        (4096, 4096, 10_000, free, free, files, free_files, free_files, 0, 255)
    )


def test_a_tier_is_no_larger_than_its_disk_lets_it_be() -> None:
    space = TierSpace(capacity_bytes=1 << 20, used_bytes=600 << 10)
    assert (space.room_bytes, space.free_bytes) == (1 << 20, 424 << 10)
    space.limit_bytes, space.crowd_bytes = limit_of(space.stored_bytes, filesystem(25), 0.95)
    assert space.room_bytes == space.planned_bytes == 700 << 10
    assert space.free_bytes == 100 << 10
    space.limit_bytes, space.crowd_bytes = limit_of(space.stored_bytes, filesystem(5000), 0.95)
    assert space.room_bytes == space.planned_bytes == 1 << 20


@given(st.integers(1, 1000), st.integers(0, 1000), st.integers(0, 1 << 40))
def test_where_inodes_are_scarce_files_leave_whatever_their_size(
    files: int, free_files: int, stored_bytes: int
) -> None:
    free_files = min(free_files, files)
    status = filesystem(1 << 40, files, free_files)
    limit_bytes, crowd_bytes = limit_of(stored_bytes, status, 0.95)
    assert limit_bytes > stored_bytes
    scarce = 1 - free_files / files > 0.95
    assert (crowd_bytes is not None) == scarce
    if crowd_bytes is not None and stored_bytes > 1000:
        # It is above the watermark by as much as the inodes are.
        used = stored_bytes / crowd_bytes
        assert abs(used - (1 - free_files / files)) < 0.01


def test_a_filesystem_that_makes_inodes_as_it_needs_them_is_never_short_of_them() -> None:
    assert limit_of(100, filesystem(1, files=0, free_files=0), 0.95) == (100 + 4096, None)


def test_a_tier_without_any_room_still_has_a_size() -> None:
    space = TierSpace(capacity_bytes=1 << 20, limit_bytes=0, crowd_bytes=0)
    assert space.room_bytes == space.planned_bytes == 4096
