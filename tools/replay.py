"""The load an inference engine puts on a directory of block files, with every byte read compared.

Owns the syscalls of vLLM's filesystem tier (layout, existence checks, stores, loads), the content
of each block, and the worker threads that play requests. Never knows kvfs: it runs the same
on any directory, which is how baselines are measured. Called by the replay and demo commands.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import mmap
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import msgspec

from kvfs.errors import KvfsError, MountpointError, UsageError
from kvfs.tools.trace import Request

PAGE_BYTES = 4096
COMPARE_BYTES = 64 << 10
MODEL_NAME = "kvfs-replay"
REFUSED = (errno.ENOSPC, errno.EDQUOT)
GONE = (errno.ENOENT, errno.ESTALE)

StopReason = Literal["end of trace", "byte budget", "time budget", "stopped"]


class BlockMismatch(KvfsError):
    """A block could not be read back as it was written."""

    def __init__(self, message: str, *, read_bytes: int, compared_bytes: int) -> None:
        super().__init__(message)
        self.read_bytes = read_bytes
        self.compared_bytes = compared_bytes


class BlockPattern:
    """What every byte of every block must be: a function of its hash id and its size alone.

    Each page is a tag, unique to the block and the page's place in it, and a cut of noise that the
    tag chooses: made and compared at memory speed, yet a page of another block, or one from
    elsewhere in the same block, never passes. Immutable; shared by all workers.
    """

    TAG_BYTES = 16
    OFFSETS = 4 << 20

    def __init__(self, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        noise = hashlib.shake_128(b"kvfs-replay").digest(self.OFFSETS + PAGE_BYTES)
        self._noise = memoryview(noise)

    def content(self, hash_id: int) -> bytes:
        pages = self.block_bytes // PAGE_BYTES
        key = f"{hash_id}/{self.block_bytes}".encode()
        tags = memoryview(hashlib.shake_128(key).digest(self.TAG_BYTES * pages))
        noise_bytes = PAGE_BYTES - self.TAG_BYTES
        parts: list[memoryview] = []
        for at in range(0, len(tags), self.TAG_BYTES):
            tag = tags[at : at + self.TAG_BYTES]
            offset = int.from_bytes(tag[:4], "little") % self.OFFSETS
            parts += (tag, self._noise[offset : offset + noise_bytes])
        return b"".join(parts)


def first_difference(buffer: mmap.mmap, expected: bytes) -> int | None:
    """Compare all of two equally long sequences; None if they are the same."""
    # In pieces: two fresh objects of a whole block cost the allocator more than the comparison.
    for start in range(0, len(expected), COMPARE_BYTES):
        got = buffer[start : start + COMPARE_BYTES]
        want = expected[start : start + COMPARE_BYTES]
        if got != want:
            pairs = enumerate(zip(got, want, strict=True))
            return start + next(at for at, (one, other) in pairs if one != other)
    return None


class BlockDirectory:
    """A directory used the way vLLM's filesystem tier uses it; stateless after `prepare`.

    `buffer` arguments are anonymous mappings of one block, so they are aligned for O_DIRECT.
    """

    def __init__(self, root: Path, block_bytes: int, *, direct: bool = True) -> None:
        if block_bytes < PAGE_BYTES or block_bytes % PAGE_BYTES:
            raise UsageError(f"a block size is a multiple of {PAGE_BYTES} bytes, not {block_bytes}")
        if not root.is_dir():
            raise MountpointError(f"{root} is not a directory: mount there or create it first")
        self.root = root
        self.pattern = BlockPattern(block_bytes)
        self.direct = direct
        self._zeros = bytes(block_bytes)
        config = {"model_name": MODEL_NAME, "bytes_per_file": block_bytes, "dtype": "uint8"}
        self._config = json.dumps(config, sort_keys=True)
        digest = hashlib.sha256(self._config.encode()).hexdigest()[:12]
        self._config_dir = root / f"{MODEL_NAME}_{digest}"
        self._blocks_dir = f"{self._config_dir}_r0"

    def prepare(self) -> None:
        """What vLLM does at start: write the configuration, find out whether O_DIRECT works."""
        self._config_dir.mkdir(exist_ok=True)
        (self._config_dir / "config.json").write_text(self._config)
        if self.direct:
            self.direct = self._direct_works()

    def path_of(self, hash_id: int) -> str:
        name = hashlib.sha256(f"{MODEL_NAME}/{hash_id}".encode()).hexdigest()
        return f"{self._blocks_dir}/{name[:3]}/{name[3:5]}_g0/{name}.bin"

    def new_buffer(self) -> mmap.mmap:
        return mmap.mmap(-1, self.pattern.block_bytes)

    def load(self, hash_id: int, buffer: mmap.mmap) -> bool:
        """Read one block and compare all of it; False if it is gone (evicted since the lookup)."""
        path = self.path_of(hash_id)
        expected = self.pattern.content(hash_id)
        # Bytes left from another load must not pass for bytes of this one.
        buffer[:] = self._zeros
        try:
            file = os.open(path, os.O_RDONLY | self._direct_flag())
        except OSError as error:
            if error.errno in GONE:
                return False
            raise
        try:
            count = os.readv(file, [buffer])
        finally:
            os.close(file)
        if count != len(expected):
            message = f"short read: {count} of {len(expected)} bytes"
            raise BlockMismatch(message, read_bytes=count, compared_bytes=0)
        wrong = first_difference(buffer, expected)
        if wrong is not None:
            message = f"wrong bytes from offset {wrong} on"
            raise BlockMismatch(message, read_bytes=count, compared_bytes=count)
        return True

    def store(self, hash_id: int, buffer: mmap.mmap) -> bool:
        """Write one block under a unique temporary name and publish it; False if it is there."""
        path = self.path_of(hash_id)
        if os.access(path, os.F_OK):
            return False
        buffer[:] = self.pattern.content(hash_id)
        temporary = f"{path}_{secrets.token_hex(8)}.tmp"
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_TRUNC | self._direct_flag()
        try:
            file = os.open(temporary, flags, 0o644)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            file = os.open(temporary, flags, 0o644)
        try:
            try:
                count = os.write(file, buffer)
            finally:
                os.close(file)
            if count != len(buffer):
                raise OSError(errno.ENOSPC, f"short write: {count} of {len(buffer)} bytes")
            os.rename(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        return True

    def _direct_flag(self) -> int:
        return os.O_DIRECT if self.direct else 0

    def _direct_works(self) -> bool:
        probe = f"{self._config_dir}/.o_direct_probe_{secrets.token_hex(8)}.tmp"
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_DIRECT
        try:
            with mmap.mmap(-1, PAGE_BYTES) as page:
                file = os.open(probe, flags, 0o644)
                try:
                    os.write(file, page)
                finally:
                    os.close(file)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(probe)
        return True


@dataclass(slots=True)
class Tally:
    """What one worker did; only that worker writes it, anybody may add it up."""

    requests: int = 0
    blocks: int = 0
    hits: int = 0
    loaded: int = 0
    lost: int = 0
    stored: int = 0
    present: int = 0
    refused: int = 0
    failures: int = 0
    bytes_read: int = 0
    bytes_compared: int = 0
    bytes_written: int = 0

    def add(self, other: Tally) -> None:
        for field in fields(self):
            name = field.name
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def hit_rate(self) -> float:
        return self.loaded / self.blocks if self.blocks else 0.0


class Failure(msgspec.Struct, frozen=True):
    """The first block that was not what it had to be."""

    path: str
    reason: str


class ReplaySettings(msgspec.Struct, frozen=True):
    """How a replay runs; None means without limit, and `speed_up` None means without waiting."""

    workers: int = 4
    speed_up: float | None = None
    max_written_bytes: int | None = None
    max_seconds: float | None = None

    def check(self) -> None:
        if self.workers < 1:
            raise UsageError(f"a replay needs at least one worker, not {self.workers}")
        if self.speed_up is not None and self.speed_up <= 0:
            raise UsageError(f"a speed-up is a positive number or max, not {self.speed_up:g}")


class Replay:
    """One run over a sequence of requests.

    The thread that calls `run` owns the object. Workers share the request iterator, the byte budget
    and the first failure, all under `_lock`; everything else a worker writes is its own tally.
    """

    def __init__(
        self, directory: BlockDirectory, requests: Iterable[Request], settings: ReplaySettings
    ) -> None:
        settings.check()
        self.directory = directory
        self._requests = iter(requests)
        self.settings = settings
        self._tallies = [Tally() for _ in range(settings.workers)]
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._budget_bytes = settings.max_written_bytes
        self._started_s = 0.0
        self.stop_reason: StopReason = "end of trace"
        self.first_failure: Failure | None = None
        self.elapsed_s = 0.0

    def run(
        self, on_progress: Callable[[Tally, float], None] | None = None, every_s: float = 0.25
    ) -> Tally:
        """Play the requests and return the sum; calls `on_progress(tally, elapsed_s)` meanwhile."""
        self.directory.prepare()
        self._started_s = time.monotonic()
        with ThreadPoolExecutor(len(self._tallies), "replay") as pool:
            running = {pool.submit(self._work, tally) for tally in self._tallies}
            try:
                while running:
                    finished, running = wait(running, timeout=every_s)
                    for worker in finished:
                        worker.result()
                    if on_progress:
                        on_progress(self.tally(), self._elapsed_s())
            finally:
                if running:
                    self._halt("stopped")
        self.elapsed_s = self._elapsed_s()
        return self.tally()

    def tally(self) -> Tally:
        total = Tally()
        for tally in self._tallies:
            total.add(tally)
        return total

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    def _halt(self, reason: StopReason) -> None:
        with self._lock:
            if not self._stop.is_set():
                self.stop_reason = reason
                self._stop.set()

    def _work(self, tally: Tally) -> None:
        try:
            with self.directory.new_buffer() as buffer:
                while (request := self._next_request()) is not None:
                    self._serve(request, tally, buffer)
        except BaseException:
            self._halt("stopped")
            raise

    def _next_request(self) -> Request | None:
        """The next request, once it is due; None at the end and when the replay has to stop."""
        with self._lock:
            request = None if self._stop.is_set() else next(self._requests, None)
        if request is None:
            return None
        due_s = 0.0
        if self.settings.speed_up is not None:
            due_s = request.timestamp_ms / 1000 / self.settings.speed_up
        limit_s = self.settings.max_seconds
        wait_s = (due_s if limit_s is None else min(due_s, limit_s)) - self._elapsed_s()
        if wait_s > 0:
            self._stop.wait(wait_s)
        if limit_s is not None and self._elapsed_s() >= limit_s:
            self._halt("time budget")
        return None if self._stop.is_set() else request

    def _serve(self, request: Request, tally: Tally, buffer: mmap.mmap) -> None:
        """One request: find the longest stored prefix, load it, store the rest."""
        ids = request.hash_ids
        hits = 0
        while hits < len(ids) and os.access(self.directory.path_of(ids[hits]), os.F_OK):
            hits += 1
        tally.blocks += len(ids)
        tally.hits += hits
        loaded = 0
        while loaded < hits and self._load(ids[loaded], tally, buffer):
            loaded += 1
        for hash_id in ids[loaded:]:
            if self._stop.is_set() or not self._store(hash_id, tally, buffer):
                return
        tally.requests += 1

    def _load(self, hash_id: int, tally: Tally, buffer: mmap.mmap) -> bool:
        """Whether the engine goes on with the next block of the prefix."""
        block_bytes = len(buffer)
        try:
            if not self.directory.load(hash_id, buffer):
                tally.lost += 1
                return False
        except BlockMismatch as error:
            tally.bytes_read += error.read_bytes
            tally.bytes_compared += error.compared_bytes
            self._fail(hash_id, error, tally)
            return False
        except OSError as error:
            self._fail(hash_id, error, tally)
            return False
        tally.loaded += 1
        tally.bytes_read += block_bytes
        tally.bytes_compared += block_bytes
        return True

    def _store(self, hash_id: int, tally: Tally, buffer: mmap.mmap) -> bool:
        """False when the byte budget does not allow another block."""
        block_bytes = len(buffer)
        if not self._take_budget(block_bytes):
            self._halt("byte budget")
            return False
        try:
            written = self.directory.store(hash_id, buffer)
        except OSError as error:
            if error.errno in REFUSED:
                tally.refused += 1
            else:
                self._fail(hash_id, error, tally)
            written = False
        else:
            tally.stored += written
            tally.present += not written
        if written:
            tally.bytes_written += block_bytes
        else:
            self._take_budget(-block_bytes)
        return True

    def _take_budget(self, amount_bytes: int) -> bool:
        with self._lock:
            if self._budget_bytes is None:
                return True
            if amount_bytes > self._budget_bytes:
                return False
            self._budget_bytes -= amount_bytes
            return True

    def _fail(self, hash_id: int, error: Exception, tally: Tally) -> None:
        tally.failures += 1
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        with self._lock:
            if self.first_failure is None:
                self.first_failure = Failure(self.directory.path_of(hash_id), reason)
