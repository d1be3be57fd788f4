"""The exerciser's expectation against bytes and directories; and that it notices what is wrong."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs.tools.exerciser import Failure, exercise
from kvfs.tools.exerciser_model import (
    NEWEST_SET_NS,
    TICK_NS,
    Change,
    ExpectedFile,
    ExpectedTree,
    Mismatch,
    compare,
    first_difference,
)

NOW_NS = NEWEST_SET_NS + 10**18
PAST_NS = 10**9
writes = st.tuples(st.integers(0, 10_000), st.binary(min_size=1, max_size=5000))


def run(directory: Path, *options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvfs.tools.exerciser", directory, *options]
    return subprocess.run([*map(str, command)], check=False, capture_output=True, text=True)


# --- the model


@given(st.lists(st.one_of(writes, st.integers(0, 12_000)), max_size=8))
def test_a_file_holds_what_was_written_and_zeros_between(steps: list[object]) -> None:
    file, plain = ExpectedFile("f"), io.BytesIO()
    for step in steps:
        if isinstance(step, tuple):
            offset, data = step
            file.write(offset, data)
            plain.seek(offset)
            plain.write(data)
        else:
            assert isinstance(step, int)
            file.resize(step)
            plain.truncate(step)
            plain.seek(0, os.SEEK_END)
            plain.write(bytes(step - plain.tell()))
    assert file.content == plain.getvalue()
    assert file.part(3, 4000) == plain.getvalue()[3:4003]


@given(st.binary(max_size=9000), st.binary(max_size=9000))
def test_the_first_difference_is_the_first(left: bytes, right: bytes) -> None:
    at = first_difference(left, right)
    if at is None:
        assert left == right
    else:
        assert left[:at] == right[:at]
        assert left[at : at + 1] != right[at : at + 1]


@given(st.binary(min_size=1, max_size=9000), st.data())
def test_a_changed_byte_is_found_with_its_offset(content: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(content) - 1))
    found = bytearray(content)
    found[at] ^= 0xFF
    with pytest.raises(Mismatch) as caught:
        compare("d/f", content, found, 1000)
    assert (caught.value.name, caught.value.offset) == ("d/f", 1000 + at)


@pytest.mark.parametrize(
    ("changed", "known_ns", "found_ns", "right"),
    [
        ("no", NOW_NS, NOW_NS, True),
        ("no", NOW_NS, NOW_NS + 1, False),
        ("maybe", PAST_NS, PAST_NS, True),
        ("maybe", PAST_NS, NOW_NS, True),
        ("yes", PAST_NS, NOW_NS, True),
        ("yes", PAST_NS, PAST_NS, False),
        ("yes", NOW_NS, NOW_NS, True),
        ("yes", NOW_NS, NOW_NS - TICK_NS, True),
        ("yes", NOW_NS, NOW_NS - TICK_NS - 1, False),
        ("maybe", NOW_NS, NOW_NS - TICK_NS - 1, False),
    ],
)
def test_times_move_when_a_file_changes_and_only_then(
    changed: Change, known_ns: int, found_ns: int, right: bool
) -> None:
    file = ExpectedFile("f", mtime_ns=known_ns, changed=changed)
    if right:
        file.check_mtime(found_ns)
    else:
        with pytest.raises(Mismatch):
            file.check_mtime(found_ns)


def test_a_late_time_may_come_at_any_time_but_must_be_there_when_all_is_settled() -> None:
    file = ExpectedFile("f", mtime_ns=PAST_NS, changed="no")
    file.store(0, b"x")
    file.check_mtime(PAST_NS)
    with pytest.raises(Mismatch):
        file.check_mtime(PAST_NS, settled=True)
    file.write(0, b"y")
    with pytest.raises(Mismatch):
        file.check_mtime(PAST_NS)
    file.check_mtime(NOW_NS)
    # That was the time of the first of several stores.
    file.check_mtime(NOW_NS + 1)
    file.check_mtime(NOW_NS + 2, settled=True)
    with pytest.raises(Mismatch):
        file.check_mtime(NOW_NS + 3)
    with pytest.raises(Mismatch):
        file.check_mtime(PAST_NS)


@pytest.mark.parametrize(
    ("content", "blocks", "right"),
    [(b"x", 8, True), (b"x", 0, False), (bytes(9), 0, True), (b"x", 100, False)],
)
def test_blocks_must_be_plausible(content: bytes, blocks: int, right: bool) -> None:
    file = ExpectedFile("f", bytearray(content))
    if right:
        file.check_blocks(blocks, slack_bytes=8192)
    else:
        with pytest.raises(Mismatch):
            file.check_blocks(blocks, slack_bytes=8192)


def test_a_directory_takes_everything_below_it_along() -> None:
    tree = ExpectedTree()
    tree.directories |= {"x", "x/y", "xy"}
    for path in ("a", "x/a", "x/y/a", "xy/a"):
        tree.create(path)
    tree.rename_directory("x", "z")
    assert tree.directories == {"", "xy", "z", "z/y"}
    assert {file.name for file in tree.files.values()} == {"a", "xy/a", "z/a", "z/y/a"}
    assert all(path == file.name for path, file in tree.files.items())
    assert tree.children("") == ["a", "xy", "z"]
    assert tree.children("z") == ["a", "y"]


# --- the whole, on a plain directory


def test_a_plain_directory_passes_and_a_seed_gives_the_same_tree(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        done = run(tmp_path / name, "--operations", 2000, "--seed", 3, "--no-forks")
        assert done.returncode == 0, done.stderr
        assert "seed 3, 2000 operations" in done.stdout

    def files(name: str) -> dict[str, bytes]:
        root = tmp_path / name
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    assert files("one") == files("two") != {}


def flip_a_byte(path: Path) -> None:
    status, data = path.stat(), bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))


def cut_off_a_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def change_the_time(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def rename_it(path: Path) -> None:
    path.rename(path.with_name("other"))


def give_it_an_attribute(path: Path) -> None:
    os.setxattr(path, "user.surplus", b"1")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (flip_a_byte, "at offset 7: "),
        (cut_off_a_byte, r"at offset \d+: \d+ bytes from 0 instead of \d+"),
        (change_the_time, "mtime 1 after"),
        (rename_it, r"lists \['other'\] too much"),
        (give_it_an_attribute, "xattrs "),
    ],
)
def test_a_later_comparison_finds_what_was_damaged(
    tmp_path: Path, damage: Callable[[Path], None], complaint: str
) -> None:
    directory, manifest = tmp_path / "d", tmp_path / "manifest"
    directory.mkdir()
    assert run(directory, "--operations", 200, "--manifest", manifest).returncode == 0
    assert run(directory, "--verify", "--manifest", manifest).returncode == 0
    victims = (p for p in directory.rglob("*") if p.is_file() and p.stat().st_size > 7)
    damage(min(victims))
    found = run(directory, "--verify", "--manifest", manifest)
    assert found.returncode == 1
    assert re.search(complaint, found.stderr)
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize("call", ["ftruncate", "fsync"])
def test_a_system_call_that_does_not_do_its_work_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """ftruncate that does nothing, fsync that fails."""

    def broken(descriptor: int, *_: object) -> None:
        if call == "fsync":
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, call, broken)
    with pytest.raises(Failure, match=r"^seed 5, operation \d+: .*; last: .* \| \d+: .*$"):
        exercise(tmp_path, 500, 5, forks=False)


def test_a_directory_with_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"x")
    assert run(tmp_path).returncode == 2
    assert (tmp_path / "precious").read_bytes() == b"x"
