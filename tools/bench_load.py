"""The loads of the benchmark: what an engine does to a directory of blocks, many times over.

Owns the worker processes and the loops they run. Each worker is a process, not a thread: with
threads the loops would share one interpreter, and small blocks would measure its lock instead of
the filesystem. Knows nothing of mounts: a load is given paths. Called by `kvfs.tools.bench`.
"""

from __future__ import annotations

import functools
import mmap
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType

from kvfs.errors import KvfsError

# One larger write can be many times slower than the same bytes in pieces, on raw ext4 too.
WRITE_PIECE_BYTES = 1 << 20
READY, GO = b"ready", b"go"


@dataclass(frozen=True, slots=True)
class Share:
    """One worker's part of a load: the loop's name and the paths it takes."""

    loop: str
    paths: tuple[str, ...]
    block_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Lap:
    """When a loop ran, by the clock that all processes share, and the CPU time it took."""

    start_s: float
    end_s: float
    cpu_s: float


@functools.lru_cache(maxsize=4)
def _buffer(size: int) -> mmap.mmap:
    """An aligned buffer whose pages are there already, as an engine's are."""
    buffer = mmap.mmap(-1, size)
    buffer.write(bytes(size))
    return buffer


@functools.lru_cache(maxsize=4)
def _pieces(size: int) -> tuple[memoryview, ...]:
    """A block's content, as it is written."""
    payload = memoryview(os.urandom(size))
    starts = range(0, size, WRITE_PIECE_BYTES)
    return tuple(payload[start : start + WRITE_PIECE_BYTES] for start in starts)


def _read(share: Share, flags: int) -> None:
    buffers = [_buffer(share.block_bytes)]
    for path in share.paths:
        descriptor = os.open(path, flags)
        length = os.preadv(descriptor, buffers, 0)
        os.close(descriptor)
        if length != share.block_bytes:
            raise KvfsError(f"{path}: read {length} bytes instead of {share.block_bytes}")


def read(share: Share) -> None:
    _read(share, os.O_RDONLY)


def read_direct(share: Share) -> None:
    _read(share, os.O_RDONLY | os.O_DIRECT)


def put(share: Share) -> None:
    pieces = _pieces(share.block_bytes)
    for path in share.paths:
        temporary = path + ".tmp"
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        for piece in pieces:
            if os.write(descriptor, piece) != len(piece):
                raise KvfsError(f"{temporary}: short write")
        os.close(descriptor)
        os.rename(temporary, path)


def access_known(share: Share) -> None:
    for path in share.paths:
        if not os.access(path, os.F_OK):
            raise KvfsError(f"{path}: is missing")


def access_unknown(share: Share) -> None:
    for path in share.paths:
        if os.access(path, os.F_OK):
            raise KvfsError(f"{path}: should not exist")


def open_close(share: Share) -> None:
    for path in share.paths:
        os.close(os.open(path, os.O_RDONLY))


LOOPS: dict[str, Callable[[Share], None]] = {
    loop.__name__: loop
    for loop in (read, read_direct, put, access_known, access_unknown, open_close)
}


def _work(pipe: Connection) -> None:
    """A worker: take a share, say ready, wait for the start, run it, say when it ran."""
    # Ctrl-C is for the main process, which closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            share: Share | None = pipe.recv()
        except EOFError:
            return
        if share is None:
            return
        if share.block_bytes:
            _buffer(share.block_bytes)
            _pieces(share.block_bytes)
        pipe.send(READY)
        pipe.recv()
        try:
            cpu_s, start_s = time.process_time(), time.monotonic()
            LOOPS[share.loop](share)
            pipe.send(Lap(start_s, time.monotonic(), time.process_time() - cpu_s))
        except (OSError, KvfsError) as error:
            pipe.send(KvfsError(f"{share.loop}: {error}"))


class Workers:
    """A pool of processes that start a load at the same instant. Owned by the main thread."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._stack = ExitStack()
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(self._stack.enter_context(ours))
            self._processes.append(process)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._stack.close()
        for process in self._processes:
            process.join(timeout=5)

    def run(self, shares: Sequence[Share]) -> list[Lap]:
        """Run one share per worker; raises KvfsError when a loop failed."""
        pipes = self._pipes[: len(shares)]
        for pipe, share in zip(pipes, shares, strict=True):
            pipe.send(share)
        for pipe in pipes:
            pipe.recv()
        for pipe in pipes:
            pipe.send(GO)
        answers = [pipe.recv() for pipe in pipes]
        for answer in answers:
            if isinstance(answer, KvfsError):
                raise answer
        return answers


def shares_of(loop: str, paths: Sequence[str], workers: int, block_bytes: int = 0) -> list[Share]:
    """The paths dealt out to workers, as engine threads take blocks off one queue."""
    return [
        Share(loop, tuple(paths[index::workers]), block_bytes)
        for index in range(min(workers, len(paths)))
    ]


def wall_s(laps: Sequence[Lap]) -> float:
    """From the first start to the last end."""
    return max(lap.end_s for lap in laps) - min(lap.start_s for lap in laps)


def stay_awake(seconds: float) -> None:
    """As an engine's thread does between two prompts. One that slept would be measured with what a
    virtual CPU needs after that: ten times as long for the same lines."""
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        pass
