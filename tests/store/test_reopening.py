"""A block that is opened for writing again."""

from __future__ import annotations

import pytest

from kvfs.catalog.rows import GOOD, SUSPECT, BlockState
from kvfs.store import Store
from tests.store.helpers import (
    Workbench,
    assert_consistent,
    create,
    put,
    put_on,
    read,
    rewrite,
    row_at,
    seal_all,
    tiers_of,
)

MIB = 1 << 20
KIB = 1 << 10


def states_of(store: Store, path: bytes) -> dict[str, int]:
    """Good or suspect, by the tier's name."""
    by_number = store.volume.by_number
    replicas = store.volume.catalog.replicas(row_at(store, path).id)
    return {by_number[replica.tier].name: replica.state for replica in replicas}


async def test_a_reopened_block_with_the_same_content_keeps_its_replicas(
    bench: Workbench,
) -> None:
    store = await bench.start()
    await put_on(store, b"a", b"the same", "nvme", "hdd")
    before = row_at(store, b"a")
    block = await store.blocks.open_writer(before.id)
    assert row_at(store, b"a").state == BlockState.REOPENED
    assert states_of(store, b"a") == {"nvme": GOOD, "hdd": SUSPECT}
    await store.blocks.write(block, 0, b"the same")
    await store.blocks.close(block, writer=True)
    await seal_all(store)
    after = row_at(store, b"a")
    assert (after.state, after.generation) == (BlockState.SEALED, before.generation)
    assert states_of(store, b"a") == {"nvme": GOOD, "hdd": GOOD}
    await assert_consistent(store)


@pytest.mark.parametrize("length", [3, 20])
async def test_a_reopened_block_with_other_content_drops_its_other_replicas(
    bench: Workbench, length: int
) -> None:
    store = await bench.start()
    await put_on(store, b"d/a", b"0123456789", "nvme", "hdd")
    before = row_at(store, b"d/a")
    await rewrite(store, b"d/a", b"X" * length)
    await seal_all(store)
    after = row_at(store, b"d/a")
    assert after.generation == before.generation + 1
    assert after.checksum != before.checksum
    assert tiers_of(store, b"d/a") == ["nvme"]
    assert await read(store, b"d/a") == b"X" * length + b"0123456789"[length:]
    await assert_consistent(store)


async def test_opening_with_truncation_empties_the_block(bench: Workbench) -> None:
    store = await bench.start()
    await put_on(store, b"a", b"0123456789", "nvme", "hdd")
    block = await store.blocks.open_writer(row_at(store, b"a").id, truncate=True)
    await store.blocks.write(block, 0, b"new")
    await store.blocks.close(block, writer=True)
    await seal_all(store)
    assert await read(store, b"a") == b"new"
    await assert_consistent(store)


@pytest.mark.parametrize("size", [0, 4, 10, 5000])
async def test_truncate_sets_the_length(bench: Workbench, size: int) -> None:
    store = await bench.start()
    inode = await put(store, b"a", b"0123456789")
    await store.attributes.set(inode, size=size)
    await seal_all(store)
    assert await read(store, b"a") == b"0123456789"[:size] + bytes(max(0, size - 10))
    assert row_at(store, b"a").generation == (1 if size == 10 else 2)
    await assert_consistent(store)


async def test_fsync_publishes_with_the_size_written_so_far(bench: Workbench) -> None:
    store = await bench.start()
    block = await create(store, b"a", b"12345")
    await store.blocks.fsync(block, data_only=False)
    row = row_at(store, b"a")
    assert (row.state, row.size_bytes) == (BlockState.PUBLISHED, 5)
    await store.blocks.write(block, 5, b"678")
    await store.blocks.close(block, writer=True)
    await seal_all(store)
    assert await read(store, b"a") == b"12345678"
    await assert_consistent(store)


async def test_a_reader_does_not_hold_up_sealing_nor_a_second_writer(bench: Workbench) -> None:
    store = await bench.start()
    block = await create(store, b"a", b"data")
    reader = await store.blocks.open_reader(block.inode)
    second = await store.blocks.open_writer(block.inode)
    assert block is reader is second
    await store.blocks.close(block, writer=True)
    assert await store.sealer.seal_pending() == set()
    assert row_at(store, b"a").state == BlockState.WRITING, "one writer is left"
    await store.blocks.close(second, writer=True)
    await seal_all(store)
    assert row_at(store, b"a").state == BlockState.SEALED
    assert await store.blocks.read(reader, 0, 4) == b"data"
    await store.blocks.close(reader, writer=False)
    await assert_consistent(store)
