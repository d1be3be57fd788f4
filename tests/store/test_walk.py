"""The walk over a tier after a crash, while moves and removals go on beside it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from kvfs.store import Store
from kvfs.tiers.walk import Found, look
from tests.store.helpers import (
    Workbench,
    assert_consistent,
    files_on,
    move,
    put_on,
    read,
    rename,
    settle_all,
    tiers_of,
    unlink,
)

HDD = 1


def seen_on_hdd(store: Store, path: bytes) -> Found:
    found = look(store.volume.tiers[HDD], path)
    assert found is not None, "the file is there when the walk comes by"
    return found


async def absorb(store: Store, found: Found) -> None:
    await store.recovery.absorb(store.volume.tiers[HDD], found)


async def test_a_replica_that_was_dropped_after_the_walk_saw_it_is_not_believed(
    bench: Workbench,
) -> None:
    store = await bench.start()
    await put_on(store, b"d/a", b"bytes", "nvme", "hdd")
    found = seen_on_hdd(store, b"d/a")
    await move(store, "drop", b"d/a", "hdd", None)
    await absorb(store, found)
    assert tiers_of(store, b"d/a") == ["nvme"]
    assert await read(store, b"d/a") == b"bytes"
    await assert_consistent(store)


async def test_a_replica_whose_removal_is_promised_is_not_believed(bench: Workbench) -> None:
    store = await bench.start()
    number = await put_on(store, b"d/a", b"bytes", "nvme", "hdd")
    found = seen_on_hdd(store, b"d/a")
    replicas = store.volume.catalog.replicas(number)
    store.replicas.forget_replicas(number, b"d/a", replicas[1:])
    await absorb(store, found)
    assert tiers_of(store, b"d/a") == ["nvme"]
    await settle_all(store)
    assert not files_on(store.volume.tiers[HDD])
    await assert_consistent(store)


async def evict(store: Store, path: bytes) -> None:
    row = store.volume.catalog.resolve(path)
    assert row is not None
    store.replicas.evict(row.id, reason="asked")


async def rename_away(store: Store, path: bytes) -> None:
    await rename(store, path, b"d/elsewhere")


@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("remove", [unlink, evict, rename_away])
async def test_a_block_that_left_its_name_after_the_walk_saw_it_stays_away(
    bench: Workbench, remove: Callable[[Store, bytes], Awaitable[object]], settled: bool
) -> None:
    store = await bench.start()
    await put_on(store, b"d/a", b"bytes", "hdd")
    found = seen_on_hdd(store, b"d/a")
    await remove(store, b"d/a")
    if settled:
        await settle_all(store)
    await absorb(store, found)
    assert store.volume.catalog.resolve(b"d/a") is None
    await settle_all(store)
    await assert_consistent(store)
