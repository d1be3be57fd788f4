"""Onboarding: the blocks of a prompt, from kvfs into an engine's memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvfs.errors import BlockNotFound, InvalidOperation, KvfsError
from kvfs.gpu.blocks import BlockFailure, Blocks, blocks_of, check_place
from kvfs.gpu.device import Device, Load, Route
from kvfs.gpu.replica import name_of
from kvfs.gpu.source import BlockSource, LeasedBlock
from kvfs.gpu.verification import Verification
from kvfs.units import printable

MAX_LEASED = 253
"""Blocks in one lease: each is a descriptor, of which a process has few and a message no more."""

Path = str | bytes | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Onboarded:
    """How much of what was asked for is loaded: the first `loaded` blocks, whole.

    What the memory of the others holds is undefined. `stopped` is why there are no more: "found"
    when all are loaded, "missing", "denied", "busy" or "offline" as the lease says, or "failed".
    Only then, when a block was there but could not be loaded, there is a `failure`.
    """

    requested: int
    loaded: int
    loaded_bytes: int
    stopped: str = "found"
    failure: BlockFailure | None = None

    @property
    def complete(self) -> bool:
        return self.loaded == self.requested

    def check(self) -> None:
        """Raises the error of the block that could not be loaded, if there is one."""
        if self.failure is not None:
            raise self.failure.error


class Onboarder:
    """Loads leading blocks of prompts. Threads may share one: they take turns.

    Owns nothing of `source` and `device`, which must stay open as long as it is used.
    """

    def __init__(
        self, source: BlockSource, device: Device, verification: Verification | None = None
    ) -> None:
        self._source = source
        self._device = device
        self._verification = verification or Verification()
        self._turn = threading.Lock()
        self._seen = 0

    def read(self, paths: Sequence[Path], into: object, *, stream: object = None) -> Onboarded:
        """Load the blocks at `paths` into memory, up to the first that cannot be.

        `into` is `PagedLayout.at(pages)`, a list of arrays, or one array with a row for each path.
        On a device, memory is changed only after the work that `stream` has now, and what is put on
        `stream` later finds the blocks loaded. Blocks; run it in a thread of an async program.

        Raises UsageError for memory that does not fit, and what the source raises when it cannot
        lease at all. What befalls a single block is in the result.
        """
        names = [os.fsencode(path) for path in paths]
        blocks = blocks_of(into, len(names), writable=True, device=self._device.number or 0)
        check_place(blocks, self._device.number)
        total = Onboarded(len(names), 0, 0)
        with self._turn:
            while total.loaded < len(names) and total.stopped == "found":
                start, end = total.loaded, total.loaded + MAX_LEASED
                try:
                    done = self._read_part(names[start:end], blocks.part(start, end), stream)
                except (KvfsError, OSError) as error:
                    if start == 0:
                        raise
                    # A later lease was refused: what is loaded stays loaded.
                    return replace(
                        total, stopped="failed", failure=BlockFailure(names[start], error)
                    )
                total = Onboarded(
                    len(names), start + done.loaded, total.loaded_bytes + done.loaded_bytes,
                    done.stopped, done.failure,
                )  # fmt: skip
        return total

    def _read_part(self, paths: Sequence[bytes], blocks: Blocks, stream: object) -> Onboarded:
        """What came of one lease."""
        with self._source.lease(paths, direct=self._device.direct) as leased:
            loads: list[Load] = []
            unfit: Exception | None = None
            for path, block in zip(paths, leased, strict=False):
                if block is None:
                    break
                load = self._load_of(path, block)
                unfit = _misfit(load, blocks.block_bytes(len(loads)))
                if unfit is not None:
                    break
                loads.append(load)
            stopped = leased.stopped
            errors = self._device.load(loads, blocks.part(0, len(loads)), stream) if loads else []
        done = next((n for n, error in enumerate(errors) if error is not None), len(loads))
        done_bytes = sum(load.size_bytes for load in loads[:done])
        error = errors[done] if done < len(loads) else unfit
        if error is not None:
            failure = BlockFailure(paths[done], error)
            return Onboarded(len(paths), done, done_bytes, "failed", failure)
        if done < len(paths) and stopped == "found":
            stopped = "missing"
        return Onboarded(len(paths), done, done_bytes, stopped)

    def _load_of(self, path: bytes, block: LeasedBlock) -> Load:
        self._seen += 1
        verify = self._verification.wants(block.size_bytes, self._seen)
        checksum = block.checksum if verify else None
        return Load(path, block.fd, block.size_bytes, block.codec, checksum)

    def describe(self, path: Path | None = None) -> Route:
        """Which way bytes take, and how that is known.

        With the path of a block it is read once more, by a process of its own, so that the answer
        is for the filesystem where that block lies; on a GPU this takes seconds. Raises
        BlockNotFound, DeviceError.
        """
        if path is None:
            return self._device.route()
        name = os.fsencode(path)
        with self._source.lease([name], direct=self._device.direct) as leased:
            for block in leased:
                if block is not None:
                    load = Load(name, block.fd, block.size_bytes, block.codec)
                    return self._device.prove(load)
        raise BlockNotFound(f"{printable(os.fsdecode(name))}: no such block to try a read with")


def _misfit(load: Load, room_bytes: int) -> KvfsError | None:
    """Why a block does not go where it was to go."""
    if load.size_bytes == room_bytes:
        return None
    return InvalidOperation(
        f"{name_of(load)}: the block has {load.size_bytes} bytes, the memory for it {room_bytes}"
    )
