"""Clients against a live daemon without a mount: descriptors, credentials, crashes, abuse."""

from __future__ import annotations

import array
import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from kvfs.async_client import AsyncClient
from kvfs.client import Client
from kvfs.control import (
    MOST_DESCRIPTORS,
    RECV_BYTES,
    Error,
    Message,
    Request,
    encode_message,
    unpack,
)
from kvfs.errors import (
    BlockExists,
    ClientForked,
    DaemonUnavailable,
    FilesystemError,
    QuotaExceeded,
    UsageError,
)
from kvfs.leasing.lookup import BATCH_NAMES
from kvfs.mount import connection, server
from kvfs.mount.connection import groups_of
from kvfs.prefix import KvfsScheme
from tests.conftest import MIB
from tests.fuzz.fuzzing import fuzz
from tests.mount.live import config_in
from tests.mounting import wait_until
from tests.ops.serving import Served
from tests.store.helpers import create, seal_all

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="acts as other users: not root")


def descriptors(served: Served) -> int:
    """Those of client and daemon, which are one process here; none of what is garbage, or of the
    blocks that are kept open."""
    gc.collect()
    kept = served.call(lambda: len(served.store.blocks.idle))
    return len(os.listdir("/proc/self/fd")) - kept


def contents(fd: int) -> bytes:
    with open(f"/proc/self/fd/{fd}", "rb") as file:
        return file.read()


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(socket_path=served.socket_path) as made:
        yield made


def fill(served: Served, count: int, directory: bytes = b"m") -> list[bytes]:
    """Sealed blocks, each with its path as content."""
    paths = [directory + b"/%05d" % number for number in range(count)]

    async def make() -> None:
        for path in paths:
            block = await create(served.store, path, path)
            await served.store.blocks.close(block, writer=True)
        await seal_all(served.store)

    served.run(make)
    return paths


def wait_for_nothing_lent(served: Served) -> None:
    """Until no block is open in the daemon, nobody is charged, and no put is under way."""

    def idle() -> bool:
        store = served.store
        return not store.replicas.open_blocks and store.quotas.total.empty and not len(store.puts)

    wait_until(lambda: served.call(idle), "the daemon lets go of everything")


# --- the library


def test_put_lookup_lease(served: Served, client: Client) -> None:
    data = [os.urandom(size) for size in (0, 1, 100_000, 3 * MIB)]
    for number, content in enumerate(data):
        stored = client.put(f"engine/{number}", content)
        assert (stored.created, stored.size_bytes, stored.tier) == (True, len(content), "nvme")
        assert not client.put(f"engine/{number}", content).created
    with pytest.raises(BlockExists):
        client.put("engine/1", b"2")
    paths = [f"engine/{number}" for number in range(5)]
    hits = client.lookup(paths)
    assert (hits.tiers, hits.stopped) == (("nvme",) * 4, "missing")
    with client.lease(paths) as leased:
        assert (leased.prefix, len(leased), leased.stopped) == (4, 4, "missing")
        assert [contents(block.fd) for block in leased] == data
        assert [block.size_bytes for block in leased] == list(map(len, data))
        assert {block.codec for block in leased} == {"raw"}
        assert leased[0].path == b"engine/0"
        assert leased.blocks[4] is None
        assert client.renew(leased) == 600.0
        kept = leased[3].fd
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(kept)
    with pytest.raises(FilesystemError, match="the lease has ended"):
        client.renew(leased)
    wait_for_nothing_lent(served)


def test_sparse_leases_and_what_became_of_each_path(served: Served, client: Client) -> None:
    served.put(b"a", b"1")
    served.put(b"far", b"2", "remote")
    with client.lease(["a", "b", "far"], sparse=True, wait="none") as leased:
        assert leased.outcomes == ("found", "missing", "busy")
        assert [block is not None for block in leased.blocks] == [True, False, False]
        assert leased.prefix == 1
    with client.lease(["a", "far"], wait="staging") as leased:
        assert [(block.tier, contents(block.fd)) for block in leased] == [
            ("nvme", b"1"), ("remote", b"2"),
        ]  # fmt: skip


def test_touch_pin_prefetch_and_match(served: Served, client: Client) -> None:
    far = served.put(b"far", b"2", "hdd")
    assert client.touch(["far", "far"]) == 1
    assert far in served.call(served.store.volume.accesses.pending)
    there = served.put(b"near", b"1")
    answer = client.prefetch(["far", "near", "missing"])
    assert (answer.accepted, answer.there, answer.missing) == (1, 1, 1)
    wait_until(lambda: client.lookup(["far"]).tiers == ("nvme",), "it is promoted")
    assert client.pin(["near"]) == 1
    row = served.call(served.store.volume.catalog.get, there)
    assert row is not None
    assert row.pin == "1"
    assert client.unpin(["near"]) == 1
    scheme = KvfsScheme(4, "a model")
    tokens = list(range(14))
    names = [scheme.file_name(key) for key in scheme.keys(tokens)]
    for name in names[:2]:
        client.put(b"ns/" + name, name)
    match = client.match(tokens, scheme, "ns")
    assert (len(match), match.tokens, match.tiers) == (2, 8, ("nvme", "nvme"))
    assert match.paths == tuple(b"ns/" + name for name in names[:2])


def test_more_blocks_than_one_message_can_bring(served: Served, client: Client) -> None:
    paths = fill(served, 3 * MOST_DESCRIPTORS)
    with client.lease([*paths, b"missing"]) as leased:
        assert leased.prefix == len(paths)
        assert [contents(block.fd) for block in leased] == paths
    wait_for_nothing_lent(served)


def test_a_long_prompt_in_one_request(served: Served, client: Client) -> None:
    paths = fill(served, 20)
    prompt = [*paths, *(b"m/" + b"x" * 100 + b"%d" % number for number in range(8172))]
    assert len(client.lookup(prompt)) == 20
    assert len(client.lookup(paths * 400)) == 8000


def test_threads_share_a_client(served: Served, client: Client) -> None:
    paths = fill(served, 64)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                with client.lease(paths) as leased:
                    assert contents(leased[7].fd) == paths[7]
                assert len(client.lookup(paths)) == 64
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    wait_for_nothing_lent(served)


@pytest.mark.parametrize("paths", ["a", b"a", Path("a")])
def test_one_path_in_place_of_a_list_is_a_mistake(client: Client, paths: Any) -> None:
    with pytest.raises(TypeError, match="a list of paths"):
        client.lookup(paths)
    with pytest.raises(TypeError, match="a list of paths"), client.lease(paths):
        pass


def test_a_client_needs_a_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KVFS_SOCKET", raising=False)
    with pytest.raises(UsageError, match="KVFS_SOCKET"):
        Client()
    monkeypatch.setenv("KVFS_SOCKET", str(tmp_path / "nowhere"))
    with pytest.raises(DaemonUnavailable, match="no daemon answers"):
        Client().lookup(["a"])


# --- trio


def test_the_same_for_trio(served: Served) -> None:
    data = os.urandom(100_000)

    async def use() -> None:
        async with AsyncClient(socket_path=served.socket_path) as client:
            assert (await client.put("d/a", data)).created
            assert await client.touch(["d/a"]) == 1
            assert (await client.lookup(["d/a", "d/b"])).tiers == ("nvme",)
            async with client.lease(["d/a"]) as leased:
                assert contents(leased[0].fd) == data
                assert await client.renew(leased) == 600.0
            assert (await client.prefetch(["d/a"])).there == 1
            assert await client.pin(["d/a"]) == 1
            assert await client.unpin(["d/a"]) == 1
            assert len(await client.match([1, 2, 3], KvfsScheme(2, "m"))) == 0

    trio.run(use)
    wait_for_nothing_lent(served)


def test_tasks_that_are_cancelled_keep_nothing(served: Served) -> None:
    served.put(b"near", b"1")
    served.put(b"far", b"2", "hdd")
    served.call(setattr, served.store.prefetcher, "_copy", _never)
    before = descriptors(served)

    async def use() -> None:
        async with AsyncClient(socket_path=served.socket_path) as client:
            for _ in range(3):
                with trio.move_on_after(0.05):
                    async with client.lease(["near", "far"], wait="promote", deadline_s=0.2):
                        await trio.sleep_forever()
                with trio.move_on_after(0.05):
                    async with client.lease(["near"]):
                        await trio.sleep_forever()
            assert await client.lookup(["near"])
            # What was forsaken is released before the next request.
            assert len(served.store.leases) == 0

    trio.run(use)
    wait_for_nothing_lent(served)
    assert descriptors(served) == before


async def _never(*_: object) -> None:
    await trio.sleep_forever()


# --- who asks


def as_user(uid: int, gid: int, groups: list[int], work: Callable[[], object]) -> None:
    """Run in a child with these credentials; what it raises fails the test."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            work()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0, "the child says why above"


@pytest.mark.semantics("S-lease-5")
@needs_root
def test_a_user_gets_what_the_kernel_would_let_him_open(served: Served, tmp_path: Path) -> None:
    for directory in (tmp_path, *list(tmp_path.parents)[:-2]):
        directory.chmod(directory.stat().st_mode | 0o011)
    served.put(b"all", b"1", mode=0o644)
    served.put(b"team", b"2", mode=0o640)
    served.put(b"mine", b"3", mode=0o600)
    served.run(_give, served, b"team", 0, 9001)

    def stranger() -> None:
        with Client(socket_path=served.socket_path) as client:
            with client.lease(["all", "team", "mine"], sparse=True) as leased:
                assert leased.outcomes == ("found", "denied", "denied")
                # What libraries do with a descriptor that they are given.
                assert contents(leased[0].fd) == b"1"
                for flags in (os.O_RDWR, os.O_WRONLY):
                    with contextlib.suppress(PermissionError):
                        os.open(f"/proc/self/fd/{leased[0].fd}", flags)
                        raise AssertionError("he could write to it")
            assert len(client.lookup(["all", "mine"])) == 2

    def member() -> None:
        paths = ["all", "team", "mine"]
        with (
            Client(socket_path=served.socket_path) as client,
            client.lease(paths, sparse=True) as leased,
        ):
            assert leased.outcomes == ("found", "found", "denied")
            assert contents(leased[1].fd) == b"2"

    as_user(4711, 4711, [], stranger)
    as_user(4711, 4711, [9001], member)
    as_user(4711, 4711, [*range(5000, 5300), 9001], member)
    wait_for_nothing_lent(served)


async def _give(served: Served, path: bytes, uid: int, gid: int) -> None:
    row = served.store.volume.catalog.resolve(path)
    assert row is not None
    await served.store.attributes.set(row.id, uid=uid, gid=gid)


@needs_root
@pytest.mark.parametrize("count", [0, 1, 64, 65, 1000])
def test_all_supplementary_groups_are_seen(count: int, tmp_path: Path) -> None:
    groups = list(range(7000, 7000 + count))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(tmp_path / "s"))
    os.chmod(tmp_path / "s", 0o666)
    listener.listen()
    # Connected before it becomes another user: the groups are those of that moment.
    pid = os.fork()
    if pid == 0:
        os.setgroups(groups)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(str(tmp_path / "s"))
        connection.recv(1)
        os._exit(0)
    with listener, listener.accept()[0] as peer:
        assert groups_of(peer) == set(groups)
    os.waitpid(pid, 0)


@needs_root
def test_another_mount_namespace_needs_only_the_sockets_directory(
    served: Served, tmp_path: Path
) -> None:
    served.put(b"a", b"hello")
    inside = tmp_path / "inside"
    inside.mkdir()
    script = (
        "import os, sys\n"
        "from kvfs.client import Client\n"
        "with Client() as client, client.lease(['a']) as leased:\n"
        "    assert not os.path.exists(sys.argv[1])\n"
        "    print(os.pread(leased[0].fd, 100, 0).decode())\n"
    )
    run = served.socket_path.parent
    shell = (
        f"mount --bind {run} {inside} && mount -t tmpfs none {run} && mount -t tmpfs none "
        f'{tmp_path}/nvme && exec {sys.executable} -c "$SCRIPT" {tmp_path}/nvme/a'
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", shell], capture_output=True, text=True, timeout=60,
        env={**os.environ, "SCRIPT": script, "KVFS_SOCKET": str(inside / "kvfs.sock")},
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr


# --- ends of all kinds


@pytest.mark.semantics("S-lease-8")
def test_a_client_killed_in_mid_read_holds_nothing(served: Served, tmp_path: Path) -> None:
    fill(served, 300)
    script = (
        "import sys, time\n"
        "from kvfs.client import Client\n"
        "client = Client(socket_path=sys.argv[1])\n"
        "paths = [f'm/{number:05d}' for number in range(300)]\n"
        "with client.lease(paths) as leased:\n"
        "    assert len(leased) == 300\n"
        "    print('reading', flush=True)\n"
        "    while True:\n"
        "        for block in leased:\n"
        "            open(f'/proc/self/fd/{block.fd}', 'rb').read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(served.socket_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    assert served.store.quotas.total.leases == 300
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    wait_for_nothing_lent(served)


def test_the_connection_is_made_again_after_a_restart(served: Served, client: Client) -> None:
    served.put(b"a", b"1")
    with client.lease(["a"]) as leased:
        served.stop()
        with pytest.raises(DaemonUnavailable):
            client.lookup(["a"])
        served.start()
        assert client.lookup(["a"]).tiers == ("nvme",)
        # What is open stays readable, but the lease ended with the connection.
        assert contents(leased[0].fd) == b"1"
        with pytest.raises(FilesystemError, match="the lease has ended"):
            client.renew(leased)
    served.stop()
    served.start()
    assert client.put("b", b"2").created
    wait_for_nothing_lent(served)


def test_a_client_refuses_to_work_in_a_forked_child(served: Served, client: Client) -> None:
    served.put(b"a", b"1")
    with client.lease(["a"]) as leased:

        def child() -> None:
            for attempt in (lambda: client.lookup(["a"]), lambda: client.put("b", b"1")):
                with pytest.raises(ClientForked, match="made before a fork"):
                    attempt()
            client.close()
            # What was leased can be read there, by descriptor.
            assert contents(leased[0].fd) == b"1"
            leased.close_descriptors()
            with Client(socket_path=served.socket_path) as own:
                assert len(own.lookup(["a"])) == 1

        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                child()
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0, "the child says why above"
        assert client.renew(leased) == 600.0
        assert contents(leased[0].fd) == b"1"


def test_a_connection_ends_with_the_process_that_made_it(served: Served) -> None:
    """Also when a child that it forked lives on."""
    served.put(b"a", b"1")
    script = (
        "import os, sys, time\n"
        "from kvfs.client import Client\n"
        "client = Client(socket_path=sys.argv[1])\n"
        "leased = client._lease(['a'], False, None, None, False)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    leased.close_descriptors()\n"
        "    time.sleep(600)\n"
        "print(pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(served.socket_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        process.kill()
        process.wait()
        wait_for_nothing_lent(served)
        assert Path(f"/proc/{child}").exists()
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_a_put_that_is_interrupted_leaves_nothing(
    served: Served, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = descriptors(served)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvfs.dialogue.Write.carry_out", interrupted)
    with pytest.raises(KeyboardInterrupt):
        client.put("d/a", b"123")
    monkeypatch.undo()
    assert client.put("d/b", b"123").created
    wait_for_nothing_lent(served)
    # The client's connection and the daemon's end of it.
    assert descriptors(served) == before + 2
    assert not list(served.config.tier[0].path.glob("d/*.tmp"))


def test_thousands_of_leases_leak_no_descriptor(served: Served, client: Client) -> None:
    paths = fill(served, 50)
    with client.lease(paths):
        pass
    wait_for_nothing_lent(served)
    before = descriptors(served)
    for _ in range(200):
        with client.lease(paths) as leased:
            assert len(leased) == 50
    wait_for_nothing_lent(served)
    assert descriptors(served) == before
    assert served.call(lambda: served.store.volume.counters.tier(0).opens) >= 10_000


def test_a_client_short_of_descriptors_keeps_none(served: Served) -> None:
    fill(served, 400)
    script = (
        "import os, resource, sys\n"
        "from kvfs.client import Client\n"
        "client = Client(socket_path=sys.argv[1])\n"
        "paths = [f'm/{number:05d}' for number in range(400)]\n"
        "assert len(client.lookup(paths)) == 400\n"
        "count = lambda: len(os.listdir('/proc/self/fd'))\n"
        "before = count()\n"
        "for most in (before + 1, before + 50, before + 253, before + 300):\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (most, 4096))\n"
        "    try:\n"
        "        with client.lease(paths):\n"
        "            raise AssertionError('it was not refused')\n"
        "    except OSError as error:\n"
        "        assert error.errno == 24, error\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))\n"
        "    assert count() == before, (count(), before)\n"
        "    with client.lease(paths[:3]) as leased:\n"
        "        assert len(leased) == 3\n"
        "with client.lease(paths) as leased:\n"
        "    assert len(leased) == 400\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(served.socket_path)], capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wait_for_nothing_lent(served)


# --- limits and abuse


@pytest.mark.semantics("S-lease-10")
def test_a_user_over_his_limit_gets_one_clear_error(served: Served, client: Client) -> None:
    paths = fill(served, 3 * BATCH_NAMES)
    served.call(_limit, served, 2 * BATCH_NAMES)
    before = descriptors(served)
    with (
        pytest.raises(QuotaExceeded, match="blocks would be leased, of at most 256: release some"),
        client.lease(paths),
    ):
        pass
    # The client's connection, and the daemon's end of it.
    wait_until(lambda: descriptors(served) <= before + 2, "what was given is closed")
    with client.lease(paths[: 2 * BATCH_NAMES]) as leased:
        assert len(leased) == 2 * BATCH_NAMES
    wait_for_nothing_lent(served)


def test_a_release_that_nobody_waits_for_comes_before_the_next_request(
    served: Served, client: Client
) -> None:
    paths = fill(served, 100)
    for _ in range(20):
        with client.lease(paths) as leased:
            assert served.call(len, served.store.leases) == 1
            assert len(leased) == len(paths)
        assert len(client.lookup(paths[:1])) == 1
        assert served.call(len, served.store.leases) == 0
    wait_for_nothing_lent(served)


def _limit(served: Served, most: int) -> None:
    config = served.store.volume.config
    leases = msgspec.structs.replace(config.leases, max_leases=most)
    served.store.volume.config = msgspec.structs.replace(config, leases=leases)


def raw_connection(served: Served) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(30)
    connection.connect(str(served.socket_path))
    return connection


def answer(connection: socket.socket) -> Message | None:
    """The next message, its descriptors closed; None at the end."""
    data, ancillary, flags, _ = connection.recvmsg(RECV_BYTES, socket.CMSG_SPACE(4 * 253))
    if not data:
        return None
    message = unpack(data, ancillary, flags)
    for descriptor in getattr(message, "descriptors", ()):
        os.close(descriptor)
    return message


def test_a_client_that_stops_reading_costs_only_its_connection(
    served: Served, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SEND_TIMEOUT_S", 0.3)
    paths = fill(served, 200)
    with raw_connection(served) as mute:
        mute.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        with contextlib.suppress(OSError):
            for number in range(1, 10_000):
                mute.settimeout(0.5)
                mute.send(encode_message(Request(number, "lease", {"paths": paths}))[0])
        assert len(client.lookup(paths)) == 200
        wait_until(lambda: served.store.quotas.total.empty, "its leases end")
    # What it did not take out of its socket was open as long as that.
    wait_for_nothing_lent(served)


def test_a_client_that_hangs_up_while_it_waits(served: Served) -> None:
    served.put(b"far", b"2", "hdd")
    served.call(setattr, served.store.prefetcher, "_copy", _never)
    connection = raw_connection(served)
    args = {"paths": [b"far"], "wait": "promote", "deadline_s": 600.0}
    connection.send(encode_message(Request(1, "lease", args))[0])
    wait_until(lambda: served.store.quotas.account(os.geteuid()).waiting == 1, "it waits")
    # What is asked after it does not hide that it is gone.
    connection.send(encode_message(Request(2, "status"))[0])
    connection.close()
    wait_until(lambda: served.store.quotas.total.empty, "it was noticed")
    wait_until(lambda: served.store.quotas.account(os.geteuid()).empty, "nobody waits")


def test_one_user_leaves_connections_for_others(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_OF_USER", 3)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(socket_path=served.socket_path)) for _ in range(4)]
        for client in clients[:3]:
            client.lookup(["a"])
        with pytest.raises(QuotaExceeded, match="as many connections as it can"):
            clients[3].lookup(["a"])
        clients[0].close()
        wait_until(lambda: _works(clients[3]), "there is room for another")


def _works(client: Client) -> bool:
    try:
        client.lookup(["a"])
    except (QuotaExceeded, DaemonUnavailable):
        return False
    return True


def test_requests_that_are_too_large_end_the_connection(served: Served, client: Client) -> None:
    data, memfd = encode_message(Request(1, "lookup", {"paths": [bytes(3 * MIB)]}))
    assert memfd is not None
    with raw_connection(served) as connection:
        rights = array.array("i", [memfd])
        connection.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        os.close(memfd)
        told = answer(connection)
        assert isinstance(told, Error)
        assert answer(connection) is None
    assert client.lookup([]).stopped == "found"


def test_replayed_requests_change_nothing_twice(served: Served) -> None:
    served.put(b"a", b"1")
    requests: list[tuple[str, dict[str, Any]]] = [
        ("lease", {"paths": [b"a"]}), ("release", {"leases": [1]}),
        ("put_begin", {"path": b"b", "size_bytes": 0}), ("put_commit", {"put": 2}),
    ]  # fmt: skip
    with raw_connection(served) as connection:
        for _ in range(3):
            for number, (verb, args) in enumerate(requests):
                connection.send(encode_message(Request(number, verb, args))[0])
                while not hasattr(answer(connection), "result") and verb != "put_commit":
                    pass
                if verb == "put_commit":
                    break
    wait_for_nothing_lent(served)


PATHS = st.sampled_from([
    b"a", b"m/00001", b"", b"..", b"/", b"missing", b"m", b"\xff\0", b"x" * 5000, "str", 7, None,
])  # fmt: skip
SOME = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.binary(max_size=20),
    st.text(max_size=5), st.lists(PATHS, max_size=5), st.lists(st.integers(-5, 50), max_size=5),
)  # fmt: skip
ARGS = st.fixed_dictionaries(
    {},
    optional={
        "paths": st.lists(PATHS, max_size=8) | SOME, "leases": SOME, "put": st.integers(-1, 9),
        "direct": st.booleans() | SOME, "wait": st.sampled_from(["none", "staging", 1]),
        "deadline_s": st.sampled_from([0, 0.01, -1, float("nan"), float("inf"), "x"]),
        "sparse": st.booleans() | SOME, "path": PATHS,
        "size_bytes": st.sampled_from([0, 3, -1, 2**62]),
        "checksum": st.sampled_from([None, b"", bytes(16), "x"]), "mode": st.integers(-1, 0o10000),
        "replace": st.booleans(), "tier": SOME, "nonsense": SOME,
    },
)  # fmt: skip
VERBS = st.sampled_from([
    "lease", "release", "renew", "lookup", "prefetch", "put_begin", "put_commit", "put_abort",
    "touch", "pin",
])  # fmt: skip


@fuzz(60, costly=True)
@given(requests=st.lists(st.tuples(VERBS, ARGS), min_size=1, max_size=12), data=st.data())
def test_nothing_that_clients_send_harms_the_daemon(
    lasting: Served, requests: list[tuple[str, dict[str, Any]]], data: st.DataObject
) -> None:
    with raw_connection(lasting) as connection:
        try:
            for number, (verb, args) in enumerate(requests):
                message = bytearray(encode_message(Request(number, verb, args))[0])
                damage = data.draw(st.sampled_from(["none", "none", "cut", "flip", "descriptor"]))
                if damage == "cut":
                    del message[data.draw(st.integers(1, len(message))) :]
                elif damage == "flip":
                    place = data.draw(st.integers(0, len(message) - 1))
                    message[place] ^= 1 << data.draw(st.integers(0, 7))
                rights = array.array("i", [0] if damage == "descriptor" else [])
                given = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
                connection.sendmsg([message], given)
                while True:
                    told = answer(connection)
                    if told is None:
                        return
                    if isinstance(told, Error):
                        assert "the daemon failed" not in told.error.message, told.error.message
                    if isinstance(told, Error) or hasattr(told, "result"):
                        break
        except (BrokenPipeError, ConnectionResetError):
            return


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One daemon for all examples; it must still be well at the end."""
    base = tmp_path_factory.mktemp("lasting")
    daemon = Served(config_in(base), base / "run" / "kvfs.sock")
    daemon.start()
    before = descriptors(daemon)
    daemon.put(b"a", b"1")
    fill(daemon, 3)
    yield daemon
    wait_for_nothing_lent(daemon)
    with Client(socket_path=daemon.socket_path) as client:
        assert client.put("well", b"1", replace=True).created
        with client.lease(["a", "well"]) as leased:
            assert len(leased) == 2
    wait_for_nothing_lent(daemon)
    wait_until(lambda: descriptors(daemon) == before, "every descriptor is closed")
    daemon.stop()
