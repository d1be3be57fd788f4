"""Blocks in the memory of a GPU.

A raw block whose place is contiguous is read straight into it. Any other is read into staging
memory, decoded there if it is compressed, verified, and then copied to its place: nothing of a
block that fails gets there. Staging has two halves: one is read into while the other is copied out.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import xxhash

from kvfs.errors import BlockCorrupt, KvfsError, UsageError
from kvfs.gpu import replica
from kvfs.gpu.arrays import DeviceMemory, HostMemory, stream_pointer
from kvfs.gpu.blocks import Blocks
from kvfs.gpu.cufile import CuFiles, Reading
from kvfs.gpu.device import RAW, Load, Route
from kvfs.gpu.kernels import plane_table
from kvfs.gpu.layout import PagedBlocks
from kvfs.gpu.probe import prove
from kvfs.gpu.runtime import FrameRun, Mark, Runtime
from kvfs.tiers.codec import CompressedBlock, open_compressed

THREADS = 8
DEPTH = 16
STAGING_BYTES = 128 << 20
_SLOT_ALIGNMENT_BYTES = 4096

Failures = list[Exception | None]


class CudaDevice:
    """A `Device` of one GPU. Owns its staging memory and threads; a lock gives callers their turn.

    Memory is changed by the runtime's own stream and by kvikio, both in order with the caller's.
    """

    direct = True

    def __init__(
        self,
        runtime: Runtime,
        *,
        compat: bool,
        threads: int = THREADS,
        depth: int = DEPTH,
        staging_bytes: int = STAGING_BYTES,
    ) -> None:
        """`depth` reads are under way at once. The GPU gives up to 2 `staging_bytes` of memory.

        `compat` is what the probe says: whether bytes have to go through the host's memory.
        """
        self._runtime = runtime
        self._depth = depth
        self._half_bytes = staging_bytes // 2
        self._files = CuFiles(threads=threads, compat=compat)
        self._pool = ThreadPoolExecutor(threads, "kvfs-frames")
        self._halves: list[DeviceMemory] = []
        self._busy: list[Mark] = [None, None]
        self._scratch: dict[str, DeviceMemory] = {}
        self._pinned: dict[str, HostMemory] = {}
        self._turn = threading.Lock()
        self._pid = os.getpid()

    @property
    def number(self) -> int:
        return self._runtime.number

    def load(self, loads: Sequence[Load], blocks: Blocks, stream: object = None) -> Failures:
        """See `Device`. Raises UsageError for a block that is too large for the staging memory."""
        self._check_fork()
        failures: Failures = [None] * len(loads)
        pointer = stream_pointer(stream)
        straight, staged = [], []
        for number, load in enumerate(loads):
            if blocks.contiguous and load.codec == RAW:
                straight.append(number)
            else:
                self._slot_bytes(load)
                staged.append(number)
        _check_pages(blocks)
        with self._turn, self._runtime.current():
            self._runtime.follow(pointer)
            self._load_straight(straight, loads, blocks, failures)
            for half, group in enumerate(self._groups(staged, loads)):
                self._load_staged(half % 2, group, loads, blocks, failures)
            self._runtime.precede(pointer)
        return failures

    # --- straight to its place ----------------------------------------------------------------

    def _load_straight(
        self, numbers: Sequence[int], loads: Sequence[Load], blocks: Blocks, failures: Failures
    ) -> None:
        if numbers:
            # The disk knows no streams: the caller's work has to be over.
            self._runtime.synchronize()
            places = [_on_device(blocks.segments(number)[0]) for number in numbers]
            self._read(numbers, loads, places, failures)
            self._verify(numbers, loads, places, failures)

    def _read(
        self, numbers: Sequence[int], loads: Sequence[Load], places: Sequence[DeviceMemory],
        failures: Failures,
    ) -> None:  # fmt: skip
        """Read raw replicas, `depth` at once; none is begun after an error."""
        running: deque[tuple[int, Reading]] = deque()
        failed = False

        def end_oldest() -> None:
            nonlocal failed
            number, reading = running.popleft()
            try:
                reading.wait()
            except KvfsError as error:
                failures[number] = replica.named(error, loads[number])
                failed = True

        try:
            for number, place in zip(numbers, places, strict=True):
                if len(running) == self._depth:
                    end_oldest()
                if failed:
                    failures[number] = _left_out()
                    continue
                try:
                    running.append((number, self._files.start(loads[number], place)))
                except KvfsError as error:
                    failures[number] = replica.named(error, loads[number])
                    failed = True
        finally:
            # Memory and descriptors are in use until then.
            while running:
                end_oldest()

    def _verify(
        self, numbers: Sequence[int], loads: Sequence[Load], places: Sequence[DeviceMemory],
        failures: Failures,
    ) -> None:  # fmt: skip
        """Compare what is in device memory with the checksums that are asked for."""
        for number, place in zip(numbers, places, strict=True):
            load = loads[number]
            if load.checksum is None or failures[number] is not None:
                continue
            pinned = self._pinned_memory("in", place.size_bytes)
            self._runtime.copy_out(place, pinned)
            self._runtime.synchronize()
            try:
                replica.check(load, xxhash.xxh3_128_digest(pinned.view))
            except BlockCorrupt as error:
                failures[number] = replica.named(error, load)

    # --- by way of staging memory -------------------------------------------------------------

    def _groups(self, numbers: Sequence[int], loads: Sequence[Load]) -> Iterator[list[int]]:
        """As many blocks as one half of the staging memory holds, at least one."""
        group: list[int] = []
        stride = 0
        for number in numbers:
            stride = max(stride, self._slot_bytes(loads[number]))
            if (len(group) + 1) * stride > self._half_bytes:
                yield group
                group, stride = [], self._slot_bytes(loads[number])
            group.append(number)
        if group:
            yield group

    def _slot_bytes(self, load: Load) -> int:
        slot_bytes = _aligned(load.size_bytes)
        if slot_bytes > self._half_bytes:
            raise UsageError(
                f"{replica.name_of(load)}: a block of {load.size_bytes} bytes needs at least "
                f"staging_bytes={2 * slot_bytes}, not {2 * self._half_bytes}"
            )
        return slot_bytes

    def _load_staged(
        self, half: int, group: Sequence[int], loads: Sequence[Load], blocks: Blocks,
        failures: Failures,
    ) -> None:  # fmt: skip
        if any(failures):
            for number in group:
                failures[number] = _left_out()
            return
        stride = max(self._slot_bytes(loads[number]) for number in group)
        staging = self._staging(half)
        slots = {
            number: staging.part(position * stride, loads[number].size_bytes)
            for position, number in enumerate(group)
        }
        raw = [number for number in group if loads[number].codec == RAW]
        self._read(raw, loads, [slots[number] for number in raw], failures)
        packed = [number for number in group if loads[number].codec != RAW]
        self._decompress(packed, loads, staging, slots, failures)
        self._verify(group, loads, list(slots.values()), failures)
        good = next((n for n, number in enumerate(group) if failures[number]), len(group))
        self._place(group[:good], staging, stride, slots, blocks)
        self._busy[half] = self._runtime.mark()

    def _place(
        self, group: Sequence[int], staging: DeviceMemory, stride: int,
        slots: dict[int, DeviceMemory], blocks: Blocks,
    ) -> None:  # fmt: skip
        if not group:
            return
        if isinstance(blocks, PagedBlocks) and not blocks.contiguous:
            # All of such blocks are staged, so a group is a run of them.
            self._runtime.scatter(staging, stride, blocks.part(group[0], group[-1] + 1))
            return
        for number in group:
            self._runtime.copy(slots[number], _on_device(blocks.segments(number)[0]))

    def _staging(self, half: int) -> DeviceMemory:
        """One half, which nothing uses any more."""
        if not self._halves:
            whole = self._runtime.allocate(2 * self._half_bytes)
            self._files.register(whole)
            self._halves = [whole.part(start, self._half_bytes) for start in (0, self._half_bytes)]
        busy = self._busy[half]
        if busy is not None:
            self._runtime.wait(busy)
            self._busy[half] = None
        return self._halves[half]

    # --- compressed replicas ------------------------------------------------------------------

    def _decompress(
        self, numbers: Sequence[int], loads: Sequence[Load], staging: DeviceMemory,
        slots: dict[int, DeviceMemory], failures: Failures,
    ) -> None:  # fmt: skip
        """Decode compressed replicas into their slots, after the host has read and checked them."""
        opened: dict[int, CompressedBlock] = {}
        for number in numbers:
            try:
                opened[number] = _open_packed(loads[number])
            except (KvfsError, OSError) as error:
                failures[number] = replica.named(error, loads[number])
        if not opened:
            return
        starts, end = {}, 0
        for number, block in opened.items():
            starts[number] = end
            end += _aligned(block.stored_bytes)
        stored = self._pinned_memory("in", end)
        jobs = {
            number: self._pool.submit(
                block.read_stored, stored.part(starts[number], block.stored_bytes).view
            )
            for number, block in opened.items()
        }
        for number, job in jobs.items():
            failure = job.exception()
            if failure is not None:
                failures[number] = replica.named(failure, loads[number])
                del opened[number]
        self._decode(opened, starts, stored.part(0, end), staging, slots, failures, loads)

    def _decode(
        self, opened: dict[int, CompressedBlock], starts: dict[int, int], stored: HostMemory,
        staging: DeviceMemory, slots: dict[int, DeviceMemory], failures: Failures,
        loads: Sequence[Load],
    ) -> None:  # fmt: skip
        """Decode what the host has read: blocks with split planes by way of another memory."""
        if not opened:
            return
        source = self._scratch_memory("stored", stored.size_bytes)
        self._runtime.copy_in(stored, source.part(0, stored.size_bytes))
        for plane_split in (False, True):
            group = {n: block for n, block in opened.items() if block.plane_split == plane_split}
            if not group:
                continue
            target = self._scratch_memory("split", self._half_bytes) if plane_split else staging
            offsets = {number: slots[number].address - staging.address for number in group}
            runs = [_run(block, starts[n], offsets[n]) for n, block in group.items()]
            decoded = self._runtime.decode(source, target, runs)
            for number, good in zip(group, decoded, strict=True):
                if not good:
                    corrupt = BlockCorrupt("a frame of it does not decode")
                    failures[number] = replica.named(corrupt, loads[number])
                elif plane_split:
                    split = target.part(offsets[number], slots[number].size_bytes)
                    self._runtime.merge_halves(split, slots[number])

    # --- out of device memory -----------------------------------------------------------------

    def contents(self, blocks: Blocks, stream: object = None) -> Iterator[memoryview]:
        """See `Device`. Raises UsageError for a block that is too large for the staging memory."""
        self._check_fork()
        _check_pages(blocks)
        start = 0
        while start < len(blocks):
            size_bytes = blocks.block_bytes(start)
            stride = self._slot_bytes(Load(b"", -1, size_bytes))
            end = start
            while (
                end < len(blocks)
                and blocks.block_bytes(end) == size_bytes
                and (end + 1 - start) * stride <= self._half_bytes
            ):
                end += 1
            pinned = self._copy_out(blocks.part(start, end), stride, stream)
            for position in range(end - start):
                yield pinned.part(position * stride, size_bytes).view
            start = end

    def _copy_out(self, blocks: Blocks, stride: int, stream: object) -> HostMemory:
        """Blocks of one size, `stride` apart, on the host."""
        with self._turn, self._runtime.current():
            # Its own, for it is looked at while others load.
            pinned = self._pinned_memory("out", len(blocks) * stride)
            self._runtime.follow(stream_pointer(stream))
            if isinstance(blocks, PagedBlocks) and not blocks.contiguous:
                staging = self._staging(0)
                self._runtime.gather(blocks, staging, stride)
                self._runtime.copy_out(staging.part(0, len(blocks) * stride), pinned)
            else:
                for number in range(len(blocks)):
                    segment = _on_device(blocks.segments(number)[0])
                    target = pinned.part(number * stride, segment.size_bytes)
                    self._runtime.copy_out(segment, target)
            self._runtime.synchronize()
        return pinned

    # --- the rest -----------------------------------------------------------------------------

    def _pinned_memory(self, purpose: str, size_bytes: int) -> HostMemory:
        memory = self._pinned.get(purpose)
        if memory is None or memory.size_bytes < size_bytes:
            memory = self._pinned[purpose] = self._runtime.pinned(size_bytes)
        return memory.part(0, size_bytes)

    def _scratch_memory(self, purpose: str, size_bytes: int) -> DeviceMemory:
        memory = self._scratch.get(purpose)
        if memory is None or memory.size_bytes < size_bytes:
            memory = self._scratch[purpose] = self._runtime.allocate(size_bytes)
        return memory

    def _check_fork(self) -> None:
        if os.getpid() != self._pid:
            raise UsageError("a GPU cannot be used after fork: use spawn")

    def route(self) -> Route:
        """By what kvikio has counted. It does not see whether cuFile itself used the host."""
        carried = self._files.carried_bytes()
        if carried.get("GDS"):
            return Route("cufile", f"kvikio gave {carried['GDS']} bytes to cuFile")
        if carried.get("POSIX"):
            return Route("compat", f"kvikio read {carried['POSIX']} bytes through the host")
        return Route("unknown", "kvikio has read nothing yet")

    def prove(self, load: Load) -> Route:
        """See `Device`. Takes seconds."""
        if load.codec != RAW:
            return Route("compat", "the host reads compressed blocks, the GPU decodes them")
        return prove(load.fd, load.size_bytes, self.number)

    def close(self) -> None:
        """Give back staging memory and threads."""
        if os.getpid() != self._pid:
            return
        with self._turn, self._runtime.current():
            self._runtime.synchronize()
            self._files.close()
            self._pool.shutdown()
            self._halves, self._scratch, self._pinned = [], {}, {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _on_device(memory: object) -> DeviceMemory:
    if not isinstance(memory, DeviceMemory):
        raise UsageError("the array is on the host, not on the GPU")
    return memory


def _check_pages(blocks: Blocks) -> None:
    """Raises UsageError for pages that the kernels cannot move."""
    if isinstance(blocks, PagedBlocks) and not blocks.contiguous and len(blocks):
        plane_table(blocks.layout)


def _open_packed(load: Load) -> CompressedBlock:
    """Raises BlockCorrupt, OSError."""
    # The lease was for the GPU; the host reads header and frames, at any offset.
    flags = fcntl.fcntl(load.fd, fcntl.F_GETFL)
    if flags & os.O_DIRECT:
        fcntl.fcntl(load.fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    block = open_compressed(load.fd)
    if block.size_bytes != load.size_bytes:
        raise BlockCorrupt("its replica is of another length")
    return block


def _run(block: CompressedBlock, source: int, target: int) -> FrameRun:
    begin = block.frames[0].offset
    targets, end = [], target
    for frame in block.frames:
        targets.append(end)
        end += frame.size_bytes
    return FrameRun(
        tuple(source + frame.offset - begin for frame in block.frames),
        tuple(frame.length_bytes for frame in block.frames),
        tuple(targets),
        tuple(frame.size_bytes for frame in block.frames),
    )


def _left_out() -> KvfsError:
    return KvfsError("left out: an earlier block failed")


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _SLOT_ALIGNMENT_BYTES) * _SLOT_ALIGNMENT_BYTES
