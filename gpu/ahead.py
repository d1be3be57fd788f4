"""Leases of a long prompt: in parts, of which the next is asked for while one is loaded.

The daemon works on a lease while nothing is read, and the readers wait for it. With parts it does
so beside them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass

from kvfs.errors import KvfsError
from kvfs.gpu.source import BlockSource, Leased

MAX_LEASED = 253
"""Blocks leased at a time: each is a descriptor, of which a process has few, a message no more."""
PART_BYTES = 32 << 20
"""The first of several parts has so many. A request costs 0.2 ms beside what it costs for each
block (docs/PERFORMANCE.md), a twentieth of what it takes to read so many from the page cache."""


def parts_of(count: int, block_bytes: int) -> list[range]:
    """The numbers of the blocks of each part.

    What fits in one lease is one part, unless it has many bytes. Else the first part is small, so
    that reading begins soon, and two parts that follow each other fit in one lease.
    """
    first = -(-PART_BYTES // max(block_bytes, 1))
    if count <= min(2 * first, MAX_LEASED):
        return [range(count)]
    most = MAX_LEASED // 2
    first = min(first, most)
    return [range(first), *(range(n, min(n + most, count)) for n in range(first, count, most))]


@dataclass(slots=True)
class _Held:
    """A lease that was entered, to be released by any one thread."""

    context: AbstractContextManager[Leased]
    leased: Leased

    def release(self) -> None:
        self.context.__exit__(None, None, None)


def leases_ahead(
    source: BlockSource, paths: Sequence[bytes], parts: Sequence[range], *, direct: bool
) -> Generator[Leased]:
    """The leases of the parts in turn, each until the next is asked for; close it at the end.

    A thread of its own asks for the next lease, and releases the last one, meanwhile. A lease that
    is refused beside another one is asked for again when that is released. Raises what the source
    raises for a lease.
    """

    def lease(part: range) -> _Held:
        context = source.lease(paths[part.start : part.stop], direct=direct)
        return _Held(context, context.__enter__())

    held = lease(parts[0])
    with ThreadPoolExecutor(1, "kvfs-lease") as thread:
        for following in parts[1:]:
            ahead = thread.submit(lease, following)
            try:
                yield held.leased
            except BaseException:
                try:
                    held.release()
                finally:
                    _drop(ahead)
                raise
            released = thread.submit(held.release)
            try:
                held = ahead.result()
            except (KvfsError, OSError):
                released.result()
                held = lease(following)
            released.result()
        try:
            yield held.leased
        finally:
            held.release()


def _drop(ahead: Future[_Held]) -> None:
    """Release a lease that nobody wants any more, once it is there; refused is as well."""
    with contextlib.suppress(KvfsError, OSError):
        ahead.result().release()
