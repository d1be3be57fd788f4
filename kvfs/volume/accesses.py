"""Accesses since the last flush: heat that is not in the catalog yet.

The mount reports each open for reading; the daemon flushes in batches. At most one access a second
of a block counts, because readers such as kvikio open a file twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvfs.policy import heat

SAME_ACCESS_S = 1.0


@dataclass(slots=True)
class Pending:
    """Heat to be merged into the catalog's."""

    tau: float
    last_s: float


class Accesses:
    """Pending heat by inode. Owned by the trio loop; bounded by the flush interval."""

    def __init__(self, half_life_s: float) -> None:
        self.half_life_s = half_life_s
        self._pending: dict[int, Pending] = {}
        self._flushed: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def touch(self, inode: int, now_s: float) -> bool:
        """Count an access; False when it belongs to the one before."""
        pending = self._pending.get(inode)
        last_s = pending.last_s if pending else self._flushed.get(inode)
        if last_s is not None and now_s - last_s < SAME_ACCESS_S:
            return False
        if pending is None:
            self._pending[inode] = Pending(now_s, now_s)
        else:
            pending.tau = heat.touch(pending.tau, now_s, self.half_life_s)
            pending.last_s = now_s
        return True

    def tau(self, inode: int, stored: float) -> float:
        """The block's tau with what is pending."""
        pending = self._pending.get(inode)
        return heat.touch(stored, pending.tau, self.half_life_s) if pending else stored

    def pending(self) -> dict[int, float]:
        """Pending taus by inode, a copy."""
        return {inode: pending.tau for inode, pending in self._pending.items()}

    def take(self, most: int) -> list[tuple[int, Pending]]:
        """Up to `most` pending entries, which are no longer pending."""
        taken: list[tuple[int, Pending]] = []
        while self._pending and len(taken) < most:
            taken.append(self._pending.popitem())
        return taken

    def put_back(self, entries: list[tuple[int, Pending]]) -> None:
        """These could not be flushed: they are pending again."""
        self._pending.update(entries)

    def flushed(self, entries: list[tuple[int, Pending]], now_s: float) -> None:
        """These are in the catalog; remember their times for as long as they matter."""
        self._flushed = {i: t for i, t in self._flushed.items() if now_s - t < SAME_ACCESS_S}
        self._flushed.update((inode, pending.last_s) for inode, pending in entries)

    def forget(self, inode: int) -> None:
        """The block is gone."""
        self._pending.pop(inode, None)
