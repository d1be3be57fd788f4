"""Which inodes the kernel holds, and how often: numbers only, no paths and no attributes."""

from __future__ import annotations

from collections.abc import Iterable


class InodeTable:
    """Lookup counts. Owned by the trio loop; counting and answering have no await between them."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def __contains__(self, inode: int) -> bool:
        return inode in self._counts

    def add(self, inode: int) -> None:
        """The kernel was told of this inode once more."""
        self._counts[inode] = self._counts.get(inode, 0) + 1

    def forget(self, entries: Iterable[tuple[int, int]]) -> None:
        """The kernel gave back (inode, count) each. Never raises: unmount may forget twice."""
        counts = self._counts
        for inode, count in entries:
            left = counts.get(inode, 0) - count
            if left > 0:
                counts[inode] = left
            else:
                counts.pop(inode, None)
