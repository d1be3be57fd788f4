"""The client library for trio: `AsyncClient` is `Client` with awaits."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import trio

from kvfs import dialogue, prefix
from kvfs.client import Place, connect, parent_only
from kvfs.control import ALL_DESCRIPTORS_BYTES, RECV_BYTES, pack
from kvfs.dialogue import (
    Answer,
    Ask,
    ConnectionLost,
    Conversation,
    Dialogue,
    Forsake,
    Write,
    bytes_of,
)
from kvfs.errors import DaemonUnavailable, InvalidOperation, NotPermitted
from kvfs.leased import Hits, Leased, Match, PathLike, Prefetched, Stored, Wait
from kvfs.plain_client import PlainFiles

T = TypeVar("T")


class AsyncClient:
    """One connection to a daemon, for the tasks of one trio loop: their requests take turns. What
    one that is cancelled was given is given back. All else is as with `Client`."""

    def __init__(
        self, directory: PathLike | None = None, *,
        socket_path: str | os.PathLike[str] | None = None,
    ) -> None:  # fmt: skip
        """See `Client`."""
        self._place = Place(None if directory is None else os.fsdecode(directory), socket_path)
        self._lock = trio.Lock()
        self._connection: AsyncConnection | None = None
        self._connections = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """See `Client.close`. A request that waits fails."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # --- operations

    async def lookup(self, paths: Sequence[PathLike]) -> Hits:
        """See `Client.lookup`."""
        names = self._place.below.all(paths)
        return await self._carry_out(
            lambda: dialogue.lookup(names), lambda plain: plain.lookup(names)
        )

    @contextlib.asynccontextmanager
    async def lease(
        self, paths: Sequence[PathLike], *, direct: bool = False, wait: Wait | None = None,
        deadline_s: float | None = None, sparse: bool = False,
    ) -> AsyncIterator[Leased]:  # fmt: skip
        """See `Client.lease`."""
        names = self._place.below.all(paths)

        def ask() -> Dialogue[Leased]:
            leased = yield from dialogue.lease(
                names, direct=direct, wait=wait, deadline_s=deadline_s, sparse=sparse
            )
            leased.connection = self._connections
            return leased

        leased = await self._carry_out(
            ask, lambda plain: plain.lease(names, direct=direct, sparse=sparse)
        )
        try:
            yield leased
        finally:
            leased.close_descriptors()
            self._forsake(leased)
        async with self._lock:
            if self._connection is not None:
                with contextlib.suppress(DaemonUnavailable):
                    await self._connection.catch_up()

    def _forsake(self, leased: Leased) -> None:
        """Also in a task that is cancelled: the daemon hears of it with the next request."""
        if leased.numbers and leased.connection == self._connections and self._connection:
            forsaken = Forsake("lease", leased.numbers)
            self._connection.conversation.forsake(forsaken)

    async def renew(self, leased: Leased) -> float:
        """See `Client.renew`."""
        async with self._lock:
            self._place.check_process()
            if leased.connection != self._connections or self._connection is None:
                raise dialogue.lease_ended()
            return await self._drive(self._connection, dialogue.renew(leased))

    async def put(
        self, path: PathLike, buffer: Any, *, mode: int = 0o644, replace: bool = False
    ) -> Stored:
        """See `Client.put`."""
        name, data = self._place.below(path), bytes_of(buffer)
        return await self._carry_out(
            lambda: dialogue.put(name, data, mode=mode, replace=replace),
            lambda plain: plain.put(name, data, mode=mode, replace=replace),
        )

    async def touch(self, paths: Sequence[PathLike]) -> int:
        """See `Client.touch`."""
        names = self._place.below.all(paths)
        return await self._carry_out(
            lambda: dialogue.touch(names), lambda plain: plain.touch(names)
        )

    async def prefetch(self, paths: Sequence[PathLike], deadline_s: float = 60.0) -> Prefetched:
        """See `Client.prefetch`."""
        names = self._place.below.all(paths)
        return await self._carry_out(
            lambda: dialogue.prefetch(names, deadline_s), lambda plain: plain.prefetch(names)
        )

    async def pin(self, paths: Sequence[PathLike], tier: str | None = None) -> int:
        """See `Client.pin`."""
        names = self._place.below.all(paths)
        return await self._carry_out(
            lambda: dialogue.pin(names, tier), lambda plain: plain.pin(names, tier)
        )

    async def unpin(self, paths: Sequence[PathLike]) -> int:
        """See `Client.unpin`."""
        names = self._place.below.all(paths)
        return await self._carry_out(
            lambda: dialogue.unpin(names), lambda plain: plain.unpin(names)
        )

    async def match(
        self, tokens: Iterable[int], scheme: prefix.Scheme, namespace: PathLike = b""
    ) -> Match:
        """See `Client.match`."""
        paths = list(prefix.block_paths(scheme, os.fsencode(namespace), tokens))
        hits = await self.lookup(paths)
        found = tuple(paths[: len(hits)])
        return Match(found, hits.tiers, len(found) * scheme.file_tokens)

    # --- carrying out

    async def _carry_out(
        self, ask: Callable[[], Dialogue[T]], plain: Callable[[PlainFiles], T]
    ) -> T:
        """As `Client` does."""
        async with self._lock:
            self._place.check_process()
            again = self._connection is not None
            while True:
                try:
                    connection = self._connected()
                except (DaemonUnavailable, NotPermitted) as error:
                    files = self._place.plain_files(error)
                    return await trio.to_thread.run_sync(plain, files)
                try:
                    return await self._drive(connection, ask())
                except ConnectionLost:
                    if not again:
                        raise
                    again = False

    def _connected(self) -> AsyncConnection:
        """Connecting to a socket of the machine waits for nobody."""
        if self._connection is None:
            self._connection = AsyncConnection(self._place.socket_path)
            self._connections += 1
        return self._connection

    async def _drive(self, connection: AsyncConnection, steps: Dialogue[T]) -> T:
        """As `Client` does."""
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
                    outcome = await connection.ask(step)
                elif isinstance(step, Write):
                    await trio.to_thread.run_sync(step.carry_out)
                elif isinstance(step, Forsake):
                    connection.conversation.forsake(step)
            except DaemonUnavailable as error:
                self.close()
                failure = error
            except BaseException as error:
                failure = error


class AsyncConnection:
    """A socket, and what was said on it. Used by one task at a time."""

    def __init__(self, path: Path) -> None:
        """Raises DaemonUnavailable, NotPermitted."""
        self.conversation = Conversation()
        self._path = path
        self._socket = trio.socket.from_stdlib_socket(connect(path))
        parent_only(self)

    def close(self) -> None:
        """Close the socket; repeating is harmless."""
        self._socket.close()

    def detach(self) -> int:
        """The descriptor of the socket, which is the caller's then."""
        return self._socket.detach()

    async def ask(self, ask: Ask) -> Answer:
        """As `Connection.ask`."""
        await self.catch_up()
        answer = await self._exchange(ask)
        try:
            await self.catch_up()
        except DaemonUnavailable:
            pass  # the answer is here
        except BaseException:
            self.conversation.discard(answer)
            raise
        return answer

    async def catch_up(self) -> None:
        """Let the daemon know what nobody wants any more."""
        for overdue in self.conversation.overdue():
            try:
                await self._exchange(overdue)
            except InvalidOperation:
                continue  # it ended by itself

    async def _exchange(self, ask: Ask) -> Answer:
        try:
            with pack(self.conversation.begin(ask)) as (buffers, ancillary):
                with trio.fail_after(ask.wait_s):
                    await self._socket.sendmsg(buffers, ancillary)
            while True:
                with trio.fail_after(ask.wait_s):
                    data, received, flags, _ = await self._socket.recvmsg(
                        RECV_BYTES, ALL_DESCRIPTORS_BYTES, socket.MSG_CMSG_CLOEXEC
                    )
                answer = self.conversation.take(data, received, flags)
                if answer is not None:
                    return answer
        except trio.TooSlowError as error:
            self.conversation.abandon()
            text = f"{self._path}: the daemon was silent for {ask.wait_s:g} s"
            raise DaemonUnavailable(text) from error
        except OSError as error:
            self.conversation.abandon()
            raise ConnectionLost(f"{self._path}: the daemon closed the connection") from error
        except BaseException:
            self.conversation.abandon()
            raise
