"""Writing: visibility, append, truncate, holes, mappings, fsync, states and rewriting."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.live import (
    KIB,
    MIB,
    TIERS,
    below,
    demote,
    info,
    promote,
    publish,
    put_on,
    refusal_of,
    replicas,
    state,
    wait_gone,
    wait_sealed,
)
from tests.mounting import MountedKvfs


@pytest.mark.semantics("S-publish-2")
def test_exclusive_creation_has_one_winner(there: Path) -> None:
    script = "import os, sys; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL | os.O_WRONLY)"
    command = [sys.executable, "-S", "-c", script, str(there / "block")]
    started = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(4)]
    assert sorted(process.wait() for process in started) == [0, 1, 1, 1]
    with pytest.raises(FileExistsError):
        os.open(there / "block", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    os.close(os.open(there / "block", os.O_CREAT | os.O_WRONLY))


@pytest.mark.semantics("S-write-1", "S-publish-5")
def test_written_bytes_are_visible_at_once_and_a_half_written_file_too(there: Path) -> None:
    path = there / "block"
    with path.open("wb", buffering=0) as writer:
        assert writer.write(b"a" * 100_000) == 100_000
        assert state(path) == "writing"
        assert path.stat().st_size == 100_000
        assert subprocess.run(["cat", path], check=True, capture_output=True).stdout == b"a" * 10**5
        writer.write(b"b" * 100_000)
        assert path.read_bytes() == b"a" * 100_000 + b"b" * 100_000


@pytest.mark.semantics("S-publish-1", "S-publish-3", "S-publish-4")
def test_states_of_a_block(there: Path) -> None:
    temporary, path = there / "block.tmp", there / "block"
    with temporary.open("wb", buffering=0) as writer:
        writer.write(b"x" * 1000)
        assert state(temporary) == "writing"
        temporary.rename(path)
        assert state(path) == "published"
        writer.write(b"y" * 1000)
        assert state(path) == "published"
        with pytest.raises(OSError, match="No data"):
            os.getxattr(path, "user.kvfs.checksum")
    wait_sealed(path)
    assert os.getxattr(path, "user.kvfs.checksum").startswith(b"xxh3-128:")
    assert path.read_bytes() == b"x" * 1000 + b"y" * 1000


@pytest.mark.semantics("S-publish-1")
def test_fsync_publishes(there: Path) -> None:
    path = there / "block"
    with path.open("wb", buffering=0) as writer:
        writer.write(b"x")
        os.fsync(writer.fileno())
        assert state(path) == "published"
    directory = os.open(there, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


@pytest.mark.semantics("S-publish-4")
def test_a_shared_mapping_keeps_a_block_from_being_sealed(shared: MountedKvfs, there: Path) -> None:
    path = publish(there / "block", bytes(4 * mmap.PAGESIZE))
    wait_sealed(path)
    descriptor = os.open(path, os.O_RDWR)
    mapping = mmap.mmap(descriptor, 4 * mmap.PAGESIZE)
    os.close(descriptor)
    mapping[0:5] = b"first"
    assert demote(shared, path, "hdd")["skipped"]
    assert state(path) == "reopened"
    mapping[5:9] = b"last"
    mapping.close()
    wait_sealed(path)
    assert path.read_bytes()[:9] == b"firstlast"


@pytest.mark.semantics("S-publish-5")
def test_a_killed_writer_looks_like_one_that_closed(there: Path) -> None:
    path = there / "block"
    script = (
        "import os, signal, sys\n"
        "with open(sys.argv[1], 'wb', buffering=0) as f:\n"
        "    f.write(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, path], check=False).returncode == -9
    wait_sealed(path)
    assert path.read_bytes() == b"half"


@pytest.mark.semantics("S-publish-6")
def test_rewriting_decides_at_the_last_close_whether_the_block_changed(
    shared: MountedKvfs, there: Path
) -> None:
    path = publish(there / "block", b"same" * 1000)
    put_on(shared, path, "hdd")
    promote(shared, path)
    generation = info(shared, path)["generation"]
    with path.open("r+b") as writer:
        assert state(path) == "reopened"
        writer.write(b"same")
    wait_sealed(path)
    assert info(shared, path)["generation"] == generation
    assert replicas(path) == ["nvme", "hdd"]
    with path.open("r+b") as writer:
        writer.write(b"diff")
    wait_sealed(path)
    assert info(shared, path)["generation"] > generation
    assert replicas(path) == ["nvme"]
    stale = shared.tiers["hdd"] / os.fsdecode(below(shared, path))
    wait_gone(stale)
    assert path.read_bytes() == b"diff" + b"same" * 999


@pytest.mark.semantics("S-write-2")
@pytest.mark.parametrize("tier", TIERS)
def test_append_goes_to_the_end(shared: MountedKvfs, there: Path, tier: str) -> None:
    path = publish(there / "log", b"start\n")
    put_on(shared, path, tier)
    with path.open("ab", buffering=0) as one, path.open("ab", buffering=0) as two:
        for number in range(20):
            one.write(b"one %d\n" % number)
            two.write(b"two %d\n" % number)
    expected = [b"start"]
    for number in range(20):
        expected += [b"one %d" % number, b"two %d" % number]
    assert path.read_bytes().splitlines() == expected


@pytest.mark.semantics("S-write-3")
@pytest.mark.parametrize("tier", TIERS)
def test_truncate_in_its_three_ways(shared: MountedKvfs, there: Path, tier: str) -> None:
    path = publish(there / "block", b"0123456789" * 100)
    put_on(shared, path, tier)
    os.truncate(path, 5)
    assert path.stat().st_size == 5
    assert path.read_bytes() == b"01234"
    with path.open("r+b") as file:
        os.ftruncate(file.fileno(), 8)
        assert os.fstat(file.fileno()).st_size == 8
        assert file.read() == b"01234\0\0\0"
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
    assert path.stat().st_size == 0
    assert path.read_bytes() == b""
    wait_sealed(path)
    assert path.stat().st_size == 0


@pytest.mark.semantics("S-write-4")
def test_a_hole_reads_as_zeros(shared: MountedKvfs, there: Path) -> None:
    path = there / "sparse"
    with path.open("wb") as file:
        file.seek(10 * MIB)
        file.write(b"end")
    expected = bytes(10 * MIB) + b"end"
    assert path.read_bytes() == expected
    put_on(shared, path, "hdd")
    assert path.read_bytes() == expected


@pytest.mark.semantics("S-write-5")
@pytest.mark.parametrize("tier", TIERS)
def test_mappings_private_and_shared(shared: MountedKvfs, there: Path, tier: str) -> None:
    data = os.urandom(256 * KIB)
    path = publish(there / "block", data)
    put_on(shared, path, tier)
    with path.open("rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as private:
            assert private[:] == data
            private[0:4] = b"mine"
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as readable:
            assert readable[:] == data
    with path.open("r+b") as writer, mmap.mmap(writer.fileno(), 0) as mapping:
        mapping[100:104] = b"ours"
        mapping.flush()
        assert path.read_bytes()[100:104] == b"ours"
    assert path.read_bytes() == data[:100] + b"ours" + data[104:]


@pytest.mark.semantics("S-moves-3")
def test_unsealed_and_temporary_files_are_never_moved(shared: MountedKvfs, there: Path) -> None:
    temporary = there / "left.tmp"
    temporary.write_bytes(b"x")
    wait_sealed(temporary)
    reasons = [skip["reason"] for skip in demote(shared, temporary, "hdd")["skipped"]]
    assert reasons == ["it is a temporary file"]
    open_block = there / "open"
    with open_block.open("wb", buffering=0) as writer:
        writer.write(b"x")
        reasons = [skip["reason"] for skip in demote(shared, open_block, "hdd")["skipped"]]
        assert reasons == ["it is not sealed yet"]
    assert replicas(temporary) == replicas(open_block) == ["nvme"]


@pytest.mark.semantics("S-weak-1")
def test_rot_after_it_was_verified_is_noticed_by_a_move_and_not_by_a_read(
    shared: MountedKvfs, there: Path, shared_log: list[str]
) -> None:
    path = publish(there / "block", b"good" * 1000)
    wait_sealed(path)
    backing = shared.tiers["nvme"] / os.fsdecode(below(shared, path))
    times = backing.stat()
    backing.chmod(0o600)
    with backing.open("r+b") as file:
        file.write(b"rot!")
    os.utime(backing, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.read_bytes().startswith(b"rot!")
    shared_log += ["has not the sealed checksum", "'.*/block' is bad .*: quarantined"]
    skipped = demote(shared, path, "hdd")["skipped"]
    assert [skip["reason"] for skip in skipped] == [
        f"{backing}: the copy has not the sealed checksum"
    ]
    with pytest.raises(FileNotFoundError):
        path.open("rb")


@pytest.mark.semantics("S-read-4")
def test_a_replica_of_another_length_is_a_lost_replica(
    shared: MountedKvfs, there: Path, shared_log: list[str]
) -> None:
    shared_log += ["bytes, sealed with .*: quarantined", "tier nvme lost"]
    damages: list[Callable[[Path], object]] = [lambda path: os.truncate(path, 100), os.unlink]
    for number, damage in enumerate(damages):
        sole = publish(there / f"sole-{number}", b"good" * 1000)
        copied = publish(there / f"copied-{number}", b"good" * 1000)
        put_on(shared, copied, "hdd")
        promote(shared, copied)
        wait_sealed(sole)
        for path in (sole, copied):
            backing = shared.tiers["nvme"] / os.fsdecode(below(shared, path))
            backing.chmod(0o600)
            damage(backing)
        assert copied.read_bytes() == b"good" * 1000
        with pytest.raises(FileNotFoundError):
            sole.open("rb")
        assert not sole.exists()
        assert replicas(copied) == ["hdd"]


@pytest.mark.semantics("S-publish-2")
def test_opening_a_directory_for_writing_is_refused(there: Path) -> None:
    assert refusal_of(lambda: os.open(there, os.O_WRONLY)) == errno.EISDIR
