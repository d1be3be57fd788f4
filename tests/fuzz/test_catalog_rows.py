"""Catalogs whose rows or bytes are damaged: the mount starts, from them or from the tiers, or says
in one line why not; and no name ever has bytes that it did not have before.

An input is an SQL script that damages the catalog of `filled`.
"""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from kvfs.catalog.catalog import Catalog
from kvfs.errors import KvfsError
from tests.fuzz.filled import CONTENTS, Copies, catalog_of, opened, try_everything
from tests.fuzz.fuzzing import check_message, fuzz, replay

COLUMNS = {
    "meta": ("key", "value"),
    "tier": ("number", "uuid", "name", "path"),
    "inode": (
        "id", "kind", "mode", "uid", "gid", "size_bytes", "atime_ns", "mtime_ns", "ctime_ns",
        "generation", "state", "checksum", "pin", "ttl_s",
    ),
    "dirent": ("inode", "parent", "name"),
    "replica": (
        "inode", "tier", "allocated_bytes", "state", "fanned", "tau", "verified", "mtime_ns",
        "codec", "saved_bytes",
    ),
    "xattr": ("inode", "name", "value"),
    "intent": ("id", "tier", "kind", "inode", "path", "target"),
    "ghost": ("key", "tau"),
    "sqlite_sequence": ("name", "seq"),
}  # fmt: skip
VALUES = st.sampled_from([
    "NULL", "-1", "0", "1", "2", "3", "4", "7", "1.5", "1e400", "-1e400", "9223372036854775807",
    "-9223372036854775808", "72057594037927936", "''", "'x'", "'1'", "'nvme'", "'unlink'",
    "'rename'", "X''", "X'00'", "X'2F'", "X'2E2E'", "X'2E6B766673'", "X'612F62'", "X'ff'",
    "CAST(X'ff' AS TEXT)", "X'746F70'", "X'642F626F7468'", "X'2E2E2F2E2E2F6574632F706173737764'",
    "randomblob(16)", "zeroblob(5000)", "rowid", "-rowid",
])  # fmt: skip


@st.composite
def statements(draw: st.DrawFn) -> str:
    """One change of a few rows of a table, or of all."""
    table = draw(st.sampled_from(sorted(COLUMNS)))
    column = draw(st.sampled_from(COLUMNS[table]))
    which = draw(st.sampled_from(COLUMNS[table]))
    offset = draw(st.integers(0, 12))
    some = f"{which} IN (SELECT {which} FROM {table} ORDER BY 1 LIMIT 1 OFFSET {offset})"
    where = draw(st.sampled_from([some, "1"]))
    if draw(st.integers(0, 9)) == 0:
        return f"DELETE FROM {table} WHERE {where}"
    value = draw(VALUES | st.sampled_from(COLUMNS[table]))
    return f"UPDATE OR IGNORE {table} SET {column} = {value} WHERE {where}"


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Copies:
    return Copies(tmp_path_factory.mktemp("catalogs"))


@pytest.fixture(autouse=True)
def _no_log(caplog: pytest.LogCaptureFixture) -> None:
    """Damage is to be warned of, a hundred thousand times in a soak."""
    caplog.set_level(logging.CRITICAL, logger="kvfs")


def damage(catalog: Path, script: list[str]) -> None:
    """Carry out what SQLite lets; the rest of the script is tried all the same."""
    with closing(sqlite3.connect(catalog, isolation_level=None)) as database:
        for statement in script:
            try:
                database.execute(statement)
            except (sqlite3.Error, OverflowError):
                continue


async def start(base: Path, *, again: bool = False) -> None:
    """A start after a crash: what it does not refuse in one line it can serve; what it finds
    damaged only then, the next start has made anew."""
    surprises: list[Exception] = []
    try:
        with opened(base) as store, store.volume.damage_told():
            await store.recovery.before_serving()
            await store.recovery.reconcile()
            found = await try_everything(store, surprises.append)
            if surprises:
                raise surprises[0]
    except KvfsError as error:
        check_message(error)
        if "the next start makes it anew" in str(error):
            assert not again
            await start(base, again=True)
        return
    for path, data in found.items():
        assert CONTENTS.get(path, data) == data, path


async def start_after_order(base: Path) -> None:
    """A start after an end in order, which trusts more: it must not end in a surprise. If one comes
    later, it ends the mount, and the next start is one after a crash."""
    surprises: list[Exception] = []
    try:
        with opened(base) as store, store.volume.damage_told():
            await store.recovery.before_serving()
            await try_everything(store, surprises.append)
    except KvfsError as error:
        check_message(error)
    if surprises:
        await start(base)


def try_script(copies: Copies, script: list[str]) -> None:
    with copies.copy() as base:
        damage(catalog_of(base), script)
        trio.run(start, base)
    with copies.copy() as base:
        damage(catalog_of(base), ["UPDATE meta SET value = '1' WHERE key = 'clean'", *script])
        trio.run(start_after_order, base)


@replay("catalog")
def test_each_script_of_the_corpus(copies: Copies, data: bytes) -> None:
    try_script(copies, data.decode().splitlines())


@fuzz(40, costly=True)
@given(script=st.lists(statements(), min_size=1, max_size=4))
def test_any_rows(copies: Copies, script: list[str]) -> None:
    try_script(copies, script)


@st.composite
def bytes_damage(draw: st.DrawFn) -> list[tuple[float, bytes]]:
    """Where in the file, as a share of it, and what is there then."""
    junk = st.binary(min_size=1, max_size=64) | st.sampled_from([bytes(4096), b"\xff" * 512])
    return draw(st.lists(st.tuples(st.floats(0, 1), junk), min_size=1, max_size=5))


@fuzz(40, costly=True)
@given(places=bytes_damage(), cut=st.floats(0, 1) | st.none())
def test_any_bytes(copies: Copies, places: list[tuple[float, bytes]], cut: float | None) -> None:
    with copies.copy() as base:
        catalog = catalog_of(base)
        data = bytearray(catalog.read_bytes())
        for share, junk in places:
            start_at = int(share * len(data))
            data[start_at : start_at + len(junk)] = junk
        if cut is not None:
            del data[int(cut * len(data)) :]
        catalog.write_bytes(data)
        trio.run(start, base)


def test_the_columns_are_those_of_the_schema(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "catalog.sqlite")
    tables = catalog.connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name != 'sqlite_stat1'"
    ).fetchall()
    found = {
        table: tuple(row[1] for row in catalog.connection.execute(f"PRAGMA table_info({table})"))
        for (table,) in tables
    }
    catalog.close()
    assert found == COLUMNS
