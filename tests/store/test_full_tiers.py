"""Writers that find a tier full: spilling, ENOSPC, eviction."""

from __future__ import annotations

import errno
import os

import msgspec
import pytest

from kvfs.errors import (
    TierFull,
    errno_of,
)
from tests.store.helpers import (
    Workbench,
    assert_consistent,
    create,
    files_on,
    put,
    put_on,
    read,
    rewrite,
    seal_all,
    tiers_of,
)

MIB = 1 << 20
KIB = 1 << 10


KIB = 1 << 10
MIB = 1 << 20


async def test_a_file_goes_on_to_the_next_tier_when_its_own_is_full(bench: Workbench) -> None:
    bench.configure(nvme_mib=1, hdd_mib=8)
    store = await bench.start()
    data = os.urandom(2 * MIB)
    block = await create(store, b"d/a")
    reader = await store.blocks.open_reader(block.inode)
    for offset in range(0, len(data), 256 * KIB):
        await store.blocks.write(block, offset, data[offset : offset + 256 * KIB])
        for account in store.volume.space.tiers:
            assert account.taken_bytes <= account.capacity_bytes
    assert store.volume.counters.events["spills"] == 1
    assert tiers_of(store, b"d/a") == ["hdd"]
    assert await store.blocks.read(reader, 0, 100) == data[:100], "readers go with it"
    await store.blocks.close(block, writer=True)
    await store.blocks.close(reader, writer=False)
    await seal_all(store)
    assert await read(store, b"d/a") == data
    assert files_on(store.volume.tiers[0]) == set()
    await assert_consistent(store)


async def test_a_new_file_goes_where_there_is_room(bench: Workbench) -> None:
    bench.configure(nvme_mib=1, hdd_mib=8)
    store = await bench.start()
    for name in (b"a", b"b", b"c"):
        await put(store, name, os.urandom(600 * KIB))
    assert [tiers_of(store, name) for name in (b"a", b"b", b"c")] == [["nvme"], ["hdd"], ["hdd"]]
    await assert_consistent(store)


async def test_seal_records_have_their_room_before_they_are_written(bench: Workbench) -> None:
    bench.configure(nvme_mib=1, on_full="refuse")
    store = await bench.start()
    account = store.volume.space[0]
    names = [b"%03d" % number for number in range(200)]
    for name in names:
        block = await create(store, name)
        await store.blocks.write(block, 0, bytes(12 * KIB))
        await store.blocks.close(block, writer=True)
    assert account.free_bytes < 16 * KIB
    await seal_all(store)
    assert account.taken_bytes <= account.capacity_bytes
    assert {tier for name in names for tier in tiers_of(store, name)} > {"nvme"}
    await assert_consistent(store)


async def test_of_two_that_begin_with_room_for_one_one_is_stored(bench: Workbench) -> None:
    bench.configure(nvme_mib=1, on_full="refuse")
    bench.config = msgspec.structs.replace(bench.config, tier=bench.config.tier[:1])
    store = await bench.start()
    account = store.volume.space[0]
    await put(store, b"d/first", bytes(256 * KIB))
    rest = store.volume.space.reserve(0, account.free_bytes - 512 * KIB)
    assert rest is not None
    block = await create(store, b"d/a")
    with pytest.raises(TierFull):
        await create(store, b"d/b")
    await store.blocks.write(block, 0, bytes(256 * KIB))
    await store.blocks.close(block, writer=True)
    rest.release()
    await seal_all(store)
    await assert_consistent(store)


async def test_a_reopened_block_spills_over_its_own_older_copy(bench: Workbench) -> None:
    bench.configure(nvme_mib=1, hdd_mib=8)
    store = await bench.start()
    data = os.urandom(600 * KIB)
    await put_on(store, b"d/a", data, "nvme", "hdd")
    more = os.urandom(600 * KIB)
    await rewrite(store, b"d/a", more, offset=len(data))
    await seal_all(store)
    assert tiers_of(store, b"d/a") == ["hdd"]
    assert await read(store, b"d/a") == data + more
    await assert_consistent(store)


async def test_enospc_when_every_tier_is_full_and_nothing_may_be_evicted(
    bench: Workbench,
) -> None:
    bench.configure(nvme_mib=1, hdd_mib=1, remote_mib=1, on_full="refuse")
    store = await bench.start()
    kept = [b"0", b"1", b"2"]
    for name in kept:
        await put(store, name, name * 900 * KIB)
    with pytest.raises(TierFull) as refused:
        await create(store, b"more")
    assert errno_of(refused.value) == errno.ENOSPC
    assert store.volume.catalog.resolve(b"more") is None
    assert [await read(store, name) == name * 900 * KIB for name in kept] == [True] * 3
    await assert_consistent(store)


async def test_a_write_that_fits_nowhere_leaves_what_was_written(bench: Workbench) -> None:
    bench.configure(nvme_mib=1, hdd_mib=1, remote_mib=1, on_full="refuse")
    store = await bench.start()
    block = await create(store, b"a", b"x" * 500 * KIB)
    with pytest.raises(TierFull):
        await store.blocks.write(block, 500 * KIB, bytes(600 * KIB))
    await store.blocks.write(block, 500 * KIB, b"y" * KIB)
    await store.blocks.close(block, writer=True)
    await seal_all(store)
    assert await read(store, b"a") == b"x" * 500 * KIB + b"y" * KIB
    await assert_consistent(store)


async def test_the_coldest_are_evicted_for_a_writer_that_finds_all_full(
    bench: Workbench,
) -> None:
    bench.configure(nvme_mib=1, hdd_mib=1, remote_mib=1)
    store = await bench.start()
    gone: list[bytes] = []
    store.volume.name_changed = lambda parent, name: gone.append(name)
    names = [b"%02d" % number for number in range(40)]
    for name in names:
        await put(store, b"d/" + name, name * (64 * KIB))
        for account in store.volume.space.tiers:
            assert account.taken_bytes <= account.capacity_bytes
    assert gone, "40 blocks of 128 KiB do not fit into 3 MiB"
    assert gone == sorted(gone), "the coldest go first"
    assert store.volume.counters.events["emergency_evictions"] == len(gone)
    for name in names:
        there = store.volume.catalog.resolve(b"d/" + name) is not None
        assert there == (name not in gone)
        if there:
            assert await read(store, b"d/" + name) == name * (64 * KIB)
    await assert_consistent(store)


async def test_what_is_kept_pinned_or_open_is_not_evicted(bench: Workbench) -> None:
    bench.configure(nvme_mib=1, hdd_mib=1, remote_mib=1)
    bench.config = msgspec.structs.replace(bench.config, tier=bench.config.tier[:1])
    store = await bench.start()
    await put(store, b"config.json", b"k" * 200 * KIB)
    pinned = await put(store, b"pinned", b"p" * 200 * KIB)
    await store.attributes.set_xattr(pinned, b"user.kvfs.pin", b"1")
    opened = await store.blocks.open_reader(await put(store, b"open", b"o" * 200 * KIB))
    await put(store, b"cold", b"c" * 200 * KIB)
    block = await create(store, b"new", b"n" * 300 * KIB)
    assert store.volume.catalog.resolve(b"cold") is None
    with pytest.raises(TierFull):
        await store.blocks.write(block, 300 * KIB, bytes(300 * KIB))
    assert {b"config.json", b"pinned", b"open", b"new"} == files_on(store.volume.tiers[0])
    await store.blocks.close(block, writer=True)
    await store.blocks.close(opened, writer=False)
    await seal_all(store)
    await assert_consistent(store)


async def test_a_writer_on_the_last_tier_grows_at_the_cost_of_cold_blocks(
    bench: Workbench,
) -> None:
    bench.configure(nvme_mib=1)
    bench.config = msgspec.structs.replace(bench.config, tier=bench.config.tier[:1])
    store = await bench.start()
    for number in range(6):
        await put(store, b"d/%d" % number, bytes([number]) * 150 * KIB)
    data = os.urandom(700 * KIB)
    block = await create(store, b"new")
    for offset in range(0, len(data), 100 * KIB):
        await store.blocks.write(block, offset, data[offset : offset + 100 * KIB])
        assert store.volume.space[0].taken_bytes <= MIB
    await store.blocks.close(block, writer=True)
    await seal_all(store)
    assert await read(store, b"new") == data
    assert store.volume.catalog.resolve(b"d/0") is None
    assert await read(store, b"d/5") == bytes([5]) * 150 * KIB
    await assert_consistent(store)
