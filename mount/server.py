"""The control socket: connections, framing and peers. What a verb does is in `kvfs.mount.verbs`.

A message that is malformed, too large or not read by its sender costs that connection only.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import socket
import struct
from pathlib import Path

import trio

from kvfs.control import (
    ANCILLARY_BYTES,
    RECV_BYTES,
    Message,
    Progress,
    Reply,
    Request,
    error_answer,
    pack,
    unpack,
)
from kvfs.errors import InvalidOperation, KvfsError, UsageError, is_expected
from kvfs.mount.verbs import Peer, Verbs

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 128
SEND_TIMEOUT_S = 10.0
ACCEPT_RETRY_S = 1.0
_PEER_CREDENTIALS = struct.Struct("iII")


def socket_path_for(mountpoint: Path) -> Path:
    """Where the daemon of a mount listens: under /run/kvfs, or the user's runtime directory."""
    name = hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16] + ".sock"
    if os.geteuid() == 0:
        return Path("/run/kvfs") / name
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/kvfs-{os.geteuid()}"
    return Path(runtime) / "kvfs" / name


class ControlServer:
    """One task per connection, in the nursery of `run`."""

    def __init__(self, path: Path, verbs: Verbs) -> None:
        self.path = path
        self._verbs = verbs
        self._connections = 0

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen until cancelled; the socket file is removed then."""
        self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with listener:
            await listener.bind(os.fspath(self.path))
            os.chmod(self.path, 0o666)
            listener.listen(64)
            task_status.started()
            try:
                async with trio.open_nursery() as nursery:
                    while True:
                        try:
                            connection, _ = await listener.accept()
                        except OSError as error:
                            # No descriptor is left, say: the mount is worth more than a command.
                            log.error("control socket: %s", error)
                            await trio.sleep(ACCEPT_RETRY_S)
                            continue
                        nursery.start_soon(self._serve, connection)
            finally:
                self.path.unlink(missing_ok=True)

    async def _serve(self, connection: trio.socket.SocketType) -> None:
        with connection:
            if self._connections >= MAX_CONNECTIONS:
                return
            self._connections += 1
            try:
                await self._converse(connection)
            except (OSError, KvfsError, trio.TooSlowError) as error:
                log.debug("control connection ended: %s", error)
            finally:
                self._connections -= 1

    async def _converse(self, connection: trio.socket.SocketType) -> None:
        peer = _peer_of(connection)
        while True:
            data, ancillary, flags, _ = await connection.recvmsg(
                RECV_BYTES, ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
            )
            if not data:
                return
            try:
                request = unpack(data, ancillary, flags)
                if not isinstance(request, Request):
                    raise InvalidOperation("a client sends requests")
            except KvfsError as error:
                await _send(connection, error_answer(0, error))
                return
            await _send(connection, await self._answer(connection, peer, request))

    async def _answer(
        self, connection: trio.socket.SocketType, peer: Peer, request: Request
    ) -> Message:
        async def report(progress: dict[str, object]) -> None:
            await _send(connection, Progress(request.id, progress))

        try:
            return Reply(request.id, await self._verbs.call(peer, request, report))
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
            return error_answer(request.id, error)


def _peer_of(connection: trio.socket.SocketType) -> Peer:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    _, uid, gid = _PEER_CREDENTIALS.unpack(raw)
    return Peer(uid, gid)


async def _send(connection: trio.socket.SocketType, message: Message) -> None:
    with trio.fail_after(SEND_TIMEOUT_S), contextlib.ExitStack() as stack:
        buffers, ancillary = stack.enter_context(pack(message))
        await connection.sendmsg(buffers, ancillary)
