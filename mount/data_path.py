"""Which way the bytes of an open block take: past the daemon, or through it.

The kernel wants one way per inode while it is open, so the first open decides for all that join it.
Owns the registrations of backing files; the descriptors belong to the block.
"""

from __future__ import annotations

import errno
import logging

import pyfuse3

from kvfs.blocks.blocks import Blocks
from kvfs.errors import reason_of
from kvfs.mount.passthrough import BACKING_ID_SHIFT, Passthrough
from kvfs.volume.open_block import OpenBlock

log = logging.getLogger(__name__)

# What registering says of a filesystem that lies too deep, or has no such files.
NOT_STACKABLE = frozenset({errno.ELOOP, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM})


class DataPath:
    """Owned by the trio loop. No method awaits: an open is decided between two checkpoints."""

    def __init__(self, blocks: Blocks, passthrough: Passthrough) -> None:
        self._blocks = blocks
        self._passthrough = passthrough
        self._counters = blocks.volume.counters
        self._unstackable: set[int] = set()

    def answer(self, block: OpenBlock, fh: int, *, writer: bool) -> pyfuse3.FileInfo:
        """What the kernel is told of a handle."""
        if not block.mode:
            block.mode = "passthrough" if self._may_pass(block) else "served"
        self._counters.count(f"opens_{block.mode}")
        if block.mode == "passthrough":
            if writer:
                block.lose_sight()
            return pyfuse3.FileInfo(fh=fh | block.backing_id << BACKING_ID_SHIFT)
        # A sealed block never changes, so what the kernel has of it stays good.
        return pyfuse3.FileInfo(fh=fh, keep_cache=not block.writers)

    def _may_pass(self, block: OpenBlock) -> bool:
        if not self._passthrough.active or block.tier.remote:
            return False
        if block.fetched or block.decoder is not None:
            return False
        if block.writers and not self._blocks.growth.may_be_unseen(block):
            return False
        return block.backing_id != 0 or self._register(block)

    def _register(self, block: OpenBlock) -> bool:
        if block.tier.index in self._unstackable:
            return False
        try:
            block.backing_id = self._passthrough.register(block.read_only_descriptor())
        except OSError as error:
            if error.errno in NOT_STACKABLE:
                self._unstackable.add(block.tier.index)
                log.warning("tier %s is not passed through: %s", block.tier.name, error)
            self._counters.count(
                "registrations_failed", reason=reason_of(error), tier=block.tier.name
            )
            return False
        block.unregister = self._passthrough.unregister
        return True
