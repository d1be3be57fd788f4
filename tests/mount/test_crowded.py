"""Directories with more names than a tier's directory takes: new ones lie in `.kvfs.d/HH/`."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kvfs import layout
from tests.mount.disks import disk
from tests.mount.live import call, config_in, demote, live, promote, publish, scratch, wait_sealed
from tests.mounting import MountedKvfs, run_kvfs

NAMES = layout.FAN_OUT_NAMES + 5
# As many names as an engine would have put there, one by one, for days.
INSERT = f"""
WITH RECURSIVE number (n) AS (VALUES (1) UNION ALL SELECT n + 1 FROM number WHERE n < {NAMES})
INSERT INTO inode (kind, mode, uid, gid, size_bytes, atime_ns, mtime_ns, ctime_ns, generation,
                   state, checksum)
SELECT 1, 420, 0, 0, 0, 0, 0, 0, 1, 2, zeroblob(16) FROM number
"""
LINK = "INSERT INTO dirent SELECT id, ?, CAST(id || '.bin' AS BLOB) FROM inode WHERE id > ?"


@pytest.fixture(scope="module")
def crowded() -> Iterator[MountedKvfs]:
    """A mount with a directory that has a million names already; their blocks are nowhere."""
    with scratch() as base:
        mount = MountedKvfs(base, config_in(base))
        mount.start()
        (mount.path / "d").mkdir()
        (mount.path / "plain").mkdir()
        publish(mount.path / "d/before", b"before")
        mount.wait_sealed()
        mount.stop()
        with closing(sqlite3.connect(mount.tiers["nvme"] / ".kvfs/catalog.sqlite")) as database:
            (directory,) = database.execute(
                "SELECT inode FROM dirent WHERE name = X'64'"
            ).fetchone()
            (last,) = database.execute("SELECT max(id) FROM inode").fetchone()
            database.execute(INSERT)
            database.execute(LINK, (directory, last))
            database.commit()
        with live(mount):
            yield mount


def backing(mount: MountedKvfs, path: Path, tier: str = "nvme") -> Path:
    """Where a fanned out block lies."""
    stored = layout.stored_path(os.fsencode(path.relative_to(mount.path)), fanned=True)
    return mount.tiers[tier] / os.fsdecode(stored)


def test_new_names_of_a_crowded_directory_are_fanned_out(crowded: MountedKvfs) -> None:
    directory = crowded.path / "d"
    assert (directory / "before").read_bytes() == b"before"
    assert (crowded.tiers["nvme"] / "d/before").exists()
    paths = [publish(directory / f"new-{number}", b"%d" % number) for number in range(20)]
    crowded.wait_sealed()
    for number, path in enumerate(paths):
        assert backing(crowded, path).read_bytes() == b"%d" % number
        assert path.read_bytes() == b"%d" % number
    assert os.path.lexists(directory / f"{NAMES}.bin")
    with pytest.raises(PermissionError):
        os.mkdir(directory / ".kvfs.d")
    demote(crowded, paths[0], "hdd")
    assert backing(crowded, paths[0], "hdd").read_bytes() == b"0"
    promote(crowded, paths[0])
    crowded.remount()
    for number, path in enumerate(paths):
        assert path.read_bytes() == b"%d" % number


def test_names_move_in_and_out_of_a_crowded_directory(crowded: MountedKvfs) -> None:
    inside, outside = crowded.path / "d/moved", crowded.path / "plain/moved"
    publish(outside, b"first")
    outside.rename(inside)
    assert backing(crowded, inside).read_bytes() == b"first"
    publish(inside, b"second")
    assert inside.read_bytes() == b"second"
    inside.rename(outside)
    assert (crowded.tiers["nvme"] / "plain/moved").read_bytes() == b"second"
    assert not backing(crowded, inside).exists()
    outside.rename(crowded.path / "d/before")
    assert (crowded.path / "d/before").read_bytes() == b"second"
    assert not (crowded.tiers["nvme"] / "d/before").exists()
    (crowded.path / "d/before").unlink()
    assert not backing(crowded, crowded.path / "d/before").exists()
    with pytest.raises(FileNotFoundError):
        os.stat(crowded.path / "d/before")


def test_a_walk_finds_them_at_their_names(crowded: MountedKvfs) -> None:
    path = publish(crowded.path / "d/found", b"found")
    wait_sealed(path)
    crowded.stop()
    for name in ("catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm"):
        (crowded.tiers["nvme"] / ".kvfs" / name).unlink(missing_ok=True)
    crowded.start()
    assert path.read_bytes() == b"found"
    assert ".kvfs.d" not in os.listdir(crowded.path / "d")
    assert run_kvfs("fsck", crowded.path).returncode == 0


# --- a tier that refuses names


@pytest.fixture(params=["auto", "off"], ids=["passthrough", "served"])
def refusing(request: pytest.FixtureRequest) -> Iterator[MountedKvfs]:
    """The first tier on an ext4 whose directory `flat` has as many names as its index takes."""
    with scratch() as base, disk(base, "disk", 160, "-b", "1024", "-N", "120000") as below:
        (below / "nvme").mkdir()
        (base / "nvme").symlink_to(below / "nvme")
        capacities = {"nvme": 64, "hdd": 64}
        mount = MountedKvfs(base, config_in(base, capacities, passthrough=request.param))
        with live(mount):
            (mount.path / "flat").mkdir()
            fill_directory(below / "nvme/flat")
            yield mount


def fill_directory(directory: Path) -> None:
    """Make files until the directory takes no more, though the disk would."""
    names = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        refused = 0
        for number in range(100_000):
            name = f"{number:06d}".ljust(250, "x")
            try:
                os.close(os.open(name, os.O_WRONLY | os.O_CREAT, dir_fd=names))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                refused += 1
                # Not each name hashes to a leaf that is full.
                if refused == 3000:
                    break
    finally:
        os.close(names)
    room = os.statvfs(directory)
    assert refused == 3000
    assert room.f_favail > 10_000
    assert room.f_bavail * room.f_frsize > 64 << 20


def test_names_that_a_tier_refuses_are_fanned_out(refusing: MountedKvfs) -> None:
    flat = refusing.path / "flat"
    contents = {f"block-{n}".ljust(250, "-"): b"%d" % n * 1000 for n in range(60)}
    for name, data in contents.items():
        # With a short temporary name, as the long one with its `.tmp` is longer than any may be.
        (flat / "tmp").write_bytes(data)
        (flat / "tmp").rename(flat / name)
    refusing.wait_sealed()
    assert sorted(os.listdir(flat)) == sorted(contents)
    for name, data in contents.items():
        assert (flat / name).read_bytes() == data
    fanned = [name for name in contents if backing(refusing, flat / name).exists()]
    assert len(fanned) >= 20, "many names are refused"
    assert all(tier["state"] == "online" for tier in call(refusing, "status")["tiers"])
    # A name that is given to another file, in the directory and from elsewhere.
    other = refusing.path / "other"
    for name in fanned[:20]:
        other.write_bytes(b"other")
        other.rename(flat / name)
        (flat / name).rename(flat / f"again-{name[:200]}")
    moved = [flat / f"again-{name[:200]}" for name in fanned[:20]]
    demote(refusing, flat, "hdd")
    assert promote(refusing, flat)["skipped"] == []
    refusing.remount()
    for path in moved:
        assert path.read_bytes() == b"other"
    for name in set(contents) - set(fanned[:20]):
        assert (flat / name).read_bytes() == contents[name]
    for path in flat.iterdir():
        path.unlink()
    assert list(backing(refusing, flat / "x").parent.parent.rglob("*-*")) == []
