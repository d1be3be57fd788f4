"""Paged KV caches: where the bytes of a block go in an engine's cache, and back.

A cache is a list of planes. A plane is an array whose first axis is the page; a block of kvfs is
one page of every plane, one after the other. That covers

- contiguous blocks: one plane that holds all layers of a page,
- per layer: a plane for each layer (MLA; K and V in one page),
- K/V split: two planes for each layer.

Nothing here has state; a layout is made once, when the engine has allocated its cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvfs.errors import UsageError
from kvfs.gpu.arrays import Memory, memory_of


@dataclass(frozen=True, slots=True)
class Plane:
    """One array of pages, and where its page begins in a block."""

    memory: Memory
    page_bytes: int
    pages: int
    offset: int

    def page(self, number: int) -> Memory:
        return self.memory.part(number * self.page_bytes, self.page_bytes)


class PagedLayout:
    """The planes of a cache in the order in which a block holds them. Immutable."""

    def __init__(self, arrays: Iterable[object], *, device: int = 0) -> None:
        """Raises UsageError for arrays that are not alike: number of pages, host or device."""
        planes: list[Plane] = []
        offset = 0
        for array in arrays:
            memory = memory_of(array, writable=False, device=device)
            if memory.rows < 1 or memory.size_bytes == 0:
                raise UsageError("a plane of a paged cache has no pages")
            page_bytes = memory.size_bytes // memory.rows
            planes.append(Plane(memory, page_bytes, memory.rows, offset))
            offset += page_bytes
        if not planes:
            raise UsageError("a paged cache has no planes")
        if len({(plane.pages, plane.memory.place) for plane in planes}) != 1:
            raise UsageError("the planes of a paged cache differ in number of pages or in device")
        self.planes = tuple(planes)
        self.block_bytes = offset

    @classmethod
    def contiguous(cls, cache: object, *, device: int = 0) -> PagedLayout:
        """`cache[page]` is a whole block."""
        return cls((cache,), device=device)

    @classmethod
    def per_layer(cls, layers: Sequence[object], *, device: int = 0) -> PagedLayout:
        """`layers[n][page]` is layer n of a block."""
        return cls(layers, device=device)

    @classmethod
    def kv_split(
        cls, keys: Sequence[object], values: Sequence[object], *, device: int = 0
    ) -> PagedLayout:
        """A block is K of layer 0, V of layer 0, K of layer 1, and so on."""
        if len(keys) != len(values):
            raise UsageError(f"{len(keys)} arrays of keys, but {len(values)} of values")
        pairs = zip(keys, values, strict=True)
        return cls((array for pair in pairs for array in pair), device=device)

    @property
    def pages(self) -> int:
        return self.planes[0].pages

    @property
    def memory(self) -> Memory:
        """Some memory of it: all planes are on one device."""
        return self.planes[0].memory

    @property
    def writable(self) -> bool:
        return all(plane.memory.writable for plane in self.planes)

    def at(self, pages: Iterable[int]) -> PagedBlocks:
        """Blocks that lie in these pages, in their order.

        Raises UsageError for a page that does not exist or that two blocks would share.
        """
        numbers = tuple(int(page) for page in pages)
        if len(set(numbers)) != len(numbers):
            raise UsageError("two blocks would share a page")
        for number in numbers:
            if not 0 <= number < self.pages:
                raise UsageError(f"there is no page {number}: the cache has {self.pages}")
        return PagedBlocks(self, numbers)


@dataclass(frozen=True, slots=True)
class PagedBlocks:
    """Blocks in pages of a cache."""

    layout: PagedLayout
    pages: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.pages)

    @property
    def memory(self) -> Memory:
        return self.layout.memory

    @property
    def writable(self) -> bool:
        return self.layout.writable

    @property
    def contiguous(self) -> bool:
        return len(self.layout.planes) == 1

    def block_bytes(self, number: int) -> int:
        return self.layout.block_bytes

    def segments(self, number: int) -> list[Memory]:
        """The parts of one block, in the block's order."""
        page = self.pages[number]
        return [plane.page(page) for plane in self.layout.planes]

    def part(self, start: int, end: int) -> PagedBlocks:
        """Some of these blocks."""
        return PagedBlocks(self.layout, self.pages[start:end])
