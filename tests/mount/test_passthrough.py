"""Reads that go from the kernel to the backing file, past the daemon."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.live import (
    call,
    config_in,
    live,
    publish,
    put_on,
    scratch,
    state,
    wait_sealed,
)
from tests.mounting import MountedKvfs, has_ended, run_kvfs, wait_until

KIB, MIB = 1 << 10, 1 << 20


def kernel_can() -> bool:
    """Root, and Linux 6.9 or newer: then a mount that serves reads itself is a failure."""
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    return os.geteuid() == 0 and release >= (6, 9)


@pytest.fixture(scope="module")
def past() -> Iterator[MountedKvfs]:
    if not kernel_can():
        pytest.skip("kernel passthrough needs root and Linux 6.9")
    with scratch() as base:
        mount = MountedKvfs(base, config_in(base, passthrough="require"))
        with live(mount, ["tier nvme has"]):
            yield mount


def served_bytes(mount: MountedKvfs) -> int:
    return sum(int(tier["bytes_read"]) for tier in call(mount, "status")["tiers"])


def test_the_mount_says_that_reads_go_past_the_daemon(past: MountedKvfs) -> None:
    assert call(past, "status")["data_path"] == {"passthrough": True, "reason": ""}
    assert "reads go through the daemon" not in run_kvfs("status", past.path).stdout


@pytest.mark.parametrize("tier", ["nvme", "hdd"])
def test_bytes_of_a_sealed_block_do_not_pass_the_daemon(past: MountedKvfs, tier: str) -> None:
    data = os.urandom(3 * MIB)
    path = publish(past.path / f"sealed-{tier}", data)
    put_on(past, path, tier)
    before = served_bytes(past)
    assert path.read_bytes() == data
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        assert view[MIB : MIB + 100] == data[MIB : MIB + 100]
    assert served_bytes(past) == before


@pytest.mark.semantics("S-read-2")
def test_unaligned_direct_reads_are_answered_by_the_filesystem_of_the_tier(
    past: MountedKvfs,
) -> None:
    path = publish(past.path / "aligned", bytes(64 * KIB))
    wait_sealed(path)

    def unaligned(file: Path) -> int | None:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
        try:
            os.pread(descriptor, 100, 17)
        except OSError as error:
            return error.errno
        finally:
            os.close(descriptor)
        return None

    assert unaligned(path) == unaligned(past.tiers["nvme"] / "aligned")


def test_a_remote_block_is_served(past: MountedKvfs) -> None:
    data = os.urandom(MIB)
    path = publish(past.path / "far", data)
    put_on(past, path, "remote")
    before = served_bytes(past)
    assert path.read_bytes() == data
    assert served_bytes(past) == before + len(data)


def test_a_writer_joins_readers_that_go_past_the_daemon(past: MountedKvfs) -> None:
    path = publish(past.path / "joined", b"a" * (64 * KIB))
    wait_sealed(path)
    with path.open("rb") as reader:
        assert reader.read(1) == b"a"
        with path.open("r+b") as writer:
            writer.seek(64 * KIB)
            writer.write(b"b" * KIB)
            writer.flush()
            assert os.fstat(reader.fileno()).st_size == 65 * KIB
            assert path.stat().st_size == 65 * KIB
        reader.seek(64 * KIB)
        assert reader.read() == b"b" * KIB
    wait_sealed(path)
    assert path.read_bytes() == b"a" * (64 * KIB) + b"b" * KIB
    assert run_kvfs("fsck", past.path).returncode == 0


def test_blocks_are_read_while_they_move(past: MountedKvfs) -> None:
    directory = past.path / "moving"
    directory.mkdir()
    blocks = {
        publish(directory / f"{n}", data): data for n in range(6) if (data := os.urandom(MIB))
    }
    for path in blocks:
        wait_sealed(path)
    done = threading.Event()
    failures: list[str] = []

    def read_all_the_time() -> None:
        while not done.is_set():
            for path, data in blocks.items():
                try:
                    if path.read_bytes() != data:
                        failures.append(f"{path}: other bytes")
                except OSError as error:
                    failures.append(str(error))

    readers = [threading.Thread(target=read_all_the_time) for _ in range(3)]
    for reader in readers:
        reader.start()
    moved = 0
    for _ in range(20):
        moved += call(past, "demote", paths=[b"moving"], to="hdd")["moved"]
        moved += call(past, "promote", paths=[b"moving"], to="nvme")["moved"]
    done.set()
    for reader in readers:
        reader.join()
    assert not failures
    assert moved > 0


def test_a_handle_outlives_the_daemon(past: MountedKvfs) -> None:
    """What is open reads its file, what is new fails, and a remount serves all of it."""
    data = os.urandom(MIB)
    path = publish(past.path / "outlives", data)
    wait_sealed(path)
    with path.open("rb", buffering=0) as reader:
        past.kill()
        assert reader.read(MIB) == data
        with pytest.raises(OSError, match=r"Transport endpoint|Software caused"):
            path.read_bytes()
    past.start()
    assert path.read_bytes() == data


@pytest.mark.semantics("S-publish-4", "S-crash-2")
def test_a_writer_that_outlives_the_daemon_is_waited_for(past: MountedKvfs) -> None:
    """Its descriptor still writes the tier's file, which is not sealed before it is closed."""
    path = past.path / "outlived"
    with path.open("wb", buffering=0) as writer:
        writer.write(b"before the kill, ")
        os.fsync(writer.fileno())
        past.kill()
        writer.write(b"after it, ")
        past.start()
        writer.write(b"and after the next mount")
        wait_sealed(publish(past.path / "other", b"x"))
        assert state(path) != "sealed"
        assert path.read_bytes() == b"before the kill, after it, and after the next mount"
    wait_sealed(path)
    assert path.read_bytes() == b"before the kill, after it, and after the next mount"
    assert path.stat().st_size == 51
    assert run_kvfs("fsck", past.path).returncode == 0


@pytest.fixture
def stacked(tmp_path: Path) -> Iterator[Path]:
    """A directory on overlayfs, which is too deep for a kernel that was asked for depth 1."""
    parts = {name: tmp_path / name for name in ("lowerdir", "upperdir", "workdir", "merged")}
    for part in parts.values():
        part.mkdir()
    options = ",".join(f"{name}={parts[name]}" for name in ("lowerdir", "upperdir", "workdir"))
    command = ["mount", "-t", "overlay", "overlay", "-o", options, str(parts["merged"])]
    if os.geteuid() != 0 or subprocess.run(command, check=False).returncode != 0:
        pytest.skip("overlayfs cannot be mounted here")
    yield parts["merged"]
    subprocess.run(["umount", parts["merged"]], check=True)


def test_a_forced_unmount_under_an_open_handle_is_quiet(tmp_path: Path) -> None:
    if not kernel_can():
        pytest.skip("kernel passthrough needs root and Linux 6.9")
    with scratch() as base:
        mount = MountedKvfs(base, config_in(base, passthrough="require"))
        with live(mount):
            path = publish(mount.path / "held", b"held" * KIB)
            wait_sealed(path)
            pid = int(call(mount, "status")["pid"])
            with path.open("rb", buffering=0) as reader:
                os.kill(pid, signal.SIGTERM)
                wait_until(lambda: has_ended(pid), "daemon gone")
                assert reader.read(4) == b"held"
        mount.start()
        assert path.read_bytes() == b"held" * KIB
        mount.stop()
        mount.check_log([])


def test_a_block_that_the_kernel_reads_does_not_outgrow_its_tier(tmp_path: Path) -> None:
    if not kernel_can():
        pytest.skip("kernel passthrough needs root and Linux 6.9")
    with scratch() as base:
        sizes = {"nvme": 4, "hdd": 64}
        mount = MountedKvfs(base, config_in(base, sizes, passthrough="require"))
        with live(mount):
            path = publish(mount.path / "small", b"x" * KIB)
            wait_sealed(path)
            with path.open("rb") as reader:
                assert reader.read(1) == b"x"
                with pytest.raises(OSError, match="No space"):
                    os.truncate(path, 8 * MIB)
                assert path.read_bytes() == b"x" * KIB
            os.truncate(path, 8 * MIB)
            assert path.read_bytes() == b"x" * KIB + bytes(8 * MIB - KIB)


def test_require_refuses_where_it_does_not_work(stacked: Path, tmp_path: Path) -> None:
    tier = f"nvme={stacked}/tier,capacity=16MiB"
    (stacked / "tier").mkdir()
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    options = ("--tier", tier, "--log-file", tmp_path / "log")
    refused = run_kvfs("mount", mountpoint, *options, "--passthrough=require", check=False)
    assert refused.returncode == 5
    assert "passthrough is required" in refused.stderr
    run_kvfs("mount", mountpoint, *options)
    try:
        (mountpoint / "block").write_bytes(b"served")
        assert (mountpoint / "block").read_bytes() == b"served"
        assert "reads go through the daemon" in run_kvfs("status", mountpoint).stdout
    finally:
        run_kvfs("umount", mountpoint)
