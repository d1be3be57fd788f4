"""Plans: each rule by an example, and what must hold for every plan by properties."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfs.policy.heat import heat_at, never, tau_for
from kvfs.policy.plan import (
    BlockView,
    Move,
    Plan,
    PolicySettings,
    Snapshot,
    TierView,
    explain,
    plan,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

NOW_S = 1_800_000_000.0
HALF_LIFE_S = 128.0
NAMES = ("nvme", "hdd", "remote", "archive")
SETTINGS = PolicySettings(promote_heat=1.5, hysteresis=2.0, on_full="evict", max_moves=1000)


def tier(
    index: int, used: int, *, capacity: int = 1000, budget: int = 10**6, online: bool = True
) -> TierView:
    return TierView(index, NAMES[index], capacity, used, 0.95, 0.9, budget, online)


def block(
    inode: int,
    *tiers: int,
    heat: float = 1.0,
    size: int = 10,
    pinned: bool = False,
    keep: bool = False,
    movable: bool = True,
) -> BlockView:
    tau = tau_for(heat, NOW_S, HALF_LIFE_S)
    return BlockView(inode, size, tau, tiers, pinned, keep, movable)


def snapshot(tiers: Iterable[TierView], blocks: Iterable[BlockView]) -> Snapshot:
    """All blocks as candidates of every tier they are on, in the order that the catalog gives."""
    views, by_heat = tuple(tiers), sorted(blocks, key=lambda b: b.tau)
    coldest = tuple(tuple(b for b in by_heat if view.index in b.tiers) for view in views)
    hottest = tuple(tuple(reversed(residents)) for residents in coldest)
    return Snapshot(NOW_S, HALF_LIFE_S, views, coldest, hottest)


def steps(of: Plan) -> list[tuple[str, int, int, int | None]]:
    return [(move.kind, move.inode, move.source, move.target) for move in of.moves]


# Leaving a tier


def test_nothing_moves_while_every_tier_is_below_its_high_watermark() -> None:
    view = snapshot([tier(0, 950), tier(1, 950)], [block(1, 0, heat=0.1), block(2, 1, heat=0.1)])
    assert plan(view, SETTINGS) == Plan((), ())


def test_a_full_tier_demotes_coldest_first_down_to_its_low_watermark() -> None:
    blocks = [block(inode, 0, heat=inode) for inode in range(1, 20)]
    made = plan(snapshot([tier(0, 960), tier(1, 0)], blocks), SETTINGS)
    assert steps(made) == [("demote", inode, 0, 1) for inode in range(1, 7)]
    assert made.moves[0].reason == "nvme is 96 % full, coldest first"


def test_blocks_with_a_replica_below_are_dropped_before_colder_sole_ones() -> None:
    blocks = [block(1, 0, heat=0.1), block(2, 0, 1, heat=5), block(3, 0, 1, heat=4)]
    blocks += [block(4, 0, heat=0.2)]
    made = plan(snapshot([tier(0, 960), tier(1, 20)], [*blocks, block(5, 0, size=40)]), SETTINGS)
    assert steps(made)[:3] == [("drop", 3, 0, None), ("drop", 2, 0, None), ("demote", 1, 0, 1)]
    assert made.moves[0].reason == "nvme is 96 % full, a copy stays on hdd"


def test_a_lower_tier_drops_copies_of_blocks_that_live_above_hottest_first() -> None:
    blocks = [block(1, 0, 1, heat=5), block(2, 0, 1, heat=9), block(3, 1, heat=0.1)]
    blocks += [block(4, 1, heat=0.2, size=100)]
    made = plan(snapshot([tier(0, 20), tier(1, 960)], blocks), SETTINGS)
    assert steps(made)[:3] == [("drop", 2, 1, None), ("drop", 1, 1, None), ("evict", 3, 1, None)]


def test_copies_of_blocks_above_are_found_among_the_coldest_too() -> None:
    blocks = [block(1, 0, 1, heat=0.5, size=30), block(2, 0, 1, heat=0.9, size=60)]
    view = replace(snapshot([tier(0, 90), tier(1, 960)], blocks), hottest=((), ()))
    assert steps(plan(view, SETTINGS)) == [("drop", 2, 1, None)]


def test_what_leaves_passes_by_a_tier_that_takes_nothing_now() -> None:
    tiers = [tier(0, 960), replace(tier(1, 0), accepts=False), tier(2, 0)]
    made = plan(snapshot(tiers, [block(1, 0, size=60)]), SETTINGS)
    assert steps(made) == [("demote", 1, 0, 2)]


def test_nothing_is_evicted_because_the_tier_below_takes_nothing_now() -> None:
    tiers = [tier(0, 960), replace(tier(1, 0), accepts=False)]
    made = plan(snapshot(tiers, [block(1, 0, size=60)]), SETTINGS)
    assert steps(made) == []
    assert "hdd takes nothing new now" in made.notes


def test_nothing_is_promoted_to_a_tier_that_takes_nothing_now() -> None:
    tiers = [replace(tier(0, 0), accepts=False), tier(1, 0), tier(2, 0)]
    made = plan(snapshot(tiers, [block(1, 2, heat=9)]), SETTINGS)
    assert steps(made) == [("promote", 1, 2, 1)]


def test_a_read_only_tier_keeps_what_it_has_and_is_still_promoted_from() -> None:
    tiers = [tier(0, 0), replace(tier(1, 960), accepts=False, read_only=True), tier(2, 0)]
    blocks = [block(1, 1, heat=9), block(2, 1, heat=0.1, size=60)]
    made = plan(snapshot(tiers, blocks), SETTINGS)
    assert steps(made) == [("promote", 1, 1, 0)]
    assert "hdd is read-only: nothing moves off it" in made.notes


def test_the_last_tier_evicts_coldest_first_and_spares_what_is_to_be_kept() -> None:
    blocks = [block(inode, 0, heat=inode, keep=inode == 1) for inode in range(1, 20)]
    made = plan(snapshot([tier(0, 960)], blocks), SETTINGS)
    assert steps(made) == [("evict", inode, 0, None) for inode in range(2, 8)]


def test_a_block_to_be_kept_is_demoted_like_any_other() -> None:
    view = snapshot([tier(0, 960), tier(1, 0)], [block(1, 0, size=60, keep=True)])
    assert steps(plan(view, SETTINGS)) == [("demote", 1, 0, 1)]


def test_refuse_evicts_nothing_and_says_so() -> None:
    view = snapshot([tier(0, 970)], [block(1, 0, size=200)])
    made = plan(view, replace(SETTINGS, on_full="refuse"))
    assert made == Plan((), ("nvme is 97 % full: nothing is evicted, since on_full is refuse",))


def test_refuse_still_drops_copies_from_the_last_tier() -> None:
    view = snapshot([tier(0, 60), tier(1, 960)], [block(1, 0, 1, size=60)])
    made = plan(view, replace(SETTINGS, on_full="refuse"))
    assert steps(made) == [("drop", 1, 1, None)]


def test_pinned_and_immovable_blocks_stay_and_the_plan_says_why() -> None:
    blocks = [block(1, 0, size=300, pinned=True), block(2, 0, size=300, movable=False)]
    made = plan(snapshot([tier(0, 960), tier(1, 0)], blocks), SETTINGS)
    assert made.moves == ()
    assert made.notes == (
        "nvme is 96 % full: its other blocks are pinned, open or unsealed, or find no room below",
    )


def test_a_lower_tier_makes_room_with_its_own_coldest_and_frees_first() -> None:
    blocks = [block(1, 0, heat=0.5, size=60), block(2, 1, heat=0.1, size=60), block(3, 1)]
    made = plan(snapshot([tier(0, 960), tier(1, 940), tier(2, 0)], blocks), SETTINGS)
    assert steps(made) == [("demote", 2, 1, 2), ("demote", 1, 0, 1)]
    assert made.moves[0].reason == "hdd makes room for what leaves nvme, coldest first"


def test_all_room_is_made_before_the_first_arrival() -> None:
    blocks = [block(1, 0, heat=0.5, size=30), block(2, 0, heat=0.6, size=30)]
    blocks += [block(3, 1, heat=0.1, size=30), block(4, 1, heat=0.2, size=30)]
    made = plan(snapshot([tier(0, 960), tier(1, 950)], blocks), SETTINGS)
    assert [(move.kind, move.inode) for move in made.moves] == [
        ("evict", 3),
        ("evict", 4),
        ("demote", 1),
        ("demote", 2),
    ]


def test_a_demotion_passes_over_a_tier_that_cannot_make_room() -> None:
    blocks = [block(1, 0, size=60), block(2, 1, size=900, pinned=True)]
    view = snapshot([tier(0, 960), tier(1, 945), tier(2, 0)], blocks)
    assert steps(plan(view, SETTINGS)) == [("demote", 1, 0, 2)]


def test_room_above_the_watermark_is_used_when_there_is_no_other() -> None:
    blocks = [block(1, 0, size=60), block(2, 1, size=900, pinned=True)]
    view = snapshot([tier(0, 960), tier(1, 930)], blocks)
    assert steps(plan(view, SETTINGS)) == [("demote", 1, 0, 1)]


def test_room_that_cannot_be_made_in_full_costs_nothing() -> None:
    blocks = [block(1, 0, size=200), block(2, 1, size=50), block(3, 1, size=900, pinned=True)]
    view = snapshot([tier(0, 960), tier(1, 950)], blocks)
    assert plan(view, SETTINGS).moves == ()


def test_room_that_was_given_up_is_not_counted_on() -> None:
    blocks = [block(1, 0, heat=0.1, size=200), block(2, 0, heat=0.2, size=40)]
    blocks += [block(3, 1, size=50), block(4, 1, size=900, pinned=True)]
    made = plan(snapshot([tier(0, 960), tier(1, 950)], blocks), SETTINGS)
    assert steps(made) == [("evict", 3, 1, None), ("demote", 2, 0, 1)]


def test_a_full_tier_that_makes_room_is_still_relieved_to_its_low_watermark() -> None:
    blocks = [block(1, 0, size=60), *(block(inode, 1, heat=0.1) for inode in range(2, 30))]
    state = State.of(snapshot([tier(0, 960), tier(1, 960)], blocks))
    state.apply(plan(state.snapshot(), SETTINGS))
    assert state.used(0) == state.used(1) == 900


def test_an_offline_tier_takes_and_gives_nothing() -> None:
    blocks = [block(1, 0, heat=0.1, size=60), block(2, 1, heat=9, size=60)]
    made = plan(snapshot([tier(0, 960), tier(1, 990, online=False), tier(2, 0)], blocks), SETTINGS)
    assert steps(made) == [("demote", 1, 0, 2)]
    assert made.notes == ("hdd is offline: nothing moves to or from it",)


def test_a_replica_on_an_offline_tier_does_not_make_a_copy_cheap() -> None:
    views = [tier(0, 960), tier(1, 60, online=False), tier(2, 0)]
    made = plan(snapshot(views, [block(1, 0, 1, size=60)]), SETTINGS)
    assert steps(made) == [("demote", 1, 0, 2)]


def test_the_last_tier_online_drops_rather_than_evicts_what_an_offline_tier_still_has() -> None:
    views = [tier(0, 960), tier(1, 60, online=False)]
    made = plan(snapshot(views, [block(1, 0, 1, size=60)]), SETTINGS)
    assert steps(made) == [("drop", 1, 0, None)]
    assert made.moves[0].reason == "nvme is 96 % full, a copy stays on hdd (offline)"


def test_a_plan_stops_at_max_moves_and_the_next_one_gets_further() -> None:
    # Making room takes more moves than one plan may have.
    blocks = [block(1, 0, size=60), *(block(inode, 1, heat=0.1) for inode in range(2, 10))]
    state = State.of(snapshot([tier(0, 960), tier(1, 950)], blocks))
    knobs = replace(SETTINGS, max_moves=4)
    made = plan(state.snapshot(), knobs)
    assert [move.kind for move in made.moves] == ["evict"] * 4
    assert made.notes == ("stopped at 4 moves: the next pass goes on",)
    state.apply(made)
    made = plan(state.snapshot(), knobs)
    assert [move.kind for move in made.moves] == ["evict", "evict", "demote"]


# Coming up


def test_a_hot_block_is_promoted_where_there_is_room() -> None:
    made = plan(snapshot([tier(0, 0), tier(1, 10)], [block(1, 1, heat=3.25)]), SETTINGS)
    assert steps(made) == [("promote", 1, 1, 0)]
    assert made.moves[0].reason == "heat 3.2 >= 1.5 and room on nvme"


def test_a_block_below_the_threshold_is_not_promoted() -> None:
    assert not plan(snapshot([tier(0, 0), tier(1, 10)], [block(1, 1, heat=1.49)]), SETTINGS).moves


def test_a_hot_block_displaces_what_is_colder_by_the_hysteresis() -> None:
    blocks = [block(1, 1, heat=8, size=20), block(2, 0, heat=1), block(3, 0, heat=2)]
    made = plan(snapshot([tier(0, 950), tier(1, 20)], blocks), SETTINGS)
    assert steps(made) == [("demote", 2, 0, 1), ("demote", 3, 0, 1), ("promote", 1, 1, 0)]
    assert made.moves[2].reason == "heat 8.0 >= 1.5 and 4.0x the coldest on nvme"


def test_all_that_a_block_displaces_has_to_be_colder_by_the_hysteresis() -> None:
    blocks = [block(1, 1, heat=8, size=20), block(2, 0, heat=1), block(3, 0, heat=5)]
    assert not plan(snapshot([tier(0, 950), tier(1, 20)], blocks), SETTINGS).moves


def test_what_is_displaced_and_has_a_replica_below_is_dropped() -> None:
    blocks = [block(1, 1, heat=8), block(2, 0, 1, heat=1)]
    made = plan(snapshot([tier(0, 950), tier(1, 20)], blocks), SETTINGS)
    assert steps(made) == [("drop", 2, 0, None), ("promote", 1, 1, 0)]


def test_promotion_keeps_within_the_budget_and_prefers_the_hottest() -> None:
    blocks = [block(inode, 1, heat=inode) for inode in range(2, 6)]
    made = plan(snapshot([tier(0, 0, budget=25), tier(1, 40)], blocks), SETTINGS)
    assert steps(made) == [("promote", 5, 1, 0), ("promote", 4, 1, 0)]
    assert made.notes == ("the promotion budget of nvme is used up",)


def test_a_block_goes_to_a_middle_tier_when_the_fastest_is_not_justified() -> None:
    blocks = [block(1, 2, heat=3), block(2, 0, heat=2)]
    made = plan(snapshot([tier(0, 950), tier(1, 0), tier(2, 10)], blocks), SETTINGS)
    assert steps(made) == [("promote", 1, 2, 1)]


def test_a_block_is_promoted_from_its_fastest_replica() -> None:
    made = plan(
        snapshot([tier(0, 0), tier(1, 10), tier(2, 10)], [block(1, 1, 2, heat=3)]), SETTINGS
    )
    assert steps(made) == [("promote", 1, 1, 0)]


def test_a_relieved_tier_takes_nothing_that_is_hardly_hotter_than_what_it_sent_away() -> None:
    views = [tier(0, 960), tier(1, 20)]
    blocks = [block(1, 0, heat=4, size=60), block(2, 1, heat=6)]
    assert steps(plan(snapshot(views, blocks), SETTINGS)) == [("demote", 1, 0, 1)]
    hotter = [blocks[0], block(2, 1, heat=9)]
    assert steps(plan(snapshot(views, hotter), SETTINGS))[-1] == ("promote", 2, 1, 0)


def test_a_promotion_that_finds_no_place_in_the_plan_displaces_nothing() -> None:
    blocks = [block(1, 1, heat=8, size=20), block(2, 0, heat=1), block(3, 0, heat=1)]
    view = snapshot([tier(0, 950), tier(1, 20)], blocks)
    assert plan(view, replace(SETTINGS, max_moves=2)).moves == ()
    assert len(plan(view, replace(SETTINGS, max_moves=3)).moves) == 3


def test_a_promotion_does_not_drop_its_own_source() -> None:
    # Block 2 would have to go down, and only the copies of block 1 could make room for it there.
    blocks = [block(1, 1, 2, heat=8), block(2, 0, heat=1)]
    made = plan(snapshot([tier(0, 950), tier(1, 950), tier(2, 950)], blocks), SETTINGS)
    assert made.moves == ()


def test_a_promotion_displaces_nothing_on_the_tiers_below_that_is_hardly_colder() -> None:
    blocks = [block(1, 2, heat=8), block(2, 0, heat=1), block(3, 1, heat=5)]
    made = plan(snapshot([tier(0, 950), tier(1, 950), tier(2, 10)], blocks), SETTINGS)
    assert steps(made) == [("demote", 2, 0, 2), ("promote", 1, 2, 0)]


def test_a_promotion_that_fails_leaves_room_for_the_next() -> None:
    blocks = [block(1, 1, heat=8, size=100), block(2, 1, heat=4), block(3, 0, heat=3)]
    made = plan(snapshot([tier(0, 900), tier(1, 110)], blocks), SETTINGS)
    assert steps(made) == [("promote", 2, 1, 0)]


def test_a_block_that_is_demoted_is_not_promoted_by_the_same_plan() -> None:
    view = snapshot([tier(0, 0), tier(1, 960), tier(2, 0)], [block(1, 1, heat=3, size=60)])
    assert steps(plan(view, SETTINGS)) == [("demote", 1, 1, 2)]


# Why


@pytest.mark.parametrize(
    ("subject", "sentence"),
    [
        (block(1, 0, pinned=True), "it is pinned, so it stays on nvme"),
        (block(1, 1, movable=False), "it is open or not sealed yet, so it stays on hdd"),
        (block(1, 2), "its only replica is on remote, which is offline"),
        (block(1, 1, heat=0.5), "it stays on hdd: heat 0.5 is below 1.5"),
        (
            block(1, 0, heat=0.5),
            "nvme is the fastest tier online; heat 0.5, and the coldest leave when nvme is more "
            "than 95 % full",
        ),
        (
            block(1, 1, heat=4),
            "the next pass lets it be copied from hdd to nvme: heat 4.0 >= 1.5 and room on nvme",
        ),
        (
            block(1, 1, heat=4, size=5000),
            "it is hot enough to leave hdd (heat 4.0), but the promotion budget of nvme is used up",
        ),
        (
            block(1, 1, heat=4, size=990),
            "it is hot enough to leave hdd (heat 4.0), but too few blocks on nvme are at least 2x "
            "colder and free to make room",
        ),
    ],
)
def test_explain_says_why_a_block_is_where_it_is(subject: BlockView, sentence: str) -> None:
    views = [tier(0, 100, budget=1000), tier(1, 100), tier(2, 0, online=False)]
    assert explain(subject, snapshot(views, [subject]), SETTINGS) == sentence


def test_explain_names_the_move_that_the_next_pass_makes() -> None:
    cold = block(1, 0, size=60)
    evicted = explain(cold, snapshot([tier(0, 960)], [cold]), SETTINGS)
    assert evicted == (
        "the next pass lets it be evicted from nvme: nvme is 96 % full, coldest first"
    )
    demoted = explain(cold, snapshot([tier(0, 960), tier(1, 0)], [cold]), SETTINGS)
    assert demoted == (
        "the next pass lets it move from nvme to hdd: nvme is 96 % full, coldest first"
    )


# What holds for every plan


@dataclass
class State:
    """The tiers while the moves of a plan are carried out one after the other."""

    tiers: list[TierView]
    blocks: dict[int, BlockView]

    @classmethod
    def of(cls, view: Snapshot) -> State:
        residents = (b for of_tier in (*view.coldest, *view.hottest) for b in of_tier)
        return cls(list(view.tiers), {b.inode: b for b in residents})

    def snapshot(self) -> Snapshot:
        return snapshot(self.tiers, self.blocks.values())

    def used(self, index: int) -> int:
        return self.tiers[index].used_bytes

    def apply(self, made: Plan) -> None:
        for move in made.moves:
            self._carry_out(move)

    def _carry_out(self, move: Move) -> None:
        moved = self.blocks[move.inode]
        replicas = set(moved.tiers)
        assert move.size_bytes == moved.size_bytes
        assert move.source in replicas
        assert self.tiers[move.source].online
        if move.kind != "promote":
            replicas.discard(move.source)
            self._use(move.source, -move.size_bytes)
        if move.target is not None:
            assert move.target not in moved.tiers
            self._use(move.target, move.size_bytes)
            view = self.tiers[move.target]
            assert view.online
            assert view.used_bytes <= view.capacity_bytes
            replicas.add(move.target)
        assert (move.target is None) == (move.kind in ("drop", "evict"))
        assert bool(replicas) == (move.kind != "evict")
        self.blocks[move.inode] = replace(moved, tiers=tuple(sorted(replicas)))

    def _use(self, index: int, n: int) -> None:
        view = self.tiers[index]
        self.tiers[index] = replace(view, used_bytes=view.used_bytes + n)


policy_settings = st.builds(
    PolicySettings,
    promote_heat=st.sampled_from([0.0, 0.5, 1.5, 4.0]),
    hysteresis=st.sampled_from([1.0, 1.3, 2.0, 4.0]),
    on_full=st.sampled_from(["evict", "refuse"]),
    max_moves=st.integers(0, 12) | st.just(1000),
)


@st.composite
def block_lists(draw: st.DrawFn, tiers: int, *, free: bool, replicas: int) -> list[BlockView]:
    """Up to 30 blocks with taus that are exact in doubles; `free` ones may all move."""
    flag = st.just(False) if free else st.sampled_from([False, False, False, True])
    where = st.sets(st.integers(0, tiers - 1), min_size=1, max_size=replicas)
    drawn = draw(
        st.lists(
            st.builds(
                BlockView,
                inode=st.just(0),
                size_bytes=st.integers(0, 60),
                tau=st.integers(-1000, 1000).map(lambda s: NOW_S + s) | st.just(never),
                tiers=where.map(lambda indices: tuple(sorted(indices))),
                pinned=flag,
                keep=flag,
                movable=flag.map(lambda no: not no),
            ),
            max_size=30,
        )
    )
    return [replace(b, inode=inode) for inode, b in enumerate(drawn, start=1)]


def resident_bytes(blocks: Iterable[BlockView], index: int) -> int:
    return sum(b.size_bytes for b in blocks if index in b.tiers)


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Anything the daemon may meet: offline and overfull tiers, candidate lists cut short."""
    count = draw(st.integers(1, 4))
    blocks = draw(block_lists(count, free=False, replicas=count))
    views = []
    for index in range(count):
        used = resident_bytes(blocks, index) + draw(st.integers(0, 100))
        capacity = int(used / draw(st.floats(0.3, 1.2)))
        low, high = sorted(draw(st.lists(st.floats(0.3, 1.0), min_size=2, max_size=2)))
        budget = draw(st.integers(0, 200) | st.just(10**9))
        online = draw(st.sampled_from([True, True, True, False]))
        views.append(TierView(index, NAMES[index], capacity, used, high, low, budget, online))
    view = snapshot(views, blocks)
    cut = draw(st.integers(1, 30))
    return replace(
        view,
        coldest=tuple(residents[:cut] for residents in view.coldest),
        hottest=tuple(residents[:cut] for residents in view.hottest),
    )


@st.composite
def roomy_snapshots(draw: st.DrawFn, replicas: int) -> Snapshot:
    """Every block may move, and each tier has room for all that lies above it."""
    count = draw(st.integers(1, 4))
    blocks = draw(block_lists(count, free=True, replicas=replicas))
    views = []
    above = 0
    for index in range(count):
        used = resident_bytes(blocks, index)
        low, high = sorted(draw(st.lists(st.floats(0.3, 1.0), min_size=2, max_size=2)))
        capacity = max(int(used / draw(st.floats(0.3, 1.2))), math.ceil(above / low) + 1)
        views.append(TierView(index, NAMES[index], capacity, used, high, low, 10**9, True))
        above += used
    return snapshot(views, blocks)


@given(snapshots(), policy_settings)
def test_every_plan_can_be_carried_out_in_its_order(view: Snapshot, knobs: PolicySettings) -> None:
    state = State.of(view)
    state.apply(plan(view, knobs))


@given(snapshots() | roomy_snapshots(replicas=4), policy_settings)
def test_space_is_freed_on_a_tier_before_it_is_filled(
    view: Snapshot, knobs: PolicySettings
) -> None:
    filled: set[int] = set()
    for move in plan(view, knobs).moves:
        assert move.kind == "promote" or move.source not in filled
        if move.target is not None:
            filled.add(move.target)


@given(snapshots(), policy_settings)
def test_a_plan_names_each_block_once_and_only_those_that_may_move(
    view: Snapshot, knobs: PolicySettings
) -> None:
    made = plan(view, knobs)
    named = [move.inode for move in made.moves]
    assert len(named) == len(set(named)) <= knobs.max_moves
    blocks = State.of(view).blocks
    assert all(blocks[inode].movable and not blocks[inode].pinned for inode in named)


@given(snapshots(), policy_settings)
def test_only_the_last_tier_evicts_and_never_what_is_kept(
    view: Snapshot, knobs: PolicySettings
) -> None:
    blocks = State.of(view).blocks
    last = max((t.index for t in view.tiers if t.online), default=None)
    for move in plan(view, knobs).moves:
        if move.kind == "evict":
            assert knobs.on_full == "evict"
            assert blocks[move.inode].tiers == (last,)
            assert not blocks[move.inode].keep


@given(snapshots(), policy_settings)
def test_only_a_tier_above_its_watermark_or_asked_for_room_loses_a_block(
    view: Snapshot, knobs: PolicySettings
) -> None:
    made = plan(view, knobs)
    fastest = min((t.index for t in view.tiers if t.online), default=0)
    if view.tiers[fastest].used_bytes <= view.tiers[fastest].high_bytes and knobs.max_moves > 12:
        leaving = [m for m in made.moves if m.source == fastest]
        arriving = [m for m in made.moves if m.target == fastest]
        assert not leaving or arriving


@given(snapshots(), policy_settings)
def test_promotions_keep_within_budget_and_below_the_high_watermark(
    view: Snapshot, knobs: PolicySettings
) -> None:
    made, state = plan(view, knobs), State.of(view)
    state.apply(made)
    for target in view.tiers:
        promoted = [m for m in made.moves if m.kind == "promote" and m.target == target.index]
        assert sum(move.size_bytes for move in promoted) <= target.promote_budget_bytes
        if promoted:
            assert state.used(target.index) <= target.high_bytes


@given(snapshots(), policy_settings)
def test_what_comes_up_is_hot_and_hotter_than_what_leaves_for_it(
    view: Snapshot, knobs: PolicySettings
) -> None:
    made, blocks = plan(view, knobs), State.of(view).blocks
    online = {t.index for t in view.tiers if t.online}
    margin_s = HALF_LIFE_S * math.log2(knobs.hysteresis)
    for move in made.moves:
        if move.kind != "promote" or move.target is None:
            continue
        hot = blocks[move.inode]
        assert heat_at(hot.tau, view.now, view.half_life_s) >= knobs.promote_heat
        assert move.target < move.source == min(online.intersection(hot.tiers))
        for other in made.moves:
            cold = blocks[other.inode]
            is_spare = any(t < move.target and t in online for t in cold.tiers)
            if other.source == move.target and other.kind != "promote" and not is_spare:
                assert hot.tau - cold.tau >= margin_s


@given(snapshots(), policy_settings, st.integers(-(10**8), 10**8))
def test_a_plan_is_invariant_under_time_shift(
    view: Snapshot, knobs: PolicySettings, shift_s: int
) -> None:
    def shifted(residents: tuple[tuple[BlockView, ...], ...]) -> tuple[tuple[BlockView, ...], ...]:
        return tuple(tuple(replace(b, tau=b.tau + shift_s) for b in r) for r in residents)

    later = replace(
        view,
        now=view.now + shift_s,
        coldest=shifted(view.coldest),
        hottest=shifted(view.hottest),
    )
    assert plan(later, knobs) == plan(view, knobs)


@settings(max_examples=400)
@given(roomy_snapshots(replicas=1))
def test_a_plan_ends_below_the_low_watermark_when_it_can(view: Snapshot) -> None:
    state = State.of(view)
    state.apply(plan(view, replace(SETTINGS, promote_heat=math.inf)))
    for before in view.tiers:
        if before.used_bytes > before.high_bytes:
            assert state.used(before.index) <= before.low_bytes
        else:
            assert state.used(before.index) <= before.high_bytes


@given(roomy_snapshots(replicas=4))
def test_a_tier_stays_full_only_if_all_its_blocks_are_moved_already(view: Snapshot) -> None:
    state, made = State.of(view), plan(view, replace(SETTINGS, promote_heat=math.inf))
    state.apply(made)
    named = {move.inode for move in made.moves}
    for before in view.tiers:
        if before.used_bytes > before.high_bytes and state.used(before.index) > before.low_bytes:
            stays = [b for b in view.coldest[before.index] if b.size_bytes]
            assert all(b.inode in named for b in stays)


@given(roomy_snapshots(replicas=4), policy_settings)
def test_with_promotions_every_tier_with_a_movable_block_ends_below_the_high_watermark(
    view: Snapshot, knobs: PolicySettings
) -> None:
    state = State.of(view)
    made = plan(view, replace(knobs, on_full="evict", max_moves=1000))
    state.apply(made)
    named = {move.inode for move in made.moves}
    for before in view.tiers:
        if state.used(before.index) > before.high_bytes:
            stays = [b for b in view.coldest[before.index] if b.size_bytes]
            assert all(b.inode in named for b in stays)


@given(snapshots(), policy_settings)
def test_every_block_can_be_explained_in_one_line(view: Snapshot, knobs: PolicySettings) -> None:
    for subject in list(State.of(view).blocks.values())[:3]:
        sentence = explain(subject, view, knobs)
        assert sentence
        assert "\n" not in sentence
        assert "nan" not in sentence
