"""Files read into device memory by kvikio: the only module that imports it.

kvikio opens paths, so it is given `/proc/self/fd/N` of a descriptor. What it starts keeps neither
its file nor its buffer alive; `Reading` does.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import kvikio
import kvikio.defaults

from kvfs.errors import BlockTorn, DeviceError
from kvfs.gpu.arrays import DeviceMemory
from kvfs.gpu.device import Load

log = logging.getLogger(__name__)

TASK_BYTES = 4 << 20
"""A larger read is split among kvikio's threads."""


class CuFiles:
    """kvikio in this process, whose settings are the process's: the last one made decides.

    Used by one thread at a time. `compat` keeps kvikio from touching cuFile, which hangs where the
    driver is not right: the probe says where.
    """

    def __init__(self, *, threads: int, compat: bool) -> None:
        settings: dict[str, Any] = {"num_threads": threads, "task_size": TASK_BYTES}
        if compat:
            settings["compat_mode"] = kvikio.CompatMode.ON
        kvikio.defaults.set(settings)
        self._compat = compat
        self._registered: list[DeviceMemory] = []
        self._monitor = kvikio.SummaryMonitor()

    def start(self, load: Load, memory: DeviceMemory) -> Reading:
        """Begin to read a raw replica. Raises DeviceError."""
        return Reading(load, memory)

    def register(self, memory: DeviceMemory) -> None:
        """Let the disk write into it by itself; where that is refused, cuFile has other ways."""
        if self._compat:
            return
        try:
            kvikio.memory_register(memory)
        except RuntimeError as error:
            log.warning("staging memory cannot be registered with cuFile: %s", error)
        else:
            self._registered.append(memory)

    def carried_bytes(self) -> dict[str, int]:
        """What kvikio has carried since this was made, in the whole process, by its ways."""
        ways = self._monitor.get().by_backend
        return {name: way["bytes_transferred"] for name, way in ways.items()}

    def close(self) -> None:
        """Deregister memory; nvidia-fs can deadlock if it is freed before."""
        while self._registered:
            kvikio.memory_deregister(self._registered.pop())
        self._monitor.stop()


class Reading:
    """One read under way. To be ended with `wait`, also after an error of another."""

    def __init__(self, load: Load, memory: DeviceMemory) -> None:
        self._load = load
        self._memory = memory
        try:
            self._file = kvikio.CuFile(f"/proc/self/fd/{load.fd}", "r")
        except RuntimeError as error:
            raise DeviceError(f"kvikio cannot open it: {error}") from error
        try:
            # Below its threshold kvikio reads at once.
            self._future = self._file.pread(memory, load.size_bytes)
        except RuntimeError as error:
            self._file.close()
            raise self._error(error) from error

    def wait(self) -> None:
        """Raises BlockTorn, DeviceError."""
        try:
            done = self._future.get()
        except RuntimeError as error:
            raise self._error(error) from error
        finally:
            self._file.close()
        if done != self._load.size_bytes:
            raise BlockTorn(f"{done} of {self._load.size_bytes} bytes were read")

    def _error(self, error: RuntimeError) -> DeviceError | BlockTorn:
        """kvikio says everything with RuntimeError."""
        size_bytes = os.fstat(self._load.fd).st_size
        if size_bytes < self._load.size_bytes:
            wanted_bytes = self._load.size_bytes
            return BlockTorn(f"its replica has {size_bytes} bytes instead of {wanted_bytes}")
        return DeviceError(f"kvikio could not read it: {error}")
