"""The control socket: who may connect, and the requests of each connection, one after the other.
What a verb does is in `kvfs.mount.verbs`.

A message that is malformed, too large or not read by its sender costs that connection only.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import socket
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

from kvfs.control import (
    Message,
    Progress,
    Reply,
    Request,
    close_all,
    descriptors_in,
    error_answer,
    unpack,
)
from kvfs.errors import (
    InvalidOperation,
    KvfsError,
    QuotaExceeded,
    UsageError,
    is_expected,
    reason_of,
)
from kvfs.mount.connection import Connection
from kvfs.mount.peers import Peer
from kvfs.mount.verbs import Verbs

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 512
# So that others find one free.
MAX_OF_USER = 256
# A prompt of many blocks; what is larger would stop the loop for long.
MAX_REQUEST_BYTES = 2 << 20
ACCEPT_RETRY_S = 1.0
REFUSE_S = 1.0


def socket_path_for(mountpoint: Path) -> Path:
    """Where the daemon of a mount listens: under /run/kvfs, or the user's runtime directory."""
    name = hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16] + ".sock"
    if os.geteuid() == 0:
        return Path("/run/kvfs") / name
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/kvfs-{os.geteuid()}"
    return Path(runtime) / "kvfs" / name


def prepare_directory(directory: Path) -> None:
    """Make where the socket goes. Raises KvfsError for a directory in which somebody else could
    put a socket of their own: whoever asks there would take it for the daemon."""
    for made in (directory.parent, directory):
        if not os.path.lexists(made):
            made.mkdir(mode=0o755, parents=True)
        status = os.lstat(made)
        # In one like /tmp others can make names, but not replace the directory that comes next.
        sticky = made != directory and status.st_mode & stat.S_ISVTX
        ours = status.st_uid in (0, os.geteuid()) and (sticky or not status.st_mode & 0o022)
        if not stat.S_ISDIR(status.st_mode) or not ours:
            raise KvfsError(
                f"{made}: others may put something there in place of the control socket; remove "
                "it, or set XDG_RUNTIME_DIR to a directory of your own"
            )


class ControlServer:
    """One task per connection, in the nursery of `run`. Who may not use the mount may not connect
    either; what a peer may order is up to the verbs."""

    def __init__(self, path: Path, verbs: Verbs, *, allow_other: bool) -> None:
        self.path = path
        self._mode = 0o666 if allow_other else 0o600
        self._verbs = verbs
        self._connections: Counter[int] = Counter()
        self._incidents = verbs.store.volume.incidents
        self._counters = verbs.store.volume.counters

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen until cancelled; the socket file is removed then."""
        prepare_directory(self.path.parent)
        self.path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.setblocking(False)
        with listener:
            listener.bind(os.fspath(self.path))
            os.chmod(self.path, self._mode)
            listener.listen(64)
            task_status.started()
            try:
                async with trio.open_nursery() as nursery:
                    while True:
                        await trio.lowlevel.wait_readable(listener)
                        try:
                            accepted, _ = listener.accept()
                        except BlockingIOError:
                            continue  # it is gone already
                        except OSError as error:
                            # No descriptor is left, say: the mount is worth more than a command.
                            self._failed(error)
                            await trio.sleep(ACCEPT_RETRY_S)
                            continue
                        nursery.start_soon(self._serve, Connection(accepted))
            finally:
                self.path.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> None:
        """A client could not be served; the mount goes on."""
        self._incidents.note(
            "control_failures", f"control socket: {error}", reason=reason_of(error)
        )

    async def _serve(self, connection: Connection) -> None:
        with contextlib.closing(connection):
            try:
                peer = connection.peer()
            except OSError as error:
                self._failed(error)
                return
            self._connections[peer.uid] += 1
            try:
                await self._admit(connection, peer)
                await self._converse(connection, peer)
            except (OSError, KvfsError, trio.TooSlowError) as error:
                log.debug("control connection ended: %s", error)
                self._counters.count("control_failures", reason=reason_of(error))
            finally:
                self._connections[peer.uid] -= 1
                if not self._connections[peer.uid]:
                    del self._connections[peer.uid]
                await self._verbs.farewell(peer)

    async def _admit(self, connection: Connection, peer: Peer) -> None:
        """Raise QuotaExceeded, which the peer is told, for one connection too many."""
        of_user, total = self._connections[peer.uid], self._connections.total()
        if of_user <= MAX_OF_USER and total <= MAX_CONNECTIONS:
            return
        refusal = QuotaExceeded("the daemon serves as many connections as it can")
        if total <= 2 * MAX_CONNECTIONS:
            # Closed with a request unread, the answer would be lost.
            with trio.move_on_after(REFUSE_S):
                _, ancillary, _ = await connection.receive()
                close_all(descriptors_in(ancillary))
            await connection.send(error_answer(0, refusal))
        raise refusal

    async def _converse(self, connection: Connection, peer: Peer) -> None:
        while True:
            data, ancillary, flags = await connection.receive()
            if not data:
                return
            try:
                request = unpack(data, ancillary, flags, MAX_REQUEST_BYTES)
                if not isinstance(request, Request):
                    raise InvalidOperation("a client sends requests")
            except KvfsError as error:
                await connection.send(error_answer(0, error))
                return
            await connection.send(await self._answer(connection, peer, request))

    async def _answer(self, connection: Connection, peer: Peer, request: Request) -> Message:
        async def report(progress: dict[str, Any], descriptors: Sequence[int] = (), /) -> None:
            await connection.send(Progress(request.id, progress, tuple(descriptors)))

        try:
            answer = await self._verbs.call(peer, request, report)
            return Reply(request.id, answer.result, tuple(answer.descriptors))
        except (OSError, trio.TooSlowError) as error:
            if isinstance(error, BrokenPipeError | ConnectionResetError | trio.TooSlowError):
                raise
            return error_answer(request.id, error)
        except (KeyError, TypeError, ValueError) as error:
            log.debug("request %s: %r", request.verb, error)
            return error_answer(
                request.id, UsageError(f"bad arguments for {request.verb}: {error}")
            )
        except Exception as error:
            if not is_expected(error):
                log.exception("control verb %s failed", request.verb)
                self._counters.count("handler_failures", reason="bug")
            return error_answer(request.id, error)
