"""Open file handles of the mount."""

from __future__ import annotations

import os
from dataclasses import dataclass

import trio

from kvfs.blocks.blocks import Blocks
from kvfs.volume.open_block import OpenBlock

# The kernel splits a large read into requests of at most 1 MiB.
# The upper 32 bits of a handle carry a backing id.
HANDLE_MASK = (1 << 32) - 1
AHEAD_FROM_BYTES = 128 << 10
AHEAD_BLOCK_BYTES = 32 << 20
AHEAD_TOTAL_BYTES = 256 << 20


@dataclass(slots=True, eq=False)
class Handle:
    """A block that a process has open, or the snapshot of a control file."""

    block: OpenBlock | None = None
    writer: bool = False
    snapshot: bytes = b""
    # What was read of the block beyond what was asked for: from where on, and after how many of
    # the block's changes.
    ahead: bytes = b""
    ahead_at: int = 0
    ahead_changes: int = 0
    # While that is done; made for the first time.
    lock: trio.Lock | None = None


class Handles:
    """The table of handles, and reading through them. Owned by the trio loop."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._handles: dict[int, Handle] = {}
        self._next = 1
        self._ahead_bytes = 0

    def __len__(self) -> int:
        return len(self._handles)

    def add(self, handle: Handle) -> int:
        while self._next in self._handles:
            self._next = self._next % HANDLE_MASK + 1
        number = self._next
        self._next = self._next % HANDLE_MASK + 1
        self._handles[number] = handle
        return number

    def numbers(self) -> list[int]:
        return list(self._handles)

    def __getitem__(self, number: int) -> Handle:
        return self._handles[number & HANDLE_MASK]

    def remove(self, number: int) -> Handle:
        handle = self._handles.pop(number & HANDLE_MASK)
        if handle.ahead:
            self._set_ahead(handle, b"", 0)
        return handle

    async def read(self, handle: Handle, offset: int, size: int) -> bytes:
        """Bytes for one request.

        When the first request of a large read arrives, the whole block is read: an error in a
        later piece would reach the caller as a short read, on which an engine deletes the block.
        """
        block = handle.block
        if block is None:
            return handle.snapshot[offset : offset + size]
        if handle.lock is not None and handle.lock.locked():
            async with handle.lock:
                pass
        if handle.ahead and handle.ahead_changes != block.changes:
            self._set_ahead(handle, b"", 0)
        if handle.ahead:
            start = offset - handle.ahead_at
            if start >= 0 and start + size <= len(handle.ahead):
                return handle.ahead[start : start + size]
            if 0 <= start < len(handle.ahead):
                tail = handle.ahead[start:]
                self._set_ahead(handle, b"", 0)
                return tail
        if offset == 0 and size >= AHEAD_FROM_BYTES and not block.writers:
            return await self._read_whole(handle, block, size)
        return await self._blocks.read(block, offset, size)

    async def _read_whole(self, handle: Handle, block: OpenBlock, size: int) -> bytes:
        if block.tier.remote and not block.fetched:
            return await self._blocks.read(block, 0, size)
        length = block.length_bytes()
        rest = length - size
        if not 0 < rest <= AHEAD_BLOCK_BYTES or self._ahead_bytes + rest > AHEAD_TOTAL_BYTES:
            return await self._blocks.read(block, 0, size)
        if block.local:
            # The whole block in few large requests to the medium, instead of a window at a time.
            os.posix_fadvise(block.descriptor, 0, length, os.POSIX_FADV_WILLNEED)
        handle.lock = handle.lock or trio.Lock()
        async with handle.lock:
            handle.ahead_changes = block.changes
            first = await self._blocks.read(block, 0, size)
            self._set_ahead(handle, await self._blocks.read(block, size, rest), size)
        return first

    def _set_ahead(self, handle: Handle, data: bytes, at: int) -> None:
        self._ahead_bytes += len(data) - len(handle.ahead)
        handle.ahead, handle.ahead_at = data, at
