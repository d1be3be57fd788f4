"""What clients and the daemon say to each other, without I/O: `Client` and `AsyncClient` carry out
what is decided here.

An operation is a generator. It yields what is to be done (`Ask` the daemon, `Write` to a file) and
is sent what came of it. `Conversation` is one connection's side of the protocol: it numbers
requests and puts answers together. Owned by whoever owns the connection.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import xxhash

from kvfs.control import (
    Ancillary,
    Error,
    Progress,
    Reply,
    Request,
    decode_message,
    descriptors_in,
    remote_error,
)
from kvfs.errors import DaemonUnavailable, FilesystemError, InvalidOperation, UsageError
from kvfs.leased import (
    OUTCOMES,
    Hits,
    Leased,
    LeasedBlock,
    PathLike,
    Prefetched,
    Stored,
    Wait,
)

# What one request may ask for.
MOST_PATHS = 8192
MOST_PATH_BYTES = 1 << 20
# A larger write in one call can be slower than the same bytes in pieces.
PIECE_BYTES = 1 << 20
# Beyond the deadline that the daemon was given.
GRACE_S = 30.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ask:
    """Send a request and wait for its answer. `wait_s` is how long the daemon may be silent."""

    verb: str
    args: dict[str, Any]
    wait_s: float = GRACE_S


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a request of which nobody needs the answer. Requests are served in order."""

    verb: str
    args: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Write:
    """Write all of a buffer to a file from its beginning; it may take a while."""

    descriptor: int
    data: memoryview

    def carry_out(self) -> None:
        """Blocking. Raises OSError."""
        for start in range(0, len(self.data), PIECE_BYTES):
            piece = self.data[start : start + PIECE_BYTES]
            while piece:
                written = os.pwrite(self.descriptor, piece, start)
                piece, start = piece[written:], start + written


@dataclass(frozen=True, slots=True)
class Forsake:
    """Nobody wants these leases or this put any more. The daemon hears of it with the next request:
    whoever was interrupted does not wait."""

    kind: str
    numbers: Sequence[int]


@dataclass(slots=True)
class Answer:
    """The result of a request, and the parts that came before it. `lost`: some descriptors could
    not be delivered, because this process has as many as it may."""

    result: dict[str, Any] = field(default_factory=dict)
    parts: list[Progress] = field(default_factory=list)
    lost: bool = False

    def close(self) -> None:
        """Close all descriptors that came with it."""
        for part in self.parts:
            for descriptor in part.descriptors:
                os.close(descriptor)
        self.parts = []


Action = Ask | Tell | Write | Forsake
Dialogue = Generator[Action, Any, T]


class ConnectionLost(DaemonUnavailable):
    """The daemon went away between a request and its answer."""


class Conversation:
    """One connection. An answer that nobody waits for any more is undone with the next request."""

    def __init__(self) -> None:
        self._id = 0
        self._answer = Answer()
        self._forsaken: list[Forsake] = []

    def begin(self, ask: Ask | Tell) -> Request:
        """The next request."""
        self._id += 1
        self._answer = Answer()
        return Request(self._id, ask.verb, ask.args)

    def take(self, data: bytes, ancillary: Ancillary, flags: int) -> Answer | None:
        """One datagram; the answer when it is complete. Raises the daemon's error, ConnectionLost
        for the end of the connection, DaemonUnavailable for what is no message."""
        if not data:
            raise ConnectionLost("the daemon closed the connection")
        lost = bool(flags & socket.MSG_CTRUNC)
        try:
            message = decode_message(data, descriptors_in(ancillary), lost=lost)
        except InvalidOperation as error:
            raise DaemonUnavailable(f"the daemon's answer is not understood ({error})") from error
        if isinstance(message, Error) and message.id in (0, self._id):
            self._answer.close()
            raise remote_error(message.error)
        if message.id != self._id:
            if isinstance(message, Progress):
                self._discard(message.progress, message.descriptors)
            elif isinstance(message, Reply):
                self._discard(message.result, message.descriptors)
            return None
        if isinstance(message, Progress):
            self._answer.parts.append(message)
            self._answer.lost = self._answer.lost or lost
            return None
        if isinstance(message, Reply):
            answer, self._answer = self._answer, Answer()
            answer.result, answer.lost = message.result, answer.lost or lost
            if message.descriptors:
                answer.parts.append(Progress(message.id, message.result, message.descriptors))
            return answer
        return None

    def _discard(self, told: dict[str, Any], descriptors: Sequence[int]) -> None:
        """What a request that was given up got nevertheless."""
        for descriptor in descriptors:
            os.close(descriptor)
        for kind in ("lease", "put"):
            number = told.get(kind)
            if isinstance(number, int) and number:
                self.forsake(Forsake(kind, [number]))

    def forsake(self, forsaken: Forsake) -> None:
        """Undo it with the next request."""
        self._forsaken.append(forsaken)

    def abandon(self) -> None:
        """Whoever waited for the answer does not any more."""
        self.discard(self._answer)
        self._answer = Answer()
        self._id += 1

    def discard(self, answer: Answer) -> None:
        """Nobody takes an answer that is here."""
        parts, answer.parts = answer.parts, []
        for part in parts:
            self._discard(part.progress, part.descriptors)

    def overdue(self) -> Iterator[Ask]:
        """What undoes the forsaken, to be asked before anything else. It stays overdue until the
        next one is asked for."""
        while self._forsaken:
            each = self._forsaken[0]
            if each.kind == "lease":
                yield Ask("release", {"leases": list(each.numbers)})
            else:
                for number in each.numbers:
                    yield Ask("put_abort", {"put": number})
            self._forsaken.remove(each)


# --- operations


def lookup(paths: Sequence[bytes]) -> Dialogue[Hits]:
    """How many of the paths from the first one on are blocks, and on which tiers."""
    tiers: list[str | None] = []
    for chunk in chunks(paths):
        answer: Answer = yield Ask("lookup", {"paths": chunk})
        result = answer.result
        names: list[str] = result["tiers"]
        tiers += [names[place] for place in result["at"]]
        if result["found"] < len(chunk):
            return Hits(tuple(tiers), result["stopped"])
    return Hits(tuple(tiers))


def lease(
    paths: Sequence[bytes], *, direct: bool, wait: Wait | None, deadline_s: float | None,
    sparse: bool,
) -> Dialogue[Leased]:  # fmt: skip
    """Lease the leading blocks, or with `sparse` all that can be had."""
    blocks: list[LeasedBlock | None] = []
    numbers: list[int] = []
    statuses = bytearray()
    args: dict[str, Any] = {"direct": direct, "sparse": sparse}
    if wait is not None:
        args["wait"] = wait
    if deadline_s is not None:
        args["deadline_s"] = deadline_s
    try:
        for chunk in chunks(paths):
            wait_s = GRACE_S + (deadline_s or GRACE_S)
            answer: Answer = yield Ask("lease", {"paths": chunk, **args}, wait_s)
            if answer.result["lease"]:
                numbers.append(answer.result["lease"])
            if answer.lost:
                answer.close()
                raise OSError(errno.EMFILE, "this process has no descriptor left for a lease")
            blocks += _blocks_of(chunk, answer)
            statuses += answer.result["statuses"]
            if not sparse and blocks[-1] is None:
                break
    except BaseException as error:
        _close_all(blocks)
        # Without a connection they have ended.
        if numbers and not isinstance(error, DaemonUnavailable | GeneratorExit):
            yield Forsake("lease", numbers)
        raise
    blocks += [None] * (len(paths) - len(blocks))
    outcomes = tuple(map(OUTCOMES.__getitem__, statuses))
    return Leased(tuple(blocks), outcomes, tuple(numbers))


def _blocks_of(chunk: list[bytes], answer: Answer) -> list[LeasedBlock | None]:
    blocks: list[LeasedBlock | None] = [None] * len(chunk)
    tiers, codecs = answer.result["tiers"], answer.result["codecs"]
    for part in answer.parts:
        rows = part.progress["blocks"]
        for row, descriptor in zip(rows, part.descriptors, strict=True):
            place, size_bytes, checksum, generation, tier, codec, direct = row
            blocks[place] = LeasedBlock(
                chunk[place], descriptor, size_bytes, checksum, generation, tiers[tier],
                codecs[codec], direct,
            )  # fmt: skip
    return blocks


def _close_all(blocks: Sequence[LeasedBlock | None]) -> None:
    for block in blocks:
        if block is not None:
            os.close(block.fd)


def release(leased: Leased) -> Dialogue[None]:
    """End a lease whose descriptors are closed."""
    if leased.numbers:
        yield Tell("release", {"leases": list(leased.numbers)})


def renew(leased: Leased) -> Dialogue[float]:
    """Let a lease last anew; for how long from now. Raises `lease_ended`."""
    answer: Answer = yield Ask("renew", {"leases": list(leased.numbers)})
    if answer.result["renewed"] < len(leased.numbers):
        raise lease_ended()
    return float(answer.result["max_lease_s"])


def lease_ended() -> FilesystemError:
    """It was not renewed in time, or the connection was lost."""
    return FilesystemError(errno.ESTALE, "the lease has ended")


def put(path: bytes, buffer: memoryview, *, mode: int, replace: bool) -> Dialogue[Stored]:
    """Write a block, whole or not at all."""
    checksum = xxhash.xxh3_128_digest(buffer)
    order = {
        "path": path, "size_bytes": len(buffer), "checksum": checksum, "mode": mode,
        "replace": replace,
    }  # fmt: skip
    answer: Answer = yield Ask("put_begin", order)
    number = answer.result["put"]
    if not number:
        return _stored(answer)
    if answer.lost:
        yield Forsake("put", [number])
        raise OSError(errno.EMFILE, "this process has no descriptor left for a put")
    (descriptor,) = (d for part in answer.parts for d in part.descriptors)
    try:
        yield Write(descriptor, buffer)
    except BaseException as error:
        os.close(descriptor)
        if not isinstance(error, GeneratorExit):
            yield Forsake("put", [number])
        raise
    # Before the commit: while a writer is left it cannot be sealed.
    os.close(descriptor)
    answer = yield Ask("put_commit", {"put": number})
    return _stored(answer)


def _stored(answer: Answer) -> Stored:
    result = answer.result
    return Stored(
        result["created"], result["size_bytes"], result["checksum"], result["tier"] or None
    )


def prefetch(paths: Sequence[bytes], deadline_s: float) -> Dialogue[Prefetched]:
    """Have blocks on the fastest tier within a time."""
    counts = dict.fromkeys(("accepted", "there", "refused", "missing"), 0)
    for chunk in chunks(paths):
        answer: Answer = yield Ask("prefetch", {"paths": chunk, "deadline_s": deadline_s})
        for key in counts:
            counts[key] += answer.result[key]
    return Prefetched(**counts)


def touch(paths: Sequence[bytes]) -> Dialogue[int]:
    """Count an access to each block; how many were counted."""
    touched = 0
    for chunk in chunks(paths):
        answer: Answer = yield Ask("touch", {"paths": chunk})
        touched += answer.result["touched"]
    return touched


def pin(paths: Sequence[bytes], tier: str | None) -> Dialogue[int]:
    """Keep blocks, on a tier if one is named; how many."""
    changed = 0
    for chunk in chunks(paths):
        answer: Answer = yield Ask("pin", {"paths": chunk, "tier": tier}, 10 * GRACE_S)
        changed += answer.result["changed"]
    return changed


def unpin(paths: Sequence[bytes]) -> Dialogue[int]:
    """Let blocks go again; how many."""
    changed = 0
    for chunk in chunks(paths):
        answer: Answer = yield Ask("unpin", {"paths": chunk})
        changed += answer.result["changed"]
    return changed


def chunks(paths: Sequence[bytes]) -> Iterator[list[bytes]]:
    """The paths in parts that fit a request each."""
    chunk: list[bytes] = []
    size_bytes = 0
    for path in paths:
        if chunk and (len(chunk) == MOST_PATHS or size_bytes + len(path) > MOST_PATH_BYTES):
            yield chunk
            chunk, size_bytes = [], 0
        chunk.append(path)
        size_bytes += len(path)
    if chunk:
        yield chunk


# --- paths and buffers


class Below:
    """Paths as users give them -> as the daemon knows them."""

    def __init__(self, directory: str | os.PathLike[str] | None, prefix: bytes) -> None:
        self._directory = None if directory is None else os.fsencode(directory) + b"/"
        self.prefix = prefix + b"/" if prefix else b""

    def __call__(self, path: PathLike) -> bytes:
        """Raises UsageError for an absolute path that lies elsewhere."""
        name = os.fsencode(path)
        if name.startswith(b"/"):
            if self._directory is None or not name.startswith(self._directory):
                raise UsageError(f"{os.fsdecode(name)} is not below the client's directory")
            name = name[len(self._directory) :]
        return self.prefix + name if self.prefix else name

    def all(self, paths: Sequence[PathLike]) -> list[bytes]:
        """Raises TypeError for one path in place of several."""
        if isinstance(paths, str | bytes | os.PathLike):
            raise TypeError("a list of paths is wanted, not one path")
        return [self(path) for path in paths]


def bytes_of(buffer: Any) -> memoryview:
    """The bytes of a buffer without a copy. Raises TypeError, for one that is not contiguous."""
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise TypeError("the buffer is not contiguous: copy it first")
    return view.cast("B") if view.nbytes else memoryview(b"")
