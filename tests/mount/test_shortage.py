"""What runs out under a mount: the disk of a tier in mid-write, the daemon's descriptors."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import pytest

from tests.mount.live import (
    KIB,
    MIB,
    call,
    config_in,
    live,
    publish,
    replicas,
    scratch,
    state,
    wait_sealed,
)
from tests.mounting import COMMAND_TIMEOUT_S, KVFS, MountedKvfs, run_kvfs, wait_until

Way = Literal["auto", "off"]

DISK_MIB = 48
FREE_MIB = 6
OPEN_FILES = 128


@pytest.fixture(params=["auto", "off"], ids=["passthrough", "served"])
def passthrough(request: pytest.FixtureRequest) -> Way:
    way: Way = request.param
    return way


# --- the disk of a tier is full before the tier is


@contextmanager
def loop_disk(base: Path) -> Iterator[Path]:
    """A small ext4 of its own, on a loop device."""
    if os.geteuid() != 0:
        pytest.skip("mounting a disk image needs root")
    image, mountpoint = base / "disk.img", base / "disk"
    mountpoint.mkdir()
    with image.open("wb") as file:
        file.truncate(DISK_MIB * MIB)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mountpoint], check=True)
    try:
        yield mountpoint
    finally:
        subprocess.run(["umount", mountpoint], check=True)


def fill(disk: Path) -> Path:
    """Somebody else fills a disk up to a few MiB."""
    foreign = disk / "foreign"
    room = os.statvfs(disk)
    with foreign.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, room.f_bfree * room.f_frsize - FREE_MIB * MIB)
    return foreign


@contextmanager
def mount_on_disk(passthrough: Way, **capacities_mib: int) -> Iterator[MountedKvfs]:
    """The fastest tier on a disk of its own, the catalog elsewhere."""
    with scratch() as base, loop_disk(base) as disk:
        (disk / "nvme").mkdir()
        (base / "nvme").symlink_to(disk / "nvme")
        config = config_in(base, capacities_mib, passthrough=passthrough, on_full="refuse")
        mount = MountedKvfs(base, config)
        with mount.config_file.open("a") as file:
            file.write(f'catalog = "{base / "catalog.sqlite"}"\n')
        with live(mount, ["No space left", "full"]):
            yield mount


@pytest.fixture
def on_disk(passthrough: Way) -> Iterator[MountedKvfs]:
    with mount_on_disk(passthrough, nvme=32) as mount:
        yield mount


@pytest.fixture
def above_hdd(passthrough: Way) -> Iterator[MountedKvfs]:
    with mount_on_disk(passthrough, nvme=32, hdd=64) as mount:
        yield mount


def write_until_refused(descriptor: int, data: bytes) -> int:
    """How much was taken before ENOSPC."""
    taken = 0
    while taken < len(data):
        try:
            taken += os.write(descriptor, data[taken : taken + MIB])
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return taken
    raise AssertionError("it was not refused")


def test_a_writer_that_meets_a_full_disk_gets_enospc_and_the_mount_goes_on(
    on_disk: MountedKvfs,
) -> None:
    sealed = publish(on_disk.path / "sealed", os.urandom(MIB))
    wait_sealed(sealed)
    foreign = fill(on_disk.tiers["nvme"].resolve().parent)
    data = os.urandom(16 * MIB)
    temporary = on_disk.path / "block.tmp"
    with temporary.open("wb", buffering=0) as writer:
        taken = write_until_refused(writer.fileno(), data)
        assert 0 < taken <= FREE_MIB * MIB
        assert os.fstat(writer.fileno()).st_size == taken
    assert os.listdir(on_disk.path) == ["sealed", "block.tmp"]
    assert temporary.stat().st_size == taken
    assert temporary.read_bytes() == data[:taken]
    assert (on_disk.path / "sealed").stat().st_size == MIB
    # Nobody's next small file fails for it, once there is room.
    temporary.unlink()
    wait_sealed(publish(on_disk.path / "small", b"s" * KIB))
    foreign.unlink()
    whole = publish(on_disk.path / "block", data)
    wait_sealed(whole)
    assert whole.read_bytes() == data
    assert run_kvfs("fsck", on_disk.path).returncode == 0
    on_disk.remount()
    assert whole.read_bytes() == data


def test_what_a_refused_writer_leaves_is_not_sealed_where_the_daemon_saw_it(
    on_disk: MountedKvfs,
) -> None:
    if call(on_disk, "status")["data_path"]["passthrough"]:
        pytest.skip("the kernel writes past the daemon, which does not see it")
    foreign = fill(on_disk.tiers["nvme"].resolve().parent)
    temporary = on_disk.path / "block.tmp"
    with temporary.open("wb", buffering=0) as writer:
        write_until_refused(writer.fileno(), os.urandom(16 * MIB))
    foreign.unlink()
    other = publish(on_disk.path / "other", b"x" * KIB)
    wait_sealed(other)
    assert state(temporary) != "sealed"


def test_when_a_disk_is_full_writers_get_on_on_the_next_tier(above_hdd: MountedKvfs) -> None:
    """At once where the daemon writes for them; else the one that met it is refused, then none."""
    old = publish(above_hdd.path / "old", os.urandom(MIB))
    wait_sealed(old)
    foreign = fill(above_hdd.tiers["nvme"].resolve().parent)
    data = os.urandom(12 * MIB)
    refused: list[int] = []

    def put() -> bool:
        try:
            publish(above_hdd.path / "block", data)
        except OSError as error:
            refused.append(error.errno or 0)
            return False
        return True

    wait_until(put, "a put that works")
    if not call(above_hdd, "status")["data_path"]["passthrough"]:
        assert refused == []
    assert set(refused) <= {errno.ENOSPC}
    wait_sealed(above_hdd.path / "block")
    assert (above_hdd.path / "block").read_bytes() == data
    assert replicas(above_hdd.path / "block") == ["hdd"]
    foreign.unlink()
    assert sorted(os.listdir(above_hdd.path)) == ["block", "old"]
    assert run_kvfs("fsck", above_hdd.path).returncode == 0


# --- no descriptor is left


@pytest.fixture
def scarce(passthrough: Way) -> Iterator[MountedKvfs]:
    """A daemon that may have few files open."""
    with scratch() as base:
        mount = MountedKvfs(base, config_in(base, passthrough=passthrough))
        command = ["prlimit", f"--nofile={OPEN_FILES}:{OPEN_FILES}", KVFS, "mount", mount.path]
        command += ["--config", mount.config_file, "--log-file", mount.log_file]
        subprocess.run(
            [*map(str, command)], check=True, capture_output=True, timeout=COMMAND_TIMEOUT_S
        )
        try:
            yield mount
        finally:
            mount.stop()
        mount.check_log(["Too many open files", "unable to open database file"])


def open_until_refused(paths: list[Path], flags: int) -> tuple[list[int], int]:
    """Descriptors, and the errno that ended it."""
    descriptors: list[int] = []
    for path in paths:
        try:
            descriptors.append(os.open(path, flags))
        except OSError as error:
            return descriptors, error.errno or 0
    return descriptors, 0


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR], ids=["readers", "writers"])
def test_more_open_blocks_than_the_daemon_may_have_are_refused_and_harm_nothing(
    scarce: MountedKvfs, flags: int
) -> None:
    paths = [publish(scarce.path / f"{n:04d}", b"%04d" % n * 256) for n in range(2 * OPEN_FILES)]
    scarce.wait_sealed()
    pid = int(call(scarce, "status")["pid"])
    descriptors, refusal = open_until_refused(paths, flags)
    try:
        assert refusal in (errno.EMFILE, errno.ENFILE)
        assert len(descriptors) > OPEN_FILES // 4
        # What is open works, and so does what needs no descriptor.
        for path, descriptor in zip(paths, descriptors, strict=False):
            assert os.pread(descriptor, 4, 0) == path.name.encode()
        assert paths[-1].stat().st_size == 1024
        assert len(os.listdir(scarce.path)) == len(paths)
        for refused in (
            lambda: paths[-1].rename(scarce.path / "renamed"),
            lambda: (scarce.path / "new").write_bytes(b"new"),
        ):
            with suppress(OSError):
                refused()
        names = sorted(os.listdir(scarce.path))
        # A command waits for its turn.
        asker = threading.Thread(target=call, args=(scarce, "status"))
        asker.start()
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    asker.join(COMMAND_TIMEOUT_S)
    assert not asker.is_alive()
    wait_until(lambda: call(scarce, "status")["open"] == 0, "all closed")
    assert int(call(scarce, "status")["pid"]) == pid
    for path in paths[:-1]:
        assert path.read_bytes() == path.name.encode() * 256
    scarce.wait_sealed()
    assert sorted(os.listdir(scarce.path)) == names
    last = next(scarce.path / name for name in names if name in (paths[-1].name, "renamed"))
    assert last.read_bytes() == paths[-1].name.encode() * 256
    assert publish(scarce.path / "later", b"l").read_bytes() == b"l"
    assert run_kvfs("fsck", scarce.path).returncode == 0
