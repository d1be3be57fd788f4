"""The kernels as C, run thread by thread: their arithmetic, without a GPU."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

from kvfs.gpu import kernels

_PRELUDE = """
typedef struct { unsigned x, y, z, w; } uint4;
typedef struct { unsigned x, y, z; } place;
static place threadIdx, blockIdx, blockDim, gridDim;
"""
_LAUNCH = """
#define LAUNCH(kernel) \\
    void launch_##kernel(unsigned *grid, unsigned threads, u64 a, u64 b, u64 c, u64 d) { \\
        gridDim = (place){grid[0], grid[1], grid[2]}; \\
        blockDim = (place){threads, 1, 1}; \\
        for (unsigned z = 0; z < grid[2]; z++) \\
        for (unsigned y = 0; y < grid[1]; y++) \\
        for (unsigned x = 0; x < grid[0]; x++) \\
        for (unsigned t = 0; t < threads; t++) { \\
            blockIdx = (place){x, y, z}; \\
            threadIdx = (place){t, 0, 0}; \\
            ((void (*)(u64, u64, u64, u64))kernel)(a, b, c, d); \\
        } \\
    }
LAUNCH(scatter_pages) LAUNCH(gather_pages) LAUNCH(merge_halves)
"""


class KernelsOnHost:
    """The compiled kernels. Every argument of each is a number of 64 bits."""

    def __init__(self, directory: Path) -> None:
        source, library = directory / "kernels.c", directory / "kernels.so"
        as_c = kernels.SOURCE.replace('extern "C" __global__', "static")
        source.write_text(_PRELUDE + as_c + _LAUNCH)
        command = ["cc", "-shared", "-fPIC", "-O1", "-w", "-o", str(library), str(source)]
        subprocess.run(command, check=True)
        self._library = ctypes.CDLL(str(library))

    def launch(self, kernel: str, grid: tuple[int, int, int], threads: int, *numbers: int) -> None:
        launch = self._library[f"launch_{kernel}"]
        launch.argtypes = (ctypes.c_void_p, ctypes.c_uint, *[ctypes.c_uint64] * 4)
        launch.restype = None
        launch(ctypes.byref((ctypes.c_uint * 3)(*grid)), threads, *numbers)
