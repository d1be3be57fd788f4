"""CUDA through cupy and nvcomp. The only module that imports either."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import cupy
import numpy as np

from kvfs.errors import DeviceError
from kvfs.gpu import kernels
from kvfs.gpu.arrays import DeviceMemory, HostMemory
from kvfs.gpu.layout import PagedBlocks, PagedLayout
from kvfs.gpu.runtime import ALIGNMENT_BYTES, FrameRun, Mark
from kvfs.tiers.codec import CHUNK_BYTES

_MAX_GRID_X = 1024


class CupyRuntime:
    """A `Runtime` of one GPU. One thread at a time: its device sees to that."""

    def __init__(self, number: int = 0) -> None:
        """Raises DeviceError where the GPU cannot be used."""
        self.number = number
        try:
            with cupy.cuda.Device(number):
                self._stream = cupy.cuda.Stream(non_blocking=True)
                self._module = cupy.RawModule(code=kernels.SOURCE)
                self._scatter = self._module.get_function(kernels.SCATTER)
                self._gather = self._module.get_function(kernels.GATHER)
                self._merge = self._module.get_function(kernels.MERGE)
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise DeviceError(f"CUDA device {number} cannot be used: {error}") from error
        # The planes of a layout, on the device.
        self._planes: weakref.WeakKeyDictionary[PagedLayout, Any] = weakref.WeakKeyDictionary()
        # nvcomp's codecs belong to the thread that made them.
        self._codecs = threading.local()

    @contextmanager
    def current(self) -> Iterator[None]:
        try:
            with cupy.cuda.Device(self.number), self._stream:
                yield
        except (cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.memory.OutOfMemoryError) as error:
            raise DeviceError(f"CUDA device {self.number} failed: {error}") from error

    def allocate(self, size_bytes: int) -> DeviceMemory:
        # Not from a pool: what is registered with cuFile is the whole allocation.
        memory = cupy.cuda.Memory(size_bytes + ALIGNMENT_BYTES)
        address = -(-memory.ptr // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return DeviceMemory(address, size_bytes, self.number, owner=memory)

    def pinned(self, size_bytes: int) -> HostMemory:
        memory = cupy.cuda.alloc_pinned_memory(size_bytes)
        return HostMemory(memoryview(memory).cast("B")[:size_bytes], owner=memory)

    def copy_in(self, source: HostMemory, target: DeviceMemory) -> None:
        kind = cupy.cuda.runtime.memcpyHostToDevice
        self._copy(target.address, _address(source), source.size_bytes, kind)

    def copy_out(self, source: DeviceMemory, target: HostMemory) -> None:
        kind = cupy.cuda.runtime.memcpyDeviceToHost
        self._copy(_address(target), source.address, source.size_bytes, kind)

    def copy(self, source: DeviceMemory, target: DeviceMemory) -> None:
        kind = cupy.cuda.runtime.memcpyDeviceToDevice
        self._copy(target.address, source.address, source.size_bytes, kind)

    def _copy(self, target: int, source: int, size_bytes: int, kind: int) -> None:
        cupy.cuda.runtime.memcpyAsync(target, source, size_bytes, kind, self._stream.ptr)

    def scatter(self, staged: DeviceMemory, stride_bytes: int, blocks: PagedBlocks) -> None:
        self._move_pages(self._scatter, staged, stride_bytes, blocks)

    def gather(self, blocks: PagedBlocks, staged: DeviceMemory, stride_bytes: int) -> None:
        self._move_pages(self._gather, staged, stride_bytes, blocks)

    def _move_pages(
        self, kernel: Any, staged: DeviceMemory, stride_bytes: int, blocks: PagedBlocks
    ) -> None:
        planes = self._planes.get(blocks.layout)
        if planes is None:
            planes = self._planes[blocks.layout] = cupy.asarray(
                np.array(kernels.plane_table(blocks.layout), np.uint64)
            )
        pages = cupy.asarray(np.array(blocks.pages, np.uint64))
        words = max(plane.page_bytes for plane in blocks.layout.planes) // kernels.WORD_BYTES
        grid = (_grid(words), len(blocks), len(blocks.layout.planes))
        stride = np.uint64(stride_bytes // kernels.WORD_BYTES)
        kernel(grid, (kernels.THREADS,), (np.uint64(staged.address), stride, planes, pages))

    def merge_halves(self, split: DeviceMemory, merged: DeviceMemory) -> None:
        numbers = (split.address, merged.address, merged.size_bytes, 2 * CHUNK_BYTES)
        grid = (_grid(merged.size_bytes // 2),)
        self._merge(grid, (kernels.THREADS,), tuple(map(np.uint64, numbers)))

    def decode(
        self, source: DeviceMemory, target: DeviceMemory, runs: Sequence[FrameRun]
    ) -> list[bool]:
        nvcomp = _nvcomp()
        codec = getattr(self._codecs, "zstd", None)
        if codec is None:
            codec = self._codecs.zstd = nvcomp.Codec(
                algorithm="Zstd", bitstream_kind=nvcomp.BitstreamKind.RAW,
                uncomp_chunk_size=CHUNK_BYTES, device_id=self.number, cuda_stream=self._stream.ptr,
            )  # fmt: skip
        sizes = [size for run in runs for size in run.sizes_bytes]
        frames = nvcomp.as_arrays(
            source, [offset for run in runs for offset in run.sources],
            [length for run in runs for length in run.lengths_bytes], self._stream.ptr,
        )  # fmt: skip
        contents = nvcomp.as_arrays(
            target, [offset for run in runs for offset in run.targets], sizes, self._stream.ptr
        )
        try:
            codec.decode(frames, out=contents)
            self._stream.synchronize()
            decoded = list(contents.buffer_sizes)
        except (RuntimeError, ValueError) as error:
            raise DeviceError(f"nvcomp could not decode: {error}") from error
        good = [done == size for done, size in zip(decoded, sizes, strict=True)]
        ends = np.cumsum([len(run.sizes_bytes) for run in runs]).tolist()
        return [
            all(good[end - len(run.sizes_bytes) : end]) for run, end in zip(runs, ends, strict=True)
        ]

    def follow(self, stream: int) -> None:
        self._order(stream, self._stream.ptr)

    def precede(self, stream: int) -> None:
        self._order(self._stream.ptr, stream)

    def _order(self, first: int, second: int) -> None:
        event = cupy.cuda.Event(disable_timing=True)
        cupy.cuda.runtime.eventRecord(event.ptr, first)
        cupy.cuda.runtime.streamWaitEvent(second, event.ptr)

    def mark(self) -> Mark:
        event = cupy.cuda.Event(disable_timing=True)
        cupy.cuda.runtime.eventRecord(event.ptr, self._stream.ptr)
        return event

    def wait(self, mark: Mark) -> None:
        mark.synchronize()

    def synchronize(self) -> None:
        self._stream.synchronize()


def _nvcomp() -> Any:
    try:
        from nvidia import nvcomp
    except ImportError as error:
        raise DeviceError(f"compressed blocks need nvidia-nvcomp on the GPU: {error}") from error
    return nvcomp


def _address(memory: HostMemory) -> int:
    address: int = np.frombuffer(memory.view, np.uint8).ctypes.data
    return address


def _grid(threads: int) -> int:
    return max(1, min(-(-threads // kernels.THREADS), _MAX_GRID_X))
