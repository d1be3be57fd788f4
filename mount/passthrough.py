"""Kernel passthrough: reads of a block go from the kernel to the backing file, not through Python.

Owns the channel to the kernel (opened, mounted and negotiated here, because libfuse 3.14 cannot ask
for passthrough) and the registration of backing files. Where the kernel or privileges say no, the
mount is made by libfuse as usual and the daemon serves reads itself. Never imports pyfuse3: the
reply extension has to be loaded before it.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib
import logging
import os
import socket
import stat
import struct
import sys
from pathlib import Path

import trio

log = logging.getLogger(__name__)

DEVICE = "/dev/fuse"
MS_NOSUID, MS_NODEV = 2, 4
# linux/fuse.h, protocol 7.40
BACKING_OPEN = 0x4010E501  # _IOW(229, 1, struct fuse_backing_map)
BACKING_CLOSE = 0x4004E502  # _IOW(229, 2, uint32_t)
INIT_EXT = 1 << 30
HANDLE_KILLPRIV_V2 = 1 << 28
PASSTHROUGH_2 = 1 << 5  # bit 37: in the second word of flags
STACK_DEPTH = 1
BACKING_ID_SHIFT = 32
INIT_BYTES = 1 << 16
_INIT_IN_FLAGS = struct.Struct("<40x4x4x4xI I")
# In struct fuse_out_header: the number of the request that is answered, 0 for a notification.
_OUT_HEADER_BYTES, _UNIQUE = 16, slice(8, 16)
_FLAGS_AT, _FLAGS_2_AT, _DEPTH_AT = 16 + 12, 16 + 32, 16 + 36
_WORD = struct.Struct("<I")
_BACKING_MAP = struct.Struct("<iIQ")

_libc = ctypes.CDLL(None, use_errno=True)


def preload() -> bool:
    """Load the reply extension where pyfuse3 will find it; whether it is there. Before pyfuse3."""
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
    try:
        importlib.import_module("kvfs.mount._reply")
    except ImportError:
        return False
    finally:
        sys.setdlopenflags(flags)
    return True


def is_preloaded() -> bool:
    """Whether `preload` was in time."""
    return "kvfs.mount._reply" in sys.modules


class Channel:
    """The descriptor of `/dev/fuse` of one mount, between the kernel and libfuse.

    libfuse gets one end of a socket pair for the INIT exchange and the device itself afterwards,
    under the same number. Owned by the trio loop.
    """

    def __init__(self, mountpoint: Path, fsname: str, *, allow_other: bool) -> None:
        """Mount. Raises OSError, with nothing mounted."""
        self.device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        options = [
            f"fd={self.device}", f"rootmode={stat.S_IFDIR:o}", f"user_id={os.getuid()}",
            f"group_id={os.getgid()}", "default_permissions",
        ]  # fmt: skip
        if allow_other:
            options.append("allow_other")
        try:
            _mount(fsname, mountpoint, ",".join(options))
        except OSError:
            os.close(self.device)
            raise
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The number that libfuse keeps; no other may refer to the socket.
        self.number = theirs.detach()
        request = os.read(self.device, INIT_BYTES)
        self.offered = _offers_passthrough(request)
        self._ours.send(request)

    @property
    def path(self) -> str:
        """What libfuse takes for an already mounted session."""
        return f"/dev/fd/{self.number}"

    async def finish(self) -> None:
        """Pass libfuse's answer to INIT on, with passthrough asked for, and step aside."""
        with trio.socket.from_stdlib_socket(self._ours) as ours:
            reply = bytearray(await ours.recv(INIT_BYTES))
            # Notifications may come before it: the kernel has nothing in its caches yet.
            while len(reply) >= _OUT_HEADER_BYTES and not any(reply[_UNIQUE]):
                reply = bytearray(await ours.recv(INIT_BYTES))
        if self.offered:
            _ask_for_passthrough(reply)
        os.write(self.device, reply)
        os.dup2(self.device, self.number, inheritable=False)
        # epoll still knows the socket under this number: asking again registers the device.
        await trio.lowlevel.wait_writable(self.number)

    def close(self) -> None:
        os.close(self.device)


def _mount(source: str, target: Path, options: str) -> None:
    flags = MS_NOSUID | MS_NODEV
    arguments = (source.encode(), os.fsencode(target), b"fuse.kvfs", flags, options.encode())
    if _libc.mount(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def _offers_passthrough(request: bytes) -> bool:
    if len(request) < _INIT_IN_FLAGS.size:
        return False
    flags, flags_2 = _INIT_IN_FLAGS.unpack_from(request)
    return bool(flags & INIT_EXT) and bool(flags_2 & PASSTHROUGH_2)


def _ask_for_passthrough(reply: bytearray) -> None:
    """Edit libfuse's answer: passthrough, and no question for capabilities before each write."""
    for offset, bits in (
        (_FLAGS_AT, INIT_EXT | HANDLE_KILLPRIV_V2),
        (_FLAGS_2_AT, PASSTHROUGH_2),
    ):
        (word,) = _WORD.unpack_from(reply, offset)
        _WORD.pack_into(reply, offset, word | bits)
    _WORD.pack_into(reply, _DEPTH_AT, STACK_DEPTH)


class Passthrough:
    """Registers backing files with the kernel. Owned by the trio loop.

    `active` only after a probe read through the mount did not come to the daemon; until then, and
    where it did, `reason` says why reads are served.
    """

    def __init__(self) -> None:
        self._channel: Channel | None = None
        self.active = False
        self.reason = "the mount was not made with passthrough"

    def describe(self) -> dict[str, object]:
        """For the statistics: whether bytes go past the daemon, and if not, why."""
        return {"passthrough": self.active, "reason": self.reason}

    def use(self, channel: Channel) -> None:
        self._channel = channel

    def register(self, descriptor: int) -> int:
        """The backing id of an open file. Raises OSError."""
        assert self._channel is not None, "a channel was negotiated"
        request = bytearray(_BACKING_MAP.pack(descriptor, 0, 0))
        return int(fcntl.ioctl(self._channel.device, BACKING_OPEN, request))

    def unregister(self, backing_id: int) -> None:
        """The last handle is gone. Never raises: with the mount its registrations went too."""
        assert self._channel is not None, "a channel was negotiated"
        try:
            fcntl.ioctl(self._channel.device, BACKING_CLOSE, _WORD.pack(backing_id))
        except OSError as error:
            log.debug("backing id %d: %s", backing_id, error)

    def decide(self, *, works: bool, reason: str) -> None:
        """What the probe showed."""
        self.active = works
        self.reason = "" if works else reason
        if not works:
            log.warning("reads go through the daemon, several times slower: %s", reason)
