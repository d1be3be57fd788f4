"""Open blocks: bytes, reservations, spilling, eviction for a writer, reopening."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pytest
import trio

from kvfs import layout
from kvfs.catalog.rows import ROOT_INODE, BlockState
from kvfs.errors import (
    BlockExists,
    BlockStale,
    FilesystemError,
    NotPermitted,
    errno_of,
)
from kvfs.tiers.beneath import Root
from kvfs.tiers.space import rounded, sealed
from tests.store.helpers import (
    Workbench,
    assert_consistent,
    create,
    file_on,
    files_on,
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
    writable,
)

MIB = 1 << 20
KIB = 1 << 10


# --- create, write, read, close


async def test_a_block_is_written_closed_sealed_and_read(bench: Workbench) -> None:
    store = await bench.start()
    data = os.urandom(100_001)
    block = await create(store, b"ns/ab/cd.bin", data, mode=0o640)
    assert row_at(store, b"ns/ab/cd.bin").state == BlockState.WRITING
    await store.blocks.close(block, writer=True)
    row = row_at(store, b"ns/ab/cd.bin")
    assert (row.size_bytes, row.mode, row.state) == (100_001, 0o640, BlockState.WRITING)
    await seal_all(store)
    assert row_at(store, b"ns/ab/cd.bin").state == BlockState.SEALED
    assert await read(store, b"ns/ab/cd.bin") == data
    assert file_on(store, "nvme", b"ns/ab/cd.bin").read_bytes() == data
    await assert_consistent(store)


async def test_an_empty_block_and_odd_names_are_blocks(bench: Workbench) -> None:
    store = await bench.start()
    names = [b"d/\xff\xfe", b"d/a\nb", b"d/.hidden", b"d/" + b"n" * 255, b"d/-rf"]
    for name in names:
        await put(store, name, b"")
    for name in names:
        assert await read(store, name) == b""
    assert files_on(store.volume.tiers[0]) == set(names)
    await assert_consistent(store)


async def test_pieces_may_come_in_any_order(bench: Workbench) -> None:
    store = await bench.start()
    block = await create(store, b"a")
    await store.blocks.write(block, 8192, b"end")
    await store.blocks.write(block, 0, b"start")
    assert await store.blocks.read(block, 0, 5) == b"start"
    assert store.namespace.current(row_at(store, b"a")).size_bytes == 8195
    await store.blocks.close(block, writer=True)
    await seal_all(store)
    assert await read(store, b"a") == b"start" + bytes(8187) + b"end"
    await assert_consistent(store)


async def test_reads_are_short_only_at_the_end(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"a", b"0123456789")
    block = await store.blocks.open_reader(row_at(store, b"a").id)
    assert await store.blocks.read(block, 4, 4) == b"4567"
    assert await store.blocks.read(block, 8, 4) == b"89"
    assert await store.blocks.read(block, 20, 4) == b""
    await store.blocks.close(block, writer=False)
    await assert_consistent(store)


async def test_a_name_is_given_once(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"a", b"first")
    with pytest.raises(BlockExists) as refused:
        await create(store, b"a", b"second")
    assert errno_of(refused.value) == errno.EEXIST
    assert await read(store, b"a") == b"first"
    await assert_consistent(store)


async def test_of_two_creators_at_once_one_wins(bench: Workbench) -> None:
    store = await bench.start()
    outcomes: list[str] = []

    async def attempt() -> None:
        try:
            block = await create(store, b"a", b"mine")
        except BlockExists:
            outcomes.append("exists")
        else:
            outcomes.append("created")
            await store.blocks.close(block, writer=True)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(attempt)
    assert sorted(outcomes) == ["created", *["exists"] * 4]
    await seal_all(store)
    await assert_consistent(store)


async def test_names_that_cannot_be_are_refused(bench: Workbench) -> None:
    store = await bench.start()
    for name in (b".kvfs", b".kvfs.d"):
        with pytest.raises(NotPermitted):
            await store.blocks.create(ROOT_INODE, name, 0o644, 0, 0)
    with pytest.raises(FilesystemError) as refused:
        await store.blocks.create(ROOT_INODE, b"n" * 256, 0o644, 0, 0)
    assert errno_of(refused.value) == errno.ENAMETOOLONG
    with pytest.raises(FilesystemError) as refused:
        await create(store, b"/".join([b"d" * 250] * 17))
    assert errno_of(refused.value) == errno.ENAMETOOLONG
    with pytest.raises(FilesystemError) as refused:
        await store.blocks.create(12345, b"a", 0o644, 0, 0)
    assert errno_of(refused.value) == errno.ENOENT
    await assert_consistent(store)


async def test_what_lies_at_a_new_name_without_being_a_block_is_replaced(bench: Workbench) -> None:
    store = await bench.start()
    file_on(store, "nvme", b"a").write_bytes(b"litter")
    await put(store, b"a", b"mine")
    assert await read(store, b"a") == b"mine"
    await assert_consistent(store)


# --- reservations


async def test_a_reservation_grows_with_the_file_and_ends_with_the_writer(
    bench: Workbench,
) -> None:
    store = await bench.start()
    account = store.volume.space[0]
    block = await create(store, b"d/a")
    first = account.reserved_bytes
    assert first == account.capacity_bytes // 100
    for written in range(MIB, 5 * MIB, MIB):
        await store.blocks.write(block, written - MIB, bytes(MIB))
        assert account.taken_bytes >= max(written, first)
    await store.blocks.close(block, writer=True)
    assert account.reserved_bytes == 0
    assert account.used_bytes >= 4 * MIB
    await seal_all(store)
    block = await create(store, b"d/b")
    assert account.reserved_bytes == sealed(4 * MIB), "as large as its neighbour"
    await store.blocks.close(block, writer=True)
    await seal_all(store)
    await assert_consistent(store)


async def test_truncating_far_reserves_what_may_be_written(bench: Workbench) -> None:
    store = await bench.start()
    block = await create(store, b"a")
    await store.blocks.truncate(block, 10 * MIB)
    assert store.volume.space[0].reserved_bytes == sealed(10 * MIB)
    await store.blocks.close(block, writer=True)
    assert row_at(store, b"a").size_bytes == 10 * MIB
    assert store.volume.space[0].taken_bytes < MIB, "holes take nothing"
    await seal_all(store)
    await assert_consistent(store)


# --- unlink while open


@pytest.mark.parametrize("tier", ["nvme", "hdd"])
async def test_an_unlinked_block_keeps_its_bytes_and_its_space_until_the_last_close(
    bench: Workbench, tier: str
) -> None:
    store = await bench.start()
    data = os.urandom(50_000)
    await put(store, b"a", data)
    if tier != "nvme":
        await move(store, "demote", b"a", "nvme", tier)
    row = row_at(store, b"a")
    first = await store.blocks.open_reader(row.id)
    second = await store.blocks.open_reader(row.id)
    account = store.volume.space[store.volume.tier_named(tier).index]
    taken = account.taken_bytes
    await unlink(store, b"a")
    await settle_all(store)
    assert not file_on(store, tier, b"a").exists()
    assert (account.used_bytes, account.taken_bytes) == (0, taken)
    orphan = store.namespace.get(row.id)
    assert orphan is not None
    assert orphan.size_bytes == 50_000
    await store.blocks.close(first, writer=False)
    assert account.held_bytes == taken
    assert await store.blocks.read(second, 0, 50_000) == data
    await store.blocks.close(second, writer=False)
    assert account.taken_bytes == 0
    assert store.namespace.get(row.id) is None
    await assert_consistent(store)


async def test_a_writer_goes_on_after_the_unlink(bench: Workbench) -> None:
    store = await bench.start()
    block = await create(store, b"a", b"before")
    await unlink(store, b"a")
    await store.blocks.write(block, 6, b" and after" * 10_000)
    assert await store.blocks.read(block, 0, 12) == b"before and a"
    assert store.volume.space[0].taken_bytes >= 100_000
    await put(store, b"a", b"another")
    await store.blocks.close(block, writer=True)
    assert await read(store, b"a") == b"another"
    await assert_consistent(store)


async def test_a_replaced_block_stays_readable_while_open(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"a", b"old")
    await put(store, b"a.tmp", b"new")
    block = await store.blocks.open_reader(row_at(store, b"a").id)
    await rename(store, b"a.tmp", b"a")
    assert await store.blocks.read(block, 0, 10) == b"old"
    assert await read(store, b"a") == b"new"
    await store.blocks.close(block, writer=False)
    await assert_consistent(store)


# --- what is not there


async def test_opening_a_block_that_is_gone_is_stale(bench: Workbench) -> None:
    store = await bench.start()
    inode = await put(store, b"a", b"data")
    await unlink(store, b"a")
    with pytest.raises(BlockStale) as refused:
        await store.blocks.open_reader(inode)
    assert errno_of(refused.value) == errno.ESTALE
    with pytest.raises(BlockStale):
        await store.blocks.open_writer(inode)
    await assert_consistent(store)


@pytest.mark.parametrize("damage", ["missing", "short", "long"])
async def test_a_file_of_the_wrong_length_is_not_served(
    bench: Workbench, expect_log: list[str], damage: str
) -> None:
    expect_log += ["bytes, sealed with 4.*: quarantined", "tier nvme lost"]
    store = await bench.start()
    await put_on(store, b"both", b"data", "nvme", "hdd")
    alone = await put(store, b"alone", b"data")
    for name in (b"both", b"alone"):
        file = file_on(store, "nvme", name)
        if damage == "missing":
            file.unlink()
        else:
            writable(file).write_bytes(b"dat" if damage == "short" else b"data!")
    # What was in use goes on under another number, which the kernel looks up.
    with contextlib.suppress(BlockStale):
        await read(store, b"both")
    assert await read(store, b"both") == b"data", "the other replica answers"
    assert tiers_of(store, b"both") == ["hdd"]
    with pytest.raises(BlockStale):
        await store.blocks.open_reader(alone)
    assert store.volume.catalog.resolve(b"alone") is None
    event = "replicas_lost" if damage == "missing" else "quarantined"
    assert store.volume.counters.events[event] == 2
    await assert_consistent(store)


# --- readers and tiers


async def test_the_fastest_replica_is_read_and_kept_while_open(bench: Workbench) -> None:
    store = await bench.start()
    await put_on(store, b"a", b"data", "nvme", "hdd")
    block = await store.blocks.open_reader(row_at(store, b"a").id)
    assert block.tier.name == "nvme"
    await store.replicas.drop(row_at(store, b"a"), block.tier, b"a")
    assert not file_on(store, "nvme", b"a").exists()
    assert await store.blocks.read(block, 0, 10) == b"data"
    assert store.volume.space[0].held_bytes > 0
    await store.blocks.close(block, writer=False)
    await assert_consistent(store)


async def test_readers_share_one_descriptor(bench: Workbench) -> None:
    store = await bench.start()
    inode = await put(store, b"a", b"data")
    opened: list[object] = []

    async def open_one() -> None:
        opened.append(await store.blocks.open_reader(inode))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(open_one)
    block = store.replicas.open_blocks[inode]
    assert opened == [block] * 5
    assert block.readers == 5
    for _ in range(5):
        await store.blocks.close(block, writer=False)
    await assert_consistent(store)


async def test_a_tier_that_is_offline_is_passed_over(bench: Workbench) -> None:
    store = await bench.start()
    await put_on(store, b"a", b"data", "nvme", "hdd")
    take_away(store.volume.tiers[0])
    block = await store.blocks.open_reader(row_at(store, b"a").id)
    assert block.tier.name == "hdd"
    await store.blocks.close(block, writer=False)
    await put(store, b"b", b"new")
    assert tiers_of(store, b"b") == ["hdd"]


async def test_a_remote_block_is_fetched_whole_at_open(bench: Workbench) -> None:
    store = await bench.start()
    data = os.urandom(300_000)
    await put(store, b"a", data)
    await move(store, "demote", b"a", "nvme", "remote")
    block = await store.blocks.open_reader(row_at(store, b"a").id)
    assert block.fetched
    assert store.volume.space[0].reserved_bytes == rounded(300_000)
    file = file_on(store, "remote", b"a")
    aside = file.rename(file.with_name("aside"))
    assert await store.blocks.read(block, 0, 300_000) == data
    aside.rename(file)
    await store.blocks.close(block, writer=False)
    assert private_files(store.volume.tiers[0], layout.STAGING_DIR) == []
    await assert_consistent(store)


async def test_a_remote_block_is_read_in_place_when_there_is_no_room(bench: Workbench) -> None:
    bench.configure(nvme_mib=1)
    store = await bench.start()
    data = os.urandom(400 * KIB)
    await put(store, b"a", data)
    await move(store, "demote", b"a", "nvme", "remote")
    await put(store, b"b", bytes(700 * KIB))
    block = await store.blocks.open_reader(row_at(store, b"a").id)
    assert not block.fetched
    assert await store.blocks.read(block, 0, len(data)) == data
    await store.blocks.close(block, writer=False)
    await assert_consistent(store)


async def test_a_fetched_block_can_be_reopened_for_writing(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"a", b"0123456789")
    await move(store, "demote", b"a", "nvme", "remote")
    reader = await store.blocks.open_reader(row_at(store, b"a").id)
    await rewrite(store, b"a", b"XX", offset=3)
    assert await store.blocks.read(reader, 0, 10) == b"012XX56789"
    await store.blocks.close(reader, writer=False)
    await seal_all(store)
    assert await read(store, b"a") == b"012XX56789"
    await assert_consistent(store)


# --- crowded directories


async def test_the_page_that_xattrs_take_is_counted(bench: Workbench) -> None:
    store = await bench.start()
    await put_on(store, b"d/a", b"123", "nvme", "hdd")
    number = row_at(store, b"d/a").id
    before_bytes = store.volume.space[0].used_bytes
    await store.attributes.set_xattr(number, b"user.engine", bytes(500))
    await assert_consistent(store)
    assert store.volume.space[0].used_bytes > before_bytes
    await store.attributes.remove_xattr(number, b"user.engine")
    await assert_consistent(store)
    writer = await store.blocks.open_writer(number)
    await store.attributes.set_xattr(number, b"user.engine", bytes(500))
    await store.blocks.close(writer, writer=True)
    await seal_all(store)
    await assert_consistent(store)


async def test_a_crowded_directory_fans_out(bench: Workbench) -> None:
    store = await bench.start()
    store.volume.catalog.fan_out_names = 3
    names = [b"flat/%d" % number for number in range(6)]
    for name in names:
        await put(store, name, name)
    stored = files_on(store.volume.tiers[0])
    assert set(names[:3]) < stored
    assert {layout.stored_path(name, True) for name in names[3:]} < stored
    await move(store, "demote", names[5], "nvme", "hdd")
    await rename(store, names[4], b"other/a")
    await rename(store, names[0], b"flat/renamed")
    for name in (*names[1:4], names[5]):
        assert await read(store, name) == name
    assert await read(store, b"other/a") == names[4]
    await unlink(store, names[3])
    await assert_consistent(store)
    for name in (*names[1:3], names[5], b"flat/renamed"):
        await unlink(store, name)
    await settle_all(store)
    await store.namespace.rmdir(ROOT_INODE, b"flat")
    assert not Path(os.fsdecode(store.volume.tiers[0].locate(b"flat"))).exists()
    await assert_consistent(store)


async def test_a_filesystem_that_refuses_a_name_gets_it_fanned_out(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    await make_directory(store, b"d")
    real = Root.open

    def refuse(root: Root, path: bytes, flags: int, mode: int = 0o600) -> int:
        if flags & os.O_CREAT and path.endswith(b"/d/a"):
            raise OSError(errno.ENOSPC, "htree is full")
        return real(root, path, flags, mode)

    monkeypatch.setattr(Root, "open", refuse)
    block = await create(store, b"d/a", b"data")
    monkeypatch.undo()
    await store.blocks.close(block, writer=True)
    await seal_all(store)
    assert files_on(store.volume.tiers[0]) == {layout.stored_path(b"d/a", True)}
    assert await read(store, b"d/a") == b"data"
    await assert_consistent(store)


async def test_a_create_that_fails_leaves_nothing(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr("kvfs.blocks.blocks.create_file", refuse)
    with pytest.raises(PermissionError):
        await create(store, b"a")
    monkeypatch.undo()
    assert store.volume.catalog.resolve(b"a") is None
    await assert_consistent(store)
