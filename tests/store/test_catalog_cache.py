"""What the catalog remembers of its rows is what is in the database, whatever was rolled back."""

from __future__ import annotations

import sqlite3
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvfs.catalog import catalog as catalog_module
from kvfs.catalog.catalog import Catalog
from kvfs.catalog.rows import GOOD, ROOT_INODE, SUSPECT, BlockState, Inode, Kind, Replica

TIERS = (1, 2)
NAMES = (b"a", b"b", b"c")


class Undo(Exception):
    """A reason to roll back."""


class RememberedRows(RuleBasedStateMachine):
    """Every way to change a row, kept or rolled back, beside one that remembers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        path = Path(self.directory.name) / "catalog.sqlite"
        self.catalog = Catalog(path)
        self.catalog.insert_inode(Kind.DIRECTORY, 0o755, 0, 0, 0, inode=ROOT_INODE)
        self.plain = sqlite3.connect(path)
        self.inodes: list[int] = []
        self.changed: set[int] = set()
        self.catalog.changing = self.changed.add

    def teardown(self) -> None:
        self.plain.close()
        self.catalog.close()
        self.directory.cleanup()

    def pick(self, number: int) -> int:
        return self.inodes[number % len(self.inodes)] if self.inodes else 99

    @rule(name=st.sampled_from(NAMES), keep=st.booleans())
    def create(self, name: bytes, keep: bool) -> None:
        made = 0
        try:
            with self.catalog.transaction("test"):
                made = self.catalog.insert_inode(Kind.BLOCK, 0o644, 1, 2, 3)
                self.catalog.link(ROOT_INODE, name, made)
                self.catalog.add_replica(made, 1, 0, 1.0)
                if not keep:
                    raise Undo
        except (Undo, sqlite3.IntegrityError):
            return
        self.inodes.append(made)

    @rule(number=st.integers(0, 5), size=st.integers(0, 9), keep=st.booleans())
    def change(self, number: int, size: int, keep: bool) -> None:
        inode = self.pick(number)
        try:
            with self.catalog.transaction("test"):
                self.catalog.update(inode, size_bytes=size, state=int(BlockState.SEALED))
                self.catalog.update_replica(inode, 1, allocated_bytes=size)
                if not keep:
                    raise Undo
        except Undo:
            pass
        assert inode in self.changed

    @rule(
        number=st.integers(0, 5),
        tier=st.sampled_from(TIERS),
        state=st.sampled_from((GOOD, SUSPECT)),
    )
    def add_replica(self, number: int, tier: int, state: int) -> None:
        if self.inodes:
            self.catalog.add_replica(self.pick(number), tier, 7, 2.0, fanned=True, state=state)

    @rule(number=st.integers(0, 5), tier=st.sampled_from(TIERS))
    def drop_replica(self, number: int, tier: int) -> None:
        self.catalog.drop_replica(self.pick(number), tier)

    @rule(number=st.integers(0, 5), state=st.sampled_from((GOOD, SUSPECT)))
    def mark(self, number: int, state: int) -> None:
        self.catalog.set_replica_states(self.pick(number), state, besides=2)

    @rule(number=st.integers(0, 5), tau=st.floats(0, 9))
    def heat(self, number: int, tau: float) -> None:
        self.catalog.set_tau(self.pick(number), tau, 17)
        self.catalog.clamp_heat(5.0)

    @rule(number=st.integers(0, 5), name=st.sampled_from(NAMES))
    def rename(self, number: int, name: bytes) -> None:
        if self.inodes and self.catalog.lookup(ROOT_INODE, name) is None:
            with self.catalog.transaction("test"):
                self.catalog.relink(self.pick(number), ROOT_INODE, name)

    @rule(number=st.integers(0, 5), keep=st.booleans())
    def delete(self, number: int, keep: bool) -> None:
        if not self.inodes:
            return
        inode = self.pick(number)
        try:
            with self.catalog.transaction("test"):
                self.catalog.delete(inode)
                if not keep:
                    raise Undo
        except Undo:
            return
        self.inodes.remove(inode)

    @invariant()
    def what_is_remembered_is_what_is_there(self) -> None:
        for inode in (*self.inodes, 99):
            columns = ", ".join(Inode._fields)
            row = self.plain.execute(
                f"SELECT {columns} FROM inode WHERE id = ?", (inode,)
            ).fetchone()
            assert self.catalog.get(inode) == (Inode._make(row) if row else None)
            columns = ", ".join(Replica._fields)
            rows = self.plain.execute(f"SELECT {columns} FROM replica WHERE inode = ?", (inode,))
            assert sorted(self.catalog.replicas(inode)) == sorted(map(Replica._make, rows))
            entry = self.plain.execute(
                "SELECT parent, name FROM dirent WHERE inode = ?", (inode,)
            ).fetchone()
            assert self.catalog.entry(inode) == entry
        for name in NAMES:
            found = self.catalog.lookup(ROOT_INODE, name)
            there = self.plain.execute(
                "SELECT inode FROM dirent WHERE parent = ? AND name = ?", (ROOT_INODE, name)
            ).fetchone()
            assert (found and found.id) == (there and there[0])
            assert self.catalog.known(ROOT_INODE, name) in (0, there and there[0])


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that rows are also forgotten for others."""
    monkeypatch.setattr(catalog_module, "ROWS_CACHED", 3)


RememberedRows.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
test_rows_are_remembered_right = RememberedRows.TestCase
