"""The control protocol: messages, framing, the client, and where a mount's socket is.

Owns the codec that both ends share: the server in `kvfs.mount.server` passes what `recvmsg` gave
it to `unpack` and sends what `pack` made. Never acts on a verb, never blocks on anything but the
client's own socket. Called by the command, by the server and by client libraries.

One message is one `SOCK_SEQPACKET` datagram with one msgpack map:

- request `{v, id, verb, args}`
- any number of `{v, id, progress}`, then one `{v, id, result}` or `{v, id, error}`
- a message above `INLINE_BYTES` travels in a sealed memfd, announced by `{v, body_bytes}`. The
  seals make sure that the sender can neither shrink nor change it while it is read.
- progress and result may bring descriptors, announced by `fds`; whoever receives them owns them
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec

from kvfs import errors, mount_table
from kvfs.errors import (
    DaemonUnavailable,
    FilesystemError,
    InvalidOperation,
    KvfsError,
    MountpointError,
    NotPermitted,
    errno_of,
    exit_code_of,
    is_expected,
)
from kvfs.mount_table import MountEntry
from kvfs.units import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

VERSION = 1
INLINE_BYTES = 64 * 1024
MAX_BODY_BYTES = 64 * 1024 * 1024
RECV_BYTES = INLINE_BYTES
ANCILLARY_BYTES = socket.CMSG_SPACE(array.array("i").itemsize)
# SCM_MAX_FD of the kernel: more in one message are EINVAL.
MOST_DESCRIPTORS = 253
ALL_DESCRIPTORS_BYTES = socket.CMSG_SPACE(MOST_DESCRIPTORS * array.array("i").itemsize)
SOCKET_ENV = "KVFS_SOCKET"
SOCKET_XATTR = "user.kvfs.socket"
FSTYPE = "fuse.kvfs"

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

Ancillary = list[tuple[int, int, bytes]]


class Request(msgspec.Struct, frozen=True):
    """What a client asks. `id` is the client's own and comes back in every answer."""

    id: int
    verb: str
    args: dict[str, Any] = {}


class Progress(msgspec.Struct, frozen=True):
    """How far request `id` is, or a part of what was asked for; more messages follow."""

    id: int
    progress: dict[str, Any]
    descriptors: tuple[int, ...] = ()


class Reply(msgspec.Struct, frozen=True):
    """Request `id` is done."""

    id: int
    result: dict[str, Any]
    descriptors: tuple[int, ...] = ()


class ErrorBody(msgspec.Struct, frozen=True):
    """A `KvfsError` on the wire."""

    errno: int
    exit_code: int
    message: str


class Error(msgspec.Struct, frozen=True):
    """Request `id` failed."""

    id: int
    error: ErrorBody


Message = Request | Progress | Reply | Error


class _Wire(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Every field that any message has: which ones are set tells the kind."""

    v: int
    id: int | msgspec.UnsetType = msgspec.UNSET
    verb: str | msgspec.UnsetType = msgspec.UNSET
    args: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    progress: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    result: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    error: ErrorBody | msgspec.UnsetType = msgspec.UNSET
    body_bytes: int | msgspec.UnsetType = msgspec.UNSET
    fds: int = 0


_decoder = msgspec.msgpack.Decoder(_Wire)
_encoder = msgspec.msgpack.Encoder()


def encode_message(message: Message) -> tuple[bytes, int | None]:
    """The datagram for `message` and, for a large body, the memfd to send along and then close."""
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    descriptors = fields.pop("descriptors", ())
    if descriptors:
        fields["fds"] = len(descriptors)
    try:
        try:
            body = _encoder.encode(_Wire(v=VERSION, **fields))
        except UnicodeEncodeError:
            body = _encoder.encode(_Wire(v=VERSION, **_names_as_bytes(fields)))
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise InvalidOperation(f"control message cannot be encoded: {error}") from error
    if len(body) <= INLINE_BYTES:
        return body, None
    if len(body) > MAX_BODY_BYTES:
        raise InvalidOperation(
            f"control message of {len(body)} bytes is above the limit of {MAX_BODY_BYTES}: "
            "ask for less at a time"
        )
    return _encoder.encode(_Wire(v=VERSION, body_bytes=len(body))), _sealed_memfd(body)


def decode_message(
    data: bytes, fds: Sequence[int] = (), *, lost: bool = False, most_bytes: int = MAX_BODY_BYTES
) -> Message:
    """The message in a datagram, which has its descriptors then; or `InvalidOperation`, and all of
    `fds` are closed. With `lost` the kernel could not deliver all of them, and the rest is closed.
    """
    left = list(fds)
    try:
        wire = _decode_wire(data)
        if wire.body_bytes is not msgspec.UNSET:
            if not left:
                raise InvalidOperation("control message: a body came with 0 descriptors")
            wire = _decode_wire(_read_sealed(left[0], wire.body_bytes, most_bytes))
            os.close(left.pop(0))
        if lost:
            close_all(left)
            left = []
        elif len(left) != wire.fds:
            raise InvalidOperation(f"control message: unexpected descriptors ({len(left)})")
        return _message_of(wire, tuple(left))
    except BaseException:
        close_all(left)
        raise


@contextlib.contextmanager
def pack(message: Message) -> Iterator[tuple[list[bytes], Ancillary]]:
    """The arguments for one `sendmsg`; the memfd lives until the block ends, so send inside it."""
    data, memfd = encode_message(message)
    descriptors = array.array("i", () if memfd is None else (memfd,))
    if isinstance(message, Progress | Reply):
        descriptors.extend(message.descriptors)
    if not descriptors:
        yield [data], []
        return
    try:
        yield [data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors.tobytes())]
    finally:
        if memfd is not None:
            os.close(memfd)


def unpack(
    data: bytes, ancillary: Ancillary, flags: int, most_bytes: int = MAX_BODY_BYTES
) -> Message:
    """The message in what `recvmsg(RECV_BYTES, ANCILLARY_BYTES, MSG_CMSG_CLOEXEC)` returned."""
    return decode_message(*recv_parts(data, ancillary, flags), most_bytes=most_bytes)


def recv_parts(data: bytes, ancillary: Ancillary, flags: int) -> tuple[bytes, list[int]]:
    """The datagram and the descriptors that came with it, which the caller then owns."""
    fds = descriptors_in(ancillary)
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_all(fds)
        raise InvalidOperation(
            f"control message is above {INLINE_BYTES} bytes or has too many descriptors"
        )
    return data, fds


def descriptors_in(ancillary: Ancillary) -> list[int]:
    """The descriptors that `recvmsg` returned, which the caller then owns."""
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return fds.tolist()


def error_answer(request_id: int, error: BaseException) -> Error:
    """The answer to request `request_id` that `error` ended."""
    if isinstance(error, OSError) and not str(error):
        message = os.strerror(errno_of(error))
    elif is_expected(error):
        message = str(error)
    else:
        message = f"the daemon failed with {type(error).__name__}: its log has the traceback"
    return Error(request_id, ErrorBody(errno_of(error), exit_code_of(error), printable(message)))


def remote_error(body: ErrorBody) -> KvfsError:
    """The error of `kvfs.errors` that the daemon raised, as far as errno and exit code tell."""
    kind = _ERRORS_BY_CODE.get((body.errno, body.exit_code))
    if kind is not None:
        return kind(body.message)
    error = FilesystemError(body.errno, body.message)
    error.exit_code = body.exit_code
    return error


def _names_as_bytes(value: Any) -> Any:
    """`value` with the decoded names that no UTF-8 can carry as the bytes that they are."""
    if isinstance(value, str):
        return value if value.isascii() or _is_utf8(value) else os.fsencode(value)
    if isinstance(value, dict):
        return {key: _names_as_bytes(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_names_as_bytes(item) for item in value]
    return value


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _errors_by_code() -> dict[tuple[int, int], type[KvfsError]]:
    by_code: dict[tuple[int, int], type[KvfsError]] = {}
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, KvfsError) and kind is not FilesystemError:
            by_code.setdefault((kind.errno, kind.exit_code), kind)
    return by_code


_ERRORS_BY_CODE = _errors_by_code()


def _decode_wire(data: bytes) -> _Wire:
    try:
        wire = _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise InvalidOperation(f"malformed control message: {printable(str(error))}") from error
    if wire.v != VERSION:
        raise InvalidOperation(
            f"control protocol {wire.v} is not the {VERSION} spoken here: use one kvfs version"
        )
    return wire


def _message_of(wire: _Wire, descriptors: tuple[int, ...]) -> Message:
    if wire.id is msgspec.UNSET or wire.body_bytes is not msgspec.UNSET:
        raise InvalidOperation("malformed control message: no id")
    answers = (wire.progress, wire.result, wire.error)
    answered = sum(answer is not msgspec.UNSET for answer in answers)
    if wire.verb is not msgspec.UNSET and not answered and not descriptors:
        return Request(wire.id, wire.verb, {} if wire.args is msgspec.UNSET else wire.args)
    if wire.verb is msgspec.UNSET and wire.args is msgspec.UNSET and answered == 1:
        if wire.progress is not msgspec.UNSET:
            return Progress(wire.id, wire.progress, descriptors)
        if wire.result is not msgspec.UNSET:
            return Reply(wire.id, wire.result, descriptors)
        if wire.error is not msgspec.UNSET and not descriptors:
            return Error(wire.id, wire.error)
    raise InvalidOperation("malformed control message: not a request, nor one answer")


def _sealed_memfd(body: bytes) -> int:
    memfd = os.memfd_create("kvfs-control", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(body)
        while view:
            view = view[os.write(memfd, view) :]
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(memfd)
        raise
    return memfd


def _read_sealed(memfd: int, size_bytes: int, most_bytes: int) -> bytes:
    # Without the seals a peer could shrink the file under us, or pass one whose reads block.
    try:
        seals = fcntl.fcntl(memfd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise InvalidOperation("control message: the body is not a memfd") from error
    if seals & _SEALS != _SEALS:
        raise InvalidOperation("control message: the body is not sealed")
    if not INLINE_BYTES < size_bytes <= most_bytes or os.fstat(memfd).st_size != size_bytes:
        raise InvalidOperation(f"control message: a body of {size_bytes} bytes is refused")
    body = bytearray()
    while len(body) < size_bytes:
        piece = os.pread(memfd, size_bytes - len(body), len(body))
        if not piece:
            raise InvalidOperation("control message: the body ends early")
        body += piece
    return bytes(body)


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that nobody wants."""
    for fd in fds:
        os.close(fd)


class ControlClient:
    """One connection to a daemon, used by the thread that opened it, one call at a time."""

    def __init__(self, socket_path: Path) -> None:
        self._path = socket_path
        self._socket: socket.socket | None = None
        self._last_id = 0

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(self) -> None:
        """Open the connection; `DaemonUnavailable` when nobody listens."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(os.fsencode(self._path))
        except PermissionError as error:
            connection.close()
            raise NotPermitted(
                f"{self._path}: only the daemon's user may use this control socket"
            ) from error
        except OSError as error:
            connection.close()
            raise self._unavailable("no daemon answers") from error
        self._socket = connection

    def close(self) -> None:
        """Close the connection; harmless when there is none."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def call(
        self,
        verb: str,
        args: dict[str, Any] | None = None,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Ask, wait for the result, raise the daemon's error. `timeout_s` bounds each silence."""
        connection = self._socket
        if connection is None:
            raise self._unavailable("not connected")
        self._last_id += 1
        connection.settimeout(timeout_s)
        try:
            with pack(Request(self._last_id, verb, args or {})) as (buffers, ancillary):
                connection.sendmsg(buffers, ancillary)
            while True:
                answer = self._receive(connection)
                if isinstance(answer, Reply):
                    return answer.result
                if isinstance(answer, Error):
                    raise remote_error(answer.error)
                if isinstance(answer, Progress) and on_progress is not None:
                    on_progress(answer.progress)
        except TimeoutError as error:
            self.close()
            raise self._unavailable(f"the daemon was silent for {timeout_s:g} s") from error
        except OSError as error:
            self.close()
            raise self._unavailable("the daemon closed the connection") from error

    def _receive(self, connection: socket.socket) -> Message:
        """The next answer to the last request; older ones belong to a call that was interrupted."""
        while True:
            data, ancillary, flags, _ = connection.recvmsg(
                RECV_BYTES, ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
            )
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            try:
                message = unpack(data, ancillary, flags)
            except InvalidOperation as error:
                self.close()
                raise self._unavailable(f"its answer is not understood ({error})") from error
            if message.id == self._last_id:
                return message

    def _unavailable(self, what: str) -> DaemonUnavailable:
        return DaemonUnavailable(
            f"{self._path}: {what}; is it mounted? `kvfs mount MOUNTPOINT` starts it"
        )


class Mount(msgspec.Struct, frozen=True):
    """A kvfs mount, and where below its root the path lies that led to it."""

    mountpoint: Path
    socket_path: Path
    relative: bytes


def find_mount(path: Path | str | bytes) -> Mount:
    """The kvfs mount that holds `path`, which need not exist.

    It asks mountinfo instead of walking up with `stat`, because a dead mount fails every `stat` and
    because a bind mount of a subdirectory is a mount root too.
    """
    absolute = os.path.realpath(os.fsencode(path))
    entry = _holder_of(absolute, mount_table.entries())
    shown = os.fsdecode(path)
    if entry is None or not entry.fstype.startswith("fuse"):
        raise MountpointError(f"{shown} is not inside a kvfs mount")
    mountpoint = Path(os.fsdecode(entry.mountpoint))
    socket_path = os.environ.get(SOCKET_ENV) or _socket_of(entry, shown)
    below = os.path.relpath(absolute, entry.mountpoint)
    relative = os.path.normpath(os.path.join(entry.root, below)).strip(b"/")
    return Mount(mountpoint, Path(socket_path), relative)


def kvfs_mountpoints() -> list[Path]:
    """Every kvfs mount that this process sees, dead ones too."""
    found = {entry.mountpoint for entry in mount_table.entries() if entry.fstype == FSTYPE}
    return [Path(os.fsdecode(mountpoint)) for mountpoint in sorted(found)]


def _socket_of(entry: MountEntry, shown: str) -> str:
    mountpoint = os.fsdecode(entry.mountpoint)
    try:
        return os.fsdecode(os.getxattr(entry.mountpoint, SOCKET_XATTR))
    except PermissionError as error:
        raise NotPermitted(
            f"{mountpoint}: only the user who mounted it may use it: mount with allow_other"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
            raise DaemonUnavailable(
                f"the mount at {mountpoint} is dead: run `kvfs mount` again "
                f"or `kvfs umount {mountpoint}`"
            ) from error
        raise MountpointError(f"{shown} is not inside a kvfs mount") from error


def _holder_of(absolute: bytes, entries: Iterable[MountEntry]) -> MountEntry | None:
    """The entry with the longest mountpoint above `absolute`; of several there, the topmost."""
    holder = None
    for entry in entries:
        inside = absolute == entry.mountpoint or absolute.startswith(
            entry.mountpoint.rstrip(b"/") + b"/"
        )
        if inside and (holder is None or len(entry.mountpoint) >= len(holder.mountpoint)):
            holder = entry
    return holder
