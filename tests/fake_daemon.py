"""A control server in a thread, for tests of what speaks to a daemon."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

from kvfs import control
from kvfs.control import Message, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


class FakeDaemon:
    """Serves one connection after another; a request that gets no answers ends its connection."""

    def __init__(self, path: Path, answer: Callable[[Request], Sequence[Message | bytes]]) -> None:
        self.path = path
        self.requests: list[Request] = []
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; the client must have closed its connection."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self._serve_connection(connection)

    def _serve_connection(self, connection: socket.socket) -> None:
        while True:
            data, ancillary, flags, _ = connection.recvmsg(
                control.RECV_BYTES, control.ANCILLARY_BYTES
            )
            if not data:
                return
            request = control.unpack(data, ancillary, flags)
            assert isinstance(request, Request)
            self.requests.append(request)
            answers = self._answer(request)
            if not answers:
                return
            for answer in answers:
                if isinstance(answer, bytes):
                    connection.send(answer)
                    continue
                with control.pack(answer) as (buffers, out):
                    connection.sendmsg(buffers, out)
