"""The places of blocks in an engine's memory: what the onboarder fills and the offloader reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from kvfs.errors import UsageError
from kvfs.gpu.arrays import Memory, memory_of
from kvfs.gpu.layout import PagedBlocks


class Blocks(Protocol):
    """Places for blocks in order, all on one device: arrays, or pages of a cache."""

    def __len__(self) -> int: ...

    @property
    def memory(self) -> Memory:
        """Some memory of it, which tells where it is."""

    @property
    def writable(self) -> bool: ...

    @property
    def contiguous(self) -> bool:
        """Whether each block has one segment."""

    def block_bytes(self, number: int) -> int: ...

    def segments(self, number: int) -> Sequence[Memory]:
        """The parts of one block, in the block's order."""

    def part(self, start: int, end: int) -> Self:
        """Some of these blocks."""


@dataclass(frozen=True, slots=True)
class BlockFailure:
    """A block that could not be loaded or stored; `error` names it as well."""

    path: bytes
    error: Exception


@dataclass(frozen=True, slots=True)
class ArrayBlocks:
    """Blocks that are each contiguous in memory."""

    memories: tuple[Memory, ...]

    def __len__(self) -> int:
        return len(self.memories)

    @property
    def memory(self) -> Memory:
        return self.memories[0]

    @property
    def writable(self) -> bool:
        return all(memory.writable for memory in self.memories)

    @property
    def contiguous(self) -> bool:
        return True

    def block_bytes(self, number: int) -> int:
        return self.memories[number].size_bytes

    def segments(self, number: int) -> Sequence[Memory]:
        return (self.memories[number],)

    def part(self, start: int, end: int) -> ArrayBlocks:
        return ArrayBlocks(self.memories[start:end])


def blocks_of(given: object, count: int, *, writable: bool, device: int = 0) -> Blocks:
    """`count` blocks in pages of a cache, in a list of arrays, or in the rows of one array.

    Raises UsageError where there are fewer or more, or one of them cannot be used without a copy.
    """
    if isinstance(given, PagedBlocks):
        blocks: Blocks = given
    elif isinstance(given, (list, tuple)):
        found = tuple(memory_of(array, writable=writable, device=device) for array in given)
        if len({memory.place for memory in found}) > 1:
            raise UsageError("some of the arrays are on another device than others")
        blocks = ArrayBlocks(found)
    else:
        memory = memory_of(given, writable=writable, device=device)
        row_bytes = memory.size_bytes // max(memory.rows, 1)
        rows = range(0, memory.size_bytes, row_bytes) if row_bytes else ()
        blocks = ArrayBlocks(tuple(memory.part(start, row_bytes) for start in rows))
    if len(blocks) != count:
        raise UsageError(f"{count} paths, but memory for {len(blocks)} blocks")
    if writable and not blocks.writable:
        raise UsageError("the pages of the cache are read-only and cannot be loaded into")
    return blocks


def check_place(blocks: Blocks, device: int | None) -> None:
    """Raises UsageError for memory of another device; None is the host."""
    if len(blocks) and blocks.memory.place != device:
        raise UsageError(
            f"the memory is {_place_text(blocks.memory.place)}, the device that is to load it "
            f"{_place_text(device)}"
        )


def _place_text(number: int | None) -> str:
    return "the host's" if number is None else f"that of CUDA device {number}"
