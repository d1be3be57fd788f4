"""Offloading: blocks from an engine's memory into kvfs."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from kvfs.errors import KvfsError
from kvfs.gpu.blocks import BlockFailure, blocks_of, check_place
from kvfs.gpu.device import Device, Route
from kvfs.gpu.source import BlockSink

Path = str | bytes | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Offloaded:
    """How much was stored: the first `stored` blocks. `failure` is what ended it."""

    requested: int
    stored: int
    stored_bytes: int
    failure: BlockFailure | None = None

    @property
    def complete(self) -> bool:
        return self.stored == self.requested

    def check(self) -> None:
        """Raises the error of the block that could not be stored, if there is one."""
        if self.failure is not None:
            raise self.failure.error


class Offloader:
    """Stores blocks. Threads may share one: they take turns.

    A block goes through the host's memory also from a GPU: its checksum is made there. Owns nothing
    of `sink` and `device`, which must stay open as long as it is used.
    """

    def __init__(self, sink: BlockSink, device: Device) -> None:
        self._sink = sink
        self._device = device
        self._turn = threading.Lock()

    def write(self, paths: Sequence[Path], from_: object, *, stream: object = None) -> Offloaded:
        """Store blocks in order, up to the first that cannot be: later ones are of no use then.

        `from_` is like `into` of `Onboarder.read`. The work that `stream` has now is done before;
        until this returns the memory must not change. Blocks; run it in a thread of an async
        program. Raises UsageError for memory that does not fit.
        """
        names = [os.fsencode(path) for path in paths]
        blocks = blocks_of(from_, len(names), writable=False, device=self._device.number or 0)
        check_place(blocks, self._device.number)
        stored, stored_bytes = 0, 0
        with self._turn:
            contents = self._device.contents(blocks, stream)
            for path, content in zip(names, contents, strict=True):
                try:
                    self._sink.put(path, content)
                except (KvfsError, OSError) as error:
                    failure = BlockFailure(path, error)
                    return Offloaded(len(names), stored, stored_bytes, failure)
                stored, stored_bytes = stored + 1, stored_bytes + len(content)
        return Offloaded(len(names), stored, stored_bytes)

    def describe(self) -> Route:
        """Which way the device's bytes take when they are loaded again."""
        return self._device.route()
