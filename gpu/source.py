"""Where blocks come from and go to: a client of the daemon, or the files of a tier.

`Client` of `kvfs.client` is both a `BlockSource` and a `BlockSink`. `BackingFiles` is one that
needs no daemon: for tests, benchmarks, and a tier's directory that no daemon serves.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

from kvfs.gpu.device import RAW, ZSTD
from kvfs.tiers.seal import SEAL_XATTR, decode_seal


class LeasedBlock(Protocol):
    """One block that may be read until the lease ends. `size_bytes` is that of the block."""

    @property
    def fd(self) -> int: ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def checksum(self) -> bytes | None: ...

    @property
    def codec(self) -> str: ...


class Leased(Protocol):
    """The answer to a lease: the leading ones of the blocks asked for."""

    @property
    def stopped(self) -> str:
        """Why not all are there: "missing", "denied", "busy", "offline"; else "found"."""

    def __iter__(self) -> Iterator[LeasedBlock | None]:
        """The blocks in order; the first None, or the end, ends the prefix."""


class BlockSource(Protocol):
    """Leases blocks."""

    def lease(
        self, paths: Sequence[bytes], *, direct: bool = False
    ) -> AbstractContextManager[Leased]:
        """Descriptors of the blocks' files, with O_DIRECT if `direct`; valid inside the `with`."""


class BlockSink(Protocol):
    """Takes blocks."""

    def put(self, path: bytes, buffer: memoryview) -> object:
        """Publish a block, whole or not at all. One that is there already is not written again."""


@dataclass(frozen=True, slots=True)
class BackingBlock:
    """An open file."""

    fd: int
    size_bytes: int
    checksum: bytes | None
    codec: str


@dataclass(frozen=True, slots=True)
class BackingLease:
    """The leading files, open."""

    blocks: tuple[BackingBlock, ...]
    stopped: str

    def __iter__(self) -> Iterator[BackingBlock]:
        return iter(self.blocks)


class BackingFiles:
    """Files below a directory as blocks: length, checksum and codec are those of a file's seal.

    A file without a seal record is raw and has no checksum.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = os.fsencode(directory)

    @contextmanager
    def lease(self, paths: Sequence[bytes], *, direct: bool = False) -> Iterator[BackingLease]:
        """See `BlockSource`. Raises OSError."""
        flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
        with ExitStack() as stack:
            blocks: list[BackingBlock] = []
            for path in paths:
                block = self._open(path, flags, stack)
                if block is None:
                    break
                blocks.append(block)
            stopped = "found" if len(blocks) == len(paths) else "missing"
            yield BackingLease(tuple(blocks), stopped)

    def _open(self, path: bytes, flags: int, stack: ExitStack) -> BackingBlock | None:
        try:
            fd = os.open(os.path.join(self._directory, path), flags)
        except FileNotFoundError:
            return None
        stack.callback(os.close, fd)
        try:
            seal = decode_seal(os.getxattr(fd, SEAL_XATTR))
        except OSError:  # no such xattr, or a filesystem without them
            seal = None
        if seal is None:
            return BackingBlock(fd, os.fstat(fd).st_size, None, RAW)
        return BackingBlock(fd, seal.length_bytes, seal.checksum, ZSTD if seal.codec else RAW)

    def put(self, path: bytes, buffer: memoryview) -> None:
        """See `BlockSink`. Raises OSError."""
        target = os.path.join(self._directory, path)
        if os.path.exists(target):
            return
        os.makedirs(os.path.dirname(target), exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=os.path.dirname(target), suffix=b".tmp")
        try:
            with open(fd, "wb") as file:
                file.write(buffer)
            os.rename(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
