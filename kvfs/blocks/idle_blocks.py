"""Blocks that nobody has open any more, kept open for the next reader.

Opening or leasing a hot block again then asks neither the catalog nor the tier: its descriptor and
what the kernel knows it by are still there. Whatever the catalog changes of a block ends that, and
a file that was touched behind kvfs is not taken from here.
"""

from __future__ import annotations

import os
import resource
from collections import OrderedDict

from kvfs.volume.open_block import OpenBlock

MOST_BLOCKS = 4096
# Open blocks need descriptors too.
DESCRIPTORS_PART = 4


Fingerprint = tuple[int, int]


def fingerprint(descriptor: int) -> Fingerprint | None:
    """What changes when somebody writes to a file; None when it has no name any more."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    return (status.st_size, status.st_mtime_ns) if status.st_nlink else None


class IdleBlocks:
    """The least recently used leave first. Owned by the trio loop."""

    def __init__(self) -> None:
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.limit = min(MOST_BLOCKS, descriptors // DESCRIPTORS_PART)
        self._blocks: OrderedDict[int, tuple[OpenBlock, Fingerprint]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def put(self, block: OpenBlock) -> bool:
        """Keep a block after its last close; False for one that is not worth it."""
        if block.fetched or block.decoder or block.outdated or self.limit == 0:
            return False
        if not block.backing_id:
            # The kernel does not know it: then only where opening it never waits.
            if block.reader_fd < 0 or block.sealed is None or not block.tier.inline:
                return False
            block.mode = ""
        assert block.writer_fd < 0, "what a writer had open was changed"
        # A sealed file is to be found as it was sealed.
        if block.sealed is not None:
            left_as = (block.sealed.file_bytes, block.sealed.mtime_ns)
        else:
            found = fingerprint(block.reader_fd)
            if found is None:
                return False
            left_as = found
        self._blocks[block.inode] = (block, left_as)
        while len(self._blocks) > self.limit:
            _, (oldest, _) = self._blocks.popitem(last=False)
            oldest.close_descriptors()
        return True

    def take(self, inode: int) -> OpenBlock | None:
        """The block, if it is here and its file is as it was."""
        block, left_as = self._blocks.pop(inode, (None, None))
        if block is None:
            return None
        if block.tier.online and fingerprint(block.reader_fd) == left_as:
            return block
        block.close_descriptors()
        return None

    def forget(self, inode: int) -> None:
        """The catalog changes the block: whoever opens it next must look anew."""
        block, _ = self._blocks.pop(inode, (None, None))
        if block is not None:
            block.close_descriptors()

    def clear(self) -> None:
        """Close all."""
        while self._blocks:
            _, (block, _) = self._blocks.popitem()
            block.close_descriptors()
