"""Whether the rows of a catalog can be what kvfs wrote: types, ranges, names, and one tree of them.

SQLite's own check finds damage of the file's structure, not a value that is nonsense. The rest of
kvfs relies on what is checked here: a walk, say, takes a file for an old one if the catalog has its
block elsewhere.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

from kvfs.catalog.rows import ROOT_INODE
from kvfs.errors import is_of_catalog_disk

# No kvfs gives such numbers or has such sizes.
_BEYOND = 1 << 56
_U32 = (1 << 32) - 1


def _whole(*columns: str) -> list[str]:
    """Any integer. `|` makes one of everything: a comparison is cheaper than typeof()."""
    return [f"({column} | 0) != {column}" for column in columns]


def _between(least: int, most: int, *columns: str) -> list[str]:
    """Text and blobs are above every number."""
    return [f"{column} NOT BETWEEN {least} AND {most}" for column in columns]


def _any(*conditions: Iterable[str]) -> str:
    return " OR ".join(f"({condition})" for several in conditions for condition in several)


# Per table, what is wrong with a row. NOT NULL is for SQLite's own check.
_SMALL = {
    "meta": _any([
        "typeof(value) != 'text'",
        "key IN ('mounts', 'crashed')"
        " AND (value GLOB '*[^0-9]*' OR length(value) NOT BETWEEN 1 AND 15)",
    ]),
    "tier": _any(
        _between(1, _BEYOND, "number"),
        (f"typeof({column}) != 'text'" for column in ("uuid", "name", "path")),
    ),
    "intent": _any(
        _between(1, _BEYOND, "id", "tier", "inode"), _whole("tier", "inode"),
        ["kind NOT IN ('unlink', 'rename')", "typeof(path) != 'blob'",
         "target IS NOT NULL AND typeof(target) != 'blob'", "kind = 'rename' AND target IS NULL"],
    ),
    "sqlite_sequence": _any(["seq IS NULL"], _between(0, _BEYOND, "seq"), _whole("seq")),
}  # fmt: skip
_INODE = _any(
    _between(ROOT_INODE, _BEYOND, "id"),
    ["kind NOT IN (0, 1)", "state NOT IN (0, 1, 2, 3)", f"id = {ROOT_INODE} AND kind != 0"],
    _between(0, 0o7777, "mode"), _between(0, _U32, "uid", "gid"),
    _between(0, _BEYOND, "size_bytes", "generation"),
    _whole("mode", "uid", "gid", "size_bytes", "generation"),
    _whole("atime_ns", "mtime_ns", "ctime_ns"),
    ["checksum IS NULL AND kind = 1 AND state >= 2",
     "checksum IS NOT NULL AND (typeof(checksum) != 'blob' OR length(checksum) != 16)",
     "pin IS NOT NULL AND (typeof(pin) != 'text' OR length(pin) NOT BETWEEN 1 AND 32"
     " OR pin GLOB '*[^A-Za-z0-9_-]*')",
     "ttl_s IS NOT NULL AND ttl_s NOT BETWEEN 0 AND 1e10"],
)  # fmt: skip
_LARGE = {
    "inode": _INODE,
    "dirent": _any(
        _between(ROOT_INODE + 1, _BEYOND, "inode"), _between(ROOT_INODE, _BEYOND, "parent"),
        _whole("parent"),
        ["typeof(name) != 'blob'", "length(name) NOT BETWEEN 1 AND 255",
         "instr(name, X'2F')", "instr(name, X'00')",
         "length(name) < 8 AND name IN"
         " (X'2E', X'2E2E', CAST('.kvfs' AS BLOB), CAST('.kvfs.d' AS BLOB))"],
    ),
    "replica": _any(
        _between(ROOT_INODE + 1, _BEYOND, "inode"),
        _between(0, _BEYOND, "allocated_bytes", "saved_bytes"),
        _whole("inode", "allocated_bytes", "verified", "mtime_ns", "saved_bytes"),
        ["state NOT IN (0, 1)", "fanned NOT IN (0, 1)", "codec NOT IN (0, 1)", "tau >= ''"],
    ),
    "xattr": _any(
        _between(ROOT_INODE, _BEYOND, "inode"), _whole("inode"),
        ["typeof(name) != 'blob'", "typeof(value) != 'blob'", "length(name) NOT BETWEEN 6 AND 255",
         "substr(name, 1, 5) != CAST('user.' AS BLOB)", "instr(name, X'00')"],
    ),
    "ghost": _any(["typeof(key) != 'blob'", "tau >= ''"]),
}  # fmt: skip
_UNSEALED = "SELECT id FROM inode INDEXED BY inode_unsealed WHERE state != 2 AND kind = 1"
_AND_ABOVE = (
    f"WITH RECURSIVE up (id) AS ({_UNSEALED} UNION"
    " SELECT d.parent FROM dirent d JOIN up ON d.inode = up.id)"
)
# The index has the tiers in order, so that the next one is found without reading all its rows.
_NEXT_TIER = "SELECT min(tier) FROM replica WHERE tier > ?"


def check(connection: sqlite3.Connection, *, thorough: bool | None = None) -> None:
    """Raise sqlite3.DatabaseError when a row makes no sense.

    Without `thorough` only what a mount reads before it serves, which takes no time; with it all,
    about a second per million blocks; None: all unless the last mount ended in order.
    """
    try:
        # Reading them shows text that is not UTF-8.
        facts = dict(connection.execute("SELECT key, value FROM meta").fetchall())
        connection.execute("SELECT uuid, name, path FROM tier").fetchall()
        if thorough is None:
            thorough = facts.get("clean") != "1"
        for table, wrong in (_SMALL | _LARGE if thorough else _SMALL).items():
            _refuse(connection, f"SELECT 1 FROM {table} WHERE {wrong}", table)
        _check_unsealed(connection)
        _refuse(connection, f"SELECT 1 FROM inode WHERE id = {ROOT_INODE} AND ({_INODE})", "inode")
        _check_tiers(connection)
        if thorough:
            _check_references(connection)
            _check_tree(connection)
    except sqlite3.OperationalError as error:
        # A table or column is not there, say; not: the disk fails.
        if is_of_catalog_disk(error):
            raise
        raise sqlite3.DatabaseError(str(error)) from None


def _refuse(connection: sqlite3.Connection, query: str, table: str) -> None:
    if connection.execute(f"{query} LIMIT 1").fetchone() is not None:
        raise sqlite3.DatabaseError(f"a row of {table} makes no sense")


def _check_unsealed(connection: sqlite3.Connection) -> None:
    """Blocks that are decided before anything is served, and what leads to them."""
    _refuse(connection, f"{_UNSEALED} AND ({_INODE})", "inode")
    for table in ("dirent", "replica"):
        query = f"{_AND_ABOVE} SELECT 1 FROM {table} JOIN up ON inode = up.id"
        _refuse(connection, f"{query} WHERE {_LARGE[table]}", table)


def _check_tiers(connection: sqlite3.Connection) -> None:
    """No replica lies on a tier that the catalog does not know."""
    known = {number for (number,) in connection.execute("SELECT number FROM tier")}
    (number,) = connection.execute("SELECT min(tier) FROM replica").fetchone()
    while number is not None:
        if number not in known:
            raise sqlite3.DatabaseError(f"a row of replica is of no tier: {number!r}")
        (number,) = connection.execute(_NEXT_TIER, (number,)).fetchone()


def _check_references(connection: sqlite3.Connection) -> None:
    """Names and replicas are of inodes that are there."""
    for table in ("dirent", "replica"):
        _refuse(
            connection,
            f"SELECT 1 FROM {table} t LEFT JOIN inode i ON i.id = t.inode WHERE i.id IS NULL",
            table,
        )


def _check_tree(connection: sqlite3.Connection) -> None:
    """All names lie in directories, and all directories below the root."""
    connection.execute(
        "CREATE TEMP TABLE directory AS SELECT i.id, d.parent FROM inode i"
        " LEFT JOIN dirent d ON d.inode = i.id WHERE i.kind = 0"
    )
    try:
        connection.execute("CREATE INDEX temp.below ON directory (parent)")
        connection.execute("CREATE INDEX temp.known ON directory (id)")
        _refuse(
            connection,
            "SELECT 1 FROM (SELECT DISTINCT parent FROM dirent)"
            " WHERE parent NOT IN (SELECT id FROM directory)",
            "dirent",
        )
        (reached,) = connection.execute(
            f"WITH RECURSIVE tree (id) AS (VALUES ({ROOT_INODE}) UNION"
            " SELECT d.id FROM directory d JOIN tree t ON d.parent = t.id)"
            " SELECT count(*) FROM tree JOIN directory USING (id)"
        ).fetchone()
        (every,) = connection.execute("SELECT count(*) FROM directory").fetchone()
        if reached != every:
            raise sqlite3.DatabaseError("names lead in a circle, or to no name")
    finally:
        connection.execute("DROP TABLE temp.directory")
