"""Rename, unlink and rmdir, also of what is open and of what lies on several tiers."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from tests.mount.live import (
    KIB,
    MIB,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    TIERS,
    below,
    demote,
    promote,
    publish,
    put_on,
    refusal_of,
    renameat2,
    replicas,
    wait_gone,
    wait_sealed,
)
from tests.mounting import MountedKvfs, wait_until


def on_tier(mount: MountedKvfs, tier: str, path: Path) -> Path:
    """Where a tier keeps the bytes of a path of the mount."""
    return mount.tiers[tier] / os.fsdecode(below(mount, path))


@pytest.mark.semantics("S-rename-1", "S-rename-2")
def test_rename_over_an_open_file_leaves_its_readers_the_old_bytes(there: Path) -> None:
    old, new = os.urandom(3 * MIB), os.urandom(2 * MIB)
    target = publish(there / "block", old)
    with target.open("rb") as reader:
        assert reader.read(1000) == old[:1000]
        number = os.fstat(reader.fileno()).st_ino
        publish(target, new)
        assert target.read_bytes() == new
        assert reader.read() == old[1000:]
        assert os.fstat(reader.fileno()).st_ino == number
        assert os.fstat(reader.fileno()).st_size == len(old)
    assert target.read_bytes() == new
    assert target.stat().st_ino != number


@pytest.mark.semantics("S-rename-1", "S-rename-7")
def test_a_reader_of_a_name_that_is_replaced_sees_one_whole_version(there: Path) -> None:
    target = publish(there / "block", b"0" * (64 * KIB))
    script = (
        "import sys, os\n"
        "for n in range(150):\n"
        "    with open(sys.argv[1] + '.w.tmp', 'wb') as f: f.write(b'%d' % (n % 10) * 65536)\n"
        "    os.replace(sys.argv[1] + '.w.tmp', sys.argv[1])\n"
    )
    with subprocess.Popen(["python3", "-c", script, target]) as writer:
        while writer.poll() is None:
            try:
                data = target.read_bytes()
            except OSError as error:
                # Replaced twice between the kernel's lookup and its open; S-rename-7 says so.
                if error.errno != errno.ESTALE:
                    raise
                continue
            assert len(data) == 64 * KIB
            assert len(set(data)) == 1
    assert writer.returncode == 0
    assert os.listdir(there) == ["block"]


@pytest.mark.semantics("S-rename-2")
def test_a_handle_follows_its_file_to_the_new_name(there: Path) -> None:
    path = there / "before.tmp"
    with path.open("w+b") as file:
        file.write(b"one")
        file.flush()
        path.rename(there / "after")
        file.write(b"two")
        file.flush()
        assert (there / "after").read_bytes() == b"onetwo"
        assert not path.exists()
    assert (there / "after").read_bytes() == b"onetwo"


@pytest.mark.semantics("S-rename-3")
def test_rename_noreplace(there: Path) -> None:
    source, target = publish(there / "source", b"s"), publish(there / "target", b"t")
    assert refusal_of(lambda: renameat2(source, target, RENAME_NOREPLACE)) == errno.EEXIST
    assert (source.read_bytes(), target.read_bytes()) == (b"s", b"t")
    renameat2(source, there / "free", RENAME_NOREPLACE)
    assert (there / "free").read_bytes() == b"s"
    assert not source.exists()


@pytest.mark.semantics("S-refused-2")
def test_rename_exchange_is_refused(there: Path) -> None:
    source, target = publish(there / "source", b"s"), publish(there / "target", b"t")
    assert refusal_of(lambda: renameat2(source, target, RENAME_EXCHANGE)) == errno.EINVAL
    assert (source.read_bytes(), target.read_bytes()) == (b"s", b"t")


@pytest.mark.semantics("S-rename-4")
def test_a_directory_takes_its_blocks_along_on_every_tier(shared: MountedKvfs, there: Path) -> None:
    source = there / "model"
    (source / "ab").mkdir(parents=True)
    data = {tier: os.urandom(64 * KIB) for tier in TIERS}
    for tier, content in data.items():
        put_on(shared, publish(source / "ab" / f"{tier}.bin", content), tier)
    promote(shared, source / "ab" / "remote.bin", "hdd")
    assert replicas(source / "ab" / "remote.bin") == ["hdd", "remote"]
    numbers = {tier: (source / "ab" / f"{tier}.bin").stat().st_ino for tier in TIERS}
    target = there / "elsewhere" / "renamed"
    target.parent.mkdir()
    with (source / "ab" / "hdd.bin").open("rb") as reader:
        source.rename(target)
        assert reader.read() == data["hdd"]
    assert not source.exists()
    for tier, content in data.items():
        path = target / "ab" / f"{tier}.bin"
        assert path.read_bytes() == content
        assert path.stat().st_ino == numbers[tier]
        assert on_tier(shared, tier, path).read_bytes() == content
        assert not on_tier(shared, tier, source / "ab" / path.name).exists()
    assert on_tier(shared, "hdd", target / "ab" / "remote.bin").read_bytes() == data["remote"]


@pytest.mark.semantics("S-rename-5")
def test_renames_that_posix_refuses(there: Path) -> None:
    outer, full = there / "outer", there / "full"
    (outer / "inner").mkdir(parents=True)
    full.mkdir()
    file = publish(full / "file", b"x")
    assert refusal_of(lambda: outer.rename(outer / "inner" / "outer")) == errno.EINVAL
    assert refusal_of(lambda: outer.rename(full)) == errno.ENOTEMPTY
    assert refusal_of(lambda: file.rename(outer)) == errno.EISDIR
    assert refusal_of(lambda: outer.rename(file)) == errno.ENOTDIR
    assert refusal_of(lambda: (there / "no").rename(there / "where")) == errno.ENOENT
    assert refusal_of(lambda: file.rename(there / "no" / "where")) == errno.ENOENT
    (there / "empty").mkdir()
    outer.rename(there / "empty")
    assert (there / "empty" / "inner").is_dir()
    assert file.read_bytes() == b"x"


@pytest.mark.semantics("S-rename-6")
@pytest.mark.parametrize("tier", TIERS)
def test_a_rename_keeps_the_inode_number_and_replaces_on_all_tiers(
    shared: MountedKvfs, there: Path, tier: str
) -> None:
    source, target = publish(there / "source", b"new"), publish(there / "target", b"old")
    put_on(shared, target, tier)
    wait_sealed(source)
    number = source.stat().st_ino
    source.rename(target)
    assert target.stat().st_ino == number
    assert target.read_bytes() == b"new"
    assert on_tier(shared, "nvme", target).read_bytes() == b"new"
    if tier != "nvme":
        wait_gone(on_tier(shared, tier, target))
    assert replicas(target) == ["nvme"]


@pytest.mark.semantics("S-unlink-1")
def test_an_unlinked_file_lives_until_its_last_close(shared: MountedKvfs, there: Path) -> None:
    data = os.urandom(2 * MIB)
    path = publish(there / "block", data)
    wait_sealed(path)
    with path.open("rb") as reader, path.open("r+b") as writer:
        path.unlink()
        assert refusal_of(path.stat) == errno.ENOENT
        assert reader.read() == data
        writer.write(b"changed")
        writer.flush()
        reader.seek(0)
        assert reader.read(7) == b"changed"
        assert os.fstat(reader.fileno()).st_size == len(data)
        publish(path, b"another")
        reader.seek(0)
        assert len(reader.read()) == len(data)
    assert path.read_bytes() == b"another"


@pytest.mark.semantics("S-unlink-2")
def test_space_of_an_unlinked_open_file_is_held_until_its_last_close(
    shared: MountedKvfs, there: Path
) -> None:
    def held() -> int:
        return sum(tier["held_bytes"] for tier in shared.status()["tiers"])

    path = publish(there / "block", os.urandom(2 * MIB))
    wait_sealed(path)
    wait_until(lambda: held() == 0, "nothing held")
    with path.open("rb"):
        path.unlink()
        assert held() >= 2 * MIB
    wait_until(lambda: held() == 0, "the space given back")


@pytest.mark.semantics("S-unlink-3")
def test_unlink_removes_the_file_from_every_tier(shared: MountedKvfs, there: Path) -> None:
    path = publish(there / "block", os.urandom(64 * KIB))
    put_on(shared, path, "remote")
    promote(shared, path, "hdd")
    promote(shared, path, "nvme")
    assert replicas(path) == list(TIERS)
    path.unlink()
    assert not path.exists()
    for tier in TIERS:
        wait_gone(on_tier(shared, tier, path))


@pytest.mark.semantics("S-unlink-4")
def test_rmdir_and_unlink_refuse_what_posix_refuses(there: Path) -> None:
    (there / "d").mkdir()
    file = publish(there / "d" / "file", b"x")
    assert refusal_of((there / "d").rmdir) == errno.ENOTEMPTY
    assert refusal_of(file.rmdir) == errno.ENOTDIR
    assert refusal_of((there / "d").unlink) == errno.EISDIR
    assert refusal_of((there / "no").unlink) == errno.ENOENT
    assert refusal_of((file / "below").stat) == errno.ENOTDIR
    file.unlink()
    (there / "d").rmdir()
    assert os.listdir(there) == []


@pytest.mark.semantics("S-unlink-4")
def test_a_directory_whose_blocks_are_on_slow_tiers_is_removed_there_too(
    shared: MountedKvfs, there: Path
) -> None:
    (there / "d").mkdir()
    path = publish(there / "d" / "file", b"x")
    put_on(shared, path, "hdd")
    assert refusal_of((there / "d").rmdir) == errno.ENOTEMPTY
    path.unlink()
    (there / "d").rmdir()
    for tier in ("nvme", "hdd"):
        wait_gone(on_tier(shared, tier, there / "d"))


@pytest.mark.semantics("S-unlink-5")
def test_inode_numbers_are_never_used_again(there: Path) -> None:
    numbers = set()
    for _ in range(5):
        path = publish(there / "block", b"x")
        numbers.add(path.stat().st_ino)
        path.unlink()
    assert len(numbers) == 5


@pytest.mark.semantics("S-moves-1")
def test_a_block_stays_on_the_replica_it_was_opened_on(shared: MountedKvfs, there: Path) -> None:
    data = os.urandom(3 * MIB)
    path = publish(there / "block", data)
    put_on(shared, path, "hdd")
    with path.open("rb") as reader:
        assert reader.read(10) == data[:10]
        promote(shared, path)
        assert replicas(path) == ["nvme", "hdd"]
        with path.open("rb") as second:
            assert second.read() == data
        outcome = demote(shared, path, "remote")
        assert [skip["reason"] for skip in outcome["skipped"]] == ["it is open"]
        assert reader.read() == data[10:]
    assert path.read_bytes() == data


@pytest.mark.semantics("S-moves-2")
def test_a_move_changes_nothing_that_stat_shows(shared: MountedKvfs, there: Path) -> None:
    path = publish(there / "block", os.urandom(64 * KIB))
    os.utime(path, ns=(10**18, 10**18 + 7))
    path.chmod(0o640)
    wait_sealed(path)
    before = path.stat()
    for tier in ("hdd", "remote"):
        demote(shared, path, tier)
        assert path.stat() == before
    promote(shared, path)
    assert path.stat() == before
