"""Which sets of directories may be opened together, and what every refusal says."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec
import pytest

from kvfs.catalog.rows import ROOT_INODE
from kvfs.config import Config, TierConfig
from kvfs.errors import CatalogError, TierError, TierOffline, exit_code_of
from kvfs.tiers.identity import init_tier, read_identity
from kvfs.volume.catalog_file import catalog_path
from kvfs.volume.volume import boot_id, open_volume
from tests.store.helpers import Workbench, assert_consistent, move, put, read, tiers_of


def with_tier(config: Config, name: str, **changes: object) -> Config:
    """The configuration with one tier changed."""
    tiers = tuple(
        msgspec.structs.replace(tier, **changes) if tier.name == name else tier
        for tier in config.tier
    )
    return msgspec.structs.replace(config, tier=tiers)


def without_tier(config: Config, name: str) -> Config:
    return msgspec.structs.replace(config, tier=tuple(t for t in config.tier if t.name != name))


def path_of(config: Config, name: str) -> Path:
    return next(tier.path for tier in config.tier if tier.name == name)


def refusal(config: Config, *forget: str) -> str:
    """The message with which the configuration is refused."""
    with pytest.raises(TierError) as refused:
        open_volume(config, forget)
    assert exit_code_of(refused.value) == 4
    assert "\n" not in str(refused.value)
    return str(refused.value)


def everything_below(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*")}


def unmount_disk(path: Path) -> Path:
    """What is left of a mountpoint when its disk is not mounted: an empty directory."""
    disk = path.with_name(path.name + ".disk")
    path.rename(disk)
    path.mkdir()
    return disk


# --- the first time


async def test_empty_directories_become_tiers_of_one_filesystem(bench: Workbench) -> None:
    store = await bench.start()
    assert [tier.name for tier in store.volume.tiers] == ["nvme", "hdd", "remote"]
    assert not store.volume.rebuild
    assert not store.volume.unclean
    assert store.volume.catalog.get(ROOT_INODE) is not None
    assert catalog_path(bench.config).exists()
    for tier in store.volume.tiers:
        members = read_identity(tier.config.path).members
        assert {member.name for member in members.values()} == {"nvme", "hdd", "remote"}
    await assert_consistent(store)


def test_a_missing_directory_is_refused(bench: Workbench) -> None:
    path_of(bench.config, "hdd").rmdir()
    message = refusal(bench.config)
    assert "tier hdd" in message
    assert "does not exist; create it or mount its disk" in message
    assert everything_below(path_of(bench.config, "nvme")) == set()


def test_a_directory_with_files_is_refused_naming_adopt(bench: Workbench) -> None:
    hdd = path_of(bench.config, "hdd")
    (hdd / "block").write_bytes(b"somebody's")
    assert f"kvfs tier init {hdd} --adopt" in refusal(bench.config)
    assert everything_below(hdd) == {"block"}
    assert everything_below(path_of(bench.config, "nvme")) == set()


def test_a_capacity_above_the_filesystem_is_refused(bench: Workbench) -> None:
    message = refusal(with_tier(bench.config, "hdd", capacity_bytes=1 << 60))
    assert "is above the" in message
    assert "is its disk mounted?" in message


def test_the_same_directory_twice_is_refused(bench: Workbench) -> None:
    bench.stop(bench.open())
    nvme = path_of(bench.config, "nvme")
    link = nvme.with_name("link")
    link.symlink_to(nvme)
    assert "the same directory" in refusal(with_tier(bench.config, "hdd", path=link))


def test_the_same_directory_twice_is_refused_before_it_is_a_tier(bench: Workbench) -> None:
    nvme = path_of(bench.config, "nvme")
    link = nvme.with_name("link")
    link.symlink_to(nvme)
    message = refusal(with_tier(bench.config, "hdd", path=link))
    assert message == "two tiers are the same directory: nvme and hdd"
    assert everything_below(nvme) == set()


def test_a_copied_identity_is_refused(bench: Workbench) -> None:
    bench.stop(bench.open())
    nvme, hdd = path_of(bench.config, "nvme"), path_of(bench.config, "hdd")
    shutil.copy(nvme / ".kvfs/tier.json", hdd / ".kvfs/tier.json")
    assert "the same uuid" in refusal(bench.config)


def test_a_remote_tier_that_never_was_is_refused(bench: Workbench) -> None:
    path_of(bench.config, "remote").rmdir()
    assert "does not exist and was never used" in refusal(bench.config)


def test_a_catalog_elsewhere_is_used(bench: Workbench, tmp_path: Path) -> None:
    elsewhere = tmp_path / "catalog.db"
    mount = msgspec.structs.replace(bench.config.mount, catalog=elsewhere)
    bench.config = msgspec.structs.replace(bench.config, mount=mount)
    bench.stop(bench.open())
    assert elsewhere.exists()
    assert not (path_of(bench.config, "nvme") / ".kvfs/catalog.sqlite").exists()


# --- the second time


async def test_a_clean_stop_and_a_crash_are_told_apart(bench: Workbench) -> None:
    store = await bench.start()
    bench.stop(store)
    store = await bench.start()
    assert (store.volume.unclean, store.volume.same_boot) == (False, True)
    bench.crash(store)
    store = await bench.start()
    assert (store.volume.unclean, store.volume.same_boot) == (True, True)
    assert store.volume.catalog.meta("boot_id") == boot_id()
    bench.crash(store, reboot=True)
    assert not bench.open().volume.same_boot


@pytest.mark.parametrize("name", ["nvme", "hdd"])
async def test_an_unmounted_disk_is_refused(bench: Workbench, name: str) -> None:
    store = await bench.start()
    await put(store, b"a", b"data")
    bench.stop(store)
    path = path_of(bench.config, name)
    disk = unmount_disk(path)
    message = refusal(bench.config)
    assert f"tier {name}" in message
    assert "is its disk mounted?" in message
    assert everything_below(path) == set(), "the mountpoint was written to"
    path.rmdir()
    disk.rename(path)
    store = await bench.start()
    assert await read(store, b"a") == b"data"


async def test_a_remote_tier_that_is_missing_is_offline(
    bench: Workbench, expect_log: list[str]
) -> None:
    expect_log.append("tier remote is offline: .* is not mounted")
    store = await bench.start()
    await put(store, b"a", b"data")
    await move(store, "demote", b"a", "nvme", "remote")
    bench.stop(store)
    path = path_of(bench.config, "remote")
    disk = path.rename(path.with_name("aside"))
    store = await bench.start()
    assert store.volume.tier_named("remote").state == "offline"
    assert tiers_of(store, b"a") == ["remote"], "its names stay visible"
    with pytest.raises(TierOffline):
        await read(store, b"a")
    disk.rename(path)
    remote = store.volume.tier_named("remote")
    remote.probe()
    remote.health.probed("")
    assert await read(store, b"a") == b"data"
    await assert_consistent(store)


async def test_a_remote_mountpoint_without_its_filesystem_is_offline(
    bench: Workbench, expect_log: list[str]
) -> None:
    expect_log.append("tier remote is offline: .* is not mounted")
    store = await bench.start()
    await put(store, b"a", b"data")
    bench.stop(store)
    path = path_of(bench.config, "remote")
    unmount_disk(path)
    store = await bench.start()
    assert store.volume.tier_named("remote").state == "offline"
    assert await read(store, b"a") == b"data"
    with pytest.raises(OSError, match="not mounted at its path"):
        store.volume.tier_named("remote").probe()
    assert everything_below(path) == set(), "the mountpoint was written to"


def test_a_tier_of_another_kvfs_is_refused(bench: Workbench, tmp_path: Path) -> None:
    bench.stop(bench.open())
    others = []
    for name in ("other-nvme", "other-hdd"):
        (tmp_path / name).mkdir()
        medium = "nvme" if name == "other-nvme" else "hdd"
        others.append(TierConfig(name, tmp_path / name, medium, 1 << 20))  # type: ignore[arg-type] # the names are media
    other = msgspec.structs.replace(bench.config, tier=tuple(others))
    open_volume(other).close(clean=True)
    added = msgspec.structs.replace(bench.config, tier=(*bench.config.tier, others[1]))
    before = read_identity(tmp_path / "other-hdd")
    assert "belongs to another kvfs" in refusal(added)
    assert read_identity(tmp_path / "other-hdd") == before


async def test_a_new_tier_is_taken_in(bench: Workbench, tmp_path: Path) -> None:
    store = await bench.start()
    await put(store, b"a", b"data")
    bench.stop(store)
    for name, prepare in (("empty", False), ("prepared", True)):
        path = tmp_path / name
        path.mkdir()
        if prepare:
            init_tier(path)
        added = TierConfig(name, path, "hdd", 1 << 20)
        bench.config = msgspec.structs.replace(bench.config, tier=(*bench.config.tier, added))
    store = await bench.start()
    assert len(store.volume.tiers) == 5
    await move(store, "demote", b"a", "nvme", "prepared")
    assert await read(store, b"a") == b"data"
    await assert_consistent(store)


async def test_tiers_may_change_order_and_name(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"fast", b"1")
    await put(store, b"slow", b"2")
    await move(store, "demote", b"slow", "nvme", "hdd")
    bench.stop(store)
    nvme, hdd, remote = bench.config.tier
    renamed = msgspec.structs.replace(hdd, name="disk")
    bench.config = msgspec.structs.replace(bench.config, tier=(nvme, remote, renamed))
    store = await bench.start()
    assert tiers_of(store, b"slow") == ["disk"]
    assert store.volume.tier_named("disk").index == 2
    assert await read(store, b"slow") == b"2"
    await assert_consistent(store)


# --- tiers that go


async def test_a_tier_with_sole_replicas_is_given_up_only_by_name(
    bench: Workbench, expect_log: list[str]
) -> None:
    expect_log.append("tier hdd .* is forgotten; what was only there: 1 block")
    store = await bench.start()
    await put(store, b"d/lost", b"only on hdd")
    await put(store, b"d/kept", b"on both")
    await move(store, "demote", b"d/lost", "nvme", "hdd")
    await move(store, "demote", b"d/kept", "nvme", "hdd")
    await move(store, "promote", b"d/kept", "hdd", "nvme")
    bench.stop(store)
    bench.config = without_tier(bench.config, "hdd")
    message = refusal(bench.config)
    assert "the only replica of 1 block" in message
    assert "--forget-tier hdd" in message
    store = await bench.start("hdd")
    assert store.volume.catalog.resolve(b"d/lost") is None
    assert await read(store, b"d/kept") == b"on both"
    assert tiers_of(store, b"d/kept") == ["nvme"]
    await assert_consistent(store)


async def test_a_tier_without_sole_replicas_may_go(bench: Workbench, expect_log: list[str]) -> None:
    expect_log.append("tier remote .* is forgotten; what was only there: 0 blocks")
    bench.stop(await bench.start())
    bench.config = without_tier(bench.config, "remote")
    store = await bench.start()
    assert len(store.volume.catalog.known_tiers()) == 2


async def test_a_replaced_disk_starts_empty_when_the_old_one_is_forgotten(
    bench: Workbench, expect_log: list[str]
) -> None:
    expect_log.append("tier hdd .* is forgotten; what was only there: 1 block")
    store = await bench.start()
    await put(store, b"a", b"gone")
    await put(store, b"b", b"here")
    await move(store, "demote", b"a", "nvme", "hdd")
    bench.stop(store)
    unmount_disk(path_of(bench.config, "hdd"))
    assert "--forget-tier hdd" in refusal(bench.config)
    store = await bench.start("hdd")
    assert store.volume.catalog.resolve(b"a") is None
    await move(store, "demote", b"b", "nvme", "hdd")
    assert await read(store, b"b") == b"here"
    await assert_consistent(store)


# --- two daemons


async def test_two_daemons_cannot_use_one_tier(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"a", b"data")
    assert "another kvfs daemon uses" in refusal(bench.config)
    assert await read(store, b"a") == b"data"
    bench.stop(store)
    await bench.start()


async def test_a_catalog_behind_a_link_is_refused(bench: Workbench, tmp_path: Path) -> None:
    bench.stop(await bench.start())
    path = catalog_path(bench.config)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CatalogError, match="is a symbolic link"):
        open_volume(bench.config)
    assert not (tmp_path / "elsewhere").exists()


async def test_the_catalog_of_another_daemon_is_left_alone_whatever_is_in_it(
    bench: Workbench,
) -> None:
    store = await bench.start()
    path = store.volume.catalog.path
    before = path.stat().st_ino
    store.volume.catalog.connection.execute("INSERT INTO meta VALUES ('mounts of', X'ff')")
    store.volume.catalog.connection.execute("UPDATE inode SET kind = 7")
    assert "another kvfs daemon uses" in refusal(bench.config)
    assert path.stat().st_ino == before
    assert [found.name for found in path.parent.glob("*.corrupt*")] == []


async def test_a_second_daemon_forgets_nothing_of_the_first(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"a", b"data")
    await move(store, "demote", b"a", "nvme", "hdd")
    message = refusal(without_tier(bench.config, "hdd"), "hdd")
    assert "another kvfs daemon uses" in message
    assert await read(store, b"a") == b"data"
    await assert_consistent(store)


async def test_after_a_refusal_nothing_stays_locked(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"a", b"data")
    await move(store, "demote", b"a", "nvme", "hdd")
    bench.stop(store)
    refusal(without_tier(bench.config, "hdd"))
    store = await bench.start()
    assert await read(store, b"a") == b"data"


# --- catalogs


def test_a_catalog_of_a_newer_schema_is_refused(bench: Workbench) -> None:
    store = bench.open()
    store.volume.catalog.connection.execute("PRAGMA user_version = 99")
    bench.stop(store)
    with pytest.raises(CatalogError, match="upgrade kvfs"):
        open_volume(bench.config)


async def test_a_corrupt_catalog_is_set_aside_and_rebuilt(
    bench: Workbench, expect_log: list[str]
) -> None:
    expect_log.append("the catalog was corrupt; set aside as .*catalog.corrupt")
    store = await bench.start()
    await put(store, b"d/a", b"data")
    bench.stop(store)
    path = catalog_path(bench.config)
    path.write_bytes(os.urandom(path.stat().st_size))
    store = await bench.start()
    assert store.volume.rebuild
    assert path.with_suffix(".corrupt").exists()
    assert await read(store, b"d/a") == b"data"
    await assert_consistent(store)


# --- a catalog that was left behind


async def test_a_catalog_older_than_its_tiers_is_rebuilt(
    bench: Workbench, expect_log: list[str]
) -> None:
    """Another tier was the first one for a while; its catalog knew what this one does not."""
    expect_log.append("the catalog is older than its tiers")
    store = await bench.start()
    await put(store, b"before", b"old")
    bench.stop(store)
    first_time = bench.config
    nvme, hdd, remote = first_time.tier
    bench.config = msgspec.structs.replace(first_time, tier=(hdd, nvme, remote))
    store = await bench.start()
    assert store.volume.rebuild
    await put(store, b"between", b"new")
    bench.stop(store)
    bench.config = first_time
    store = await bench.start()
    assert store.volume.rebuild
    assert await read(store, b"between") == b"new"
    assert await read(store, b"before") == b"old"
    assert catalog_path(first_time).with_suffix(".old").exists()
    await assert_consistent(store)
