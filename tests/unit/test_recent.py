"""The bounded memory of rows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvfs.catalog.recent import Recent


@given(st.integers(1, 4), st.lists(st.tuples(st.booleans(), st.integers(0, 6))))
def test_it_answers_what_was_put_last_or_nothing_and_stays_small(
    limit: int, steps: list[tuple[bool, int]]
) -> None:
    recent = Recent[int, int](limit)
    model: dict[int, int] = {}
    for turn, (putting, inode) in enumerate(steps):
        if putting:
            assert recent.put(inode, turn) == turn
            model[inode] = turn
            assert recent.get(inode) == turn
        else:
            recent.forget(inode)
            model.pop(inode, None)
            assert recent.get(inode) is None
        assert len(recent) <= limit
        for known, value in model.items():
            assert recent.get(known) in (None, value)


def test_the_oldest_leaves_first_and_clear_forgets_all() -> None:
    recent = Recent[int, str](2)
    recent.put(1, "a")
    recent.put(2, "b")
    recent.put(1, "again")
    recent.put(3, "c")
    assert [recent.get(inode) for inode in (1, 2, 3)] == [None, "b", "c"]
    recent.clear()
    assert len(recent) == 0
