"""What `CudaDevice` needs of CUDA besides reading files: memory, copies, kernels, order.

`CupyRuntime` in `kvfs.gpu.cupy_runtime` is the one for GPUs. The tests have one for the driver that
they build, so that all of `CudaDevice` runs where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from kvfs.gpu.arrays import DeviceMemory, HostMemory
from kvfs.gpu.layout import PagedBlocks

ALIGNMENT_BYTES = 64 << 10
"""Of own device memory. cuFile needs 4 KiB to go straight."""


@dataclass(frozen=True, slots=True)
class FrameRun:
    """Frames of one compressed block: where each lies, and where its content goes.

    Offsets count from the beginning of the memories that `Runtime.decode` is given.
    """

    sources: tuple[int, ...]
    lengths_bytes: tuple[int, ...]
    targets: tuple[int, ...]
    sizes_bytes: tuple[int, ...]


Mark = Any
"""A point in the runtime's own stream: what the runtime likes."""


class Runtime(Protocol):
    """One CUDA device. All its work goes to one stream of its own, in order.

    Copies, kernels and decoding do not wait for their end: `synchronize` and `wait` do.
    """

    @property
    def number(self) -> int:
        """The device's."""

    def current(self) -> AbstractContextManager[object]:
        """Makes device and stream those of the calling thread. Every other call is made inside."""

    def allocate(self, size_bytes: int) -> DeviceMemory:
        """Memory of the device that is nobody else's, aligned to `ALIGNMENT_BYTES`."""

    def pinned(self, size_bytes: int) -> HostMemory:
        """Memory of the host that the device copies from and to by itself."""

    def copy_in(self, source: HostMemory, target: DeviceMemory) -> None: ...

    def copy_out(self, source: DeviceMemory, target: HostMemory) -> None: ...

    def copy(self, source: DeviceMemory, target: DeviceMemory) -> None: ...

    def scatter(self, staged: DeviceMemory, stride_bytes: int, blocks: PagedBlocks) -> None:
        """Copy blocks that lie `stride_bytes` apart into their pages."""

    def gather(self, blocks: PagedBlocks, staged: DeviceMemory, stride_bytes: int) -> None:
        """Copy blocks out of their pages."""

    def merge_halves(self, split: DeviceMemory, merged: DeviceMemory) -> None:
        """Undo the plane split of one block."""

    def decode(
        self, source: DeviceMemory, target: DeviceMemory, runs: Sequence[FrameRun]
    ) -> list[bool]:
        """Decode zstd frames; for each run whether all its frames have the sizes they should have.

        The frames have been checked. Returns when it is done.
        """

    def follow(self, stream: int) -> None:
        """What is done from now on happens after the work that `stream` has now."""

    def precede(self, stream: int) -> None:
        """What is put on `stream` from now on happens after the work done so far."""

    def mark(self) -> Mark: ...

    def wait(self, mark: Mark) -> None:
        """Until the work before `mark` has been done."""

    def synchronize(self) -> None:
        """Until all work has been done."""
