"""The device of an engine: a GPU if the probe says that one can be used, else the host."""

from __future__ import annotations

from typing import Literal

from kvfs.errors import DeviceError
from kvfs.gpu.device import Device
from kvfs.gpu.host import HostDevice
from kvfs.gpu.probe import probe


def open_device(where: Literal["auto", "host"] | int = "auto") -> Device:
    """`"auto"`, `"host"` or the number of a GPU. To be closed by the caller.

    Raises DeviceError for a GPU that cannot be used; `"auto"` then takes the host.
    """
    if where == "host":
        return HostDevice()
    answer = probe()
    if not answer.usable:
        if where == "auto":
            return HostDevice()
        raise DeviceError(f"CUDA device {where} cannot be used: {answer.problem}")
    # Both import CUDA libraries, of which nothing else in kvfs knows.
    from kvfs.gpu.cuda import CudaDevice
    from kvfs.gpu.cupy_runtime import CupyRuntime

    number = 0 if where == "auto" else where
    return CudaDevice(CupyRuntime(number), compat=answer.compat)
