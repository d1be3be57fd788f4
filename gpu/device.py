"""What onboarder and offloader need of a device: the host's memory, or that of a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

from kvfs.gpu.blocks import Blocks

RAW, ZSTD = "raw", "zstd"
"""Codecs of a replica, as a lease names them. docs/FORMAT.md is what ZSTD is."""

RouteKind = Literal["host", "compat", "cufile", "p2pdma", "gds", "unknown"]


@dataclass(frozen=True, slots=True)
class Load:
    """One replica to load: a descriptor of its file, and what it must turn out to hold.

    `checksum` is that of the block's bytes; None trusts the seal. `path` is for errors.
    """

    path: bytes
    fd: int
    size_bytes: int
    codec: str = RAW
    checksum: bytes | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """Which way bytes take from the file to the block's place, and how that is known.

    `host`: `preadv` into host memory. `compat`: through host memory and a copy to the GPU. `gds`
    and `p2pdma`: straight from the disk to the GPU, by nvidia-fs or by the kernel's PCI P2PDMA.
    `cufile`: cuFile was used, which may go through host memory. `unknown`: nothing was read yet.
    """

    kind: RouteKind
    why: str


class Device(Protocol):
    """Loads replicas into memory, and shows blocks in memory to the host.

    One thread may load while another goes through contents. Whoever makes a device closes it.
    """

    @property
    def number(self) -> int | None:
        """The CUDA device; None is the host."""

    @property
    def direct(self) -> bool:
        """Whether descriptors are wanted with O_DIRECT."""

    def load(
        self, loads: Sequence[Load], blocks: Blocks, stream: object = None
    ) -> list[Exception | None]:
        """Read each replica into the block of the same number; the error of each, None if loaded.

        After the first error later blocks may be left out, with an error of their own. What a block
        that has an error holds is undefined. Work that `stream` has now is done before memory is
        changed; what is put there later finds it loaded.
        """

    def contents(self, blocks: Blocks, stream: object = None) -> Iterator[memoryview]:
        """Each block's bytes on the host, valid until the next one is asked for.

        Work that `stream` has when the first is asked for is done before.
        """

    def route(self) -> Route:
        """The way that bytes take. Never a guess."""

    def prove(self, load: Load) -> Route:
        """The way that the bytes of this replica take, told by a read. Raises DeviceError."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...
