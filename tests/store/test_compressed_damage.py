"""Compressed replicas that are damaged, that a crash left, or that the catalog does not know."""

from __future__ import annotations

import errno
import os
import shutil

import pytest
import trio
import trio.testing

from kvfs.catalog.rows import RAW, ZSTD
from kvfs.errors import BlockCorrupt, BlockStale
from kvfs.fsck import check_online
from kvfs.store import Store
from kvfs.tiers.identity import init_tier
from kvfs.tiers.pacing import Pacer
from kvfs.upkeep import mover, scrub
from tests.store.helpers import (
    Workbench,
    assert_consistent,
    assert_no_litter,
    file_on,
    move,
    put_on,
    read,
    rewrite,
    row_at,
    seal_all,
    tiers_of,
    writable,
)
from tests.store.packing import codec_on, compressing, fill_up, flip, place_of, text_of

# --- damage


@pytest.mark.parametrize("place", ["header", "table", "frame", "last frame", "short"])
@pytest.mark.parametrize("other", [True, False], ids=["two replicas", "sole replica"])
async def test_a_damaged_one_goes_to_quarantine_and_is_never_served(
    packing: Workbench, expect_log: list[str], place: str, other: bool
) -> None:
    expect_log.append("is bad .*: quarantined")
    store = await packing.start()
    data = text_of(600_000)
    await put_on(store, b"a", data, "hdd", *(["remote"] if other else []))
    file = file_on(store, "hdd", b"a")
    if place == "short":
        os.truncate(writable(file), file.stat().st_size - 4096)
    else:
        flip(file, place_of(file, place))
    if other:
        assert await read(store, b"a") == data
        assert tiers_of(store, b"a") == ["remote"]
    else:
        with pytest.raises(BlockStale):
            await store.blocks.open_reader(row_at(store, b"a").id)
    assert store.volume.counters.events["quarantined"] == 1
    assert not file.exists()
    await assert_consistent(store)


@pytest.mark.parametrize("verify", ["first-open", "never"])
async def test_damage_after_the_open_is_an_error_and_found(
    bench: Workbench, expect_log: list[str], verify: str
) -> None:
    expect_log.append("is bad .*: quarantined")
    bench.configure(verify=verify)
    bench.config = compressing(bench.config, hdd="zstd")
    store = await bench.start()
    data = os.urandom(64) * 10_000
    await put_on(store, b"a", data, "hdd")
    reserved = fill_up(store, "nvme")
    inode = row_at(store, b"a").id
    block = await store.blocks.open_reader(inode)
    assert await store.blocks.read(block, 0, 100) == data[:100]
    file = file_on(store, "hdd", b"a")
    status = file.stat()
    flip(file, place_of(file, "last frame"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert await store.blocks.read(block, 0, 200_000) == data[:200_000]
    with pytest.raises(BlockCorrupt):
        await store.blocks.read(block, 500_000, 1_000_000)
    await store.blocks.close(block, writer=False)
    with pytest.raises(BlockStale):
        await store.blocks.open_reader(inode)
    assert store.volume.counters.events["quarantined"] == 1
    reserved.release()
    await assert_consistent(store)


async def test_a_writer_finds_damage_too(packing: Workbench, expect_log: list[str]) -> None:
    expect_log.append("is bad .*: quarantined")
    store = await packing.start()
    data = text_of(600_000)
    await put_on(store, b"a", data, "hdd", "remote")
    file = file_on(store, "hdd", b"a")
    flip(file, place_of(file, "last frame"))
    await rewrite(store, b"a", b"new")
    await seal_all(store)
    assert await read(store, b"a") == b"new" + data[3:]
    await assert_consistent(store)


async def test_a_move_finds_damage_too(packing: Workbench, expect_log: list[str]) -> None:
    expect_log.append("is bad .*: quarantined")
    store = await packing.start()
    data = text_of(600_000)
    await put_on(store, b"a", data, "hdd", "remote")
    file = file_on(store, "hdd", b"a")
    flip(file, place_of(file, "last frame"))
    with pytest.raises(BlockCorrupt):
        await move(store, "promote", b"a", "hdd", "nvme")
    assert tiers_of(store, b"a") == ["remote"]
    assert_no_litter(store)
    assert await read(store, b"a") == data
    await assert_consistent(store)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
async def test_a_scrub_decodes(
    packing: Workbench, expect_log: list[str], monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    expect_log.append("is bad .*: quarantined")
    if not direct:
        monkeypatch.setattr(scrub, "_direct", lambda tier: False)
    store = await packing.start()
    data = text_of(3_000_000)
    await put_on(store, b"good", data, "hdd")
    await put_on(store, b"bad", data, "hdd")

    async def report(_: object) -> None:
        await trio.lowlevel.checkpoint()

    async def run() -> scrub.Tally:
        return await store.scrubber.scrub(store.volume.tiers, Pacer(lambda: 0), report)

    tally = await run()
    assert (tally.blocks, tally.bad, tally.size_bytes) == (2, 0, 2 * len(data))
    file = file_on(store, "hdd", b"bad")
    status = file.stat()
    flip(file, place_of(file, "frame"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    tally = await run()
    assert (tally.blocks, tally.bad) == (2, 1)
    assert await read(store, b"good") == data
    await assert_consistent(store)


# --- fsck, crashes, the loss of the catalog


async def fsck(store: Store, *, repair: bool = False) -> list[tuple[str, bytes, bool]]:
    async def progress(done: int, total: int) -> None:
        assert done <= total

    report = await check_online(store, repair=repair, progress=progress)
    return [(found.kind, found.path, found.repaired) for found in report.findings]


async def test_fsck_compares_headers(packing: Workbench, expect_log: list[str]) -> None:
    expect_log.append("is bad .*: quarantined")
    store = await packing.start()
    for name in (b"a", b"b", b"c"):
        await put_on(store, name, text_of(600_000, seed=name[0]), "hdd")
    assert await fsck(store) == []
    other = file_on(store, "hdd", b"b").read_bytes()
    writable(file_on(store, "hdd", b"a")).write_bytes(other)
    flip(file_on(store, "hdd", b"c"), 100)
    expected = [("wrong-header", b"a"), ("wrong-header", b"c")]
    assert [found[:2] for found in await fsck(store)] == expected
    assert await fsck(store, repair=True) == [(*found, True) for found in expected]
    assert await fsck(store) == []
    assert [name for name in (b"a", b"b", b"c") if store.volume.catalog.resolve(name)] == [b"b"]
    await assert_consistent(store)


async def test_a_record_that_went_is_mended_with_its_codec(packing: Workbench) -> None:
    store = await packing.start()
    data = text_of(600_000)
    await put_on(store, b"a", data, "hdd")
    os.removexattr(file_on(store, "hdd", b"a"), "user.kvfs.seal")
    assert await fsck(store) == [("seal-record", b"a", False)]
    store = await packing.restart_after_crash(store)
    await store.recovery.reconcile()
    assert await fsck(store) == []
    assert await read(store, b"a") == data
    await assert_consistent(store)


@pytest.mark.parametrize("repair", ["open", "walk", "fsck", "writer"])
@pytest.mark.parametrize("xattrs", [True, False], ids=["xattrs", "sidecars"])
async def test_unpacked_in_place_but_not_in_the_catalog(
    packing: Workbench, monkeypatch: pytest.MonkeyPatch, repair: str, xattrs: bool
) -> None:
    """A crash between the rename and the commit: the row is wrong, the file is whole."""
    if not xattrs:
        packing.without_xattrs("hdd")
    store = await packing.start()
    data = text_of(600_000)
    await put_on(store, b"a", data, "hdd")
    reserved = fill_up(store, "nvme")

    def die(*_: object) -> os.stat_result:
        put_in_place(*_)  # type: ignore[arg-type] # what it was called with
        raise OSError(errno.EPERM, "killed")

    put_in_place = mover.put_in_place
    monkeypatch.setattr(mover, "put_in_place", die)
    with pytest.raises(OSError, match="killed"):
        await store.blocks.open_writer(row_at(store, b"a").id)
    monkeypatch.undo()
    reserved.release()
    assert file_on(store, "hdd", b"a").read_bytes() == data
    assert codec_on(store, "hdd", b"a") == ZSTD
    store = await packing.restart_after_crash(store)
    if repair == "walk":
        await store.recovery.reconcile()
    elif repair == "fsck":
        assert await fsck(store, repair=True) == [("wrong-header", b"a", True)]
    elif repair == "writer":
        await rewrite(store, b"a", data[:1])
        await seal_all(store)
    assert await read(store, b"a") == data
    assert codec_on(store, "hdd", b"a") == RAW
    assert await fsck(store) == []
    await assert_consistent(store)


async def test_the_catalog_forgot_an_unpacking_backwards(packing: Workbench) -> None:
    """The commit outlived a power loss and the rename did not: a raw row, a compressed file."""
    store = await packing.start()
    data = text_of(600_000)
    await put_on(store, b"a", data, "hdd")
    number = store.volume.tier_named("hdd").number
    store.volume.catalog.update_replica(
        row_at(store, b"a").id, number, codec=RAW, saved_bytes=0, mtime_ns=0
    )
    store = await packing.restart_after_crash(store, reboot=True)
    assert await read(store, b"a") == data
    assert codec_on(store, "hdd", b"a") == ZSTD
    assert await fsck(store) == []
    await assert_consistent(store)


@pytest.mark.parametrize("xattrs", [True, False], ids=["xattrs", "sidecars"])
async def test_a_rebuild_takes_compressed_replicas_in(packing: Workbench, xattrs: bool) -> None:
    if not xattrs:
        packing.without_xattrs("hdd", "remote")
    store = await packing.start()
    data = text_of(600_000)
    await put_on(store, b"ns/a", data, "hdd")
    await put_on(store, b"ns/b", data, "nvme", "hdd", "remote")
    await store.attributes.set(row_at(store, b"ns/a").id, mode=0o600, mtime_ns=10**18)
    before = row_at(store, b"ns/a")
    saved = [account.saved_bytes for account in store.volume.space.tiers]
    packing.stop(store)
    packing.lose_catalog()
    store = await packing.start()
    assert [account.saved_bytes for account in store.volume.space.tiers] == saved
    after = row_at(store, b"ns/a")
    assert (after.id, after.mode, after.size_bytes, after.mtime_ns, after.checksum) == (
        before.id, before.mode, before.size_bytes, before.mtime_ns, before.checksum,
    )  # fmt: skip
    assert [await read(store, name) for name in (b"ns/a", b"ns/b")] == [data, data]
    assert tiers_of(store, b"ns/b") == ["nvme", "hdd", "remote"]
    assert await fsck(store) == []
    await assert_consistent(store)


@pytest.mark.parametrize("records", [True, False], ids=["records", "no records"])
async def test_adoption_knows_a_compressed_file(packing: Workbench, records: bool) -> None:
    """Of another kvfs, or copied without xattrs: its header says what it holds."""
    store = await packing.start()
    data = text_of(600_000)
    await put_on(store, b"ns/a", data, "hdd")
    packing.stop(store)
    packing.lose_catalog()
    for tier in packing.config.tier:
        shutil.rmtree(tier.path / ".kvfs")
        init_tier(tier.path, adopt=True)
    if not records:
        os.removexattr(packing.config.tier[1].path / "ns/a", "user.kvfs.seal")
    store = await packing.start()
    await seal_all(store)
    assert await read(store, b"ns/a") == data
    assert codec_on(store, "hdd", b"ns/a") == ZSTD
    assert await fsck(store) == []
    await assert_consistent(store)


@pytest.mark.parametrize("content", ["same", "new"])
async def test_killed_while_a_writer_had_it_open(packing: Workbench, content: str) -> None:
    """The compressed replica has what was sealed: it comes back unless the raw one still does."""
    store = await packing.start()
    data = text_of(600_000)
    await put_on(store, b"a", data, "hdd")
    block = await store.blocks.open_writer(row_at(store, b"a").id)
    if content == "new":
        await store.blocks.write(block, 0, b"nobody was promised this")
    store = await packing.restart_after_crash(store)
    await store.recovery.reconcile()
    assert await read(store, b"a") == data
    assert tiers_of(store, b"a") == (["nvme", "hdd"] if content == "same" else ["hdd"])
    assert await fsck(store) == []
    await assert_consistent(store)


async def test_a_bad_replica_above_leaves_the_compressed_one(
    packing: Workbench, expect_log: list[str]
) -> None:
    expect_log.append("is bad .*: quarantined")
    store = await packing.start()
    data = text_of(600_000)
    await put_on(store, b"a", data, "nvme", "hdd")
    flip(file_on(store, "nvme", b"a"), 7)
    with pytest.raises(BlockStale):
        await store.blocks.open_reader(row_at(store, b"a").id)
    assert await read(store, b"a") == data
    assert codec_on(store, "hdd", b"a") == ZSTD
    assert await fsck(store) == []
    await assert_consistent(store)
