"""The heat of evicted names, in case they come back."""

from __future__ import annotations

import sqlite3

import xxhash


def ghost_key(path: bytes) -> bytes:
    """What a name is known by here: XXH3-128 of its path."""
    return xxhash.xxh3_128_digest(path)


class Ghosts:
    """The catalog's `ghost` table. Used by the trio loop only."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection

    def add(self, path: bytes, tau: float) -> None:
        self._db.execute("INSERT OR REPLACE INTO ghost VALUES (?, ?)", (ghost_key(path), tau))

    def take(self, path: bytes) -> float | None:
        """The remembered heat of an evicted name, forgotten by this."""
        row = self._db.execute(
            "DELETE FROM ghost WHERE key = ? RETURNING tau", (ghost_key(path),)
        ).fetchone()
        return row[0] if row else None

    def trim(self, most: int) -> None:
        """Forget the coldest beyond `most`."""
        self._db.execute(
            "DELETE FROM ghost WHERE key IN (SELECT key FROM ghost ORDER BY tau DESC"
            " LIMIT -1 OFFSET ?)",
            (most,),
        )
