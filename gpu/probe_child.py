"""The child of `kvfs.gpu.probe`: a program that asks CUDA's libraries what they can do.

Prints one JSON object a line: the step it begins, or what it found. With the arguments FD SIZE
DEVICE it also reads that file into the GPU, and says which way the bytes took.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from importlib import import_module, metadata
from typing import Any

from kvfs.gpu.device import RouteKind

# What a read shows, and what each package of the extra is called for either CUDA.
_LIBRARIES = {
    "kvikio": ("kvikio", ("kvikio-cu13", "kvikio-cu12")),
    "cupy": ("cupy", ("cupy-cuda13x", "cupy-cuda12x", "cupy")),
    "nvcomp": ("nvidia.nvcomp", ("nvidia-nvcomp-cu13", "nvidia-nvcomp-cu12")),
    "cuda-bindings": ("cuda.bindings.cufile", ("cuda-bindings",)),
}
_NAME_BYTES = 256
_STATS_LEVEL = 3


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def driver() -> int:
    """The number of GPUs; nothing else of CUDA is touched where there are none."""
    say(step="driver")
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        say(problem="there is no NVIDIA driver: libcuda.so.1 cannot be loaded")
        return 0
    if error := cuda.cuInit(0):
        say(problem=f"the NVIDIA driver finds no GPU: cuInit says {error}")
        return 0
    number = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    say(cuda=f"{number.value // 1000}.{number.value % 1000 // 10}")
    cuda.cuDeviceGetCount(ctypes.byref(number))
    names = []
    for index in range(number.value):
        name = ctypes.create_string_buffer(_NAME_BYTES)
        device = ctypes.c_int()
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetName(name, _NAME_BYTES, device)
        names.append(name.value.decode(errors="replace"))
    say(devices=names)
    return len(names)


def libraries() -> dict[str, str]:
    say(step="import")
    found = {}
    for name, (module, packages) in _LIBRARIES.items():
        try:
            import_module(module)
        except (ImportError, OSError, RuntimeError):
            continue
        found[name] = _version(packages)
    say(libraries=found)
    return found


def _version(packages: tuple[str, ...]) -> str:
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def cufile() -> None:
    """Whether kvikio would use cuFile, and whether cuFile opens its driver."""
    import kvikio.cufile_driver
    import kvikio.defaults

    say(nvidia_fs=os.path.exists("/proc/driver/nvidia-fs"), p2pdma=p2pdma_wanted())
    if kvikio.defaults.is_compat_mode_preferred():
        say(compat_because=compat_reason())
        return
    say(step="cuFile's driver_open")
    try:
        kvikio.cufile_driver.driver_open()
    except RuntimeError as error:
        say(compat_because=f"cuFile's driver does not open: {error}")
        return
    say(cufile=".".join(map(str, kvikio.cufile_driver.libcufile_version())))
    available = kvikio.cufile_driver.get("is_gds_available")
    say(compat_because="" if available else "cuFile says that GDS is not available")


def compat_reason() -> str:
    """Why kvikio prefers its own way; it does not say."""
    if os.environ.get("KVIKIO_COMPAT_MODE", "AUTO").upper() in ("ON", "TRUE", "YES", "1"):
        return "KVIKIO_COMPAT_MODE says so"
    if not os.access("/run/udev", os.R_OK):
        return "/run/udev cannot be read, which cuFile needs; mount it into the container"
    return "kvikio cannot load libcufile, or this is WSL"


def p2pdma_wanted() -> bool:
    if os.environ.get("CUFILE_USE_PCIP2PDMA", "").lower() in ("1", "true"):
        return True
    path = os.environ.get("CUFILE_ENV_PATH_JSON", "/etc/cufile.json")
    try:
        with open(path) as file:
            text = "".join(line.partition("//")[0] for line in file)
        return bool(json.loads(text)["properties"]["use_pci_p2pdma"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read(fd: int, size_bytes: int, device: int) -> None:
    """Read a whole file, compare it with what the host reads, and say which way it took."""
    import cupy
    import kvikio

    say(step="read")
    counters = _CufileCounters()
    with cupy.cuda.Device(device), kvikio.SummaryMonitor() as monitor:
        array = cupy.empty(size_bytes, cupy.uint8)
        with kvikio.CuFile(f"/proc/self/fd/{fd}", "r") as file:
            file.pread(array, size_bytes).get()
        ways = monitor.get().by_backend
        held = array.get().tobytes()
    with open(f"/proc/self/fd/{fd}", "rb") as buffered:
        if held != buffered.read(size_bytes):
            say(problem="the GPU got other bytes than the host")
            return
    kind, why = counters.route() if ways.get("GDS", {}).get("bytes_transferred") else (
        "compat", "kvikio itself read through the host's memory"
    )  # fmt: skip
    say(route=kind, why=why)


class _CufileCounters:
    """What cuFile says of its reads, by way; it counts from here on."""

    def __init__(self) -> None:
        self._cufile: Any = None
        try:
            from cuda.bindings import cufile

            cufile.set_stats_level(_STATS_LEVEL)
            cufile.stats_start()
        except Exception as error:  # whatever it lacks: the read itself does not need it
            say(counters=str(error))
        else:
            self._cufile = cufile

    def route(self) -> tuple[RouteKind, str]:
        if self._cufile is None:
            return "cufile", "cuFile read it; which way, its counters in cuda-bindings would tell"
        stats = self._cufile.StatsLevel3()
        self._cufile.get_stats_l3(stats.ptr)
        per_gpu = stats.per_gpu_stats
        counts = {
            name: int(sum(getattr(per_gpu, name)))
            for name in ("n_p2p_reads", "n_nvfs_reads", "n_posix_reads")
        }
        told = ", ".join(f"{name}={count}" for name, count in counts.items())
        if counts["n_posix_reads"]:
            return "compat", f"cuFile read through the host's memory: {told}"
        if counts["n_p2p_reads"]:
            return "p2pdma", f"cuFile counted {told}"
        if counts["n_nvfs_reads"]:
            return "gds", f"cuFile counted {told}"
        return "cufile", f"cuFile read it, but counted {told}"


def main() -> None:
    if not driver():
        return
    found = libraries()
    if "kvikio" not in found:
        return
    if sys.argv[1:]:
        read(*map(int, sys.argv[1:]))
    else:
        cufile()


if __name__ == "__main__":
    main()
