"""The mount table, and paths that are followed without asking who may hang."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from kvfs import mount_table
from kvfs.mount_table import MountEntry, resolve


def mounted(monkeypatch: pytest.MonkeyPatch, *entries: tuple[Path, str]) -> None:
    table = [MountEntry(os.fsencode(path), b"/", fstype) for path, fstype in entries]
    monkeypatch.setattr(mount_table, "entries", lambda: table)


def test_entries_are_those_of_the_kernel() -> None:
    found = {entry.mountpoint: entry.fstype for entry in mount_table.entries()}
    assert found[b"/proc"] == "proc"


@pytest.mark.parametrize(
    "name", ["plain", "a/../plain", "./plain", "link", "relative", "missing/x"]
)
def test_what_is_local_is_followed_as_pathlib_does(tmp_path: Path, name: str) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "plain")
    (tmp_path / "relative").symlink_to("a/../plain")
    assert resolve(tmp_path / name) == (tmp_path / name).resolve()


def test_nothing_below_a_mount_from_elsewhere_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distant = tmp_path / "distant"
    distant.mkdir()
    # If it looked it would follow this.
    (distant / "tier").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(distant)
    mounted(monkeypatch, (distant, "fuse.juicefs"))
    assert resolve(tmp_path / "link" / "tier") == distant / "tier"
    assert resolve(tmp_path / "link" / "x" / ".." / "tier") == distant / "tier"
    assert resolve(distant) == distant


@pytest.mark.parametrize("fstype", ["nfs4", "ceph", "fuse.sshfs", "cifs", "something new"])
def test_what_is_not_known_to_be_local_may_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fstype: str
) -> None:
    (tmp_path / "link").symlink_to("/")
    mounted(monkeypatch, (tmp_path / "link", fstype))
    assert resolve(tmp_path / "link") == tmp_path / "link"


def test_what_is_mounted_from_a_disk_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to("/")
    mounted(monkeypatch, (tmp_path, "ext4"))
    assert resolve(tmp_path / "link") == Path("/")


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match="symbolic links") as refused:
        resolve(tmp_path / "a")
    assert refused.value.errno == errno.ELOOP
