"""What a token bucket and a daily write budget let through."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvfs.policy.budget import UNLIMITED_BYTES, Budget, DailyBudget, available_bytes

NOW_S = 1_800_000_000.0
DAY_S = 86_400.0


def test_a_bucket_starts_full_and_refills_at_its_rate() -> None:
    full = Budget(rate_bytes_per_s=100, burst_bytes=1000)
    assert full.available(NOW_S) == 1000
    empty = full.spend(NOW_S, 1000)
    assert empty.available(NOW_S) == 0
    assert empty.available(NOW_S + 4) == 400
    assert empty.available(NOW_S + 60) == 1000


def test_spending_leaves_the_old_budget_as_it_was() -> None:
    budget = Budget(rate_bytes_per_s=100, burst_bytes=1000)
    budget.spend(NOW_S, 500)
    assert budget.available(NOW_S) == 1000


def test_what_was_overspent_is_paid_back_before_the_next_byte() -> None:
    budget = Budget(rate_bytes_per_s=100, burst_bytes=1000).spend(NOW_S, 1500)
    assert budget.available(NOW_S) == 0
    assert budget.available(NOW_S + 5) == 0
    assert budget.available(NOW_S + 6) == 100


def test_a_clock_that_steps_back_refills_nothing() -> None:
    budget = Budget(rate_bytes_per_s=100, burst_bytes=1000).spend(NOW_S, 1000)
    assert budget.available(NOW_S - 3600) == 0


@given(
    st.integers(0, 10**9),
    st.integers(0, 10**10),
    st.lists(st.tuples(st.floats(0, 1000), st.integers(0, 10**9)), max_size=20),
)
def test_no_more_than_burst_plus_rate_ever_passes(
    rate: int, burst: int, wishes: list[tuple[float, int]]
) -> None:
    budget, now, passed = Budget(rate, burst), NOW_S, 0
    for wait_s, wish in wishes:
        now += wait_s
        granted = min(wish, budget.available(now))
        assert 0 <= granted <= burst
        budget = budget.spend(now, granted)
        passed += granted
    # The clock in a double is exact to a microsecond, so the rate may err by that per step.
    assert passed <= burst + rate * (now - NOW_S + 1e-6 * len(wishes)) + 1


def test_a_daily_budget_is_whole_again_on_the_next_day() -> None:
    midnight = NOW_S // DAY_S * DAY_S
    budget = DailyBudget(bytes_per_day=1000).spend(midnight + 10, 700)
    assert budget.available(midnight + DAY_S - 1) == 300
    assert budget.spend(midnight + 20, 400).available(midnight + 30) == 0
    assert budget.available(midnight + DAY_S) == 1000
    assert budget.spend(midnight + DAY_S, 100).available(midnight + DAY_S) == 900


def test_the_tightest_budget_decides() -> None:
    bucket = Budget(rate_bytes_per_s=1, burst_bytes=500)
    daily = DailyBudget(bytes_per_day=300)
    assert available_bytes(NOW_S, bucket, daily) == 300
    assert available_bytes(NOW_S, bucket, None) == 500


def test_without_a_budget_everything_is_allowed() -> None:
    assert available_bytes(NOW_S) == UNLIMITED_BYTES
    assert available_bytes(NOW_S, None, None) == UNLIMITED_BYTES
