"""The exchange of INIT between the kernel and libfuse, with both played by the test."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest

from kvfs.mount import passthrough
from kvfs.mount.passthrough import HANDLE_KILLPRIV_V2, INIT_EXT, PASSTHROUGH_2, Channel

NOTIFICATION = struct.pack("<IiQ", 46, 3, 0) + struct.pack("<QII", 1, 13, 0) + b"13 characters\0"
INIT_REPLY = struct.pack("<IiQ", 80, 0, 2) + bytes(64)


async def test_a_notification_before_the_answer_to_init_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with kernel:
        monkeypatch.setattr(passthrough, "_mount", lambda *_: None)
        # A socket cannot be opened by name.
        monkeypatch.setattr(os, "open", lambda *_: device.detach())
        request = bytearray(104)
        struct.pack_into("<I I", request, 52, INIT_EXT, PASSTHROUGH_2)
        kernel.send(request)
        channel = Channel(tmp_path, "kvfs", allow_other=False)
        monkeypatch.undo()
        assert channel.offered
        try:
            assert os.read(channel.number, 4096) == request
            os.write(channel.number, NOTIFICATION)
            os.write(channel.number, INIT_REPLY)
            await channel.finish()
            answer = kernel.recv(4096)
            assert len(answer) == len(INIT_REPLY)
            flags, flags_2 = (struct.unpack_from("<I", answer, at)[0] for at in (28, 48))
            assert (flags, flags_2) == (INIT_EXT | HANDLE_KILLPRIV_V2, PASSTHROUGH_2)
            # From now on libfuse has the device itself.
            os.write(channel.number, b"next")
            assert kernel.recv(4096) == b"next"
        finally:
            os.close(channel.number)
            channel.close()
