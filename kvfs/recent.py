"""A bounded memory of rows that were asked for lately."""

from __future__ import annotations

from typing import Generic, TypeVar

V = TypeVar("V")


class Recent(Generic[V]):
    """Values by inode; the oldest entry leaves first. Owned by the trio loop."""

    __slots__ = ("_limit", "_values")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: dict[int, V] = {}

    def __len__(self) -> int:
        return len(self._values)

    def get(self, inode: int) -> V | None:
        return self._values.get(inode)

    def put(self, inode: int, value: V) -> V:
        """Remember and return it."""
        values = self._values
        if inode not in values and len(values) >= self._limit:
            del values[next(iter(values))]
        values[inode] = value
        return value

    def forget(self, inode: int) -> None:
        self._values.pop(inode, None)

    def clear(self) -> None:
        self._values.clear()
