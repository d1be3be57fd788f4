"""What is promised of tiers' files and not done yet: removals and renames.

A promise is committed with the change of the namespace that it belongs to, so that a crash, or a
tier that is away, only delays it. Carrying one out twice is harmless.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import AbstractContextManager

from kvfs.catalog.rows import Intent

DONE_KEPT = 500


class Intents:
    """The catalog's `intent` table. Used by the trio loop only.

    What is done leaves the table with the next transaction of any kind, or with one of its own
    when there are many.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        transaction: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._db = connection
        self.transaction = transaction
        self._done: list[int] = []

    def add(
        self, tier: int, kind: str, inode: int, path: bytes, target: bytes | None = None
    ) -> Intent:
        """Promise a change of a tier's files; stored paths. Within a transaction."""
        cursor = self._db.execute(
            "INSERT INTO intent (tier, kind, inode, path, target) VALUES (?, ?, ?, ?, ?)",
            (tier, kind, inode, path, target),
        )
        assert cursor.lastrowid is not None
        return Intent(cursor.lastrowid, tier, kind, inode, path, target)

    def retarget(self, intent: int, target: bytes) -> None:
        """A rename goes elsewhere than was promised."""
        self._db.execute("UPDATE intent SET target = ? WHERE id = ?", (target, intent))

    def left(self, tier: int, *, upto: int | None = None) -> list[Intent]:
        """What is left to do on a tier, in order; `upto` an intent and with it."""
        rows = self._db.execute(
            "SELECT id, tier, kind, inode, path, target FROM intent"
            " WHERE tier = ? AND id <= ifnull(?, id) ORDER BY id",
            (tier, upto),
        )
        done = set(self._done)
        return [Intent._make(row) for row in rows if row[0] not in done]

    def is_left(self, intent: int) -> bool:
        """Whether it is left to do."""
        row = self._db.execute("SELECT 1 FROM intent WHERE id = ?", (intent,)).fetchone()
        return row is not None and intent not in self._done

    def done(self, intent: int) -> None:
        """Forget one. Not within a transaction."""
        self._done.append(intent)
        if len(self._done) >= DONE_KEPT:
            self.flush()

    def flush(self) -> None:
        """Forget in the table as well what is done."""
        if self._done:
            with self.transaction("intents_done"):
                pass

    def delete_done(self) -> int:
        """For the catalog: the first statement of a transaction. How many it deletes."""
        if self._done:
            self._db.executemany("DELETE FROM intent WHERE id = ?", [(i,) for i in self._done])
        return len(self._done)

    def deleted(self, count: int) -> None:
        """For the catalog: the transaction that deleted the oldest so many is committed."""
        del self._done[:count]
