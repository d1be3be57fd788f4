"""The catalog: every row of the namespace, in SQLite.

Owned by the trio loop: point queries and single-row transactions run on it directly (microseconds);
scans belong to `kvfs.catalog.scans` on read-only connections in worker threads. Knows nothing of
tiers' files. Callers keep several changes together with `transaction()`.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from kvfs import failpoints, layout
from kvfs.catalog import schema
from kvfs.catalog.ghosts import Ghosts
from kvfs.catalog.intents import Intents
from kvfs.catalog.recent import Recent
from kvfs.catalog.rows import GOOD, RAW, ROOT_INODE, BlockState, Inode, Kind, Placed, Replica

DIRECTORY_PATHS_CACHED = 16_384
ROWS_CACHED = 8192
BATCH_ROWS = 500
# What the write-ahead log is cut to once it has been moved into the database.
LOG_BYTES = 16 << 20
# Small: a transaction logs each page that it touches, a new block nine of them.
PAGE_BYTES = 1024

_INODE = ", ".join(f"i.{column}" for column in Inode._fields)
_REPLICA = ", ".join(Replica._fields)
_MARKS = ", ".join("?" for _ in Replica._fields)


class Catalog:
    """The write connection. Used by the trio loop only."""

    def __init__(self, path: Path) -> None:
        """Open or create. Raises CatalogError (newer schema) or sqlite3.DatabaseError (corrupt)."""
        self.path = path
        self._db = sqlite3.connect(path, isolation_level=None, cached_statements=256)
        try:
            self._db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA cache_size = -16384")
            self._db.execute(f"PRAGMA journal_size_limit = {LOG_BYTES}")
            # A service checkpoints from a thread: an fsync would stop the loop.
            self._db.execute("PRAGMA wal_autocheckpoint = 0")
            self.created = schema.prepare(self._db)
            if self.created:
                _close_to_others(path)
        except BaseException:
            self._db.close()
            raise
        self._paths: OrderedDict[int, bytes] = OrderedDict()
        self._names: dict[int, int] = {}
        self.ghosts = Ghosts(self._db)
        self.intents = Intents(self._db, self.transaction)
        self.fan_out_names = layout.FAN_OUT_NAMES
        # Rows as the catalog has them: whatever changes one of an inode forgets it.
        self._rows = Recent[int, Inode](ROWS_CACHED)
        self._replicas = Recent[int, tuple[Replica, ...]](ROWS_CACHED)
        self._entries = Recent[int, tuple[int, bytes]](ROWS_CACHED)
        self._numbers = Recent[tuple[int, bytes], int](ROWS_CACHED)
        # Called with an inode before its row or the places of its replicas change.
        self.changing: Callable[[int], None] = lambda inode: None

    @property
    def connection(self) -> sqlite3.Connection:
        """For short queries of `kvfs.catalog.scans` on the loop."""
        return self._db

    def close(self) -> None:
        # What cannot be moved now the next one to open the catalog finds in the log.
        with contextlib.suppress(sqlite3.Error):
            self.checkpoint(self._db)
        self._db.close()

    @staticmethod
    def checkpoint(connection: sqlite3.Connection) -> int:
        """Move the log into the database; cheap to repeat. How long the log is."""
        _, frames, _ = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
        return int(frames) * int(page_bytes)

    def log_bytes(self) -> int:
        """Size of the log file."""
        return os.stat(f"{self.path}-wal").st_size

    def reader(self) -> sqlite3.Connection:
        """A read-only connection for a worker thread, which closes it."""
        connection = sqlite3.connect(
            f"file:{self.path}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA query_only = 1")
        connection.execute("PRAGMA cache_size = -8192")
        return connection

    @contextlib.contextmanager
    def transaction(self, name: str) -> Iterator[None]:
        """All or nothing, with no await between its statements; `name` is for its failpoints."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            done = self.intents.delete_done()
            yield
            failpoints.hit(f"{name}.changed")
            self._db.execute("COMMIT")
        except BaseException:
            self._forget_rows()
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        self.intents.deleted(done)
        failpoints.hit(f"{name}.committed")

    def _changing(self, inode: int) -> None:
        self._rows.forget(inode)
        self._replicas.forget(inode)
        self._entries.forget(inode)
        self.changing(inode)

    def _forget_rows(self) -> None:
        self._rows.clear()
        self._replicas.clear()
        self._entries.clear()
        self._numbers.clear()

    # --- meta and tiers

    def meta(self, key: str) -> str | None:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def set_meta(self, key: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def set_meta_durably(self, key: str, value: str) -> None:
        """`set_meta` that outlives a power loss from here on."""
        self._db.execute("PRAGMA synchronous = FULL")
        self.set_meta(key, value)
        self._db.execute("PRAGMA synchronous = NORMAL")

    def known_tiers(self) -> list[tuple[int, str, str, str]]:
        """(number, uuid, name, path) of each tier ever used."""
        return self._db.execute("SELECT number, uuid, name, path FROM tier").fetchall()

    def tier_number(self, uuid: str, name: str, path: str) -> int:
        """The number of this tier, registered or brought up to date."""
        self._db.execute(
            "INSERT INTO tier (uuid, name, path) VALUES (?, ?, ?)"
            " ON CONFLICT (uuid) DO UPDATE SET name = excluded.name, path = excluded.path",
            (uuid, name, path),
        )
        row = self._db.execute("SELECT number FROM tier WHERE uuid = ?", (uuid,)).fetchone()
        return int(row[0])

    def forget_tier(self, number: int) -> None:
        """Drop the tier and its replicas; blocks without any other are gone."""
        with self.transaction("forget_tier"):
            self._forget_rows()
            self._db.execute("DELETE FROM replica WHERE tier = ?", (number,))
            self._db.execute("DELETE FROM intent WHERE tier = ?", (number,))
            self._db.execute("DELETE FROM tier WHERE number = ?", (number,))
            lost = self._db.execute(
                "SELECT id FROM inode i WHERE kind = 1"
                " AND NOT EXISTS (SELECT 1 FROM replica r WHERE r.inode = i.id)"
            ).fetchall()
            for (inode,) in lost:
                self._delete_rows(inode)

    def sole_replicas(self, number: int, leaving: Iterable[int] = ()) -> int:
        """How many blocks of this tier would be gone with it and with the others that leave."""
        gone = ",".join(str(int(tier)) for tier in {number, *leaving})
        row = self._db.execute(
            "SELECT count(*) FROM replica r WHERE tier = ? AND NOT EXISTS (SELECT 1"
            f" FROM replica o WHERE o.inode = r.inode AND o.tier NOT IN ({gone}))",
            (number,),
        ).fetchone()
        return int(row[0])

    def orphans(self) -> list[int]:
        """Inodes without a name, and blocks without a replica. A scan."""
        rows = self._db.execute(
            "SELECT id FROM inode i WHERE id != 1 AND (NOT EXISTS"
            " (SELECT 1 FROM dirent d WHERE d.inode = i.id) OR (kind = 1 AND NOT EXISTS"
            " (SELECT 1 FROM replica r WHERE r.inode = i.id)))"
        )
        return [row[0] for row in rows]

    # --- names

    def lookup(self, parent: int, name: bytes) -> Inode | None:
        number = self.known(parent, name)
        if number:
            return self.get(number)
        row = self._db.execute(
            f"SELECT {_INODE} FROM dirent d JOIN inode i ON i.id = d.inode"
            " WHERE d.parent = ? AND d.name = ?",
            (parent, name),
        ).fetchone()
        if row is None:
            return None
        self.learn(parent, name, row[0])
        return self._rows.put(row[0], Inode._make(row))

    def known(self, parent: int, name: bytes) -> int:
        """The inode of a name, as far as it is in memory; 0 says nothing."""
        return self._numbers.get((parent, name)) or 0

    def learn(self, parent: int, name: bytes, inode: int) -> None:
        """A query on the loop found this name."""
        self._numbers.put((parent, name), inode)

    def get(self, inode: int) -> Inode | None:
        cached = self._rows.get(inode)
        if cached is not None:
            return cached
        row = self._db.execute(f"SELECT {_INODE} FROM inode i WHERE id = ?", (inode,)).fetchone()
        return self._rows.put(inode, Inode._make(row)) if row else None

    def load(self, inodes: Iterable[int]) -> None:
        """Have the rows and replicas of some inodes in memory: two queries for all."""
        unknown = [i for i in inodes if not (self._rows.get(i) and self._replicas.get(i))]
        for start in range(0, len(unknown), BATCH_ROWS):
            part = unknown[start : start + BATCH_ROWS]
            # Of few lengths, so that the statements are prepared once.
            asked = part + part[-1:] * ((1 << (len(part) - 1).bit_length()) - len(part))
            marks = ",".join("?" * len(asked))
            rows = self._db.execute(f"SELECT {_INODE} FROM inode i WHERE id IN ({marks})", asked)
            for row in rows:
                self._rows.put(row[0], Inode._make(row))
            replicas: dict[int, list[Replica]] = {number: [] for number in part}
            for row in self._db.execute(
                f"SELECT {_REPLICA} FROM replica WHERE inode IN ({marks})", asked
            ):
                replicas[row[0]].append(Replica._make(row))
            for number, found in replicas.items():
                self._replicas.put(number, tuple(found))

    def entry(self, inode: int) -> tuple[int, bytes] | None:
        """(parent, name) of an inode; None for the root and for what has no name."""
        cached = self._entries.get(inode)
        if cached is not None:
            return cached
        row = self._db.execute(
            "SELECT parent, name FROM dirent WHERE inode = ?", (inode,)
        ).fetchone()
        return self._entries.put(inode, (row[0], row[1])) if row else None

    def path_of(self, inode: int) -> bytes | None:
        """The path of a block or directory; None when it has no name any more."""
        if inode == ROOT_INODE:
            return b""
        entry = self.entry(inode)
        if entry is None:
            return None
        directory = self.directory_path(entry[0])
        return None if directory is None else layout.join(directory, entry[1])

    def directory_path(self, inode: int) -> bytes | None:
        """`path_of` for directories, from a bounded cache."""
        below: list[tuple[int, bytes]] = []
        while inode != ROOT_INODE and inode not in self._paths:
            entry = self.entry(inode)
            # Names of a damaged catalog may lead in a circle.
            if entry is None or len(below) > layout.PATH_MAX_BYTES:
                return None
            below.append((inode, entry[1]))
            inode = entry[0]
        path = b""
        if inode != ROOT_INODE:
            path = self._paths[inode]
            self._paths.move_to_end(inode)
        for number, name in reversed(below):
            path = self._paths[number] = layout.join(path, name)
            if len(self._paths) > DIRECTORY_PATHS_CACHED:
                self._paths.popitem(last=False)
        return path

    def resolve(self, path: bytes) -> Inode | None:
        """The inode at a path."""
        inode = self.get(ROOT_INODE)
        for name in path.split(b"/") if path else ():
            if inode is None:
                return None
            inode = self.lookup(inode.id, name)
        return inode

    def children(self, parent: int, after: int, limit: int) -> list[tuple[bytes, Inode]]:
        """Up to `limit` entries of a directory whose inode is above `after`, in that order."""
        rows = self._db.execute(
            f"SELECT d.name, {_INODE} FROM dirent d JOIN inode i ON i.id = d.inode"
            " WHERE d.parent = ? AND d.inode > ? ORDER BY d.inode LIMIT ?",
            (parent, after, limit),
        )
        return [(row[0], Inode._make(row[1:])) for row in rows]

    def has_children(self, parent: int) -> bool:
        row = self._db.execute(
            "SELECT 1 FROM dirent WHERE parent = ? LIMIT 1", (parent,)
        ).fetchone()
        return row is not None

    def is_crowded(self, parent: int) -> bool:
        """Whether the directory has as many names as one on-disk directory should.

        Counted once, then kept up: a count of a million names is no point query.
        """
        count = self._names.get(parent)
        if count is None:
            (count,) = self._db.execute(
                "SELECT count(*) FROM dirent WHERE parent = ?", (parent,)
            ).fetchone()
            if len(self._names) >= DIRECTORY_PATHS_CACHED:
                self._names.pop(next(iter(self._names)))
            self._names[parent] = count
        return count >= self.fan_out_names

    def _count_name(self, parent: int, change: int) -> None:
        if parent in self._names:
            self._names[parent] += change

    def skip_numbers(self, upto: int) -> None:
        """Give new inodes numbers above this one."""
        self._db.execute(
            "UPDATE sqlite_sequence SET seq = max(seq, ?) WHERE name = 'inode'", (upto,)
        )

    def insert_inode(
        self, kind: Kind, mode: int, uid: int, gid: int, now_ns: int, *,
        inode: int | None = None, size_bytes: int = 0, generation: int = 1,
        state: BlockState = BlockState.WRITING, checksum: bytes | None = None,
    ) -> int:  # fmt: skip
        cursor = self._db.execute(
            "INSERT INTO inode (id, kind, mode, uid, gid, size_bytes, atime_ns, mtime_ns,"
            " ctime_ns, generation, state, checksum) VALUES (?,?,?,?,?,?,?,?,?,?,?,?)",
            (inode, kind, mode, uid, gid, size_bytes, now_ns, now_ns, now_ns,
             generation, state, checksum),
        )  # fmt: skip
        number = cursor.lastrowid
        assert number is not None
        times_ns = (now_ns, now_ns, now_ns)
        row = Inode(number, kind, mode, uid, gid, size_bytes, *times_ns,
                    generation, state, checksum, None, None)  # fmt: skip
        self._rows.put(number, row)
        self._replicas.put(number, ())
        return number

    def link(self, parent: int, name: bytes, inode: int) -> None:
        """Give a new inode its name. Raises sqlite3.IntegrityError when the name is taken."""
        self._db.execute("INSERT INTO dirent VALUES (?, ?, ?)", (inode, parent, name))
        self._entries.put(inode, (parent, name))
        self.learn(parent, name, inode)
        self._count_name(parent, 1)

    def relink(self, inode: int, parent: int, name: bytes) -> None:
        """Give an inode another name."""
        before = self.entry(inode)
        assert before is not None, "what is renamed has a name"
        self._db.execute(
            "UPDATE dirent SET parent = ?, name = ? WHERE inode = ?", (parent, name, inode)
        )
        self._numbers.forget(before)
        self._entries.put(inode, (parent, name))
        self.learn(parent, name, inode)
        self._count_name(before[0], -1)
        self._count_name(parent, 1)

    def forget_paths(self) -> None:
        """A directory was renamed."""
        self._paths.clear()

    def delete(self, inode: int) -> None:
        """The inode, its name, replicas and xattrs."""
        self._delete_rows(inode)
        self._paths.pop(inode, None)

    def _delete_rows(self, inode: int) -> None:
        self._changing(inode)
        row = self._db.execute(
            "DELETE FROM dirent WHERE inode = ? RETURNING parent, name", (inode,)
        ).fetchone()
        if row:
            self._numbers.forget((row[0], row[1]))
            self._count_name(row[0], -1)
        self._db.execute("DELETE FROM inode WHERE id = ?", (inode,))
        self._db.execute("DELETE FROM replica WHERE inode = ?", (inode,))
        self._db.execute("DELETE FROM xattr WHERE inode = ?", (inode,))

    def update(self, inode: int, **columns: Any) -> None:
        """Set columns of an inode."""
        self.changing(inode)
        assignments = ", ".join(f"{column} = ?" for column in columns)
        self._db.execute(f"UPDATE inode SET {assignments} WHERE id = ?", (*columns.values(), inode))
        cached = self._rows.get(inode)
        if cached is not None:
            self._rows.put(inode, cached._replace(**columns))

    def unsealed(self, states: Iterable[BlockState]) -> list[int]:
        """Inodes of blocks in one of these states."""
        wanted = ",".join(str(int(state)) for state in states)
        rows = self._db.execute(
            f"SELECT id FROM inode WHERE state IN ({wanted}) AND state != 2 AND kind = 1"
        )
        return [row[0] for row in rows]

    def count_unsealed(self) -> int:
        """Blocks that are not sealed: a partial index of few rows."""
        row = self._db.execute(
            "SELECT count(*) FROM inode WHERE state != 2 AND kind = 1"
        ).fetchone()
        return int(row[0])

    # --- replicas and heat

    def replicas(self, inode: int) -> list[Replica]:
        cached = self._replicas.get(inode)
        if cached is None:
            rows = self._db.execute(f"SELECT {_REPLICA} FROM replica WHERE inode = ?", (inode,))
            cached = self._replicas.put(inode, tuple(Replica._make(row) for row in rows))
        return list(cached)

    def replica_page(self, tier: int, after: int) -> list[Placed]:
        """Up to BATCH_ROWS replicas on a tier, by inode."""
        rows = self._db.execute(
            "SELECT r.inode, r.fanned, r.codec, i.size_bytes, i.state, i.checksum FROM replica r"
            " JOIN inode i ON i.id = r.inode WHERE r.inode > ? AND r.tier = ?"
            " ORDER BY r.inode LIMIT ?",
            (after, tier, BATCH_ROWS),
        )
        return [Placed._make(row) for row in rows]

    def add_replica(
        self, inode: int, tier: int, allocated_bytes: int, tau: float, *,
        fanned: bool = False, state: int = GOOD, verified: int = 0, mtime_ns: int = 0,
        codec: int = RAW, saved_bytes: int = 0,
    ) -> None:  # fmt: skip
        self.changing(inode)
        row = Replica(
            inode, tier, allocated_bytes, state, int(fanned), tau, verified, mtime_ns,
            codec, saved_bytes,
        )  # fmt: skip
        self._db.execute(f"INSERT OR REPLACE INTO replica VALUES ({_MARKS})", row)
        cached = self._replicas.get(inode)
        if cached is not None:
            self._replicas.put(inode, (*(r for r in cached if r.tier != tier), row))

    def update_replica(self, inode: int, tier: int, **columns: Any) -> None:
        """Set columns of a replica that do not say where it is."""
        assignments = ", ".join(f"{column} = ?" for column in columns)
        self._db.execute(
            f"UPDATE replica SET {assignments} WHERE inode = ? AND tier = ?",
            (*columns.values(), inode, tier),
        )
        cached = self._replicas.get(inode)
        if cached is not None:
            changed = (r._replace(**columns) if r.tier == tier else r for r in cached)
            self._replicas.put(inode, tuple(changed))

    def drop_replica(self, inode: int, tier: int) -> None:
        self._changing(inode)
        self._db.execute("DELETE FROM replica WHERE inode = ? AND tier = ?", (inode, tier))

    def set_fanned(self, inode: int, tier: int, fanned: bool) -> None:
        self.update_replica(inode, tier, fanned=int(fanned))

    def set_replica_states(self, inode: int, state: int, *, besides: int) -> None:
        """Mark all replicas but the one on tier `besides`."""
        self._changing(inode)
        self._db.execute(
            "UPDATE replica SET state = ? WHERE inode = ? AND tier != ?", (state, inode, besides)
        )

    def coldest(self, tier: int, limit: int) -> list[int]:
        """Inodes of the coldest replicas on a tier."""
        rows = self._db.execute(
            "SELECT inode FROM replica WHERE tier = ? ORDER BY tau LIMIT ?", (tier, limit)
        )
        return [row[0] for row in rows]

    def tau_of(self, inode: int) -> float | None:
        row = self._db.execute("SELECT max(tau) FROM replica WHERE inode = ?", (inode,)).fetchone()
        return row[0] if row else None

    def set_tau(self, inode: int, tau: float, atime_ns: int) -> None:
        self._replicas.forget(inode)
        self._rows.forget(inode)
        self._db.execute("UPDATE replica SET tau = ? WHERE inode = ?", (tau, inode))
        self._db.execute("UPDATE inode SET atime_ns = ? WHERE id = ?", (atime_ns, inode))

    def clamp_heat(self, latest: float) -> None:
        """No tau above `latest`: a clock that was wrong once does no lasting harm."""
        self._forget_rows()
        for table in ("replica", "ghost"):
            self._db.execute(f"UPDATE {table} SET tau = ? WHERE tau > ?", (latest, latest))

    # --- xattrs

    def xattr(self, inode: int, name: bytes) -> bytes | None:
        row = self._db.execute(
            "SELECT value FROM xattr WHERE inode = ? AND name = ?", (inode, name)
        ).fetchone()
        return row[0] if row else None

    def xattrs(self, inode: int) -> list[tuple[bytes, bytes]]:
        return self._db.execute(
            "SELECT name, value FROM xattr WHERE inode = ?", (inode,)
        ).fetchall()

    def set_xattr(self, inode: int, name: bytes, value: bytes) -> None:
        self._db.execute("INSERT OR REPLACE INTO xattr VALUES (?, ?, ?)", (inode, name, value))

    def remove_xattr(self, inode: int, name: bytes) -> bool:
        cursor = self._db.execute("DELETE FROM xattr WHERE inode = ? AND name = ?", (inode, name))
        return cursor.rowcount > 0

    def replica_at(self, tier: int, stored: bytes) -> int | None:
        """The inode whose replica the catalog expects at this stored path of a tier."""
        path, fanned = layout.logical_path(stored)
        inode = self.resolve(path)
        if inode is None or inode.kind != Kind.BLOCK:
            return None
        for replica in self.replicas(inode.id):
            if replica.tier == tier and bool(replica.fanned) == fanned:
                return inode.id
        return None


def _close_to_others(path: Path) -> None:
    """SQLite lets everybody read what it makes, and gives a log the mode of its database."""
    for part in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.chmod(f"{path}{part}", 0o600)
