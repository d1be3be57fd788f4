"""A GPU that is none: a driver built from `stub_libcuda.c`, and a `Runtime` on its memory.

With it all of `CudaDevice` runs, with the real kvikio; cupy, the kernels and nvcomp do not. It must
be loaded before kvikio, so it needs a process of its own: `python -m tests.gpu.stub_run`.
"""

from __future__ import annotations

import ctypes
import subprocess
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard

from kvfs.gpu import reference
from kvfs.gpu.arrays import DeviceMemory, HostMemory
from kvfs.gpu.layout import PagedBlocks, PagedLayout
from kvfs.gpu.reference import Bytes
from kvfs.gpu.runtime import ALIGNMENT_BYTES, FrameRun

SOURCE = Path(__file__).with_name("stub_libcuda.c")
LIBRARY = "libcuda.so.1"


def build_driver(directory: Path) -> Path:
    """The stub as a library that stands in for the driver's."""
    library = directory / LIBRARY
    command = ["cc", "-shared", "-fPIC", "-O1", f"-Wl,-soname,{LIBRARY}"]
    subprocess.run([*command, "-o", library, SOURCE], check=True, capture_output=True)
    return library


class StubDriver:
    """The loaded stub. Used by one thread."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self._library.stub_alloc.restype = ctypes.c_void_p
        self._library.stub_alloc.argtypes = (ctypes.c_size_t,)
        self._library.stub_free.argtypes = (ctypes.c_void_p,)
        self._library.stub_copied_bytes.restype = ctypes.c_ulonglong

    def allocate(self, size_bytes: int) -> StubArray:
        address = self._library.stub_alloc(max(size_bytes, 1))
        assert address is not None
        array = StubArray(address, size_bytes)
        weakref.finalize(array, self._library.stub_free, address)
        return array

    def copied_bytes(self) -> int:
        return int(self._library.stub_copied_bytes())


class StubArray:
    """Device memory as cupy shows it: one array of bytes."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.address = address
        self.size_bytes = size_bytes

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return {
            "shape": (self.size_bytes,), "typestr": "|u1", "data": (self.address, False),
            "version": 3,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rows:
    """Device memory as an array of another shape."""

    array: StubArray
    shape: tuple[int, ...]
    typestr: str = "|u1"

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        interface = self.array.__cuda_array_interface__
        return {**interface, "shape": self.shape, "typestr": self.typestr}


def seen_by_host(memory: DeviceMemory) -> HostMemory:
    """The stub's device memory is the host's."""
    view = memoryview((ctypes.c_char * memory.size_bytes).from_address(memory.address)).cast("B")
    return HostMemory(view, memory.rows, memory.owner)


class StubRuntime:
    """A `Runtime` that does at once, and on the host, what a GPU would be asked to do."""

    number = 0

    def __init__(self, driver: StubDriver) -> None:
        self.driver = driver
        self.followed: list[int] = []
        self.preceded: list[int] = []

    def current(self) -> AbstractContextManager[object]:
        return nullcontext()

    def allocate(self, size_bytes: int) -> DeviceMemory:
        array = self.driver.allocate(size_bytes)
        assert array.address % ALIGNMENT_BYTES == 0
        return DeviceMemory(array.address, size_bytes, self.number, owner=array)

    def pinned(self, size_bytes: int) -> HostMemory:
        return HostMemory(memoryview(bytearray(size_bytes)))

    def copy_in(self, source: HostMemory, target: DeviceMemory) -> None:
        seen_by_host(target).view[:] = source.view

    def copy_out(self, source: DeviceMemory, target: HostMemory) -> None:
        target.view[:] = seen_by_host(source).view

    def copy(self, source: DeviceMemory, target: DeviceMemory) -> None:
        seen_by_host(target).view[:] = seen_by_host(source).view

    def scatter(self, staged: DeviceMemory, stride_bytes: int, blocks: PagedBlocks) -> None:
        reference.scatter(_staged(staged, stride_bytes, blocks), _on_host(blocks))

    def gather(self, blocks: PagedBlocks, staged: DeviceMemory, stride_bytes: int) -> None:
        reference.gather(_on_host(blocks), _staged(staged, stride_bytes, blocks))

    def merge_halves(self, split: DeviceMemory, merged: DeviceMemory) -> None:
        reference.merge_halves(_bytes_of(split), _bytes_of(merged))

    def decode(
        self, source: DeviceMemory, target: DeviceMemory, runs: Sequence[FrameRun]
    ) -> list[bool]:
        """By zstandard, one frame after the other, as nvcomp has to do it."""
        frames, contents = seen_by_host(source).view, seen_by_host(target).view
        decode = zstandard.ZstdDecompressor().decompress
        for run in runs:
            for start, length, goal, size in zip(
                run.sources, run.lengths_bytes, run.targets, run.sizes_bytes, strict=True
            ):
                # RequiredDecompressionAlignment of nvcomp.
                assert (seen_address(source) + start) % 8 == 0
                contents[goal : goal + size] = decode(frames[start : start + length])
        return [True] * len(runs)

    def follow(self, stream: int) -> None:
        self.followed.append(stream)

    def precede(self, stream: int) -> None:
        self.preceded.append(stream)

    def mark(self) -> object:
        return object()

    def wait(self, mark: object) -> None:
        assert mark is not None

    def synchronize(self) -> None:
        """Everything has been done."""


def seen_address(memory: DeviceMemory) -> int:
    return memory.address


def _bytes_of(memory: DeviceMemory) -> Bytes:
    array: Bytes = np.frombuffer(seen_by_host(memory).view, np.uint8)
    return array


def _staged(staged: DeviceMemory, stride_bytes: int, blocks: PagedBlocks) -> Bytes:
    used = _bytes_of(staged.part(0, len(blocks) * stride_bytes))
    return used.reshape(len(blocks), stride_bytes)


def _on_host(blocks: PagedBlocks) -> PagedBlocks:
    planes = []
    for plane in blocks.layout.planes:
        assert isinstance(plane.memory, DeviceMemory)
        planes.append(seen_by_host(plane.memory))
    return PagedLayout(planes).at(blocks.pages)
