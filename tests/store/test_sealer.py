"""Sealing: who is still a writer, what a record is worth, what is not committed."""

from __future__ import annotations

import mmap
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from kvfs.catalog.rows import BlockState
from kvfs.store import Store
from kvfs.tiers.checksum import cached_bytes, checksum_of, drop_cached
from kvfs.tiers.seal import SEAL_XATTR, Seal, decode_seal, no_writer_left
from kvfs.tiers.tier import Tier
from kvfs.upkeep import sealer
from tests.store.helpers import (
    Workbench,
    assert_consistent,
    create,
    file_on,
    first_record,
    move,
    put,
    read,
    rename,
    rewrite,
    row_at,
    seal_all,
    unlink,
    until,
)

unsigned32 = st.integers(0, 2**32 - 1)
sizes = st.integers(0, 2**56 - 1)
seals = st.builds(
    Seal, st.integers(2, 2**56 - 1), sizes, sizes, st.binary(min_size=16, max_size=16),
    st.integers(0, 0o7777), unsigned32, unsigned32, st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 1),
)  # fmt: skip


# --- records


@given(seals)
def test_a_record_is_read_as_it_was_written(seal: Seal) -> None:
    assert decode_seal(seal.encode()) == seal
    assert len(seal.encode()) == 60


@given(seals)
def test_a_record_of_the_first_version_is_read(seal: Seal) -> None:
    assert decode_seal(first_record(seal)) == seal


def test_a_record_takes_no_page_where_ext4_has_room_for_it_in_the_inode(tmp_path: Path) -> None:
    def allocated_bytes(record: bytes) -> int:
        file = tmp_path / f"{len(record)}"
        file.write_bytes(bytes(5000))
        os.setxattr(file, SEAL_XATTR, record)
        return file.stat().st_blocks * 512

    if allocated_bytes(bytes(8)) != 8192 or allocated_bytes(bytes(200)) == 8192:
        pytest.skip("no filesystem with some room for xattrs in its inodes")
    record = Seal(2, 1, 5000, bytes(16), 0o644, 0, 0, 0).encode()
    assert allocated_bytes(record) == 8192


@given(seals, st.integers(2, 15))
def test_a_record_of_a_codec_that_is_not_known_is_none(seal: Seal, codec: int) -> None:
    assert decode_seal(replace(seal, codec=codec).encode()) is None


@given(seals, st.data())
def test_a_torn_record_is_none(seal: Seal, data: st.DataObject) -> None:
    record = seal.encode()
    assert decode_seal(record[: data.draw(st.integers(0, len(record) - 1))]) is None
    assert decode_seal(record + b"\0") is None


@given(seals, st.data())
def test_a_rotten_record_is_none(seal: Seal, data: st.DataObject) -> None:
    record = bytearray(seal.encode())
    record[data.draw(st.integers(0, len(record) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert decode_seal(bytes(record)) is None


@given(seals, sizes)
def test_another_generation_is_the_same_content(seal: Seal, generation: int) -> None:
    later = seal.at_generation(generation)
    assert later.generation == generation
    assert later.at_generation(seal.generation) == seal


# --- the lease probe


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file that nobody has open."""
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    return path


def probe(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return no_writer_left(descriptor)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND])
def test_an_open_writer_is_seen(file: Path, flags: int) -> None:
    writer = os.open(file, flags)
    assert not probe(file)
    os.close(writer)
    assert probe(file)


def test_a_shared_mapping_is_seen_after_its_descriptor_is_closed(file: Path) -> None:
    descriptor = os.open(file, os.O_RDWR)
    mapping = mmap.mmap(descriptor, 8192)
    os.close(descriptor)
    assert not probe(file)
    mapping.close()
    assert probe(file)


def test_readers_are_no_writers(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    mapping = mmap.mmap(descriptor, 8192, prot=mmap.PROT_READ)
    assert probe(file)
    mapping.close()
    os.close(descriptor)


# --- sealing


async def test_a_block_is_not_sealed_while_its_file_can_be_written(bench: Workbench) -> None:
    store = await bench.start()
    block = await create(store, b"a", b"data")
    writer = os.open(file_on(store, "nvme", b"a"), os.O_WRONLY)
    await store.blocks.close(block, writer=True)
    assert await store.sealer.seal_pending() == {block.inode}
    assert row_at(store, b"a").state == BlockState.WRITING
    os.pwrite(writer, b"DATA", 0)
    os.close(writer)
    store.volume.request_seal(block.inode)
    await seal_all(store)
    assert await read(store, b"a") == b"DATA"
    await assert_consistent(store)


async def test_a_block_is_not_sealed_while_a_shared_mapping_lives(bench: Workbench) -> None:
    store = await bench.start()
    block = await create(store, b"a", bytes(4096))
    descriptor = os.open(file_on(store, "nvme", b"a"), os.O_RDWR)
    mapping = mmap.mmap(descriptor, 4096)
    os.close(descriptor)
    await store.blocks.close(block, writer=True)
    assert await store.sealer.seal_pending() == {block.inode}
    mapping[:4] = b"late"
    mapping.close()
    store.volume.request_seal(block.inode)
    await seal_all(store)
    assert (await read(store, b"a")).startswith(b"late")
    await assert_consistent(store)


async def test_the_checksum_is_of_the_content(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"a", b"data" * 1_000_000)
    with file_on(store, "nvme", b"a").open("rb") as file:
        assert checksum_of(file.fileno()) == row_at(store, b"a").checksum
        assert checksum_of(file.fileno(), past_page_cache=True) == row_at(store, b"a").checksum


# --- what it costs


def leave_page_cache(store: Store, path: bytes) -> None:
    """As if the file had been written with O_DIRECT."""
    descriptor = os.open(file_on(store, "nvme", path), os.O_RDONLY)
    os.fsync(descriptor)
    drop_cached(descriptor)
    os.close(descriptor)


def cached_of(store: Store, path: bytes) -> int:
    descriptor = os.open(file_on(store, "nvme", path), os.O_RDONLY)
    try:
        return cached_bytes(descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


async def test_what_the_page_cache_has_costs_the_medium_nothing(bench: Workbench) -> None:
    store = await bench.start()
    for name, written_past_it in ((b"a", False), (b"b", True)):
        block = await create(store, name, bytes(100_000))
        await store.blocks.close(block, writer=True)
        if written_past_it:
            leave_page_cache(store, name)
    await seal_all(store)
    costs = store.sealer.costs
    assert (costs.size_bytes, costs.medium_bytes) == (200_000, 100_000)
    assert costs.seconds > 0
    assert cached_of(store, b"a") == 100_000, "it may be wanted"
    assert cached_of(store, b"b") == 0, "it would push out what is"
    await assert_consistent(store)


async def test_what_the_medium_has_to_deliver_is_read_at_a_pace(
    bench: Workbench, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    autojump_clock.autojump_threshold = 0.05
    monkeypatch.setattr(sealer, "MEDIUM_BYTES_AT_ONCE", 150_000)
    bench.configure(seal_rate=100_000)
    store = await bench.start()
    for number in range(10):
        block = await create(store, b"%d" % number, bytes(100_000))
        await store.blocks.close(block, writer=True)
        leave_page_cache(store, b"%d" % number)
    start_s = trio.current_time()
    assert not await store.sealer.seal_pending(paced=True)
    assert trio.current_time() - start_s >= 9
    assert store.volume.counters.events["seals"] == 10
    await assert_consistent(store)


@pytest.mark.parametrize("why", ["the end of the mount", "a full tier", "no rate"])
async def test_nobody_waits_for_the_pace_where_blocks_must_be_sealed(
    bench: Workbench, autojump_clock: MockClock, why: str
) -> None:
    autojump_clock.autojump_threshold = 0.05
    bench.configure(seal_rate=0 if why == "no rate" else 1)
    store = await bench.start()
    block = await create(store, b"a", bytes(100_000))
    await store.blocks.close(block, writer=True)
    leave_page_cache(store, b"a")
    account = store.volume.space[0]
    full = store.volume.space.reserve(0, account.free_bytes if why == "a full tier" else 0)
    assert full is not None
    start_s = trio.current_time()
    await store.sealer.seal_pending(paced=why != "the end of the mount")
    assert trio.current_time() - start_s < 1000
    full.release()
    await assert_consistent(store)


async def test_the_lag_is_that_of_the_oldest_that_waits(bench: Workbench) -> None:
    store = await bench.start()
    assert store.sealer.lag_s() == 0
    first = await create(store, b"first", b"data")
    assert store.sealer.lag_s() == 0, "it has a writer"
    mapped = os.open(file_on(store, "nvme", b"first"), os.O_RDWR)
    await store.blocks.close(first, writer=True)
    lag_s = store.sealer.lag_s()
    assert lag_s > 0
    await put_more(store)
    assert store.sealer.lag_s() > lag_s, "the first still waits for its other writer"
    os.close(mapped)
    store.volume.request_seal(first.inode)
    await seal_all(store)
    assert store.sealer.lag_s() == 0
    await assert_consistent(store)


async def put_more(store: Store) -> None:
    for number in range(3):
        block = await create(store, b"%d" % number, b"data")
        await store.blocks.close(block, writer=True)
    assert len(await store.sealer.seal_pending()) == 1


async def test_a_batch_is_sealed_and_what_is_gone_is_left_out(bench: Workbench) -> None:
    store = await bench.start()
    for number in range(sealer.BATCH_BLOCKS + 10):
        block = await create(store, b"d/%d" % number, b"%d" % number)
        await store.blocks.close(block, writer=True)
    await unlink(store, b"d/3")
    await seal_all(store)
    assert store.volume.counters.events["seals"] == sealer.BATCH_BLOCKS + 9
    await assert_consistent(store)


async def test_a_scan_finds_what_nobody_asked_for(bench: Workbench) -> None:
    store = await bench.start()
    block = await create(store, b"a", b"data")
    await store.blocks.close(block, writer=True)
    store.volume.to_seal.clear()
    store.sealer.scan()
    await seal_all(store)
    assert row_at(store, b"a").state == BlockState.SEALED
    store.sealer.scan()
    assert not store.volume.to_seal


async def test_the_service_seals_by_itself_and_tries_again(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealer, "RETRY_S", 0.01)
    store = await bench.start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.sealer.run)
        block = await create(store, b"a", b"data")
        writer = os.open(file_on(store, "nvme", b"a"), os.O_WRONLY)
        await store.blocks.close(block, writer=True)
        asked_again = store.volume.sealing_due
        await until(lambda: store.volume.sealing_due is not asked_again, "a first attempt")
        assert row_at(store, b"a").state == BlockState.WRITING
        os.close(writer)
        await until(lambda: row_at(store, b"a").state == BlockState.SEALED, "sealed")
        nursery.cancel_scope.cancel()
    await assert_consistent(store)


# --- what happens while a worker hashes


def during_sealing(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[], Awaitable[object]]
) -> None:
    """Run `change` on the loop after the files were sealed and before the loop commits."""
    real = sealer.seal_files

    def seal_then_change(tier: Tier, jobs: list[sealer.Job]) -> tuple[list[sealer.Sealed], int]:
        results = real(tier, jobs)
        monkeypatch.undo()

        async def call() -> None:
            await change()

        trio.from_thread.run(call)
        return results

    monkeypatch.setattr(sealer, "seal_files", seal_then_change)


async def test_a_generation_that_changes_meanwhile_is_not_committed(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    block = await create(store, b"a.tmp", b"data")
    await store.blocks.close(block, writer=True)
    during_sealing(monkeypatch, lambda: rename(store, b"a.tmp", b"a"))
    assert await store.sealer.seal_pending() == {block.inode}
    assert store.volume.counters.events["seals"] == 1, "the rename asked for another"
    row = row_at(store, b"a")
    assert (row.state, row.generation) == (BlockState.SEALED, 2)
    await assert_consistent(store)


async def test_a_writer_that_comes_meanwhile_prevents_the_commit(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    inode = await put(store, b"a", b"0123456789")
    await rewrite(store, b"a", b"X")
    during_sealing(monkeypatch, lambda: store.blocks.open_writer(inode))
    again = await store.sealer.seal_pending()
    assert again == {inode}
    assert row_at(store, b"a").state == BlockState.REOPENED
    block = store.replicas.open_blocks[inode]
    await store.blocks.write(block, 1, b"Y")
    await store.blocks.close(block, writer=True)
    await seal_all(store)
    assert await read(store, b"a") == b"XY23456789"
    await assert_consistent(store)


@pytest.mark.parametrize("sealed_before", [False, True])
async def test_a_writer_that_came_and_went_meanwhile_prevents_the_commit(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, sealed_before: bool
) -> None:
    store = await bench.start()
    block = await create(store, b"a", b"0123456789")
    await store.blocks.close(block, writer=True)
    if sealed_before:
        await seal_all(store)
        await rewrite(store, b"a", b"X")
    during_sealing(monkeypatch, lambda: rewrite(store, b"a", b"Y"))
    assert await store.sealer.seal_pending() == {block.inode}
    assert await read(store, b"a") == b"Y123456789"
    await assert_consistent(store)


PAST_NS = 10**18


def during_hashing(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[], Awaitable[object]]
) -> None:
    """Run `change` on the loop before the files get their records."""
    real = checksum_of

    def hash_and_change(descriptor: int) -> bytes:
        monkeypatch.undo()

        async def call() -> None:
            await change()

        trio.from_thread.run(call)
        return real(descriptor)

    monkeypatch.setattr(sealer, "checksum_of", hash_and_change)


@pytest.mark.parametrize("stored", [False, True], ids=["alone", "after stores through a mapping"])
@pytest.mark.parametrize("during", [during_hashing, during_sealing])
async def test_a_time_that_is_set_meanwhile_stays(
    bench: Workbench,
    monkeypatch: pytest.MonkeyPatch,
    during: Callable[..., None],
    stored: bool,
) -> None:
    store = await bench.start()
    block = await create(store, b"a", b"data")
    await store.blocks.close(block, writer=True)
    if stored:
        file_on(store, "nvme", b"a").write_bytes(b"DATA")
    during(monkeypatch, lambda: store.attributes.set(block.inode, mtime_ns=PAST_NS))
    for number in await store.sealer.seal_pending():
        store.volume.request_seal(number)
    await seal_all(store)
    assert row_at(store, b"a").state == BlockState.SEALED
    assert row_at(store, b"a").mtime_ns == PAST_NS
    await assert_consistent(store)


async def test_a_mode_that_is_set_meanwhile_does_not_hide_the_time_of_stores(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    block = await create(store, b"a", b"data")
    await store.blocks.close(block, writer=True)
    before_ns = row_at(store, b"a").mtime_ns
    file_on(store, "nvme", b"a").write_bytes(b"DATA")
    during_sealing(monkeypatch, lambda: store.attributes.set(block.inode, mode=0o600))
    for number in await store.sealer.seal_pending():
        store.volume.request_seal(number)
    await seal_all(store)
    assert row_at(store, b"a").state == BlockState.SEALED
    row = row_at(store, b"a")
    assert (row.mode, row.mtime_ns > before_ns) == (0o600, True)
    nvme = store.volume.tier_named("nvme")
    seal = nvme.read_seal(nvme.locate(b"a"))
    assert seal is not None
    assert (seal.mode, seal.mtime_ns) == (row.mode, row.mtime_ns)
    await assert_consistent(store)


async def test_a_block_that_is_unlinked_meanwhile_stays_gone(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    block = await create(store, b"a", b"data")
    await store.blocks.close(block, writer=True)
    during_sealing(monkeypatch, lambda: unlink(store, b"a"))
    assert await store.sealer.seal_pending() == set()
    await assert_consistent(store)


async def test_content_that_changes_while_it_is_hashed_is_hashed_again(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    block = await create(store, b"a", b"data")
    await store.blocks.close(block, writer=True)

    def hash_and_change(descriptor: int) -> bytes:
        checksum = checksum_of(descriptor)
        file_on(store, "nvme", b"a").write_bytes(b"DATA+")
        return checksum

    monkeypatch.setattr(sealer, "checksum_of", hash_and_change)
    assert await store.sealer.seal_pending() == {block.inode}
    monkeypatch.undo()
    store.volume.request_seal(block.inode)
    await seal_all(store)
    assert await read(store, b"a") == b"DATA+"
    await assert_consistent(store)


@pytest.mark.parametrize("tier", ["hdd", "remote"])
async def test_blocks_on_slower_tiers_are_sealed_there(bench: Workbench, tier: str) -> None:
    store = await bench.start()
    await put(store, b"a", b"0123456789")
    await move(store, "demote", b"a", "nvme", tier)
    await rewrite(store, b"a", b"X")
    await seal_all(store)
    assert await read(store, b"a") == b"X123456789"
    await assert_consistent(store)


async def test_a_tier_without_xattrs_has_records_beside(bench: Workbench) -> None:
    bench.without_xattrs("nvme", "hdd")
    store = await bench.start()
    await put(store, b"d/a", b"data")
    await put(store, b"d/b", b"more data")
    await move(store, "demote", b"d/a", "nvme", "hdd")
    await rewrite(store, b"d/b", b"MORE")
    await seal_all(store)
    await rename(store, b"d/a", b"d/c")
    await assert_consistent(store)
    bench.stop(store)
    bench.lose_catalog()
    store = await bench.start()
    assert await read(store, b"d/c") == b"data"
    assert await read(store, b"d/b") == b"MORE data"
    await assert_consistent(store)
