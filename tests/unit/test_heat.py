"""The arithmetic of heat: what it counts, and that no clock, half-life or shift breaks it."""

from __future__ import annotations

import math
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs.policy.heat import MAX_HALF_LIVES_AHEAD, clamp, heat_at, never, tau_for, touch

YEAR_S = 365.25 * 86_400
TEN_YEARS_S = 10 * YEAR_S
NOW_S = 1_800_000_000.0
ROUNDING_S = 1e-3  # a wall-clock time in a double is exact to a quarter of a microsecond

half_lives = st.floats(1e-3, TEN_YEARS_S)
times = st.floats(NOW_S - TEN_YEARS_S, NOW_S + TEN_YEARS_S)
taus = times | st.just(never)
accesses = st.lists(st.integers(0, 86_400), min_size=1, max_size=30, unique=True)


def tau_of(access_times: list[int], half_life_s: float, shift_s: float = NOW_S) -> float:
    return reduce(lambda tau, t: touch(tau, t + shift_s, half_life_s), sorted(access_times), never)


def test_a_block_used_once_has_the_time_of_that_use_as_tau() -> None:
    assert touch(never, NOW_S, 120.0) == NOW_S
    assert heat_at(NOW_S, NOW_S, 120.0) == 1.0


def test_heat_halves_with_every_half_life() -> None:
    assert heat_at(NOW_S, NOW_S + 120.0, 120.0) == 0.5
    assert heat_at(NOW_S, NOW_S + 360.0, 120.0) == 0.125


def test_a_block_never_used_has_no_heat() -> None:
    assert heat_at(never, NOW_S, 120.0) == 0.0
    assert touch(never, never, 120.0) == never
    assert clamp(never, NOW_S, 120.0) == never
    assert tau_for(0.0, NOW_S, 120.0) == never


@given(accesses, half_lives)
def test_heat_is_the_decayed_count_of_accesses(access_times: list[int], half_life_s: float) -> None:
    end = max(access_times)
    expected = sum(2.0 ** ((t - end) / half_life_s) for t in access_times)
    heat = heat_at(tau_of(access_times, half_life_s), NOW_S + end, half_life_s)
    # The rounding of tau, in half-lives, is the relative error of the heat.
    assert heat == pytest.approx(expected, rel=1e-9 + 1e-5 / half_life_s)


@given(taus, taus, half_lives)
def test_touch_commutes_and_never_cools(a: float, b: float, half_life_s: float) -> None:
    merged = touch(a, b, half_life_s)
    assert merged == touch(b, a, half_life_s)
    assert merged >= max(a, b)
    assert merged <= max(a, b) + half_life_s


@given(taus, taus, taus, half_lives)
def test_merging_taus_is_associative(a: float, b: float, c: float, half_life_s: float) -> None:
    left = touch(touch(a, b, half_life_s), c, half_life_s)
    right = touch(a, touch(b, c, half_life_s), half_life_s)
    assert left == pytest.approx(right, abs=ROUNDING_S)


@given(taus, half_lives)
def test_never_is_the_identity(tau: float, half_life_s: float) -> None:
    assert touch(tau, never, half_life_s) == tau
    assert touch(never, tau, half_life_s) == tau


@given(taus, taus, times, half_lives, half_lives)
def test_nothing_overflows_when_the_half_life_changes(
    a: float, b: float, t: float, before_s: float, after_s: float
) -> None:
    tau = touch(a, b, before_s)
    for half_life_s in (before_s, after_s):
        heat = heat_at(tau, t, half_life_s)
        assert 0.0 <= heat <= 2.0**MAX_HALF_LIVES_AHEAD
        assert not math.isnan(touch(tau, t, half_life_s))
        assert not math.isnan(clamp(tau, t, half_life_s))


@given(half_lives)
def test_an_access_every_second_for_ten_years_is_counted_right(half_life_s: float) -> None:
    tau, span_s = NOW_S, 1.0
    while span_s < TEN_YEARS_S:
        # Everything so far, and the same again one span later.
        tau = touch(tau, tau + span_s, half_life_s)
        span_s *= 2
    log_kept = math.log(2.0) / half_life_s
    expected = math.expm1(-span_s * log_kept) / math.expm1(-log_kept)
    heat = heat_at(tau, NOW_S + span_s - 1.0, half_life_s)
    assert heat == pytest.approx(expected, rel=1e-6 + 1e-4 / half_life_s)


@given(accesses, accesses, half_lives, st.integers(-int(YEAR_S), int(TEN_YEARS_S)))
def test_order_is_invariant_under_time_shift(
    one: list[int], other: list[int], half_life_s: float, shift_s: int
) -> None:
    apart = tau_of(one, half_life_s) - tau_of(other, half_life_s)
    shifted = NOW_S + shift_s
    apart_shifted = tau_of(one, half_life_s, shifted) - tau_of(other, half_life_s, shifted)
    assert apart_shifted == pytest.approx(apart, abs=ROUNDING_S)
    if abs(apart) > 2 * ROUNDING_S:
        assert (apart > 0) == (apart_shifted > 0)


@given(taus, taus, times, half_lives, half_lives)
def test_order_of_heats_is_the_order_of_taus_at_any_time_and_half_life(
    a: float, b: float, t: float, one_s: float, other_s: float
) -> None:
    cold, hot = sorted((a, b))
    for half_life_s in (one_s, other_s):
        assert heat_at(cold, t, half_life_s) <= heat_at(hot, t, half_life_s)


@given(st.lists(accesses, min_size=2, max_size=8))
def test_a_short_half_life_orders_as_lru(blocks: list[list[int]]) -> None:
    by_heat = sorted(blocks, key=lambda block: tau_of(block, 1e-3))
    last_uses = [max(block) for block in by_heat]
    assert last_uses == sorted(last_uses)


@given(st.lists(accesses, min_size=2, max_size=8))
def test_a_long_half_life_orders_as_lfu(blocks: list[list[int]]) -> None:
    by_heat = sorted(blocks, key=lambda block: tau_of(block, TEN_YEARS_S))
    uses = [len(block) for block in by_heat]
    assert uses == sorted(uses)


@given(times, times, half_lives)
def test_clamp_bounds_how_long_a_wrong_clock_matters(
    tau: float, t: float, half_life_s: float
) -> None:
    bound = t + MAX_HALF_LIVES_AHEAD * half_life_s
    assert clamp(tau, t, half_life_s) == (tau if tau <= bound else bound)


@given(st.floats(1e-6, 1e6), times, half_lives)
def test_tau_for_is_the_inverse_of_heat_at(heat: float, t: float, half_life_s: float) -> None:
    tau = tau_for(heat, t, half_life_s)
    assert heat_at(tau, t, half_life_s) == pytest.approx(heat, rel=1e-9 + 1e-5 / half_life_s)
