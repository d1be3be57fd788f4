"""Backing files that are changed behind a mount: what readers see, with and without a second copy.

In both ways of a read. Each test has blocks of its own; `remount` begins a mount that has verified
nothing.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvfs.tools import bench_verify
from tests.mount.live import (
    KIB,
    MIB,
    below,
    call,
    promote,
    publish,
    put_on,
    replicas,
    wait_gone,
    wait_sealed,
)
from tests.mounting import KVFS, MountedKvfs, run_kvfs, wait_until

BAD = "is bad .*: quarantined"
# More than one request of the kernel, and not a multiple of anything.
SIZE = 300 * KIB + 7

Damage = Callable[[bytearray], None]


def flip_a_bit(data: bytearray) -> None:
    data[len(data) // 2] ^= 1


def zero(data: bytearray) -> None:
    data[:] = bytes(len(data))


def cut(data: bytearray) -> None:
    del data[SIZE // 2 :]


DAMAGES = [flip_a_bit, zero, cut]


def spoil(
    mount: MountedKvfs, path: Path, damage: Damage = zero, *, tier: str = "nvme", seen: bool = False
) -> None:
    """Change a backing file; with `seen` its time tells."""
    file = mount.tiers[tier] / os.fsdecode(below(mount, path))
    times = file.stat()
    data = bytearray(file.read_bytes())
    damage(data)
    file.write_bytes(data)
    if not seen:
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def sole(mount: MountedKvfs, path: Path, data: bytes) -> Path:
    """A block on the fastest tier alone."""
    put_on(mount, publish(path, data), "nvme")
    return path


def doubled(mount: MountedKvfs, path: Path, data: bytes) -> Path:
    """A block on the two fastest tiers."""
    put_on(mount, publish(path, data), "hdd")
    promote(mount, path)
    assert replicas(path) == ["nvme", "hdd"]
    return path


def is_a_miss(path: Path) -> bool:
    """What an engine sees. A block that opens must have all its bytes."""
    try:
        path.open("rb").close()
    except FileNotFoundError:
        return True
    return False


@pytest.fixture
def rotten(shared: MountedKvfs, shared_log: list[str]) -> MountedKvfs:
    shared_log.append(BAD)
    return shared


@pytest.mark.semantics("S-verify-1", "S-verify-2")
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_new_mount_serves_nothing_that_rotted_meanwhile(
    rotten: MountedKvfs, there: Path, damage: Damage
) -> None:
    data = os.urandom(SIZE)
    blocks = [sole(rotten, there / "sole", data), doubled(rotten, there / "doubled", data)]
    rotten.stop()
    for path in blocks:
        spoil(rotten, path, damage)
    rotten.start()
    assert (there / "doubled").read_bytes() == data
    assert is_a_miss(there / "sole")
    assert not (there / "sole").exists()
    assert os.listdir(there) == ["doubled"]
    assert replicas(there / "doubled") == ["hdd"]


@pytest.mark.semantics("S-verify-2")
def test_many_readers_at_once_get_a_good_copy_or_nothing(rotten: MountedKvfs, there: Path) -> None:
    data = os.urandom(SIZE)
    sole(rotten, there / "sole", data)
    doubled(rotten, there / "doubled", data)
    rotten.stop()
    for name in ("sole", "doubled"):
        spoil(rotten, there / name)
    rotten.start()
    results: list[bytes | None] = []

    def read(path: Path) -> None:
        try:
            results.append(path.read_bytes())
        except FileNotFoundError:
            results.append(None)

    threads = [
        threading.Thread(target=read, args=(there / name,))
        for name in ("sole", "doubled") for _ in range(6)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count(data) == results.count(None) == 6


@pytest.mark.semantics("S-verify-3")
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_the_kernel_has_of_a_block_does_not_hide_that_it_was_touched(
    rotten: MountedKvfs, there: Path, damage: Damage
) -> None:
    data = os.urandom(SIZE)
    blocks = [sole(rotten, there / "sole", data), doubled(rotten, there / "doubled", data)]
    for path in blocks:
        assert path.read_bytes() == data
    for path in blocks:
        spoil(rotten, path, damage, seen=True)
    assert (there / "doubled").read_bytes() == data
    assert is_a_miss(there / "sole")


@pytest.mark.semantics("S-verify-3")
def test_a_file_that_was_touched_while_it_was_open_is_read_at_the_next_open(
    rotten: MountedKvfs, there: Path
) -> None:
    data = os.urandom(SIZE)
    blocks = [sole(rotten, there / "sole", data), doubled(rotten, there / "doubled", data)]
    for path in blocks:
        with path.open("rb"):
            spoil(rotten, path, seen=True)
    assert is_a_miss(there / "sole")
    assert (there / "doubled").read_bytes() == data


@pytest.mark.semantics("S-verify-3")
def test_nobody_joins_a_handle_that_has_a_touched_file(rotten: MountedKvfs, there: Path) -> None:
    data = os.urandom(SIZE)
    sole(rotten, there / "sole", data)
    path = doubled(rotten, there / "doubled", data)
    with path.open("rb") as held, (there / "sole").open("rb") as lost:
        assert held.read(10) == data[:10]
        spoil(rotten, path, seen=True)
        spoil(rotten, there / "sole", seen=True)
        for _ in range(3):
            with path.open("rb") as joined:
                assert joined.read() == data
                assert os.pread(joined.fileno(), SIZE, 0) == data
        assert is_a_miss(there / "sole")
        assert len(os.pread(held.fileno(), SIZE, 0)) == SIZE, "its handle reads on, all of it"
        assert len(os.pread(lost.fileno(), SIZE, 0)) == SIZE
    assert path.read_bytes() == data
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        assert mapping[:] == data
    promote(rotten, path)
    assert replicas(path) == ["nvme", "hdd"]
    assert path.read_bytes() == data


@pytest.mark.semantics("S-verify-6")
def test_a_writer_does_not_build_on_what_is_bad(rotten: MountedKvfs, there: Path) -> None:
    data = os.urandom(SIZE)
    sole(rotten, there / "sole", data)
    path = doubled(rotten, there / "doubled", data)
    for name in ("sole", "doubled"):
        spoil(rotten, there / name, seen=True)
    with pytest.raises(FileNotFoundError):
        os.open(there / "sole", os.O_RDWR)
    with path.open("r+b") as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" + data[3:]
    wait_sealed(path)


def test_a_name_that_was_lost_can_be_made_again(rotten: MountedKvfs, there: Path) -> None:
    path = sole(rotten, there / "block", os.urandom(SIZE))
    spoil(rotten, path, seen=True)
    assert is_a_miss(path)
    assert publish(path, b"computed anew").read_bytes() == b"computed anew"
    wait_sealed(path)


@pytest.mark.semantics("S-verify-8")
def test_scrub_finds_what_no_open_would(rotten: MountedKvfs, there: Path) -> None:
    data = os.urandom(SIZE)
    sole(rotten, there / "sole", data)
    path = doubled(rotten, there / "doubled", data)
    spoil(rotten, path, tier="hdd")
    spoil(rotten, there / "sole")
    assert path.read_bytes() == data
    with path.open("rb") as held:
        done = run_kvfs("scrub", rotten.path, "--json", check=False)
        assert held.read() == data
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert sorted((one["tier"], one["path"]) for one in found["named"]) == [
        ("hdd", os.fsdecode(below(rotten, path))),
        ("nvme", os.fsdecode(below(rotten, there / "sole"))),
    ]
    assert (found["bad"], found["unreadable"], found["offline"]) == (2, 0, [])
    # Nobody asked the kernel to look: it has been told.
    wait_gone(there / "sole")
    assert replicas(path) == ["nvme"]
    assert call(rotten, "scrub", path=below(rotten, path))["checked"] == 1
    assert call(rotten, "fsck")["findings"] == []


@pytest.mark.semantics("S-verify-7")
def test_the_quarantine_is_counted_shown_and_emptied(rotten: MountedKvfs, there: Path) -> None:
    path = sole(rotten, there / "block", os.urandom(SIZE))
    call(rotten, "quarantine", purge=True)
    used = rotten.tier("nvme")["used_bytes"]
    stored = rotten.tiers["nvme"] / os.fsdecode(below(rotten, path))
    allocated = stored.stat().st_blocks * 512
    spoil(rotten, path, seen=True)
    assert is_a_miss(path)
    tier = rotten.tier("nvme")
    assert tier["quarantine_files"] == 1
    assert tier["used_bytes"] == used - allocated
    listed = json.loads(run_kvfs("quarantine", rotten.path, "--tier", "nvme", "--json").stdout)
    (file,) = listed["files"]
    assert file["path"] == os.fsdecode(below(rotten, path))
    assert file["reason"] == "checksum"
    aside = rotten.tiers["nvme"] / ".kvfs" / "quarantine" / file["name"]
    assert aside.read_bytes() == bytes(SIZE)
    # Why it lies there is an xattr, which may take a page.
    assert tier["quarantine_bytes"] == aside.stat().st_blocks * 512
    assert "1 files" in run_kvfs("quarantine", rotten.path, "--purge").stdout
    assert not aside.exists()
    assert rotten.tier("nvme")["quarantine_files"] == 0
    metrics = (rotten.path / ".kvfs/metrics").read_text()
    assert 'kvfs_incidents_total{event="quarantined",reason="checksum",tier="nvme"}' in metrics


def test_an_interrupted_scrub_goes_on(shared: MountedKvfs, there: Path) -> None:
    for number in range(20):
        publish(there / str(number), os.urandom(MIB // 4))
    wait_until(lambda: shared.status()["unsealed"] == 0, "everything sealed")
    total = call(shared, "scrub")["checked"]
    before = shared.status()["counters"]["scrubbed"]
    slow = subprocess.Popen([KVFS, "scrub", shared.path, "--rate", "1MiB/s", "--restart"])
    wait_until(lambda: shared.status()["counters"]["scrubbed"] - before >= 2, "two blocks scrubbed")
    slow.send_signal(signal.SIGINT)
    assert slow.wait(30) == 130
    # The daemon notices at its next report that nobody listens.
    wait_until(lambda: shared.status()["scrub"]["at"] == "", "the scrub stopped")
    assert shared.status()["counters"]["scrubbed"] - before < total
    again = call(shared, "scrub")
    assert again["resumed"]
    assert again["checked"] == total


def test_the_benchmark_of_the_checks_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_verify, "BLOCKS", {64 * KIB: 3, MIB: 2})
    rows = {row.what: row for row in bench_verify.measure_checks(tmp_path, 1)}
    assert len(rows) == 6
    assert all(row.with_checks > 0 for row in rows.values())
    assert rows["open + close after that, 64 KiB"].without is not None
    assert bench_verify.checks_table(list(rows.values())).row_count == 6
    assert list(tmp_path.iterdir()) == []
