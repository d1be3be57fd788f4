"""Leases, puts and lookups beside a real mount: what the kernel sees, races with all that moves."""

from __future__ import annotations

import errno
import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from kvfs.client import Client
from kvfs.control import find_mount
from kvfs.errors import (
    BlockExists,
    BlockNotFound,
    DaemonUnavailable,
    FilesystemError,
    MountpointError,
)
from kvfs.leased import Wait
from kvfs.tools import bench_client
from tests.mount.live import (
    MIB,
    below,
    call,
    config_in,
    demote,
    live,
    promote,
    publish,
    put_on,
    refusal_of,
    replicas,
    scratch,
    wait_gone,
    wait_sealed,
)
from tests.mounting import MountedKvfs, check_accounts, run_kvfs, wait_until

RACE_S = 4.0


def contents(fd: int) -> bytes:
    with open(f"/proc/self/fd/{fd}", "rb") as file:
        return file.read()


def lent(mount: MountedKvfs) -> tuple[int, int]:
    """Blocks that are leased, and files that may be open after their lease."""
    leases = mount.status()["leases"]
    return leases["blocks"], leases["lingering"]


def wait_for_nothing_lent(mount: MountedKvfs) -> None:
    wait_until(lambda: lent(mount) == (0, 0), "every lease has ended")


@pytest.fixture
def client(shared: MountedKvfs) -> Iterator[Client]:
    with Client(shared.path) as made:
        yield made


# --- what the kernel sees


@pytest.mark.semantics("S-put-1")
def test_a_put_is_seen_at_once_by_who_looked_before(client: Client, there: Path) -> None:
    path = there / "deep" / "block"
    for _ in range(3):
        assert refusal_of(path.stat) == errno.ENOENT
    data = os.urandom(3 * MIB)
    assert client.put(path, data).created
    assert path.read_bytes() == data
    assert os.getxattr(path, "user.kvfs.state") == b"sealed"
    assert os.listdir(there / "deep") == ["block"]


@pytest.mark.semantics("S-put-2")
def test_a_put_of_what_is_there(client: Client, there: Path) -> None:
    path = publish(there / "block", b"12345")
    wait_sealed(path)
    before = path.stat()
    assert not client.put(path, b"12345").created
    with pytest.raises(BlockExists):
        client.put(path, b"other")
    assert (path.read_bytes(), path.stat().st_ino) == (b"12345", before.st_ino)
    with path.open("rb") as reader:
        assert client.put(path, b"other", replace=True).created
        assert reader.read() == b"12345"
    assert path.read_bytes() == b"other"


def test_what_engines_write_is_leased_and_what_is_put_is_read(client: Client, there: Path) -> None:
    data = os.urandom(2 * MIB)
    path = publish(there / "block", data)
    with client.lease([path]) as leased, path.open("rb") as reader:
        assert contents(leased[0].fd) == reader.read() == data
    assert client.lookup([path, there / "none"]).tiers == ("nvme",)


@pytest.mark.semantics("S-lease-1", "S-lease-6")
@pytest.mark.parametrize("direct", [False, True])
def test_a_leased_block_can_be_read_after_its_unlink(
    shared: MountedKvfs, client: Client, there: Path, direct: bool
) -> None:
    data = os.urandom(MIB)
    path = publish(there / "block", data)
    wait_sealed(path)
    with client.lease([path], direct=direct) as leased:
        assert leased[0].direct == direct
        path.unlink()
        wait_gone(shared.tiers["nvme"] / below(shared, path).decode())
        assert shared.tier("nvme")["held_bytes"] >= MIB
        assert contents(leased[0].fd) == data
        assert not client.lookup([path])
    wait_for_nothing_lent(shared)
    wait_until(lambda: shared.tier("nvme")["held_bytes"] == 0, "its space is free")


@pytest.mark.semantics("S-lease-2")
def test_a_leased_block_stays_where_it_is(shared: MountedKvfs, client: Client, there: Path) -> None:
    path = publish(there / "block", b"x" * 10_000)
    put_on(shared, path, "nvme")
    with client.lease([path]) as leased:
        assert "open" in demote(shared, path, "hdd")["skipped"][0]["reason"]
        assert "nvme" in replicas(path)
        answer = call(shared, "evict", paths=[below(shared, path)])
        assert [skip["reason"] for skip in answer["skipped"]] == ["it is open"]
        assert contents(leased[0].fd) == b"x" * 10_000
    wait_for_nothing_lent(shared)
    assert call(shared, "evict", paths=[below(shared, path)])["evicted"] == 1


@pytest.mark.semantics("S-lease-7")
def test_what_stays_open_after_the_lease_stays_counted(
    shared: MountedKvfs, client: Client, there: Path
) -> None:
    path = publish(there / "block", bytes(MIB))
    wait_sealed(path)
    with client.lease([path]) as leased:
        kept = os.dup(leased[0].fd)
    wait_until(lambda: lent(shared) == (0, 1), "the lease has ended")
    path.unlink()
    time.sleep(1.2)
    assert shared.tier("nvme")["held_bytes"] >= MIB
    os.close(kept)
    wait_for_nothing_lent(shared)
    assert shared.tier("nvme")["held_bytes"] == 0


@pytest.mark.semantics("S-lease-4")
def test_slow_tiers(shared: MountedKvfs, client: Client, there: Path) -> None:
    paths = [publish(there / name, name.encode() * 1000) for name in ("hdd", "remote")]
    for path in paths:
        put_on(shared, path, path.name)
    with client.lease(paths, wait="none", sparse=True) as leased:
        assert leased.outcomes == ("found", "busy")
    with client.lease(paths, wait="staging") as leased:
        assert [contents(block.fd) for block in leased] == [b"hdd" * 1000, b"remote" * 1000]
        assert [block.tier for block in leased] == ["hdd", "remote"]
    assert replicas(paths[1]) == ["remote"]
    wait_for_nothing_lent(shared)
    with client.lease(paths, wait="promote") as leased:
        assert [block.tier for block in leased] == ["nvme", "nvme"]
    assert replicas(paths[1]) == ["nvme", "remote"]


@pytest.mark.semantics("S-lease-3")
def test_a_lease_is_an_access(client: Client, there: Path) -> None:
    path = publish(there / "block", b"x")
    wait_sealed(path)
    before = float(os.getxattr(path, "user.kvfs.heat"))
    time.sleep(1.1)
    client.lookup([path])
    client.prefetch([path])
    assert float(os.getxattr(path, "user.kvfs.heat")) < before
    with client.lease([path, path]):
        pass
    after = float(os.getxattr(path, "user.kvfs.heat"))
    assert before < after < before + 1.01


def test_attributes_of_puts(client: Client, there: Path) -> None:
    client.put(there / "block", b"x", mode=0o600)
    status = (there / "block").stat()
    assert (status.st_mode & 0o777, status.st_uid) == (0o600, os.geteuid())
    assert client.pin([there / "block"]) == 1
    assert os.getxattr(there / "block", "user.kvfs.pin") == b"1"
    assert client.unpin([there / "block"]) == 1


# --- finding the daemon


def test_paths_below_a_directory_of_the_mount(shared: MountedKvfs, there: Path) -> None:
    publish(there / "block", b"123")
    with Client(there) as inner, Client(str(shared.path)) as outer:
        for client, path in ((inner, "block"), (outer, f"{there.name}/block")):
            with client.lease([path]) as leased:
                assert contents(leased[0].fd) == b"123"
    with pytest.raises(MountpointError):
        Client("/")


def test_without_the_socket_plain_files_do(
    shared: MountedKvfs, there: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, expect_log: list[str],
) -> None:  # fmt: skip
    expect_log.append("plain files of .* are used instead")
    monkeypatch.setenv("KVFS_SOCKET", str(there / "no such socket"))
    data = os.urandom(100_000)
    with Client(there) as client:
        assert client.put("d/a", data).created
        assert not client.put("d/a", data).created
        with pytest.raises(BlockExists):
            client.put("d/a", b"other")
        assert client.put("d/b", b"2").created
        assert client.put("d/b", b"22", replace=True).created
        wait_sealed(there / "d/a")
        assert client.lookup(["d/a", "d/b", "d/c"]).tiers == ("nvme", "nvme")
        assert client.lookup(["d/c"]).stopped == "missing"
        with client.lease(["d/a", "d", "d/b"], sparse=True) as leased:
            assert leased.outcomes == ("found", "missing", "found")
            block = leased[0]
            assert (contents(block.fd), block.size_bytes, block.tier) == (data, 100_000, "nvme")
            assert block.checksum == client.put("d/a", data).checksum
        with client.lease(["d/a"], direct=True) as leased:
            assert leased[0].direct
        assert client.touch(["d/a"]) == 1
        answer = client.prefetch(["d/a", "d/c"])
        assert (answer.refused, answer.missing) == (1, 1)
        assert client.pin(["d/a"], "nvme") == 1
        assert os.getxattr(there / "d/a", "user.kvfs.pin") == b"nvme"
        assert client.unpin(["d/a"]) == 1
        assert sorted(os.listdir(there / "d")) == ["a", "b"]
    told = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len([record for record in told if "plain files" in record.getMessage()]) == 1


def test_plain_files_of_another_user(
    shared: MountedKvfs, there: Path, monkeypatch: pytest.MonkeyPatch, expect_log: list[str]
) -> None:
    if os.geteuid() != 0:
        pytest.skip("acts as another user: not root")
    for name, mode in (("open", 0o644), ("closed", 0o600)):
        publish(there / name, b"x").chmod(mode)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(4711, 4711, 4711)
            os.setresuid(4711, 4711, 4711)
            os.environ["KVFS_SOCKET"] = "/nowhere"
            with Client(there) as client, client.lease(["open", "closed"]) as leased:
                assert leased.outcomes == ("found", "denied")
                assert client.lookup(["open", "closed", "x"]).tiers == ("nvme", None)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.semantics("S-lease-8")
def test_a_daemon_that_is_restarted(tmp_path: Path) -> None:
    with scratch() as base, live(MountedKvfs(base, config_in(base))) as mount:
        publish(mount.path / "block", b"123")
        wait_sealed(mount.path / "block")
        with Client(mount.path) as client, client.lease(["block"]) as leased:
            mount.kill()
            with pytest.raises(DaemonUnavailable):
                client.lookup(["block"])
            with pytest.raises(DaemonUnavailable, match="is dead"):
                Client(mount.path)
            assert contents(leased[0].fd) == b"123"
            mount.start()
            assert client.lookup(["block"]).tiers == ("nvme",)
            assert contents(leased[0].fd) == b"123"
            with pytest.raises(FilesystemError, match="the lease has ended"):
                client.renew(leased)
            assert client.put("other", b"4").created
        wait_for_nothing_lent(mount)


def test_a_daemon_ends_in_order_while_blocks_are_leased(tmp_path: Path) -> None:
    with scratch() as base, live(MountedKvfs(base, config_in(base))) as mount:
        path = publish(mount.path / "block", b"123")
        wait_sealed(path)
        with Client(mount.path) as client, client.lease(["block"]) as leased:
            run_kvfs("umount", mount.path)
            assert contents(leased[0].fd) == b"123"
        mount.start()
        assert path.read_bytes() == b"123"
        assert mount.status()["state"] == "ok"


# --- everything at once


class Race:
    """Threads that do something over and over until the time is up or one of them fails."""

    def __init__(self) -> None:
        self.deadline_s = time.monotonic() + RACE_S
        self.failures: list[BaseException] = []
        self.rounds = 0

    def run(self, *works: Callable[[random.Random], None]) -> None:
        threads = [
            threading.Thread(target=self._repeat, args=(work, number))
            for number, work in enumerate(works)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failures:
            raise self.failures[0]

    def _repeat(self, work: Callable[[random.Random], None], seed: int) -> None:
        rng = random.Random(seed)
        try:
            while time.monotonic() < self.deadline_s and not self.failures:
                work(rng)
                self.rounds += 1
        except BaseException as error:
            self.failures.append(error)


@pytest.mark.semantics("S-lease-1")
def test_leases_while_blocks_move_go_and_are_scrubbed(shared: MountedKvfs, there: Path) -> None:
    names = [f"b{number}" for number in range(24)]
    data = {name: (name.encode() * 20_000)[:50_000] for name in names}
    for name in names:
        publish(there / name, data[name])

    def read(rng: random.Random) -> None:
        with Client(there) as client:
            for _ in range(10):
                asked = rng.sample(names, 8)
                wait: Wait | None = rng.choice(["none", "staging", "promote", None])
                with client.lease(asked, sparse=True, wait=wait, deadline_s=2.0) as leased:
                    for name, block in zip(asked, leased.blocks, strict=True):
                        if block is not None:
                            assert block.size_bytes == len(data[name])
                            assert contents(block.fd) == data[name], name
                    assert client.renew(leased) if leased.numbers else True

    def move(rng: random.Random) -> None:
        path = there / rng.choice(names)
        action = rng.choice([demote, demote, promote])
        to = "nvme" if action is promote else rng.choice(["hdd", "remote"])
        with suppress(BlockNotFound):
            action(shared, path, to)

    def remove(rng: random.Random) -> None:
        name = rng.choice(names)
        verb = rng.choice(["evict", "unlink", "rename"])
        # Somebody may be faster.
        with suppress(BlockNotFound, FileNotFoundError):
            if verb == "evict":
                call(shared, "evict", paths=[below(shared, there / name)])
            elif verb == "unlink":
                (there / name).unlink()
            else:
                (there / name).rename(there / f"{name}.away")
                (there / f"{name}.away").rename(there / name)

    def write(rng: random.Random) -> None:
        name = rng.choice(names)
        with Client(there) as client:
            client.put(name, data[name], replace=rng.random() < 0.5)

    def scrub(rng: random.Random) -> None:
        call(shared, "scrub", rate=1 << 30, restart=True)

    Race().run(read, read, move, move, remove, write, scrub)
    wait_for_nothing_lent(shared)
    for name in names:
        if (there / name).exists():
            assert (there / name).read_bytes() == data[name]
    check_accounts(shared)
    assert run_kvfs("fsck", shared.path).returncode == 0


def test_clients_that_are_killed_while_blocks_go(shared: MountedKvfs, there: Path) -> None:
    paths = [publish(there / f"b{number}", bytes(100_000)) for number in range(30)]
    for path in paths:
        wait_sealed(path)
    script = (
        "import sys, time\n"
        "from kvfs.client import Client\n"
        "client = Client(sys.argv[1])\n"
        "with client.lease([f'b{number}' for number in range(30)]) as leased:\n"
        "    assert len(leased) == 30\n"
        "    print('leased', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with ExitStack() as stack:
        readers = [stack.enter_context(_client_process(script, there)) for _ in range(2)]
        for path in paths:
            path.unlink()
        assert lent(shared) == (60, 0)
        assert shared.tier("nvme")["held_bytes"] >= 30 * 100_000
        for reader in readers:
            reader.kill()
        wait_for_nothing_lent(shared)
    check_accounts(shared)


@contextmanager
def _client_process(script: str, directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has said that it leases blocks; killed at the end."""
    command = [sys.executable, "-c", script, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "leased\n"
            yield process
        finally:
            process.kill()


def test_the_socket_is_the_one_that_the_mount_names(shared: MountedKvfs) -> None:
    assert find_mount(shared.path).socket_path == Path(shared.status()["socket"])


def test_the_benchmark_of_the_client_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_client, "NAMES", 80)
    monkeypatch.setattr(bench_client, "CYCLES", 2)
    monkeypatch.setattr(bench_client, "PUTS", 2)
    rows = bench_client.measure_client(tmp_path, 1)
    assert len(rows) == 8
    assert all(row.client_us > 0 for row in rows)
    assert [row.bar_us for row in rows].count(None) == 5
    assert bench_client.client_table(rows).row_count == 8
    assert list(tmp_path.iterdir()) == []
