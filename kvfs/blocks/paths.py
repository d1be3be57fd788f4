"""Where a name or a block is: its path, now or once nobody is changing it.

What is awaited here is a claim; after the answer the caller has until its next await.
"""

from __future__ import annotations

import errno

from kvfs import layout
from kvfs.errors import BlockStale, FilesystemError
from kvfs.volume.volume import Volume


class Paths:
    """Owned by the trio loop."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume

    def of_name(self, parent: int, name: bytes) -> bytes:
        """The path of a name in a directory. Raises FilesystemError(ENOENT)."""
        directory = self.volume.catalog.directory_path(parent)
        if directory is None:
            raise FilesystemError(errno.ENOENT)
        return layout.join(directory, name)

    async def free_name(self, parent: int, name: bytes) -> bytes:
        """`of_name`, once nobody is changing it or a directory above it."""
        while True:
            path = self.of_name(parent, name)
            if self.volume.claims.is_free(path):
                return path
            await self.volume.claims.wait(path)

    def check_length(self, path: bytes) -> None:
        """ENAMETOOLONG for what some tier could not store."""
        longest = max(len(tier.root) for tier in self.volume.tiers)
        if longest + len(path) > layout.PATH_MAX_BYTES:
            raise FilesystemError(errno.ENAMETOOLONG)

    async def free_block(self, inode: int) -> bytes:
        """The path of a block, once nobody is changing it. Raises BlockStale."""
        while True:
            path = self.volume.catalog.path_of(inode)
            if path is None:
                raise BlockStale("the block is gone")
            if self.volume.claims.is_free(path):
                return path
            await self.volume.claims.wait(path)
