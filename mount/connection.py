"""One client of the control socket: its messages, and what the kernel says of it.

The socket is used directly: most messages are sent and received without waiting, and going through
the scheduler for each would take longer than what a client asks for.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import struct

import trio

from kvfs.control import ANCILLARY_BYTES, RECV_BYTES, Ancillary, Message, pack
from kvfs.mount.peers import Peer

SEND_TIMEOUT_S = 10.0
HANGUP_POLL_S = 0.2
# asm-generic/socket.h
SO_PEERGROUPS = 59
_PEER_CREDENTIALS = struct.Struct("iII")

_libc = ctypes.CDLL(None, use_errno=True)


class Connection:
    """Used by the task that serves it; only `hung_up` may wait beside that."""

    def __init__(self, accepted: socket.socket) -> None:
        accepted.setblocking(False)
        self._socket = accepted

    def close(self) -> None:
        """Whoever waits for it gets ClosedResourceError."""
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()

    def peer(self) -> Peer:
        """Who is at the other end. Raises OSError."""
        size = _PEER_CREDENTIALS.size
        raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        _, uid, gid = _PEER_CREDENTIALS.unpack(raw)
        return Peer(uid, gid, groups_of(self._socket), self.hung_up)

    async def receive(self) -> tuple[bytes, Ancillary, int]:
        """The next datagram, for `unpack`; empty at the end. Always a checkpoint."""
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(
                    RECV_BYTES, ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                continue
            return data, ancillary, flags

    async def send(self, message: Message) -> None:
        """Raises trio.TooSlowError for a client that does not read. No checkpoint for one that
        does."""
        with pack(message) as (buffers, ancillary):
            try:
                self._socket.sendmsg(buffers, ancillary)
                return
            except BlockingIOError:
                pass
            with trio.fail_after(SEND_TIMEOUT_S):
                while True:
                    await trio.lowlevel.wait_writable(self._socket)
                    try:
                        self._socket.sendmsg(buffers, ancillary)
                        return
                    except BlockingIOError:
                        continue

    async def hung_up(self) -> None:
        """Return when the other end is closed; what it has asked before that may wait still."""
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLHUP)
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            if poll.poll(0):
                return
            await trio.sleep(HANGUP_POLL_S)


def groups_of(connection: socket.socket) -> frozenset[int]:
    """The supplementary groups of the other end. Raises OSError."""
    most = 64
    while True:
        # Python's own getsockopt takes no more than 1 KiB.
        groups, length = (ctypes.c_uint32 * most)(), ctypes.c_uint32(4 * most)
        arguments = connection.fileno(), socket.SOL_SOCKET, SO_PEERGROUPS, groups
        if _libc.getsockopt(*arguments, ctypes.byref(length)) == 0:
            return frozenset(groups[: length.value // 4])
        number = ctypes.get_errno()
        if number != errno.ERANGE:
            raise OSError(number, os.strerror(number))
        most = length.value // 4
