"""Reading a compressed replica where it lies: any range of its block, without the rest."""

from __future__ import annotations

from kvfs.tiers.codec import CompressedBlock, open_compressed
from kvfs.tiers.tier import Tier

# What is kept of a read, for the next one: whole pieces, with planes split or not.
SPAN_BYTES = 128 << 10


class Decoder:
    """One open file of a tier; the descriptor belongs to the `OpenBlock`, whose lock is held over
    each call, so that one thread at a time is here and the descriptor stays open."""

    def __init__(self, tier: Tier, block: CompressedBlock) -> None:
        self.tier = tier
        self._block = block
        # Set as one: a call that was given up may still be on its way.
        self._kept = (0, b"")

    @property
    def size_bytes(self) -> int:
        """The length of the block."""
        return self._block.size_bytes

    def read(self, offset: int, size: int) -> bytes:
        """The bytes at `offset`, fewer only at the end. Blocking. Raises BlockCorrupt, OSError."""
        end = min(offset + size, self.size_bytes)
        if offset >= end:
            return b""
        kept_at, kept = self._kept
        if kept_at <= offset and end <= kept_at + len(kept):
            return kept[offset - kept_at : end - kept_at]
        begin = offset - offset % SPAN_BYTES
        data = self._block.read(begin, end + -end % SPAN_BYTES - begin)
        last = (end - 1) // SPAN_BYTES * SPAN_BYTES
        self._kept = (last, data[last - begin :])
        return data[offset - begin : end - begin]


def open_decoder(tier: Tier, descriptor: int) -> Decoder:
    """Blocking. Raises BlockCorrupt, OSError."""
    return Decoder(tier, open_compressed(descriptor))
