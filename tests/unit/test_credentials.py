"""What mode and owner let somebody do, as the kernel decides it."""

from __future__ import annotations

import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs.catalog.rows import Inode, Kind
from kvfs.leasing.credentials import READ, SEARCH, WRITE, Credentials, inherited

IDS = st.sampled_from([0, 1, 2, 3])


def row(mode: int, uid: int, gid: int, kind: Kind = Kind.BLOCK) -> Inode:
    return Inode(7, kind, mode, uid, gid, 0, 0, 0, 0, 1, 2, None, None, None)


def as_posix_says(who: Credentials, inode: Inode, wanted: int) -> bool:
    """One class of bits decides: the owner's, else the group's, else that of all others."""
    if who.uid == 0:
        return True
    if who.uid == inode.uid:
        bits = inode.mode >> 6 & 7
    elif inode.gid in {who.gid, *who.groups}:
        bits = inode.mode >> 3 & 7
    else:
        bits = inode.mode & 7
    return bits & wanted == wanted


@given(
    st.integers(0, 0o7777), IDS, IDS, IDS, IDS, st.frozensets(IDS, max_size=3),
    st.integers(0, 7),
)  # fmt: skip
def test_the_first_class_that_fits_decides(
    mode: int, uid: int, gid: int, owner: int, group: int, groups: frozenset[int], wanted: int
) -> None:
    who, inode = Credentials(uid, gid, groups), row(mode, owner, group)
    assert who.may(inode, wanted) == as_posix_says(who, inode, wanted)


def test_an_owner_gets_nothing_from_his_group() -> None:
    assert not Credentials(5, 5).may(row(0o044, 5, 5), READ)
    assert Credentials(6, 5).may(row(0o044, 5, 5), READ)
    assert Credentials(6, 6, frozenset({5})).may(row(0o040, 5, 5), READ)
    assert not Credentials(6, 6).may(row(0o040, 5, 5), READ)


@pytest.mark.parametrize(
    ("uid", "mode", "allowed"),
    [(5, 0o777, True), (5, 0o1777, False), (7, 0o1777, True), (8, 0o1777, True), (0, 0o1777, True)],
)
def test_in_a_sticky_directory_only_owners_replace(uid: int, mode: int, allowed: bool) -> None:
    directory, inode = row(mode, 8, 8, Kind.DIRECTORY), row(0o666, 7, 7)
    assert Credentials(uid, uid).may_replace(directory, inode) == allowed


def test_replacing_needs_the_directory_not_the_file() -> None:
    assert Credentials(5, 5).may_replace(row(0o300, 5, 5, Kind.DIRECTORY), row(0, 7, 7))
    assert not Credentials(5, 5).may_replace(row(0o500, 5, 5, Kind.DIRECTORY), row(0o666, 5, 5))


def test_a_set_group_id_directory_passes_its_group_on() -> None:
    plain, passing = row(0o755, 1, 9, Kind.DIRECTORY), row(0o2755, 1, 9, Kind.DIRECTORY)
    assert inherited(plain, 0o644, 3) == (0o644, 3)
    assert inherited(None, 0o644, 3) == (0o644, 3)
    assert inherited(passing, 0o644, 3) == (0o644, 9)
    assert inherited(passing, 0o755, 3, is_directory=True) == (0o755 | stat.S_ISGID, 9)


def test_the_bits_are_those_of_access() -> None:
    assert (READ, WRITE, SEARCH) == (os.R_OK, os.W_OK, os.X_OK)
