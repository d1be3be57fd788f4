"""A catalog that is lost, files that an engine left, and the walk beside the requests."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec
import pytest

from kvfs import layout
from kvfs.catalog.rows import BlockState
from kvfs.store import Store
from kvfs.tiers.identity import FORMAT_VERSION, init_tier, read_identity, write_identity
from kvfs.tiers.seal import SEAL_XATTR
from kvfs.tiers.walk import look
from kvfs.upkeep.recovery import Verdict
from tests.store.helpers import (
    Workbench,
    assert_consistent,
    create,
    file_on,
    files_on,
    first_record,
    make_directory,
    move,
    private_files,
    put,
    put_on,
    read,
    rename,
    rewrite,
    row_at,
    seal_all,
    settle_all,
    take_away,
    tiers_of,
    unlink,
)

# --- the catalog is lost


async def test_tiers_of_the_first_format_are_read_and_marked_as_newer(bench: Workbench) -> None:
    store = await bench.start()
    contents = {b"d/%d" % number: os.urandom(1000 * number) for number in range(4)}
    for path, data in contents.items():
        await put_on(store, path, data, "nvme", "hdd")
    bench.stop(store)
    for tier in store.volume.tiers:
        for path in files_on(tier):
            absolute = tier.locate(path)
            seal = tier.read_seal(absolute)
            assert seal is not None
            os.setxattr(absolute, SEAL_XATTR, first_record(seal))
        write_identity(tier.config.path, msgspec.structs.replace(tier.identity, format_version=1))
    bench.lose_catalog()
    store = await bench.start()
    for tier in store.volume.tiers:
        assert read_identity(tier.config.path).format_version == FORMAT_VERSION
    for path, data in contents.items():
        assert await read(store, path) == data
        assert tiers_of(store, path) == ["nvme", "hdd"]
        await rewrite(store, path, b"new")
    await seal_all(store)
    assert await read(store, b"d/3") == b"new" + contents[b"d/3"][3:]
    await assert_consistent(store)


async def test_a_lost_catalog_is_rebuilt_with_all_but_heat(bench: Workbench) -> None:
    store = await bench.start()
    before = {}
    for number in range(8):
        path = b"ns%d/%02x/block" % (number % 2, number)
        tiers = [("nvme",), ("hdd",), ("nvme", "hdd"), ("hdd", "remote")][number % 4]
        await put_on(store, path, os.urandom(1000 * number), *tiers)
        inode = row_at(store, path).id
        await store.attributes.set(inode, mode=0o600 + number, mtime_ns=10**18 + number)
        await store.attributes.set_xattr(inode, b"user.vllm.crc", b"%d" % number)
    await store.attributes.set_xattr(row_at(store, b"ns0/00/block").id, b"user.kvfs.pin", b"hdd")
    await store.attributes.set_xattr(row_at(store, b"ns1/01/block").id, b"user.kvfs.ttl", b"3d")
    await store.attributes.set_xattr(row_at(store, b"ns1").id, b"user.kvfs.pin", b"1")
    await rename(store, b"ns0/02/block", b"ns0/02/renamed")
    await make_directory(store, b"empty/directory", 0o750)
    assert store.volume.catalog.unsealed(BlockState) == []
    paths = [store.volume.catalog.path_of(i) for i in _blocks(store)]
    for path in filter(None, paths):
        row = row_at(store, path)
        before[path] = (
            row._replace(ctime_ns=0, atime_ns=0), tiers_of(store, path),
            store.volume.catalog.xattrs(row.id), await read(store, path),
        )  # fmt: skip
    bench.stop(store)
    bench.lose_catalog()
    store = await bench.start()
    assert store.volume.rebuild
    after = {}
    for path in before:
        row = row_at(store, path)
        after[path] = (
            row._replace(ctime_ns=0, atime_ns=0), tiers_of(store, path),
            store.volume.catalog.xattrs(row.id), await read(store, path),
        )  # fmt: skip
    assert after == before
    assert row_at(store, b"empty/directory").mode == 0o750
    assert row_at(store, b"ns1").pin == "1"
    highest = max(row.id for row, *_ in after.values())
    assert await put(store, b"new", b"") > highest, "numbers are not given again"
    await assert_consistent(store)


def _blocks(store: Store) -> list[int]:
    rows = store.volume.catalog.connection.execute("SELECT id FROM inode WHERE kind = 1")
    return [row[0] for row in rows]


async def test_directories_never_take_the_number_of_a_block(bench: Workbench) -> None:
    store = await bench.start()
    paths = [b"d%d/e/block" % number for number in range(12)]
    inodes = [await put(store, path, path) for path in paths]
    for _ in range(2):
        bench.stop(store)
        bench.lose_catalog()
        store = await bench.start()
        assert [row_at(store, path).id for path in paths] == inodes
        paths.append(b"later%d/block" % len(paths))
        inodes.append(await put(store, paths[-1], paths[-1]))
    for path in paths:
        assert await read(store, path) == path
    await assert_consistent(store)


@pytest.mark.parametrize("stale", ["nvme", "hdd"])
async def test_of_two_generations_the_newer_is_kept(bench: Workbench, stale: str) -> None:
    newer = "hdd" if stale == "nvme" else "nvme"
    store = await bench.start()
    await put(store, b"d/a", b"old content")
    await rewrite(store, b"d/a", b"NEW")
    old = store.volume.tier_named(stale).root
    await seal_all(store)
    seal = store.volume.tiers[0].read_seal(store.volume.tiers[0].locate(b"d/a"))
    assert seal is not None
    if newer == "hdd":
        await move(store, "demote", b"d/a", "nvme", "hdd")
    leftover = Path(os.fsdecode(old + b"/d/a"))
    leftover.parent.mkdir(exist_ok=True)
    leftover.write_bytes(b"old content")
    store.volume.tier_named(stale).write_seal(os.fsencode(leftover), seal.at_generation(1))
    bench.stop(store)
    bench.lose_catalog()
    store = await bench.start()
    await settle_all(store)
    assert tiers_of(store, b"d/a") == [newer]
    assert await read(store, b"d/a") == b"NEW content"
    await assert_consistent(store)


async def test_a_renamed_block_is_not_found_at_its_old_name_on_another_tier(
    bench: Workbench,
) -> None:
    store = await bench.start()
    inode = await put_on(store, b"old", b"data", "nvme", "remote")
    take_away(store.volume.tier_named("remote"))
    await rename(store, b"old", b"new")
    bench.stop(store)
    bench.lose_catalog()
    store = await bench.start()
    assert row_at(store, b"new").id == inode
    assert store.volume.catalog.resolve(b"old") is None
    assert tiers_of(store, b"new") == ["nvme"]
    await assert_consistent(store)


async def test_of_two_blocks_at_one_name_the_later_is_kept(bench: Workbench) -> None:
    store = await bench.start()
    await put_on(store, b"a", b"first", "remote")
    take_away(store.volume.tier_named("remote"))
    await unlink(store, b"a")
    later = await put(store, b"a", b"second")
    bench.stop(store)
    bench.lose_catalog()
    store = await bench.start()
    assert row_at(store, b"a").id == later
    assert await read(store, b"a") == b"second"
    await assert_consistent(store)


async def test_torn_files_are_quarantined_and_empty_ones_removed(
    bench: Workbench, expect_log: list[str]
) -> None:
    expect_log.append("not sealed and not known")
    store = await bench.start()
    await put(store, b"d/sealed", b"sealed")
    for name, data in ((b"d/torn", b"half"), (b"d/empty", b"")):
        file_on(store, "nvme", name).write_bytes(data)
    rotten = file_on(store, "nvme", b"d/rotten")
    rotten.write_bytes(b"longer than its seal says")
    os.setxattr(rotten, SEAL_XATTR, os.getxattr(file_on(store, "nvme", b"d/sealed"), SEAL_XATTR))
    bench.stop(store)
    bench.lose_catalog()
    store = await bench.start()
    assert files_on(store.volume.tiers[0]) == {b"d/sealed"}
    assert len(private_files(store.volume.tiers[0], layout.QUARANTINE_DIR)) == 2
    await assert_consistent(store)


async def test_a_crowded_directory_is_rebuilt(bench: Workbench) -> None:
    store = await bench.start()
    store.volume.catalog.fan_out_names = 2
    paths = [b"crowd/%d" % number for number in range(6)]
    for path in paths:
        await put(store, path, path)
    await move(store, "demote", paths[5], "nvme", "hdd")
    bench.stop(store)
    bench.lose_catalog()
    store = await bench.start()
    for path in paths:
        assert await read(store, path) == path
    await assert_consistent(store)


# --- adoption


async def test_the_directory_of_an_engine_is_adopted(bench: Workbench) -> None:
    nvme = bench.config.tier[0].path
    blocks = {f"model_{h:x}/{h:02x}/{h:064x}.bin": os.urandom(5000 + h) for h in range(20)}
    for name, data in blocks.items():
        (nvme / name).parent.mkdir(parents=True, exist_ok=True)
        (nvme / name).write_bytes(data)
    (nvme / "config.json").write_text("{}")
    (nvme / "config.json").chmod(0o640)
    os.setxattr(nvme / "config.json", "user.vllm.version", b"1")
    (nvme / "link").symlink_to("config.json")
    init_tier(nvme, adopt=True)
    store = await bench.start()
    assert not read_identity(nvme).adopt
    await seal_all(store)
    for name, data in blocks.items():
        assert await read(store, os.fsencode(name)) == data
    row = row_at(store, b"config.json")
    assert (row.mode, row.state, row.size_bytes) == (0o640, BlockState.SEALED, 2)
    assert store.attributes.get_xattr(row.id, b"user.vllm.version") == b"1"
    (nvme / "link").unlink()
    await move(store, "demote", b"config.json", "nvme", "hdd")
    await assert_consistent(store)
    store = await bench.restart_after_crash(store)
    assert store.volume.blocks == len(blocks) + 1
    await assert_consistent(store)


async def test_a_tier_of_another_kvfs_is_adopted_beside_blocks_of_the_same_numbers(
    bench: Workbench, tmp_path: Path, expect_log: list[str]
) -> None:
    expect_log.append("not sealed and not known")
    others = []
    for tier in bench.config.tier:
        path = tmp_path / "other" / tier.name
        path.mkdir(parents=True)
        others.append(msgspec.structs.replace(tier, path=path))
    other = Workbench(bench.make_config)
    other.config = msgspec.structs.replace(bench.config, tier=tuple(others))
    store = await other.start()
    await put_on(store, b"theirs/a", b"their data", "hdd")
    await put_on(store, b"same/name", b"their version", "hdd")
    other.stop(store)
    store = await bench.start()
    for number in range(6):
        await put(store, b"ours/%d" % number, b"our data %d" % number)
    await put(store, b"same/name", b"our version")
    bench.stop(store)
    taken = msgspec.structs.replace(others[1], name="taken")
    shutil.rmtree(taken.path / ".kvfs")
    init_tier(taken.path, adopt=True)
    bench.config = msgspec.structs.replace(bench.config, tier=(*bench.config.tier, taken))
    store = await bench.start()
    await seal_all(store)
    assert await read(store, b"theirs/a") == b"their data"
    for number in range(6):
        assert await read(store, b"ours/%d" % number) == b"our data %d" % number
    assert await read(store, b"same/name") == b"our version"
    (quarantined,) = private_files(store.volume.tier_named("taken"), layout.QUARANTINE_DIR)
    assert quarantined.endswith(b".unknown.name")
    await assert_consistent(store)


# --- while serving


async def test_reconciling_finds_sealed_files_and_drops_rows_without_one(
    bench: Workbench, expect_log: list[str]
) -> None:
    expect_log.append("tier (nvme|hdd) lost")
    store = await bench.start()
    kept = await put(store, b"d/kept", b"kept")
    lost = await put_on(store, b"d/lost", b"lost", "nvme")
    half = await put_on(store, b"d/half", b"half", "nvme", "hdd")
    unknown = await put_on(store, b"d/unknown", b"unknown", "hdd")
    store.volume.catalog.delete(unknown)
    store.volume.catalog.drop_replica(kept, 2)
    file_on(store, "nvme", b"d/lost").unlink()
    file_on(store, "hdd", b"d/half").unlink()
    changed: list[bytes] = []
    store = await bench.restart_after_crash(store)
    store.volume.name_changed = lambda parent, name: changed.append(name)
    await store.recovery.reconcile()
    assert not store.volume.walking
    assert row_at(store, b"d/unknown").id == unknown
    assert await read(store, b"d/unknown") == b"unknown"
    assert store.volume.catalog.get(lost) is None
    assert tiers_of(store, b"d/half") == ["nvme"]
    assert row_at(store, b"d/half").id == half
    assert sorted(changed) == [b"lost", b"unknown"]
    await assert_consistent(store)


async def test_reconciling_a_sound_store_changes_nothing(bench: Workbench) -> None:
    store = await bench.start()
    await put_on(store, b"d/a", b"1", "nvme", "hdd")
    await put_on(store, b"d/b", b"2", "remote")
    opened = await store.blocks.open_reader(row_at(store, b"d/a").id)
    writing = await create(store, b"d/writing", b"3")
    before = dict(store.volume.counters.events)
    await store.recovery.reconcile()
    assert dict(store.volume.counters.events) == before
    await store.blocks.close(opened, writer=False)
    await store.blocks.close(writing, writer=True)
    await seal_all(store)
    await assert_consistent(store)


async def test_a_replica_that_only_the_tier_knows_is_taken_in(bench: Workbench) -> None:
    store = await bench.start()
    inode = await put_on(store, b"d/a", b"data", "nvme", "hdd")
    hdd = store.volume.tier_named("hdd")
    store.volume.catalog.drop_replica(inode, hdd.number)
    store = await bench.restart_after_crash(store)
    await store.recovery.reconcile()
    assert tiers_of(store, b"d/a") == ["nvme", "hdd"]
    await assert_consistent(store)


async def test_a_miss_during_the_walk_is_answered_from_the_tiers(bench: Workbench) -> None:
    store = await bench.start()
    parent = await make_directory(store, b"d")
    unknown = await put_on(store, b"d/a", b"data", "hdd")
    store.volume.catalog.delete(unknown)
    store = await bench.restart_after_crash(store)
    found = await store.find_on_tiers(parent, b"a")
    assert found is not None
    assert found.id == unknown
    assert await store.find_on_tiers(parent, b"never") is None
    assert await store.find_on_tiers(12345, b"a") is None
    assert await read(store, b"d/a") == b"data"
    await assert_consistent(store)


async def test_verdicts_change_nothing(bench: Workbench) -> None:
    store = await bench.start()
    await put_on(store, b"a", b"data", "nvme", "hdd")
    nvme = store.volume.tiers[0]
    file_on(store, "nvme", b"torn").write_bytes(b"torn")
    known, torn = look(nvme, b"a"), look(nvme, b"torn")
    assert known is not None
    assert torn is not None
    assert store.recovery.judge(nvme, known) is Verdict.KNOWN
    assert store.recovery.judge(nvme, torn) is Verdict.TORN
    assert look(nvme, b"missing") is None
    file_on(store, "nvme", b"torn").unlink()
    await assert_consistent(store)


async def test_numbers_that_a_power_loss_made_the_catalog_forget_are_not_given_again(
    bench: Workbench,
) -> None:
    store = await bench.start()
    forgotten = await put(store, b"d/a", b"data")
    store.volume.catalog.delete(forgotten)
    store.volume.catalog.connection.execute(
        "UPDATE sqlite_sequence SET seq = ? WHERE name = 'inode'", (forgotten - 1,)
    )
    store = await bench.restart_after_crash(store, reboot=True)
    assert await put(store, b"d/new", b"new") > forgotten
    await store.recovery.reconcile()
    assert await read(store, b"d/a") == b"data"
    await assert_consistent(store)
