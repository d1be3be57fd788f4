"""Messages on the control socket, requests of anybody, and the files of `.kvfs/`: what makes no
sense costs whoever asked an error, and the daemon nothing."""

from __future__ import annotations

import errno
import logging
import socket
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pyfuse3
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from kvfs.control import (
    ANCILLARY_BYTES,
    INLINE_BYTES,
    RECV_BYTES,
    Error,
    Message,
    Reply,
    Request,
    decode_message,
    encode_message,
    unpack,
)
from kvfs.errors import (
    ConfigError,
    InvalidOperation,
    KvfsError,
    NotPermitted,
    errno_of,
    is_expected,
)
from kvfs.mount.control_dir import CONTROL_INODE, ControlDirectory
from kvfs.mount.operations import Operations
from kvfs.mount.passthrough import Passthrough
from kvfs.mount.peers import Peer
from kvfs.mount.server import ControlServer
from kvfs.mount.tiering import Tiering
from kvfs.mount.verbs import Verbs
from kvfs.store import Store
from kvfs.views import Views
from kvfs.volume.volume import open_volume
from tests.fuzz.filled import TIERS, config_at
from tests.fuzz.fuzzing import check_message, corpus, damaged, fuzz, replay
from tests.store.helpers import put, row_at, seal_all

STRANGER = 54321
VERBS = sorted(
    [name.removeprefix("_verb_") for name in dir(Verbs) if name.startswith("_verb_")]
    + ["fsck", "scrub", "quarantine", "no_such", "", "__init__", "call", "farewell"]
    + ["lookup", "lease", "renew", "release", "prefetch", "put_begin", "put_commit", "put_abort"]
)
KEYS = (
    "path", "paths", "after", "limit", "coldest", "tier", "to", "name", "dry_run", "repair", "rate",
    "restart", "drop", "purge", "nonsense", "leases", "put", "size_bytes", "checksum", "direct",
    "wait", "deadline_s", "sparse", "replace", "mode",
)  # fmt: skip
SCALARS = st.sampled_from([
    None, True, 0, 1, -1, 10**6, 2**63 - 1, -(2**63), 2**64 - 1, 1.5, float("inf"), float("nan"),
    "", "nvme", "hdd", "\0", "é", "d", b"", b"d", b"d/a", b"/d/a/", b"top", b"..", b"../../etc",
    b".kvfs", b".kvfs/catalog.sqlite", b"d//a", b"\xff\xfe", b"a\0b", b"x" * 5000,
])  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["a", "path"]), inner, max_size=2)
    ),
    max_leaves=6,
)
REQUESTS = st.builds(
    Request,
    id=st.integers(0, 2**63 - 1),
    verb=st.sampled_from(VERBS) | st.text(max_size=10),
    args=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4),
)


@pytest.fixture(autouse=True)
def _no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="kvfs")


# --- messages


def try_message(data: bytes) -> None:
    try:
        message = decode_message(data)
    except InvalidOperation as error:
        check_message(error)
        return
    again, memfd = encode_message(message)
    assert memfd is None
    # Compared as bytes: a nan is not equal to itself.
    assert encode_message(decode_message(again))[0] == again


@replay("control")
def test_each_message_of_the_corpus(data: bytes) -> None:
    try_message(data)


@fuzz(500)
@given(
    data=REQUESTS.map(lambda request: encode_message(request)[0])
    | damaged(corpus("control"))
    | st.binary(max_size=200)
)
def test_any_message(data: bytes) -> None:
    try_message(data)


# --- a daemon without a mount


@asynccontextmanager
async def daemon(base: Path) -> AsyncIterator[tuple[Store, Verbs]]:
    """A store with a few blocks of root, and its verbs."""

    def reload() -> tuple[list[str], list[str]]:
        raise ConfigError("there is nothing to reload")

    for name in TIERS:
        (base / name).mkdir(parents=True)
    volume = open_volume(config_at(base))
    store = Store(volume)
    try:
        await store.recovery.before_serving()
        for path in (b"d/a", b"d/b", b"top"):
            await put(store, path, path * 100)
        views = Views(store, str(base), str(base / "socket"))
        yield store, Verbs(store, views, Tiering(store, views), reload)
    finally:
        for block in store.replicas.open_blocks.values():
            block.close_descriptors()
        store.blocks.idle.clear()
        volume.close(clean=True)


async def converse(base: Path, messages: list[bytes]) -> None:
    """Each message to a server, which must answer or hang up, and still answer afterwards."""
    async with daemon(base) as (_, verbs), trio.open_nursery() as nursery:
        server = ControlServer(base / "socket", verbs, allow_other=True)
        await nursery.start(server.run)
        for data in messages:
            await _exchange(server.path, data)
        answer = await _exchange(server.path, encode_message(Request(1, "status", {}))[0])
        assert isinstance(answer, Reply)
        nursery.cancel_scope.cancel()


async def _exchange(path: Path, data: bytes) -> Message | None:
    """Send one datagram; the last message that comes back, None when there was none."""
    client = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    answer = None
    with client, trio.fail_after(30):
        await client.connect(str(path))
        with suppress(BrokenPipeError, ConnectionResetError):
            await client.send(data)
            while not isinstance(answer, Reply | Error):
                received = await client.recvmsg(RECV_BYTES, ANCILLARY_BYTES)
                if not received[0]:
                    return answer
                answer = unpack(*received[:3])
    if isinstance(answer, Error):
        assert "the daemon failed" not in answer.error.message, (data, answer.error.message)
    return answer


@replay("control")
def test_a_daemon_outlives_each_message_of_the_corpus(tmp_path: Path, data: bytes) -> None:
    trio.run(converse, tmp_path / "base", [data, data])


@fuzz(10, costly=True)
@given(
    messages=st.lists(
        REQUESTS.map(lambda request: encode_message(request)[0])
        | damaged(corpus("control"))
        | st.binary(min_size=1, max_size=200)
        | st.integers(-2, 2).map(lambda more: bytes(INLINE_BYTES + more)),
        min_size=1, max_size=12,
    )
)  # fmt: skip
def test_a_daemon_outlives_any_messages(
    tmp_path_factory: pytest.TempPathFactory, messages: list[bytes]
) -> None:
    trio.run(converse, tmp_path_factory.mktemp("control") / "base", messages)


# --- requests


def answer_of(error: Exception) -> None:
    assert is_expected(error)
    assert errno_of(error) > 0


async def request_all(base: Path, peer: Peer, requests: list[Request]) -> None:
    async def report(progress: dict[str, Any], descriptors: Sequence[int] = (), /) -> None:
        encode_message(Reply(1, progress))

    async with daemon(base) as (store, verbs):
        before = _visible(store)
        for request in requests:
            try:
                with trio.fail_after(30):
                    answer = await verbs.call(peer, request, report)
                encode_message(Reply(request.id, answer.result))
            except (KeyError, TypeError, ValueError):
                continue  # answered as wrong use
            except (KvfsError, OSError) as error:
                answer_of(error)
        await verbs.farewell(peer)
        if peer.uid == STRANGER:
            assert _visible(store) == before, "a stranger changed something"
        await seal_all(store)


def _visible(store: Store) -> object:
    """What a stranger must not change."""
    rows = []
    for path in (b"", b"d", b"d/a", b"d/b", b"top"):
        row = row_at(store, path)
        rows.append((row._replace(atime_ns=0), store.attributes.replica_names(row.id)))
    return rows, [tier.draining for tier in store.volume.tiers]


@replay("request")
def test_each_request_of_the_corpus(tmp_path: Path, data: bytes) -> None:
    requests = [
        msgspec.convert(line, Request) for line in map(msgspec.json.decode, data.splitlines())
    ]
    trio.run(request_all, tmp_path / "root", Peer(0, 0), requests)
    trio.run(request_all, tmp_path / "stranger", Peer(STRANGER, STRANGER), requests)


@fuzz(20, costly=True)
@given(requests=st.lists(REQUESTS, min_size=1, max_size=20), stranger=st.booleans())
def test_any_requests(
    tmp_path_factory: pytest.TempPathFactory, requests: list[Request], stranger: bool
) -> None:
    base = tmp_path_factory.mktemp("requests") / "base"
    peer = Peer(STRANGER, STRANGER) if stranger else Peer(0, 0)
    trio.run(request_all, base, peer, requests)


# --- the control directory

NAMES = st.sampled_from([b"stats", b"metrics", b".", b"..", b"", b"probe", b"x", b"\xff" * 300])
INODES = st.sampled_from([0, 1, 2, 77, CONTROL_INODE - 1]) | st.integers(
    CONTROL_INODE, CONTROL_INODE + 8
) | st.integers(1, 2**64 - 1)  # fmt: skip
CALLS = st.sampled_from([
    "lookup", "getattr", "setattr", "mkdir", "rmdir", "unlink", "rename", "link", "symlink",
    "mknod", "create", "opendir", "open", "getxattr", "listxattr", "setxattr", "removexattr",
    "access",
])  # fmt: skip


async def call_all(base: Path, calls: list[tuple[str, int, bytes, int]]) -> None:
    async with daemon(base) as (store, _):
        control = ControlDirectory({b"stats": lambda: b"{}", b"metrics": lambda: b"#\n"})
        operations = Operations(store, control, Passthrough())
        for name, inode, entry, flags in calls:
            with suppress(pyfuse3.FUSEError):
                await _call(operations, name, inode, entry, flags)
        await operations.close_all()
        assert store.volume.counters.events.get("handler_failures", 0) == 0


async def _call(operations: Operations, call: str, inode: int, name: bytes, flags: int) -> None:
    context = pyfuse3.RequestContext()
    mode = stat.S_IFREG | 0o644
    fields = pyfuse3.SetattrFields()
    number: Any = inode
    arguments: dict[str, tuple[Any, ...]] = {
        "lookup": (number, name, context), "getattr": (number, context),
        "setattr": (number, pyfuse3.EntryAttributes(), fields, None, context),
        "mkdir": (number, name, 0o755, context), "rmdir": (number, name, context),
        "unlink": (number, name, context), "rename": (number, name, number, b"new", 0, context),
        "link": (number, number, name, context), "symlink": (number, name, b"x", context),
        "mknod": (number, name, mode, 0, context),
        "create": (number, name, 0o644, flags, context), "opendir": (number, context),
        "open": (number, flags, context), "getxattr": (number, b"user.x", context),
        "listxattr": (number, context), "setxattr": (number, b"user.x", b"1", context),
        "removexattr": (number, b"user.x", context), "access": (number, 4, context),
    }  # fmt: skip
    answer = await getattr(operations, call)(*arguments[call])
    if call == "open":
        data = await operations.read(answer.fh, 0, 1000)
        assert isinstance(data, bytes)
        if ControlDirectory.owns(inode):
            with pytest.raises(pyfuse3.FUSEError) as raised:
                await operations.write(answer.fh, 0, b"x")
            assert raised.value.errno == errno.EPERM
        await operations.release(answer.fh)
    if call == "create":
        await operations.release(answer[0].fh)


@fuzz(40, costly=True)
@given(
    calls=st.lists(
        st.tuples(CALLS, INODES, NAMES, st.sampled_from([0, 1, 2, 0o1000, 0o1002])),
        min_size=15,
        max_size=40,
    )
)
def test_any_calls_on_the_control_directory(
    tmp_path_factory: pytest.TempPathFactory, calls: list[tuple[str, int, bytes, int]]
) -> None:
    trio.run(call_all, tmp_path_factory.mktemp("calls") / "base", calls)


def test_nobody_may_change_it(tmp_path: Path) -> None:
    async def refuse_all() -> None:
        async with daemon(tmp_path / "base") as (store, _):
            control = ControlDirectory({b"stats": lambda: b"{}"})
            operations = Operations(store, control, Passthrough())
            for call in ("setattr", "mkdir", "rmdir", "unlink", "rename", "mknod", "create"):
                with pytest.raises(pyfuse3.FUSEError) as raised:
                    await _call(operations, call, CONTROL_INODE, b"stats", 1)
                assert raised.value.errno == errno_of(NotPermitted("")), call

    trio.run(refuse_all)
