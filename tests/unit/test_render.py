"""What the command makes of names, numbers and documents."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs.tools.render import ago_text, json_text, name_text, usage_bar


@given(st.binary())
def test_json_carries_every_name(name: bytes) -> None:
    text = json_text({"path": name})
    assert text.isascii()
    assert os.fsencode(json.loads(text)["path"]) == name


@given(st.binary())
def test_shown_names_are_printable_and_one_line(name: bytes) -> None:
    shown = name_text(name)
    assert shown.isprintable()
    shown.encode()


@pytest.mark.parametrize(
    ("name", "shown"),
    [(b"a b", "a b"), (b"a\nb", r"a\nb"), (b"\x1b[1m", r"\x1b[1m"), (b"\xff", r"\xff"), ("ü", "ü")],
)
def test_names_keep_what_can_be_shown(name: bytes | str, shown: str) -> None:
    assert name_text(name) == shown


def test_json_has_no_infinities() -> None:
    document = {"heat": float("-inf"), "tiers": ({"name": b"a"},)}
    assert json.loads(json_text(document)) == {"heat": None, "tiers": [{"name": "a"}]}


@given(st.integers(0, 2**60), st.integers(0, 2**60), st.integers(1, 2**60), st.integers(1, 40))
def test_a_bar_has_its_length_whatever_it_shows(
    used: int, claimed: int, capacity: int, cells: int
) -> None:
    bar = usage_bar(used, claimed, capacity, cells).plain
    assert sum(bar.count(char) for char in "█▒░") == cells


def test_a_little_reserved_space_is_seen() -> None:
    assert usage_bar(50, 1, 100, 10).plain == "█████▒░░░░  51%"


def test_ages() -> None:
    assert ago_text(None) == "never"
    assert ago_text(100.0, now_s=225.0) == "2m 5s ago"
    assert ago_text(200.0, now_s=100.0) == "0ms ago"
