"""Who may touch what lies on a tier: modes and owners of its directories and backing files."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kvfs.catalog.rows import ROOT_INODE
from kvfs.store import Store
from tests.store import unprivileged
from tests.store.helpers import (
    Workbench,
    assert_consistent,
    create,
    file_on,
    move,
    put,
    put_on,
    read,
    rewrite,
    row_at,
    seal_all,
    settle_all,
)

OWNER, GROUP = 12345, 23456

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user: not root")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def owner_of(path: Path) -> tuple[int, int]:
    return path.lstat().st_uid, path.lstat().st_gid


async def put_as(store: Store, name: bytes, data: bytes, mode: int = 0o640) -> int:
    """A sealed block that another user has written."""
    inode, block = await store.blocks.create(ROOT_INODE, name, mode, OWNER, GROUP)
    await store.blocks.write(block, 0, data)
    await store.blocks.close(block, writer=True)
    await seal_all(store)
    return inode.id


async def test_tiers_are_closed_to_other_users(bench: Workbench) -> None:
    for configured in bench.config.tier:
        configured.path.chmod(0o2775)
    store = await bench.start()
    for tier in store.volume.tiers:
        root = tier.config.path
        assert mode_of(root) & 0o777 == 0o700
        for below in [root / ".kvfs", *(root / ".kvfs").iterdir()]:
            assert mode_of(below) & 0o077 == 0, below
    bench.stop(store)
    bench.config.tier[1].path.chmod(0o755)
    await bench.start()
    assert mode_of(bench.config.tier[1].path) == 0o700, "also one that was opened later"


async def test_a_sealed_file_can_be_read_by_whom_its_mode_says_and_written_by_nobody(
    bench: Workbench,
) -> None:
    store = await bench.start()
    for mode, expected in ((0o644, 0o444), (0o600, 0o400), (0o777, 0o444), (0o266, 0o444)):
        path = b"%o" % mode
        block = await create(store, path, b"data", mode)
        assert mode_of(file_on(store, "nvme", path)) == 0o600, "what is being written is kvfs' own"
        await store.blocks.close(block, writer=True)
        await seal_all(store)
        assert mode_of(file_on(store, "nvme", path)) == expected
        assert row_at(store, path).mode == mode, "the mount shows what was asked for"
    await assert_consistent(store)


async def test_what_is_written_again_is_writable_as_long(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"a", b"first")
    block = await store.blocks.open_writer(row_at(store, b"a").id)
    assert mode_of(file_on(store, "nvme", b"a")) == 0o600
    await store.blocks.write(block, 0, b"other")
    await store.blocks.close(block, writer=True)
    await seal_all(store)
    assert mode_of(file_on(store, "nvme", b"a")) == 0o444
    assert await read(store, b"a") == b"other"
    await assert_consistent(store)


async def test_changing_the_mode_changes_every_replica(bench: Workbench) -> None:
    bench.without_xattrs("remote")
    store = await bench.start()
    inode = await put_on(store, b"d/a", b"data", "nvme", "hdd", "remote")
    await store.attributes.set(inode, mode=0o640)
    for tier in ("nvme", "hdd", "remote"):
        assert mode_of(file_on(store, tier, b"d/a")) == 0o440, tier
    assert row_at(store, b"d/a").mode == 0o640
    await assert_consistent(store)


@needs_root
async def test_files_and_directories_belong_to_whom_the_mount_says(bench: Workbench) -> None:
    store = await bench.start()
    inode = await put_as(store, b"a", b"data")
    assert owner_of(file_on(store, "nvme", b"a")) == (OWNER, GROUP)
    assert mode_of(file_on(store, "nvme", b"a")) == 0o440
    await move(store, "demote", b"a", "nvme", "hdd")
    assert owner_of(file_on(store, "hdd", b"a")) == (OWNER, GROUP)
    assert mode_of(file_on(store, "hdd", b"a")) == 0o440
    await store.attributes.set(inode, uid=OWNER + 1, gid=GROUP + 1)
    assert owner_of(file_on(store, "hdd", b"a")) == (OWNER + 1, GROUP + 1)
    await store.namespace.mkdir(ROOT_INODE, b"d", 0o750, OWNER, GROUP)
    directory = file_on(store, "nvme", b"d")
    assert (owner_of(directory), mode_of(directory)) == ((OWNER, GROUP), 0o750)
    await settle_all(store)
    await assert_consistent(store)


@needs_root
async def test_owner_and_mode_come_back_from_the_seal_alone(bench: Workbench) -> None:
    store = await bench.start()
    await put_as(store, b"a", b"data", 0o604)
    file = file_on(store, "nvme", b"a")
    bench.stop(store)
    bench.lose_catalog()
    # What somebody did to the file beside kvfs is not believed.
    os.chown(file, 1, 1)
    file.chmod(0o666)
    store = await bench.start()
    row = row_at(store, b"a")
    assert (row.mode, row.uid, row.gid) == (0o604, OWNER, GROUP)


@needs_root
async def test_a_filesystem_without_owners_is_no_obstacle(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", refuse)
    await put_as(store, b"a", b"data")
    await move(store, "demote", b"a", "nvme", "hdd")
    assert owner_of(file_on(store, "hdd", b"a")) == (0, 0)
    row = row_at(store, b"a")
    assert (row.uid, row.gid) == (OWNER, GROUP), "the mount shows and checks the right ones"
    await assert_consistent(store)


@needs_root
def test_a_daemon_of_another_user_writes_what_it_sealed(tmp_path: Path) -> None:
    """Without CAP_DAC_OVERRIDE a file that is read-only must be opened up before it is changed."""
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_mode & 0o005 != 0o005 and directory.is_relative_to("/tmp"):
            directory.chmod(0o755)
    command = [sys.executable, "-m", "tests.store.unprivileged", str(tmp_path), str(OWNER)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root: runs as another user above")
async def test_the_same_without_being_root(bench: Workbench, tmp_path: Path) -> None:
    await unprivileged.scenario(bench)


async def test_a_rewritten_block_keeps_no_way_in(bench: Workbench) -> None:
    store = await bench.start()
    await put_on(store, b"a", b"data", "nvme", "hdd")
    await rewrite(store, b"a", b"DATA")
    await seal_all(store)
    await settle_all(store)
    assert mode_of(file_on(store, "nvme", b"a")) == 0o444
    await assert_consistent(store)
