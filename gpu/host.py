"""Blocks in the host's memory: for engines on CPU nodes, and wherever there is no GPU.

A small block is first asked for with `RWF_NOWAIT` on the calling thread: if the page cache has it,
no other thread is woken for it. What has to wait for a disk, and large blocks, are read by several
threads. Bytes go from the page cache straight to their place, also into the pages of a cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

from kvfs.errors import KvfsError, UsageError
from kvfs.gpu import replica
from kvfs.gpu.arrays import HostMemory
from kvfs.gpu.blocks import Blocks
from kvfs.gpu.device import RAW, Load, Route

THREADS = 4
INLINE_BYTES = 256 << 10


class HostDevice:
    """A `Device` of the host's memory. Owns its threads; any thread may call it."""

    number = None
    direct = False

    def __init__(self, threads: int = THREADS, inline_bytes: int = INLINE_BYTES) -> None:
        """The calling thread is one of `threads`; blocks up to `inline_bytes` need no other."""
        if threads < 1:
            raise UsageError("a device has at least one thread")
        self._threads = threads
        self._inline_bytes = inline_bytes
        self._pool = ThreadPoolExecutor(max(threads - 1, 1), "kvfs-load")
        self._pid = os.getpid()

    def load(
        self, loads: Sequence[Load], blocks: Blocks, stream: object = None
    ) -> list[Exception | None]:
        """See `Device`. Raises UsageError for a stream, which the host has none of."""
        self._check_usable(stream)
        failures: list[Exception | None] = [None] * len(loads)
        waiting: list[int] = []
        for number, load in enumerate(loads):
            if load.codec != RAW or load.size_bytes > self._inline_bytes:
                waiting.append(number)
                continue
            try:
                if not replica.read_cached(load, _views(blocks, number)):
                    waiting.append(number)
            except (KvfsError, OSError) as error:
                failures[number] = replica.named(error, load)
                break
        self._load_waiting(waiting, loads, blocks, failures)
        return failures

    def _load_waiting(
        self, waiting: Sequence[int], loads: Sequence[Load], blocks: Blocks,
        failures: list[Exception | None],
    ) -> None:  # fmt: skip
        """Every thread takes the next block, in order, until one has failed."""
        rest = iter(waiting)
        failed = False

        def work() -> None:
            nonlocal failed
            # next() of a list's iterator is one step for other threads.
            while (number := next(rest, None)) is not None:
                if failed:
                    failures[number] = KvfsError("left out: an earlier block failed")
                    continue
                try:
                    replica.read(loads[number], _views(blocks, number))
                except (KvfsError, OSError) as error:
                    failures[number] = replica.named(error, loads[number])
                    failed = True

        helpers = min(self._threads, len(waiting)) - 1
        running = [self._pool.submit(work) for _ in range(helpers)]
        try:
            work()
        finally:
            # Nobody may write to the blocks any more when this returns.
            for future in running:
                future.exception()
        for future in running:
            future.result()

    def contents(self, blocks: Blocks, stream: object = None) -> Iterator[memoryview]:
        """See `Device`. A block that is contiguous is shown where it is."""
        self._check_usable(stream)
        for number in range(len(blocks)):
            views = _views(blocks, number)
            yield views[0] if len(views) == 1 else memoryview(b"".join(views))

    def route(self) -> Route:
        return Route("host", "preadv into the host's memory")

    def prove(self, load: Load) -> Route:  # the same for every file
        """See `Device`."""
        return self.route()

    def close(self) -> None:
        """End the threads."""
        if os.getpid() == self._pid:
            self._pool.shutdown()

    def _check_usable(self, stream: object) -> None:
        if stream is not None:
            raise UsageError("the host's memory has no streams")
        if os.getpid() != self._pid:
            raise UsageError("a device does not survive fork: make one in the child")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _views(blocks: Blocks, number: int) -> list[memoryview]:
    views = []
    for segment in blocks.segments(number):
        if not isinstance(segment, HostMemory):
            raise UsageError(f"the array is on CUDA device {segment.device}, not on the host")
        views.append(segment.view)
    return views
