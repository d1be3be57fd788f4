"""The devices that the contract is held against, and files for them to load."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from kvfs.gpu.device import Device
from kvfs.gpu.host import HostDevice
from kvfs.tiers.codec import compress_file
from kvfs.tiers.seal import SEAL_XATTR, Seal
from tests.gpu.stub import Rows, StubDriver, StubRuntime, seen_by_host

STAGING_BYTES = 1 << 20
DEPTH = 4


class Machine(Protocol):
    """A device, and how a program on it makes arrays and looks at them."""

    device: Device
    has_streams: bool

    def array(self, rows: int, row_bytes: int) -> Any:
        """Rows of zeros."""

    def bytes_of(self, array: Any) -> bytes: ...

    def fill(self, array: Any, content: bytes) -> None: ...

    def close(self) -> None: ...


class HostMachine:
    """numpy."""

    has_streams = False

    def __init__(self) -> None:
        self.device: Device = HostDevice(threads=3, inline_bytes=16 << 10)

    def array(self, rows: int, row_bytes: int) -> Any:
        return np.zeros((rows, row_bytes), np.uint8)

    def bytes_of(self, array: Any) -> bytes:
        return bytes(np.ascontiguousarray(array).tobytes())

    def fill(self, array: Any, content: bytes) -> None:
        array[:] = np.frombuffer(content, np.uint8).reshape(array.shape)

    def close(self) -> None:
        self.device.close()


class StubMachine:
    """The real kvikio on the driver that the tests build."""

    has_streams = True

    def __init__(self, library: Path) -> None:
        self.driver = StubDriver(library)
        self.runtime = StubRuntime(self.driver)
        from kvfs.gpu.cuda import CudaDevice

        self.device: Device = CudaDevice(
            self.runtime, compat=True, threads=2, depth=DEPTH, staging_bytes=STAGING_BYTES
        )

    def array(self, rows: int, row_bytes: int) -> Any:
        rows_of = Rows(self.driver.allocate(rows * row_bytes), (rows, row_bytes))
        self.fill(rows_of, bytes(rows * row_bytes))
        return rows_of

    def bytes_of(self, array: Any) -> bytes:
        return bytes(self._view(array))

    def fill(self, array: Any, content: bytes) -> None:
        self._view(array)[:] = content

    def _view(self, array: Any) -> memoryview:
        from kvfs.gpu.arrays import DeviceMemory, memory_of

        memory = memory_of(array, writable=True)
        assert isinstance(memory, DeviceMemory)
        return seen_by_host(memory).view

    def close(self) -> None:
        self.device.close()


class CudaMachine:
    """cupy on GPU 0."""

    has_streams = True

    def __init__(self) -> None:
        import cupy

        from kvfs.gpu.cuda import CudaDevice
        from kvfs.gpu.cupy_runtime import CupyRuntime
        from kvfs.gpu.probe import probe

        self._cupy = cupy
        self.device: Device = CudaDevice(
            CupyRuntime(0), compat=probe().compat, threads=4, depth=DEPTH,
            staging_bytes=STAGING_BYTES,
        )  # fmt: skip

    def array(self, rows: int, row_bytes: int) -> Any:
        return self._cupy.zeros((rows, row_bytes), self._cupy.uint8)

    def bytes_of(self, array: Any) -> bytes:
        return bytes(array.get().tobytes())

    def fill(self, array: Any, content: bytes) -> None:
        array[:] = self._cupy.asarray(np.frombuffer(content, np.uint8)).reshape(array.shape)

    def close(self) -> None:
        self.device.close()


def machine_of(kind: str, scratch: Path) -> Machine:
    if kind == "host":
        return HostMachine()
    if kind == "stub":
        from tests.gpu.stub import build_driver

        return StubMachine(build_driver(scratch))
    return CudaMachine()


def content_of(number: int, size_bytes: int) -> bytes:
    """Bytes of their own for each block, that compress."""
    noise = np.random.default_rng(number).normal(size=size_bytes // 2 + 1).astype(np.float32)
    upper_halves = noise.view(np.uint16)[1::2]
    return upper_halves.tobytes()[:size_bytes]


def publish(
    directory: Path, name: str, content: bytes, *, packed: bool = False, plane_split: bool = False
) -> Path:
    """A sealed file as it lies on a tier: raw, or compressed."""
    path = directory / name
    path.write_bytes(content)
    if packed:
        raw = path.rename(path.with_suffix(".raw"))
        with raw.open("rb") as source, path.open("wb") as target:
            assert compress_file(source.fileno(), target.fileno(), plane_split=plane_split)
        raw.unlink()
    checksum = xxhash.xxh3_128_digest(content)
    seal = Seal(2, 1, len(content), checksum, 0o644, 0, 0, 0, codec=int(packed))
    os.setxattr(path, SEAL_XATTR, seal.encode())
    return path


def publish_many(directory: Path, contents: Sequence[bytes], **how: bool) -> list[str]:
    names = [f"{number:03d}.bin" for number in range(len(contents))]
    for name, content in zip(names, contents, strict=True):
        publish(directory, name, content, **how)
    return names
