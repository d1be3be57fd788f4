"""Names, listings, the control directory, and what the mount refuses to make."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from subprocess import PIPE

import pytest

from tests.mount.live import (
    config_in,
    demote,
    live,
    publish,
    refusal_of,
    scratch,
    state,
    wait_sealed,
)
from tests.mounting import MountedKvfs, run_kvfs, wait_until

STRANGE_NAMES = [
    b"\xff\xfe not utf-8 \x80",
    b"new\nline\ttab",
    b".hidden",
    b"...",
    b" ",
    b"-rf",
    "Schlüssel 鍵".encode(),
    b"n" * 255,
    b"\xc3" * 255,
    b"*?[a]$(x)`y`\\",
]
ADOPTED_NAMES = 5000


def test_the_kernel_answers_alone_for_names_that_it_knows(shared: MountedKvfs, there: Path) -> None:
    """100,000 times, while the daemon is stopped: whoever asked it would not return."""
    for path in [publish(there / f"{number}.bin", b"x") for number in range(100)]:
        wait_sealed(path)
    script = (
        "import os, sys\n"
        "names = [f'{sys.argv[1]}/{number}' for number in range(100)]\n"
        "def ask(times):\n"
        "    for name in names * times:\n"
        "        assert os.access(name + '.bin', os.R_OK)\n"
        "        assert not os.access(name + '.missing', os.F_OK)\n"
        "ask(1)\n"
        "print('known', flush=True)\n"
        "sys.stdin.readline()\n"
        "ask(1000)\n"
    )
    command = [sys.executable, "-c", script, str(there)]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True) as asker:
        assert asker.stdin is not None
        assert asker.stdout is not None
        assert asker.stdout.readline() == "known\n"
        daemon = int(shared.status()["pid"])
        os.kill(daemon, signal.SIGSTOP)
        try:
            asker.stdin.write("\n")
            asker.stdin.close()
            assert asker.wait(timeout=60) == 0
        finally:
            os.kill(daemon, signal.SIGCONT)


@pytest.mark.semantics("S-names-1")
@pytest.mark.parametrize("name", STRANGE_NAMES)
def test_strange_names_are_served_like_any_others(
    shared: MountedKvfs, there: Path, name: bytes
) -> None:
    directory = os.fsencode(there)
    path = directory + b"/" + name
    with open(path, "wb") as file:
        file.write(name)
    assert os.listdir(directory) == [name]
    wait_until(lambda: os.getxattr(path, "user.kvfs.state") == b"sealed", "sealed")
    demote(shared, Path(os.fsdecode(path)), "hdd")
    on_tier = os.fsencode(shared.tiers["hdd"]) + path.removeprefix(os.fsencode(shared.path))
    with open(path, "rb") as file, open(on_tier, "rb") as backing:
        assert file.read() == backing.read() == name
    os.rename(path, directory + b"/plain")
    os.mkdir(path)
    assert sorted(os.listdir(directory)) == sorted([b"plain", name])
    os.rmdir(path)


@pytest.mark.semantics("S-names-2")
def test_a_name_of_256_bytes_is_too_long(there: Path) -> None:
    name = there / ("n" * 256)
    file = publish(there / "file", b"x")
    assert refusal_of(name.stat) == errno.ENAMETOOLONG
    assert refusal_of(name.mkdir) == errno.ENAMETOOLONG
    assert refusal_of(lambda: name.write_bytes(b"")) == errno.ENAMETOOLONG
    assert refusal_of(lambda: file.rename(name)) == errno.ENAMETOOLONG
    assert file.exists()


@pytest.mark.semantics("S-names-3")
def test_a_path_that_no_tier_could_hold_is_too_long(there: Path) -> None:
    descriptor = os.open(there, os.O_RDONLY)
    try:
        for _ in range(15):
            os.mkdir("d" * 250, dir_fd=descriptor)
            deeper = os.open("d" * 250, os.O_RDONLY, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = deeper
        make = partial(os.mkdir, "d" * 250, dir_fd=descriptor)
        assert refusal_of(make) == errno.ENAMETOOLONG
        with open("short", "wb", opener=lambda p, f: os.open(p, f, dir_fd=descriptor)) as file:
            file.write(b"x")
    finally:
        os.close(descriptor)


@pytest.mark.semantics("S-names-4")
@pytest.mark.parametrize("name", [".kvfs", ".kvfs.d"])
def test_reserved_names_are_refused_at_any_depth(there: Path, name: str) -> None:
    deep = there / "a" / "b"
    deep.mkdir(parents=True)
    file = publish(deep / "file", b"x")
    for directory in (there, deep):
        reserved = directory / name
        assert not reserved.exists()
        assert refusal_of(reserved.mkdir) == errno.EPERM
        assert refusal_of(partial(reserved.write_bytes, b"")) == errno.EPERM
        assert refusal_of(partial(file.rename, reserved)) == errno.EPERM
        assert refusal_of(partial(os.mknod, reserved, 0o600)) == errno.EPERM
    assert file.read_bytes() == b"x"


@pytest.mark.semantics("S-names-4")
def test_the_root_has_no_fan_out_directory_either(shared: MountedKvfs) -> None:
    assert refusal_of((shared.path / ".kvfs.d").mkdir) == errno.EPERM
    assert refusal_of((shared.path / ".kvfs").rmdir) == errno.EPERM


@pytest.mark.semantics("S-names-6")
def test_a_name_remembered_as_missing_appears_however_it_is_made(there: Path) -> None:
    makers: list[Callable[[Path], object]] = [
        lambda path: path.write_bytes(b"x"),
        lambda path: path.mkdir(),
        lambda path: os.mknod(path, 0o600),
        lambda path: publish(path, b"x"),
        lambda path: subprocess.run(["cp", "/etc/hostname", path], check=True),
    ]
    for number, make in enumerate(makers):
        path = there / str(number)
        assert not path.exists()
        make(path)
        assert path.exists()
        assert os.access(path, os.F_OK)


@pytest.mark.semantics("S-names-7")
def test_a_file_put_into_a_tier_is_not_in_the_mount(shared: MountedKvfs, there: Path) -> None:
    smuggled = shared.tiers["nvme"] / there.name / "smuggled"
    smuggled.write_bytes(b"not kvfs'")
    path = there / "smuggled"
    assert not path.exists()
    assert list(there.iterdir()) == []
    path.write_bytes(b"of the mount")
    assert path.read_bytes() == smuggled.read_bytes() == b"of the mount"


# --- the control directory


@pytest.mark.semantics("S-control-1", "S-list-2")
def test_the_control_directory_is_readable_but_not_listed(shared: MountedKvfs) -> None:
    assert ".kvfs" not in os.listdir(shared.path)
    assert sorted(os.listdir(shared.path / ".kvfs")) == ["config", "metrics", "stats", "tiers"]
    shown = {
        name: subprocess.run(
            ["cat", shared.path / ".kvfs" / name], check=True, capture_output=True
        ).stdout
        for name in ("stats", "metrics", "config", "tiers")
    }
    stats = json.loads(shown["stats"])
    assert stats["mountpoint"] == str(shared.path)
    assert [tier["name"] for tier in json.loads(shown["tiers"])] == ["nvme", "hdd", "remote"]
    assert json.loads(shown["config"])["tiering"]["promote_heat"] == 1000.0
    assert b"kvfs_tier_capacity_bytes" in shown["metrics"]


@pytest.mark.semantics("S-control-1")
def test_control_files_are_current(shared: MountedKvfs, there: Path) -> None:
    def blocks() -> int:
        return int(json.loads((shared.path / ".kvfs/stats").read_bytes())["blocks"])

    before = blocks()
    with (shared.path / ".kvfs/stats").open("rb") as opened:
        (there / "one").write_bytes(b"x")
        assert json.loads(opened.read())["blocks"] == before
    assert blocks() == before + 1


@pytest.mark.semantics("S-control-2", "S-control-3")
def test_the_control_directory_is_read_only(shared: MountedKvfs, there: Path) -> None:
    control = shared.path / ".kvfs"
    stats = control / "stats"
    file = publish(there / "file", b"x")
    attempts: list[Callable[[], object]] = [
        lambda: stats.open("r+b"),
        lambda: stats.open("ab"),
        stats.unlink,
        lambda: stats.chmod(0o666),
        lambda: os.truncate(stats, 0),
        lambda: os.utime(stats),
        lambda: stats.rename(there / "stats"),
        lambda: file.rename(control / "file"),
        lambda: (control / "new").write_bytes(b""),
        (control / "new").mkdir,
        lambda: os.setxattr(stats, "user.x", b"1"),
    ]
    for attempt in attempts:
        assert refusal_of(attempt) == errno.EPERM
    assert not (control / "nothing").exists()
    assert stat.S_ISREG(stats.stat().st_mode)
    assert stats.stat().st_size == 0
    assert stats.read_bytes()


# --- what is refused


@pytest.mark.semantics("S-refused-1")
def test_links_and_special_files_are_refused(there: Path) -> None:
    file = publish(there / "file", b"x")
    assert refusal_of(lambda: os.link(file, there / "hard")) == errno.EPERM
    assert refusal_of(lambda: (there / "soft").symlink_to(file)) == errno.EPERM
    assert refusal_of(lambda: os.mkfifo(there / "pipe")) == errno.EPERM
    device = os.makedev(1, 3)
    assert refusal_of(lambda: os.mknod(there / "null", stat.S_IFCHR, device)) == errno.EPERM
    assert refusal_of(lambda: os.mknod(there / "socket", stat.S_IFSOCK)) == errno.EPERM
    assert os.listdir(there) == ["file"]


@pytest.mark.semantics("S-refused-3")
def test_there_is_no_fallocate_and_no_nameless_file(there: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with (there / "file").open("w+b") as file:
        length = ctypes.c_long(4096)
        assert libc.fallocate(file.fileno(), 0, ctypes.c_long(0), length) == -1
        assert ctypes.get_errno() == errno.EOPNOTSUPP
        os.posix_fallocate(file.fileno(), 0, 8192)
        assert os.fstat(file.fileno()).st_size == 8192
    attempt = refusal_of(lambda: os.open(there, os.O_TMPFILE | os.O_RDWR, 0o600))
    assert attempt == errno.EOPNOTSUPP


@pytest.mark.semantics("S-refused-4")
def test_locks_exclude_other_processes_of_the_node(there: Path) -> None:
    path = there / "locked"
    with path.open("w+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        other = subprocess.run(["flock", "--nonblock", path, "true"], check=False)
        assert other.returncode == 1
        fcntl.flock(file, fcntl.LOCK_UN)
        subprocess.run(["flock", "--nonblock", path, "true"], check=True)


# --- listing a directory that existed before kvfs


@pytest.fixture(scope="module")
def adopted() -> Iterator[MountedKvfs]:
    """A mount whose first tier is a directory that an engine filled before."""
    with scratch() as base:
        mount = MountedKvfs(base, config_in(base))
        directory = base / "nvme" / "flat"
        directory.mkdir()
        for number in range(ADOPTED_NAMES):
            (directory / f"old-{number:05d}").write_bytes(b"%d" % number)
        refused = run_kvfs("mount", mount.path, "--config", mount.config_file, check=False)
        assert refused.returncode == 4
        assert f"kvfs tier init {base / 'nvme'} --adopt" in refused.stderr
        assert len(os.listdir(directory)) == ADOPTED_NAMES
        run_kvfs("tier", "init", base / "nvme", "--adopt")
        with live(mount):
            yield mount


@pytest.mark.semantics("S-mount-6")
def test_an_existing_directory_is_adopted(adopted: MountedKvfs) -> None:
    path = adopted.path / "flat" / "old-00042"
    assert path.read_bytes() == b"42"
    wait_sealed(path)
    assert (adopted.tiers["nvme"] / "flat" / "old-00042").read_bytes() == b"42"


@pytest.mark.semantics("S-list-1", "S-list-3")
def test_a_listing_neither_repeats_nor_misses_names_that_stay(adopted: MountedKvfs) -> None:
    directory = adopted.path / "flat"
    stop = threading.Event()

    def churn() -> None:
        number = 0
        while not stop.is_set():
            (directory / f"new-{number % 50}").write_bytes(b"")
            (directory / f"new-{(number + 25) % 50}").unlink(missing_ok=True)
            number += 1

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(5):
            counts = Counter(entry.name for entry in os.scandir(directory))
            assert max(counts.values()) == 1
            assert sum(name.startswith("old-") for name in counts) == ADOPTED_NAMES
    finally:
        stop.set()
        thread.join()
    (directory / "a").write_bytes(b"")
    assert os.listdir(directory)[-1] == "a"
    assert state(directory / "old-00000") in ("published", "sealed")
