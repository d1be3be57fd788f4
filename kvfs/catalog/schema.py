"""The catalog's SQLite schema. Its comments are its documentation.

The catalog is an index of the tiers: all of it but heat and ghosts can be rebuilt by a walk.
"""

from __future__ import annotations

import sqlite3

from kvfs.catalog import sanity
from kvfs.errors import CatalogError, is_of_catalog_disk

SCHEMA_VERSION = 2

SCHEMA = """
-- Facts of the whole filesystem: 'clean' (1 after an orderly unmount), 'boot_id' (of the machine
-- when it last recovered), 'complete' (1 once it knows what its tiers hold), 'mounts' (how often it
-- was), 'crashed' (the last mount that began after an end without order), 'scrub.TIER' (how far the
-- scrub of a tier is).
CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;

-- Every tier ever used. `number` is what `replica` and `intent` refer to; it survives renaming and
-- reordering in the configuration, `uuid` is the identity on disk.
CREATE TABLE tier (
    number  INTEGER PRIMARY KEY,
    uuid    TEXT NOT NULL UNIQUE,
    name    TEXT NOT NULL,
    path    TEXT NOT NULL
);

-- One row per file or directory. AUTOINCREMENT: a number that the kernel may still hold is never
-- given again. The root is 1.
CREATE TABLE inode (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    kind       INTEGER NOT NULL,            -- 0 directory, 1 block
    mode       INTEGER NOT NULL,            -- permission bits only
    uid        INTEGER NOT NULL,
    gid        INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL,
    atime_ns   INTEGER NOT NULL,            -- last counted access
    mtime_ns   INTEGER NOT NULL,
    ctime_ns   INTEGER NOT NULL,
    generation INTEGER NOT NULL,            -- raised by unseal, overwrite and rename
    state      INTEGER NOT NULL,            -- 0 writing, 1 published, 2 sealed, 3 reopened
    checksum   BLOB,                        -- XXH3-128 at the last seal
    pin        TEXT,                        -- NULL, '1' (never evict) or a tier's name
    ttl_s      REAL                         -- NULL or seconds after mtime
);
-- What recovery and the sealer start from: few rows at any time.
CREATE INDEX inode_unsealed ON inode (state) WHERE state != 2 AND kind = 1;
CREATE INDEX inode_with_ttl ON inode (id) WHERE ttl_s IS NOT NULL;
CREATE INDEX inode_with_pin ON inode (id, kind) WHERE pin IS NOT NULL;

-- Names. No hard links, so the inode is the key; (parent, inode) is also the order of readdir, and
-- the inode its cookie: a listing neither repeats nor misses a name that stays.
CREATE TABLE dirent (
    inode  INTEGER PRIMARY KEY,
    parent INTEGER NOT NULL,
    name   BLOB NOT NULL,
    UNIQUE (parent, name)
);
CREATE INDEX dirent_in_order ON dirent (parent, inode);
CREATE INDEX dirent_temporary ON dirent (inode) WHERE substr(name, -4) = X'2E746D70';

-- A block's bytes on one tier. `tau` is the block's heat (kvfs/policy/heat.py), the same on each of
-- its replicas, so that "coldest first on this tier" is one index scan.
CREATE TABLE replica (
    inode           INTEGER NOT NULL,
    tier            INTEGER NOT NULL,
    allocated_bytes INTEGER NOT NULL,
    state           INTEGER NOT NULL,       -- 0 good, 1 suspect: the block is reopened elsewhere
    fanned          INTEGER NOT NULL,       -- 1 when stored in .kvfs.d
    tau             REAL NOT NULL,
    verified        INTEGER NOT NULL,       -- the mount ('mounts') that last read it; 0: none did
    mtime_ns        INTEGER NOT NULL,       -- of the file, as it was then; 0: not known
    codec           INTEGER NOT NULL,       -- 0 raw, 1 zstd (docs/FORMAT.md)
    saved_bytes     INTEGER NOT NULL,       -- the block's length less allocated_bytes; 0 when raw
    PRIMARY KEY (inode, tier)
) WITHOUT ROWID;
CREATE INDEX replica_by_heat ON replica (tier, tau);
CREATE INDEX replica_compressed ON replica (tier, saved_bytes) WHERE codec != 0;

-- Foreign user.* xattrs. The backing files carry them too.
CREATE TABLE xattr (
    inode INTEGER NOT NULL,
    name  BLOB NOT NULL,
    value BLOB NOT NULL,
    PRIMARY KEY (inode, name)
) WITHOUT ROWID;

-- Changes of a tier's files that were promised but may not be done: applied in order, per tier,
-- at mount and when a tier comes back. 'unlink' is void once a replica lives at the path again,
-- 'rename' while a block of its own lives at the old path, or another at the new one. Numbers are
-- never given again: who waits to carry one out must not take another for it.
CREATE TABLE intent (
    id     INTEGER PRIMARY KEY AUTOINCREMENT,
    tier   INTEGER NOT NULL,
    kind   TEXT NOT NULL,                   -- 'unlink' or 'rename'
    inode  INTEGER NOT NULL,
    path   BLOB NOT NULL,                   -- stored path
    target BLOB                             -- stored path, rename only
);

-- Heat of evicted names: XXH3-128 of the path. Bounded; the coldest are forgotten first.
CREATE TABLE ghost (
    key BLOB PRIMARY KEY,
    tau REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX ghost_by_heat ON ghost (tau);
"""

# Version n -> n + 1.
MIGRATIONS: dict[int, str] = {
    1: (
        "ALTER TABLE replica ADD COLUMN verified INTEGER NOT NULL DEFAULT 0;"
        "ALTER TABLE replica ADD COLUMN mtime_ns INTEGER NOT NULL DEFAULT 0;"
        "ALTER TABLE replica ADD COLUMN codec INTEGER NOT NULL DEFAULT 0;"
        "ALTER TABLE replica ADD COLUMN saved_bytes INTEGER NOT NULL DEFAULT 0;"
        "CREATE INDEX replica_compressed ON replica (tier, saved_bytes) WHERE codec != 0;"
        "INSERT OR REPLACE INTO meta VALUES ('complete', '1');"
    ),
}


def prepare(connection: sqlite3.Connection) -> bool:
    """Create or migrate the schema; whether it was created.

    Raises CatalogError if it is newer, sqlite3.DatabaseError if what is there is damaged.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise CatalogError(
            f"the catalog has schema {version}, this kvfs knows {SCHEMA_VERSION}: upgrade kvfs"
        )
    (objects,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if version <= 0 and objects:
        raise sqlite3.DatabaseError("the version of its schema is lost")
    if version <= 0:
        _run(connection, SCHEMA, SCHEMA_VERSION)
        return True
    # Damage that a query meets later would make names vanish: about a second per million blocks.
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise sqlite3.DatabaseError(verdict)
    for step in range(version, SCHEMA_VERSION):
        _migrate(connection, step)
    sanity.check(connection)
    return False


def _migrate(connection: sqlite3.Connection, version: int) -> None:
    try:
        _run(connection, MIGRATIONS[version], version + 1)
    except sqlite3.OperationalError as error:
        if is_of_catalog_disk(error):
            raise
        raise sqlite3.DatabaseError(str(error)) from None


def _run(connection: sqlite3.Connection, script: str, version: int) -> None:
    connection.executescript(f"BEGIN;\n{script}\nPRAGMA user_version = {version};\nCOMMIT;")
