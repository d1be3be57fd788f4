"""Modes, owners, times and xattrs: what survives moves, remounts and a lost catalog; statfs."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.mount.live import (
    KIB,
    MIB,
    call,
    config_in,
    demote,
    info,
    live,
    promote,
    publish,
    put_on,
    refusal_of,
    scratch,
    wait_sealed,
)
from tests.mounting import MountedKvfs, run_kvfs, wait_until

STRANGER = 54321


@pytest.fixture(scope="module")
def settled() -> Iterator[MountedKvfs]:
    """A mount whose tests unmount and mount again."""
    with scratch() as base, live(MountedKvfs(base, config_in(base))) as mount:
        yield mount


def lose_catalog(mount: MountedKvfs) -> None:
    """Unmount, delete the catalog, mount: it is rebuilt from the tiers."""
    mount.stop()
    for name in ("catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm"):
        (mount.tiers["nvme"] / ".kvfs" / name).unlink(missing_ok=True)
    mount.start()


def refused(*command: object) -> str:
    """What a command that must fail says."""
    done = subprocess.run([*map(str, command)], check=False, capture_output=True, text=True)
    assert done.returncode != 0
    return done.stderr


def dress(path: Path) -> None:
    """Give a sealed block every attribute that must survive."""
    path.chmod(0o640)
    os.chown(path, STRANGER, STRANGER + 1)
    os.utime(path, ns=(10**18, 1234567890123456789))
    os.setxattr(path, "user.vllm.kv_crc32c", b"\x00\xff\x10")
    os.setxattr(path, "user.kvfs.pin", b"1")
    os.setxattr(path, "user.kvfs.ttl", b"2h")


def look_at(mount: MountedKvfs, path: Path) -> dict[str, object]:
    """What must be the same afterwards."""
    status = path.stat()
    fields = ("st_mode", "st_uid", "st_gid", "st_size", "st_mtime_ns", "st_ino")
    xattrs = ("user.vllm.kv_crc32c", "user.kvfs.pin", "user.kvfs.ttl", "user.kvfs.replicas",
              "user.kvfs.state", "user.kvfs.checksum")  # fmt: skip
    return {
        **{field: getattr(status, field) for field in fields},
        **{name: os.getxattr(path, name) for name in xattrs},
        "generation": info(mount, path)["generation"],
        "bytes": path.read_bytes(),
    }


@pytest.mark.semantics("S-attributes-1", "S-attributes-2", "S-xattr-2", "S-xattr-4")
@pytest.mark.parametrize("again", ["remount", "rebuild"])
def test_attributes_survive_a_remount_and_a_rebuild(settled: MountedKvfs, again: str) -> None:
    directory = settled.path / f"model-{again}"
    directory.mkdir()
    paths = [publish(directory / tier, os.urandom(64 * KIB)) for tier in ("nvme", "hdd")]
    for path in paths:
        put_on(settled, path, path.name)
        dress(path)
    directory.chmod(0o2770)
    os.chown(directory, STRANGER, STRANGER + 2)
    os.setxattr(directory, "user.origin", b"here")
    os.setxattr(directory, "user.kvfs.pin", b"1")
    before = [look_at(settled, path) for path in paths]
    if again == "remount":
        settled.remount()
    else:
        lose_catalog(settled)
    assert [look_at(settled, path) for path in paths] == before
    assert before[1]["user.kvfs.replicas"] == b"hdd"
    assert before[0]["st_mtime_ns"] == 1234567890123456789
    parent = directory.stat()
    assert stat.S_IMODE(parent.st_mode) == 0o2770
    assert (parent.st_uid, parent.st_gid) == (STRANGER, STRANGER + 2)
    assert os.getxattr(directory, "user.origin") == b"here"
    assert os.getxattr(directory, "user.kvfs.pin") == b"1"


@pytest.mark.semantics("S-weak-4")
def test_a_rebuild_forgets_heat_and_opens_directories_to_their_owner(settled: MountedKvfs) -> None:
    directory = settled.path / "weak"
    directory.mkdir()
    path = publish(directory / "block", b"x")
    wait_sealed(path)
    os.utime(path, ns=(10**18, 10**18))
    directory.chmod(0o050)
    assert call(settled, "touch", paths=[b"weak/block"])["touched"] == 1
    lose_catalog(settled)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o750
    assert float(os.getxattr(path, "user.kvfs.heat")) < 0.01


@pytest.mark.semantics("S-attributes-3")
def test_permissions_are_enforced(there: Path) -> None:
    path = publish(there / "block", b"secret")
    path.chmod(0o600)
    command = ["cat", str(path)]
    ids = [f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups"]
    assert "Permission denied" in refused("setpriv", *ids, *command)
    path.chmod(0o604)
    read = subprocess.run(command, check=True, capture_output=True, user=STRANGER, group=STRANGER)
    assert read.stdout == b"secret"
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run(
            ["touch", there / "new"], check=True, capture_output=True, user=STRANGER, group=STRANGER
        )
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run(
            ["chmod", "777", path], check=True, capture_output=True, user=STRANGER, group=STRANGER
        )
    there.chmod(0o777)
    subprocess.run(["touch", there / "new"], check=True, user=STRANGER, group=STRANGER)
    assert (there / "new").stat().st_uid == STRANGER
    assert (there / "new").stat().st_gid == STRANGER


@pytest.mark.semantics("S-attributes-3")
def test_a_set_group_id_directory_passes_its_group_on(there: Path) -> None:
    os.chown(there, 0, STRANGER)
    there.chmod(0o2755)
    (there / "sub").mkdir()
    (there / "file").write_bytes(b"")
    assert (there / "sub").stat().st_gid == (there / "file").stat().st_gid == STRANGER
    assert (there / "sub").stat().st_mode & stat.S_ISGID


@pytest.mark.semantics("S-attributes-4")
def test_a_change_in_a_directory_changes_its_times(there: Path) -> None:
    os.utime(there, ns=(10**18, 10**18))
    changes: list[Callable[[], object]] = [
        lambda: (there / "file").write_bytes(b""),
        lambda: (there / "file").rename(there / "other"),
        lambda: (there / "other").unlink(),
        lambda: (there / "sub").mkdir(),
        lambda: (there / "sub").rmdir(),
    ]
    for change in changes:
        before = there.stat().st_mtime_ns
        change()
        assert there.stat().st_mtime_ns > before


@pytest.mark.semantics("S-attributes-5")
def test_blocks_and_links_that_stat_shows(shared: MountedKvfs, there: Path) -> None:
    path = publish(there / "block", bytes(MIB))
    put_on(shared, path, "hdd")
    promote(shared, path)
    assert path.stat().st_blocks == MIB // 512
    assert path.stat().st_nlink == 1
    (there / "sub").mkdir()
    assert there.stat().st_nlink == 2
    du = subprocess.run(["du", "-sk", path], check=True, capture_output=True, text=True)
    assert int(du.stdout.split()[0]) == 1024


# --- xattrs


@pytest.mark.semantics("S-xattr-1", "S-xattr-2")
def test_foreign_xattrs_follow_the_block_across_tiers(shared: MountedKvfs, there: Path) -> None:
    path = publish(there / "block", os.urandom(64 * KIB))
    os.setxattr(path, "user.vllm.kv_crc32c", b"1234")
    wait_sealed(path)
    demote(shared, path, "hdd")
    os.setxattr(path, "user.second", b"\x00")
    assert sorted(os.listxattr(path)) == ["user.second", "user.vllm.kv_crc32c"]
    demote(shared, path, "remote")
    backing = shared.tiers["remote"] / there.name / "block"
    assert os.getxattr(backing, "user.vllm.kv_crc32c") == b"1234"
    assert os.getxattr(backing, "user.second") == b"\x00"
    os.removexattr(path, "user.second")
    assert os.listxattr(path) == ["user.vllm.kv_crc32c"]
    assert "user.second" not in os.listxattr(backing)
    with pytest.raises(OSError, match="No data"):
        os.getxattr(path, "user.second")


@pytest.mark.semantics("S-xattr-1")
def test_limits_and_flags_of_xattrs(there: Path) -> None:
    path = publish(there / "block", b"x")
    os.setxattr(path, "user.a", b"1", os.XATTR_CREATE)
    with pytest.raises(FileExistsError):
        os.setxattr(path, "user.a", b"2", os.XATTR_CREATE)
    with pytest.raises(OSError, match="No data"):
        os.setxattr(path, "user.b", b"2", os.XATTR_REPLACE)
    os.setxattr(path, "user.big", bytes(3000))
    for name, value in (("user.more", bytes(600)), ("user.big", bytes(3600))):
        assert refusal_of(partial(os.setxattr, path, name, value)) == errno.ENOSPC
    for name in ("trusted.x", "security.x"):
        assert refusal_of(partial(os.setxattr, path, name, b"1")) == errno.EOPNOTSUPP
    assert sorted(os.listxattr(path)) == ["user.a", "user.big"]


@pytest.mark.semantics("S-xattr-1", "S-xattr-2")
def test_the_tiers_carry_as_many_xattrs_as_the_mount_takes(
    shared: MountedKvfs, there: Path
) -> None:
    path = publish(there / "block", b"x")
    os.setxattr(path, "user.kvfs.pin", b"remote")
    os.setxattr(path, "user.kvfs.ttl", b"3650d")

    def fill() -> None:
        for number in range(1000):
            os.setxattr(path, f"user.n{number}", b"v")

    assert refusal_of(fill) == errno.ENOSPC
    names = [name for name in os.listxattr(path) if name.startswith("user.n")]
    assert len(names) > 100
    for tier in ("nvme", "hdd", "remote"):
        put_on(shared, path, tier)
        backing = shared.tiers[tier] / there.name / "block"
        assert {*names, "user.kvfs.pin", "user.kvfs.ttl"} < set(os.listxattr(backing))


@pytest.mark.semantics("S-xattr-3")
def test_computed_xattrs_are_readable_unlisted_and_cannot_be_set(
    shared: MountedKvfs, there: Path
) -> None:
    path = publish(there / "block", b"x")
    put_on(shared, path, "hdd")
    promote(shared, path)
    shown = {
        name: os.getxattr(path, f"user.kvfs.{name}")
        for name in ("tier", "replicas", "heat", "state", "checksum")
    }
    assert shown["tier"] == b"nvme"
    assert shown["replicas"] == b"nvme,hdd"
    assert shown["state"] == b"sealed"
    assert float(shown["heat"]) > 0
    assert shown["checksum"].decode() == f"xxh3-128:{info(shared, path)['checksum']}"
    assert os.listxattr(path) == []
    for name in (*shown, "seal", "other"):
        with pytest.raises(PermissionError):
            os.setxattr(path, f"user.kvfs.{name}", b"1")
        with pytest.raises(PermissionError):
            os.removexattr(path, f"user.kvfs.{name}")
    with pytest.raises(OSError, match="No data"):
        os.getxattr(path, "user.kvfs.other")


@pytest.mark.semantics("S-xattr-4", "S-xattr-5")
def test_pin_and_ttl_are_set_with_setfattr(shared: MountedKvfs, there: Path) -> None:
    path = publish(there / "block", b"x")
    for value, shown in (("1", b"1"), ("hdd", b"hdd")):
        subprocess.run(["setfattr", "-n", "user.kvfs.pin", "-v", value, path], check=True)
        assert os.getxattr(path, "user.kvfs.pin") == shown
    for value, shown in (("120", b"120s"), ("5m", b"300s")):
        subprocess.run(["setfattr", "-n", "user.kvfs.ttl", "-v", value, path], check=True)
        assert os.getxattr(path, "user.kvfs.ttl") == shown
    assert sorted(os.listxattr(path)) == ["user.kvfs.pin", "user.kvfs.ttl"]
    assert info(shared, path)["pinned"] is True
    for name, value in (("pin", "neither"), ("ttl", "soon")):
        assert "Invalid argument" in refused(
            "setfattr", "-n", f"user.kvfs.{name}", "-v", value, path
        )
    subprocess.run(["setfattr", "-x", "user.kvfs.pin", path], check=True)
    os.setxattr(path, "user.kvfs.ttl", b"0")
    assert os.listxattr(path) == []
    os.setxattr(there, "user.kvfs.pin", b"1")
    assert info(shared, path)["pinned"] is True
    assert info(shared, path)["pin"] is None


@pytest.mark.semantics("S-xattr-6")
def test_rsync_and_cp_carry_what_belongs_to_a_block(shared: MountedKvfs, there: Path) -> None:
    outside = shared.path.parent / "outside"
    shutil.rmtree(outside, ignore_errors=True)
    source = outside / "source"
    source.mkdir(parents=True)
    (source / "block").write_bytes(os.urandom(3 * MIB))
    os.setxattr(source / "block", "user.vllm.kv_crc32c", b"1234")
    os.utime(source / "block", ns=(10**18, 10**18 + 5))
    (source / "block").chmod(0o640)
    for command in (["rsync", "-aX"], ["cp", "-a"]):
        inside, back = there / command[0], outside / f"back-{command[0]}"
        subprocess.run([*command, f"{source}/.", inside], check=True)
        wait_sealed(inside / "block")
        subprocess.run([*command, f"{inside}/.", back], check=True)
        for copy in (inside / "block", back / "block"):
            assert copy.read_bytes() == (source / "block").read_bytes()
            assert copy.stat().st_mtime_ns == 10**18 + 5
            assert stat.S_IMODE(copy.stat().st_mode) == 0o640
            assert "user.vllm.kv_crc32c" in os.listxattr(copy)
            assert not [name for name in os.listxattr(copy) if name.startswith("user.kvfs.")]
        assert sorted(os.listdir(inside)) == ["block"]


@pytest.mark.semantics("S-xattr-7")
def test_the_root_names_the_control_socket(shared: MountedKvfs) -> None:
    socket = os.getxattr(shared.path, "user.kvfs.socket")
    assert stat.S_ISSOCK(os.stat(socket).st_mode)
    assert os.listxattr(shared.path) == []
    assert socket.decode() == shared.status()["socket"]


# --- space


@pytest.mark.semantics("S-space-1", "S-space-2", "S-space-3")
def test_statvfs_shows_capacities_and_what_may_be_evicted(shared: MountedKvfs, there: Path) -> None:
    def idle() -> bool:
        tiers = call(shared, "status")["tiers"]
        return all(tier["reserved_bytes"] + tier["held_bytes"] == 0 for tier in tiers)

    wait_until(idle, "nothing open")
    before = os.statvfs(shared.path)
    assert before.f_blocks * before.f_frsize == (64 + 128 + 256) * MIB
    assert before.f_bavail == before.f_blocks
    assert before.f_namemax == 255
    path = publish(there / "block", bytes(8 * MIB))
    wait_until(idle, "closed")
    after = os.statvfs(shared.path)
    assert 8 * MIB <= (before.f_bfree - after.f_bfree) * 4096 <= 9 * MIB
    assert after.f_bavail == after.f_blocks
    wait_sealed(path)
    promoted = os.statvfs(shared.path).f_bfree
    assert demote(shared, path, "hdd")["skipped"] == []
    promote(shared, path)
    assert abs(os.statvfs(shared.path).f_bfree - promoted) < 64
    df = subprocess.run(["df", "-k", shared.path], check=True, capture_output=True, text=True)
    assert df.stdout.splitlines()[1].split()[1] == str((64 + 128 + 256) * 1024)


@pytest.mark.semantics("S-space-2")
def test_an_open_writer_reserves_space(shared: MountedKvfs, there: Path) -> None:
    free = os.statvfs(shared.path).f_bfree
    with (there / "new").open("wb", buffering=0) as writer:
        writer.write(bytes(MIB))
        assert os.statvfs(shared.path).f_bfree < free
        tiers = {tier["name"]: tier for tier in call(shared, "status")["tiers"]}
        assert tiers["nvme"]["reserved_bytes"] >= MIB


@pytest.mark.semantics("S-weak-3")
def test_what_others_put_on_a_disk_is_not_seen(shared: MountedKvfs) -> None:
    wait_until(lambda: call(shared, "status")["open"] == 0, "nothing open")
    before = os.statvfs(shared.path).f_bfree
    foreign = shared.tiers["nvme"] / "foreign"
    foreign.write_bytes(bytes(4 * MIB))
    try:
        assert os.statvfs(shared.path).f_bfree == before
    finally:
        foreign.unlink()


@pytest.mark.semantics("S-space-1")
def test_df_of_a_mount_that_refuses_shows_what_is_free(settled: MountedKvfs) -> None:
    text = settled.config_file.read_text()
    settled.config_file.write_text(text.replace('on_full = "evict"', 'on_full = "refuse"'))
    try:
        call(settled, "reload")
        publish(settled.path / "big", bytes(8 * MIB))
        shown = os.statvfs(settled.path)
        assert shown.f_bavail == shown.f_bfree < shown.f_blocks - 2000
    finally:
        settled.config_file.write_text(text)
        run_kvfs("umount", settled.path)
        settled.start()
