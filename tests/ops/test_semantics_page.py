"""docs/SEMANTICS.md and the tests name the same sentences."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "SEMANTICS.md"
TAG = re.compile(r"\[(S-[a-z]+-\d+)\]")
MARK = re.compile(r"pytest\.mark\.semantics\(([^)]*)\)")


def tags_of_the_page() -> list[str]:
    return TAG.findall(PAGE.read_text())


def tags_of_the_tests() -> set[str]:
    marks = [
        arguments
        for file in sorted((ROOT / "tests").rglob("test_*.py"))
        for arguments in MARK.findall(file.read_text())
    ]
    return {tag for arguments in marks for tag in re.findall(r"S-[a-z]+-\d+", arguments)}


def test_each_sentence_has_a_test_and_each_marked_test_a_sentence() -> None:
    page = tags_of_the_page()
    assert [tag for tag, count in Counter(page).items() if count > 1] == []
    assert set(page) - tags_of_the_tests() == set()
    assert tags_of_the_tests() - set(page) == set()


def test_each_numbered_sentence_ends_with_its_tag() -> None:
    items = re.split(r"\n(?=\d+\. )", PAGE.read_text().split("## ", 1)[1])
    numbered = [re.split(r"\n\n|\n##", item)[0] for item in items if re.match(r"\d+\. ", item)]
    assert len(numbered) == len(tags_of_the_page())
    assert [item for item in numbered if not re.search(r"\[S-[a-z]+-\d+\]$", item)] == []
