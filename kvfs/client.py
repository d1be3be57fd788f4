"""The client library: an engine's way to blocks, past the mount. docs/CLIENT.md shows its use.

`Client` blocks; `kvfs.async_client` has the same for trio. Both carry out what `kvfs.dialogue`
decides. Where no daemon can be reached but the mount answers, plain files are used instead.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from kvfs import dialogue, prefix
from kvfs.control import (
    ALL_DESCRIPTORS_BYTES,
    RECV_BYTES,
    SOCKET_ENV,
    Mount,
    find_mount,
    pack,
)
from kvfs.dialogue import (
    GRACE_S,
    Answer,
    Ask,
    Below,
    ConnectionLost,
    Conversation,
    Dialogue,
    Forsake,
    Tell,
    Write,
    bytes_of,
)
from kvfs.errors import (
    ClientForked,
    DaemonUnavailable,
    InvalidOperation,
    NotPermitted,
    UsageError,
)
from kvfs.leased import Hits, Leased, Match, PathLike, Prefetched, Stored, Wait
from kvfs.plain_client import PlainFiles

log = logging.getLogger(__name__)

T = TypeVar("T")


class Place:
    """Where a client's directory and its daemon are."""

    def __init__(
        self, directory: str | os.PathLike[str] | None, socket_path: str | os.PathLike[str] | None
    ) -> None:
        """Raises UsageError, MountpointError, DaemonUnavailable."""
        self.pid = os.getpid()
        self.directory = None if directory is None else Path(os.path.realpath(directory))
        mount = None if self.directory is None else find_mount(self.directory)
        self.socket_path = _socket_path(mount, socket_path)
        self.below = Below(self.directory, mount.relative if mount else b"")
        self._told = False

    def check_process(self) -> None:
        """Raise ClientForked in a child of the process that made the client."""
        if os.getpid() != self.pid:
            raise ClientForked("this client was made before a fork: make one in the child")

    def plain_files(self, error: Exception) -> PlainFiles:
        """What to use without a daemon, which is said once. Raises `error` where the mount does
        not answer either."""
        if self.directory is None:
            raise error
        try:
            os.listxattr(self.directory)
        except OSError:
            raise error from None
        if not self._told:
            self._told = True
            log.warning("%s; plain files of %s are used instead", error, self.directory)
        return PlainFiles(self.directory, self.below.prefix)


def _socket_path(mount: Mount | None, given: str | os.PathLike[str] | None) -> Path:
    if given is not None:
        return Path(given)
    if mount is not None:
        return mount.socket_path
    named = os.environ.get(SOCKET_ENV)
    if not named:
        raise UsageError(f"name a directory in a mount, or a socket (also by {SOCKET_ENV})")
    return Path(named)


class Client:
    """One connection to a daemon, made when it is needed and again after the daemon was restarted.

    Threads may share a client: their requests take turns. Leases end with the connection, so a
    process that forks needs a new client in the child; the old one refuses to work there.
    """

    def __init__(
        self, directory: PathLike | None = None, *,
        socket_path: str | os.PathLike[str] | None = None,
    ) -> None:  # fmt: skip
        """`directory` is a mountpoint or a directory in a mount: paths are relative to it, or
        absolute and below it. The daemon's socket is found by it; `socket_path` or KVFS_SOCKET name
        another, and where no mount is visible do instead of it.

        Raises UsageError, MountpointError, DaemonUnavailable (the mount is dead).
        """
        self._place = Place(None if directory is None else os.fsdecode(directory), socket_path)
        self._lock = threading.RLock()
        self._connection: Connection | None = None
        self._connections = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection: leases end. The client may be used again."""
        if os.getpid() == self._place.pid:
            with self._lock:
                self._disconnect()

    # --- operations

    def lookup(self, paths: Sequence[PathLike]) -> Hits:
        """How many of the paths from the first one on are blocks that can be read, and on which
        tiers. One round trip for up to 8,192 paths. No access: heat stays."""
        names = self._place.below.all(paths)
        return self._carry_out(lambda: dialogue.lookup(names), lambda plain: plain.lookup(names))

    @contextlib.contextmanager
    def lease(
        self, paths: Sequence[PathLike], *, direct: bool = False, wait: Wait | None = None,
        deadline_s: float | None = None, sparse: bool = False,
    ) -> Iterator[Leased]:  # fmt: skip
        """Descriptors of the leading blocks (with `sparse` of all that can be had), to be read
        inside the `with`. They are closed at its end, and the lease is released.

        `direct` asks for O_DIRECT. `wait` says what to do about blocks on slow tiers, `deadline_s`
        how long the daemon may take for all; without them the daemon's configuration does.

        Raises QuotaExceeded, DaemonUnavailable, OSError(EMFILE) with nothing leased.
        """
        leased = self._lease(paths, direct, wait, deadline_s, sparse)
        try:
            yield leased
        finally:
            leased.close_descriptors()
            self._release(leased)

    def _lease(
        self, paths: Sequence[PathLike], direct: bool, wait: Wait | None,
        deadline_s: float | None, sparse: bool,
    ) -> Leased:  # fmt: skip
        names = self._place.below.all(paths)

        def ask() -> Dialogue[Leased]:
            leased = yield from dialogue.lease(
                names, direct=direct, wait=wait, deadline_s=deadline_s, sparse=sparse
            )
            leased.connection = self._connections
            return leased

        return self._carry_out(ask, lambda plain: plain.lease(names, direct=direct, sparse=sparse))

    def _release(self, leased: Leased) -> None:
        """Whatever happened to the connection: with it the lease has ended."""
        if os.getpid() != self._place.pid:
            return
        with self._lock, contextlib.suppress(DaemonUnavailable):
            if leased.connection == self._connections and self._connection is not None:
                self._drive(self._connection, dialogue.release(leased))

    def renew(self, leased: Leased) -> float:
        """Let a lease last longer: for so many seconds from now. Raises FilesystemError(ESTALE)
        when it has ended: its descriptors can be read still, but nothing keeps the blocks."""
        with self._lock:
            self._place.check_process()
            if leased.connection != self._connections or self._connection is None:
                raise dialogue.lease_ended()
            return self._drive(self._connection, dialogue.renew(leased))

    def put(
        self, path: PathLike, buffer: Any, *, mode: int = 0o644, replace: bool = False
    ) -> Stored:
        """Write a block, whole or not at all, with the directories above it. One that is there with
        the same content is left as it is; another one is BlockExists unless `replace`.

        `buffer` is anything contiguous with the buffer protocol. Raises KvfsError, OSError.
        """
        name, data = self._place.below(path), bytes_of(buffer)
        return self._carry_out(
            lambda: dialogue.put(name, data, mode=mode, replace=replace),
            lambda plain: plain.put(name, data, mode=mode, replace=replace),
        )

    def touch(self, paths: Sequence[PathLike]) -> int:
        """Count an access to each block, at most one a second; how many were counted."""
        names = self._place.below.all(paths)
        return self._carry_out(lambda: dialogue.touch(names), lambda plain: plain.touch(names))

    def prefetch(self, paths: Sequence[PathLike], deadline_s: float = 60.0) -> Prefetched:
        """Ask for blocks on the fastest tier, because they will be read within that time. Returns
        at once; what cannot be done in time is dropped."""
        names = self._place.below.all(paths)
        return self._carry_out(
            lambda: dialogue.prefetch(names, deadline_s), lambda plain: plain.prefetch(names)
        )

    def pin(self, paths: Sequence[PathLike], tier: str | None = None) -> int:
        """Keep blocks, or all below a directory, from eviction; bring them to a tier first if one
        is named. How many paths it were. Needs permission to write them."""
        names = self._place.below.all(paths)
        return self._carry_out(
            lambda: dialogue.pin(names, tier), lambda plain: plain.pin(names, tier)
        )

    def unpin(self, paths: Sequence[PathLike]) -> int:
        """Let them go again."""
        names = self._place.below.all(paths)
        return self._carry_out(lambda: dialogue.unpin(names), lambda plain: plain.unpin(names))

    def match(
        self, tokens: Iterable[int], scheme: prefix.Scheme, namespace: PathLike = b""
    ) -> Match:
        """The longest cached prefix of a prompt, in an engine's directory of blocks."""
        paths = list(prefix.block_paths(scheme, os.fsencode(namespace), tokens))
        hits = self.lookup(paths)
        found = tuple(paths[: len(hits)])
        return Match(found, hits.tiers, len(found) * scheme.file_tokens)

    # --- carrying out

    def _carry_out(self, ask: Callable[[], Dialogue[T]], plain: Callable[[PlainFiles], T]) -> T:
        """Do it with the daemon: once more after a connection that was made before was lost; or
        with plain files where there is none."""
        with self._lock:
            self._place.check_process()
            again = self._connection is not None
            while True:
                try:
                    connection = self._connected()
                except (DaemonUnavailable, NotPermitted) as error:
                    return plain(self._place.plain_files(error))
                try:
                    return self._drive(connection, ask())
                except ConnectionLost:
                    # The daemon was restarted, perhaps: whatever it was, it can be asked again.
                    if not again:
                        raise
                    again = False

    def _connected(self) -> Connection:
        if self._connection is None:
            self._connection = Connection(self._place.socket_path)
            self._connections += 1
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _drive(self, connection: Connection, steps: Dialogue[T]) -> T:
        """Carry out each step, and send what came of it back."""
        outcome: Any = None
        failure: BaseException | None = None
        while True:
            try:
                step = steps.throw(failure) if failure is not None else steps.send(outcome)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return] # the dialogue's own type
            outcome, failure = None, None
            try:
                if isinstance(step, Ask):
                    outcome = connection.ask(step)
                elif isinstance(step, Tell):
                    connection.tell(step)
                elif isinstance(step, Write):
                    step.carry_out()
                elif isinstance(step, Forsake):
                    connection.conversation.forsake(step)
            except DaemonUnavailable as error:
                self._disconnect()
                failure = error
            except BaseException as error:
                failure = error


class Connection:
    """A socket, and what was said on it. Used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        """Raises DaemonUnavailable, NotPermitted."""
        self.conversation = Conversation()
        self._path = path
        self._socket = connect(path)
        parent_only(self)

    def close(self) -> None:
        """Close the socket; repeating is harmless."""
        self._socket.close()

    def detach(self) -> int:
        """The descriptor of the socket, which is the caller's then."""
        return self._socket.detach()

    def ask(self, ask: Ask) -> Answer:
        """Send a request and wait for its answer. Raises the daemon's error, DaemonUnavailable."""
        self._catch_up()
        answer = self._exchange(ask)
        # Answers to requests that were given up may have come before it.
        try:
            self._catch_up()
        except DaemonUnavailable:
            pass  # the answer is here
        except BaseException:
            self.conversation.discard(answer)
            raise
        return answer

    def tell(self, tell: Tell) -> None:
        """Send a request; its answer is read, and dropped, with that to the next one. Raises
        DaemonUnavailable."""
        with self._conversing(GRACE_S):
            self._send(tell)
            self.conversation.abandon()

    def _catch_up(self) -> None:
        """Let the daemon know what nobody wants any more. What ended by itself is fine."""
        for overdue in self.conversation.overdue():
            try:
                self._exchange(overdue)
            except InvalidOperation:
                continue

    def _exchange(self, ask: Ask) -> Answer:
        with self._conversing(ask.wait_s):
            self._send(ask)
            while True:
                data, received, flags, _ = self._socket.recvmsg(
                    RECV_BYTES, ALL_DESCRIPTORS_BYTES, socket.MSG_CMSG_CLOEXEC
                )
                answer = self.conversation.take(data, received, flags)
                if answer is not None:
                    return answer

    def _send(self, ask: Ask | Tell) -> None:
        with pack(self.conversation.begin(ask)) as (buffers, ancillary):
            self._socket.sendmsg(buffers, ancillary)

    @contextlib.contextmanager
    def _conversing(self, wait_s: float) -> Iterator[None]:
        """No answer is waited for longer than that, and none at all after an error."""
        try:
            self._socket.settimeout(wait_s)
            yield
        except TimeoutError as error:
            self.conversation.abandon()
            text = f"{self._path}: the daemon was silent for {wait_s:g} s"
            raise DaemonUnavailable(text) from error
        except OSError as error:
            self.conversation.abandon()
            raise ConnectionLost(f"{self._path}: the daemon closed the connection") from error
        except BaseException:
            self.conversation.abandon()
            raise


class Detachable(Protocol):
    """What has a descriptor."""

    def detach(self) -> int: ...


_connections: weakref.WeakSet[Detachable] = weakref.WeakSet()


def parent_only(connection: Detachable) -> None:
    """Have forked children close their copy: a connection ends with the process that made it."""
    _connections.add(connection)


def _close_in_child() -> None:
    for connection in list(_connections):
        # Not the socket's own way: trio's would take it from the parent's epoll.
        descriptor = connection.detach()
        if descriptor >= 0:
            os.close(descriptor)


os.register_at_fork(after_in_child=_close_in_child)


def connect(path: Path) -> socket.socket:
    """A connected socket. Raises DaemonUnavailable, NotPermitted."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(os.fsencode(path))
    except PermissionError as error:
        connection.close()
        raise NotPermitted(f"{path}: you may not connect to this daemon") from error
    except OSError as error:
        connection.close()
        raise DaemonUnavailable(f"{path}: no daemon answers") from error
    return connection
