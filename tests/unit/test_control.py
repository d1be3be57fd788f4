"""The control codec, its limits, the client against small servers, and how a mount is found."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs import control, errors, mount_table
from kvfs.control import (
    INLINE_BYTES,
    MAX_BODY_BYTES,
    ControlClient,
    Error,
    ErrorBody,
    Message,
    Progress,
    Reply,
    Request,
    decode_message,
    encode_message,
    error_answer,
    remote_error,
)
from kvfs.errors import DaemonUnavailable, InvalidOperation, KvfsError, MountpointError
from tests.fake_daemon import FakeDaemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=255)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)
documents = st.dictionaries(st.text(), values, max_size=5)
ids = st.integers(0, 2**63 - 1)
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(Request, id=ids, verb=st.text(), args=documents),
    st.builds(Progress, id=ids, progress=documents),
    st.builds(Reply, id=ids, result=documents),
    st.builds(
        Error,
        id=ids,
        error=st.builds(
            ErrorBody, errno=st.integers(0, 200), exit_code=st.integers(0, 255), message=st.text()
        ),
    ),
)


def over_a_socket(message: Message) -> Message:
    """`message` sent and received the way that client and server do."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        with control.pack(message) as (buffers, ancillary):
            here.sendmsg(buffers, ancillary)
        data, received, flags, _ = there.recvmsg(
            control.RECV_BYTES, control.ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
        )
        return control.unpack(data, received, flags)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@given(messages)
def test_codec_round_trip(message: Message) -> None:
    data, memfd = encode_message(message)
    assert memfd is None
    assert decode_message(data) == message


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_an_invalid_operation(data: bytes) -> None:
    try:
        decode_message(data)
    except InvalidOperation as refused:
        message = str(refused)
    else:
        message = ""
    assert "\n" not in message


@given(messages, st.data())
def test_damaged_messages_are_refused_or_still_messages(message: Message, data: Any) -> None:
    encoded = bytearray(encode_message(message)[0])
    position = data.draw(st.integers(0, len(encoded) - 1))
    encoded[position] = data.draw(st.integers(0, 255))
    try:
        decode_message(bytes(encoded))
    except InvalidOperation:
        pass


@pytest.mark.parametrize("size", [0, INLINE_BYTES - 100, INLINE_BYTES, INLINE_BYTES + 1, 5_000_000])
def test_every_size_crosses_a_socket_and_leaks_no_descriptor(size: int) -> None:
    before = open_descriptors()
    message = Reply(7, {"blob": os.urandom(size)})
    assert over_a_socket(message) == message
    assert open_descriptors() == before


def test_a_large_body_travels_sealed() -> None:
    data, memfd = encode_message(Reply(1, {"blob": bytes(INLINE_BYTES)}))
    assert memfd is not None
    assert len(data) < 100
    wanted = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
    assert fcntl.fcntl(memfd, fcntl.F_GET_SEALS) == wanted
    decode_message(data, [memfd])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(memfd)


def test_a_message_above_the_limit_is_not_sent() -> None:
    with pytest.raises(InvalidOperation, match="above the limit"):
        encode_message(Reply(1, {"blob": bytes(MAX_BODY_BYTES)}))


@pytest.mark.parametrize("value", [object(), "\ud800", 2**64])
def test_what_msgpack_cannot_say_is_refused(value: object) -> None:
    with pytest.raises(InvalidOperation, match="cannot be encoded"):
        encode_message(Reply(1, {"value": value}))


def test_names_that_are_not_utf8_travel_as_bytes() -> None:
    message = Reply(1, {"moves": [{"path": os.fsdecode(b"a\xff"), "ü": "ü"}]})
    assert over_a_socket(message) == Reply(1, {"moves": [{"path": b"a\xff", "ü": "ü"}]})
    body = error_answer(1, errors.BlockNotFound("a\udcff: no such\nblock")).error
    assert body.message == r"a\xff: no such\nblock"
    assert over_a_socket(Error(1, body)) == Error(1, body)


def header(body_bytes: int) -> bytes:
    return msgspec.msgpack.encode({"v": 1, "body_bytes": body_bytes})


def memfd_of(size: int, seals: int | None) -> int:
    memfd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(memfd, size)
    if seals is not None:
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, seals)
    return memfd


def test_an_unsealed_body_is_refused_and_closed() -> None:
    before = open_descriptors()
    for seals in (None, fcntl.F_SEAL_WRITE, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW):
        with pytest.raises(InvalidOperation, match="not sealed"):
            decode_message(header(100_000), [memfd_of(100_000, seals)])
    assert open_descriptors() == before


def test_a_body_that_is_not_a_memfd_is_refused() -> None:
    reader, writer = os.pipe()
    with pytest.raises(InvalidOperation, match="not a memfd"):
        decode_message(header(100_000), [reader])
    os.close(writer)


@pytest.mark.parametrize(
    ("announced", "real"), [(100_000, 99_999), (MAX_BODY_BYTES + 1, MAX_BODY_BYTES + 1), (-1, 0)]
)
def test_a_body_of_another_size_is_refused(announced: int, real: int) -> None:
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    with pytest.raises(InvalidOperation, match="refused"):
        decode_message(header(announced), [memfd_of(real, seals)])


def test_a_body_that_announces_a_body_is_refused() -> None:
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    memfd = memfd_of(0, None)
    inner = header(100_000) + bytes(INLINE_BYTES)
    os.write(memfd, inner)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, seals)
    with pytest.raises(InvalidOperation):
        decode_message(header(len(inner)), [memfd])


def test_descriptors_must_fit_the_message() -> None:
    before = open_descriptors()
    inline, _ = encode_message(Request(1, "status"))
    with pytest.raises(InvalidOperation, match="unexpected descriptors"):
        decode_message(inline, [os.open("/dev/null", os.O_RDONLY)])
    with pytest.raises(InvalidOperation, match="0 descriptors"):
        decode_message(header(100_000))
    assert open_descriptors() == before


def test_an_oversized_datagram_is_refused() -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        here.send(bytes(INLINE_BYTES + 1))
        data, received, flags, _ = there.recvmsg(control.RECV_BYTES, control.ANCILLARY_BYTES)
        with pytest.raises(InvalidOperation, match="above"):
            control.unpack(data, received, flags)


@pytest.mark.parametrize(
    "fields",
    [
        {"v": 2, "id": 1, "verb": "status"},
        {"id": 1, "verb": "status"},
        {"v": 1, "verb": "status"},
        {"v": 1, "id": 1},
        {"v": 1, "id": 1, "args": {}},
        {"v": 1, "id": 1, "result": {}, "progress": {}},
        {"v": 1, "id": 1, "verb": "status", "result": {}},
        {"v": 1, "id": 1, "verb": "status", "color": "red"},
        {"v": 1, "id": 1, "verb": "status", "args": []},
        {"v": 1, "id": 1, "error": {"errno": 5}},
    ],
)
def test_maps_that_are_no_message_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidOperation):
        decode_message(msgspec.msgpack.encode(fields))


@pytest.mark.parametrize(
    "error",
    [
        errors.ConfigError("kvfs.toml: tier.capacity: must be positive"),
        errors.TierFull("no room"),
        errors.BlockNotFound("no such block: a"),
        errors.BlockBusy("open"),
        errors.NotPermitted("not yours"),
    ],
)
def test_errors_keep_class_message_errno_and_exit_code(error: KvfsError) -> None:
    answer = error_answer(3, error)
    assert answer.id == 3
    rebuilt = remote_error(answer.error)
    assert type(rebuilt) is type(error)
    assert str(rebuilt) == str(error)
    assert (rebuilt.errno, rebuilt.exit_code) == (error.errno, error.exit_code)


def test_posix_errors_keep_their_number() -> None:
    rebuilt = remote_error(error_answer(1, errors.FilesystemError(errno.ENOTDIR, "a/b")).error)
    assert (rebuilt.errno, str(rebuilt)) == (errno.ENOTDIR, "a/b")
    rebuilt = remote_error(error_answer(1, OSError(errno.ENOTEMPTY, "not empty")).error)
    assert rebuilt.errno == errno.ENOTEMPTY


def test_a_bug_in_the_daemon_tells_where_its_traceback_is() -> None:
    body = error_answer(1, ZeroDivisionError("secret")).error
    assert body.errno == errno.EIO
    assert "ZeroDivisionError" in body.message
    assert "log" in body.message


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Callable[[Request], list[Any]]], FakeDaemon]]:
    daemons: list[FakeDaemon] = []

    def start(answer: Callable[[Request], list[Any]]) -> FakeDaemon:
        daemons.append(FakeDaemon(tmp_path / f"control{len(daemons)}", answer))
        return daemons[-1]

    yield start
    for daemon in daemons:
        daemon.stop()


def test_client_gets_progress_and_results_in_order(serve: Any) -> None:
    def answer(request: Request) -> list[Message]:
        stale = Reply(request.id - 1, {"stale": True})
        steps = [Progress(request.id, {"done": done}) for done in range(3)]
        return [stale, *steps, Reply(request.id, {"verb": request.verb})]

    server = serve(answer)
    seen: list[dict[str, Any]] = []
    with ControlClient(server.path) as client:
        assert client.call("promote", {"paths": [b"\xff"]}, seen.append) == {"verb": "promote"}
        assert client.call("status") == {"verb": "status"}
    assert seen == [{"done": 0}, {"done": 1}, {"done": 2}]
    assert [request.args for request in server.requests] == [{"paths": [b"\xff"]}, {}]


def test_client_carries_large_bodies_both_ways(serve: Any) -> None:
    server = serve(lambda request: [Reply(request.id, {"blob": request.args["blob"][::-1]})])
    blob = os.urandom(1_000_000)
    with ControlClient(server.path) as client:
        assert client.call("echo", {"blob": blob}) == {"blob": blob[::-1]}


def test_client_raises_the_daemons_error_and_goes_on(serve: Any) -> None:
    def answer(request: Request) -> list[Message]:
        if request.verb == "info":
            return [error_answer(request.id, errors.BlockNotFound("no such block: x"))]
        return [Reply(request.id, {})]

    server = serve(answer)
    with ControlClient(server.path) as client:
        with pytest.raises(errors.BlockNotFound, match="no such block: x"):
            client.call("info", {"path": b"x"})
        assert client.call("status") == {}


def test_client_without_daemon_says_what_to_do(tmp_path: Path) -> None:
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(stale))
    for path in (tmp_path / "missing", stale, tmp_path / ("x" * 200)):
        with pytest.raises(DaemonUnavailable, match="kvfs mount"), ControlClient(path):
            pass


def test_client_reports_a_daemon_that_hangs_up(serve: Any) -> None:
    server = serve(lambda _: [])
    with ControlClient(server.path) as client, pytest.raises(DaemonUnavailable, match="closed"):
        client.call("status")


def test_client_reports_a_daemon_of_another_protocol(serve: Any) -> None:
    server = serve(lambda request: [msgspec.msgpack.encode({"v": 9, "id": request.id})])
    with ControlClient(server.path) as client, pytest.raises(DaemonUnavailable, match="protocol 9"):
        client.call("status")


def test_client_reports_a_silent_daemon(serve: Any) -> None:
    released = threading.Event()

    def answer(request: Request) -> list[Message]:
        released.wait()
        return []

    server = serve(answer)
    with ControlClient(server.path) as client:
        with pytest.raises(DaemonUnavailable, match="silent"):
            client.call("status", timeout_s=0.01)
        released.set()
        with pytest.raises(DaemonUnavailable, match="not connected"):
            client.call("status")


MOUNTINFO = rb"""22 1 0:20 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /mnt/kv\040cache rw,nosuid - fuse.kvfs kvfs rw,user_id=0
31 22 0:41 / /mnt/kv rw - fuse.kvfs kvfs rw
32 31 0:42 / /mnt/kv/inner rw - tmpfs tmpfs rw
33 22 0:41 /models/m /srv/bind rw - fuse.kvfs kvfs rw
34 22 0:50 / /mnt/ssh rw - fuse.sshfs host: rw
"""


@pytest.fixture
def mountinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mountinfo"
    path.write_bytes(MOUNTINFO)
    entries = mount_table.entries(path)
    monkeypatch.setattr(mount_table, "entries", lambda: entries)
    monkeypatch.delenv(control.SOCKET_ENV, raising=False)

    def getxattr(mountpoint: bytes, name: str) -> bytes:
        assert name == "user.kvfs.socket"
        if mountpoint == b"/mnt/kv cache":
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        if mountpoint == b"/mnt/ssh":
            raise OSError(errno.ENOTSUP, "Operation not supported")
        return b"/run/kvfs/1.sock"

    monkeypatch.setattr(os, "getxattr", getxattr)


@pytest.mark.usefixtures("mountinfo")
@pytest.mark.parametrize(
    ("path", "mountpoint", "relative"),
    [
        ("/mnt/kv", "/mnt/kv", b""),
        ("/mnt/kv/", "/mnt/kv", b""),
        ("/mnt/kv/a/../b/c.bin", "/mnt/kv", b"b/c.bin"),
        (b"/mnt/kv/\xff\n", "/mnt/kv", b"\xff\n"),
        ("/srv/bind", "/srv/bind", b"models/m"),
        ("/srv/bind/x", "/srv/bind", b"models/m/x"),
    ],
)
def test_find_mount(path: str | bytes, mountpoint: str, relative: bytes) -> None:
    mount = control.find_mount(path)
    assert mount.mountpoint == Path(mountpoint)
    assert mount.relative == relative
    assert mount.socket_path == Path("/run/kvfs/1.sock")


@pytest.mark.usefixtures("mountinfo")
@pytest.mark.parametrize("path", ["/", "/mnt/kvother", "/mnt/kv/inner/x", "/mnt/ssh/x"])
def test_paths_outside_are_refused(path: str) -> None:
    with pytest.raises(MountpointError, match="is not inside a kvfs mount") as caught:
        control.find_mount(path)
    assert str(caught.value).startswith(path)


@pytest.mark.usefixtures("mountinfo")
def test_a_dead_mount_is_named() -> None:
    with pytest.raises(DaemonUnavailable, match="mount at /mnt/kv cache is dead: run `kvfs mount`"):
        control.find_mount("/mnt/kv cache/a")


@pytest.mark.usefixtures("mountinfo")
def test_the_environment_overrides_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFS_SOCKET", "/tmp/other.sock")
    assert control.find_mount("/mnt/kv/x").socket_path == Path("/tmp/other.sock")


@pytest.mark.usefixtures("mountinfo")
def test_every_mount_is_listed_once() -> None:
    expected = [Path("/mnt/kv"), Path("/mnt/kv cache"), Path("/srv/bind")]
    assert control.kvfs_mountpoints() == expected
