"""Many paths at once: how many leading ones are blocks that can be read, and where."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from kvfs.leasing.credentials import Credentials
from kvfs.leasing.lookup import BATCH_NAMES, Status
from kvfs.store import Store
from tests.mount.live import config_in
from tests.store.helpers import (
    Workbench,
    create,
    make_directory,
    move,
    put,
    put_on,
    rename,
    row_at,
    take_away,
    unlink,
)

ROOT, STRANGER = Credentials(0, 0), Credentials(4711, 4711)


async def found(store: Store, *paths: bytes, who: Credentials = ROOT) -> tuple[list[str], str]:
    """The tiers of the leading paths, and what ended them."""
    hits = await store.lookup.leading(paths, who)
    return [store.volume.tiers[place].name for place in hits.tiers], hits.stopped.name


async def test_leading_blocks_and_their_fastest_tiers(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"m/a", b"1")
    await put_on(store, b"m/b", b"2", "hdd")
    await put_on(store, b"c", b"3", "nvme", "remote")
    await put(store, b"m/e", b"5")
    assert await found(store, b"m/a", b"m/b", b"c") == (["nvme", "hdd", "nvme"], "FOUND")
    assert await found(store, b"m/a", b"m/d", b"m/e") == (["nvme"], "MISSING")
    assert await found(store) == ([], "FOUND")
    assert store.volume.accesses.pending() == {}


@pytest.mark.parametrize(
    "path", [b"", b"m", b"m/x", b"x/a", b"m/a/b", b"m//a", b".", b"m/..", b"m/../c", b"\xff\0/a"]
)
async def test_what_is_no_block_is_missing(bench: Workbench, path: bytes) -> None:
    store = await bench.start()
    await put(store, b"m/a", b"1")
    await put(store, b"c", b"1")
    assert await found(store, path, b"c") == ([], "MISSING")


async def test_a_slash_too_many_at_the_ends_is_none(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"m/a", b"1")
    assert await found(store, b"/m/a", b"m/a/") == (["nvme", "nvme"], "FOUND")


async def test_more_paths_than_a_query_takes_in_many_directories(bench: Workbench) -> None:
    store = await bench.start()
    paths = [b"m/%02x/%d/block" % (number % 7, number) for number in range(2 * BATCH_NAMES + 5)]
    for path in paths:
        block = await create(store, path, b"x")
        await store.blocks.close(block, writer=True)
    await store.sealer.seal_pending()
    assert await found(store, *paths) == (["nvme"] * len(paths), "FOUND")
    missing = [*paths[:-3], b"m/00/nowhere", *paths[-3:]]
    assert await found(store, *missing) == (["nvme"] * (len(paths) - 3), "MISSING")


async def test_a_directory_that_was_renamed_or_replaced(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"top/old/a", b"1")
    assert await found(store, b"top/old/a") == (["nvme"], "FOUND")
    await rename(store, b"top", b"other")
    assert await found(store, b"top/old/a") == ([], "MISSING")
    assert await found(store, b"other/old/a") == (["nvme"], "FOUND")
    await unlink(store, b"other/old/a")
    await store.namespace.rmdir(row_at(store, b"other").id, b"old")
    assert await found(store, b"other/old/a") == ([], "MISSING")
    await put(store, b"other/old/a", b"2")
    assert await found(store, b"other/old/a") == (["nvme"], "FOUND")


async def test_who_may_not_search_a_directory_learns_nothing(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"open/a", b"1", mode=0)
    await put(store, b"closed/in/a", b"1", mode=0o666)
    await store.attributes.set(row_at(store, b"closed").id, mode=0o700)
    assert await found(store, b"open/a", b"closed/in/a") == (["nvme", "nvme"], "FOUND")
    assert await found(store, b"open/a", b"closed/in/a", who=STRANGER) == (["nvme"], "DENIED")
    for path in (b"closed/x", b"closed/no/x", b"closed/in/x"):
        assert await found(store, path, who=STRANGER) == ([], "DENIED")
    await store.attributes.set(1, mode=0o700)
    assert await found(store, b"open/a", who=STRANGER) == ([], "DENIED")


@pytest.mark.semantics("S-lease-9")
async def test_what_cannot_be_read_now_is_no_hit(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"a", b"1")
    await put_on(store, b"away", b"2", "remote")
    await put_on(store, b"both", b"2", "hdd", "remote")
    half = await create(store, b"half", b"3")
    take_away(store.volume.tier_named("remote"))
    assert await found(store, b"a", b"away") == (["nvme"], "OFFLINE")
    assert await found(store, b"both", b"half") == (["hdd"], "BUSY")
    await store.blocks.close(half, writer=True)
    await store.sealer.seal_pending()
    assert await found(store, b"both", b"half") == (["hdd", "nvme"], "FOUND")


async def test_after_a_crash_a_miss_is_looked_up_on_the_tiers(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"deep/er/a", b"1")
    await put(store, b"b", b"1")
    catalog = store.volume.catalog
    with catalog.transaction("test"):
        for path in (b"deep/er/a", b"deep/er", b"deep"):
            catalog.delete(row_at(store, path).id)
    account = store.volume.space[0]
    account.used_bytes, account.blocks = account.used_bytes // 2, 1
    store.volume.blocks, store.volume.directories = 1, store.volume.directories - 2
    assert await found(store, b"deep/er/a") == ([], "MISSING")
    store.volume.walking = True
    assert await found(store, b"b", b"deep/er/a", b"b") == (["nvme"] * 3, "FOUND")
    assert await found(store, b"deep/er/a", b"nowhere") == (["nvme"], "MISSING")


async def test_names_come_with_their_rows(bench: Workbench) -> None:
    store = await bench.start()
    first = await put(store, b"m/a", b"1")
    last = await put(store, b"b", b"1")
    directories = store.lookup.directories(ROOT)
    names = await store.lookup.names([b"m/a", b"x", b"b", b"m"], directories)
    assert [name.inode for name in names] == [first, 0, last, row_at(store, b"m").id]
    assert names[1].status == Status.MISSING


PARTS = st.sampled_from([b"a", b"b", b"c"])
PATHS = st.lists(PARTS, min_size=1, max_size=3).map(b"/".join)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """Some of the paths that PATHS makes, as blocks or directories."""
    base = tmp_path_factory.mktemp("lookup")
    bench = Workbench(lambda **_: config_in(base))

    async def fill() -> Store:
        store = await bench.start()
        for path in (b"a/a", b"a/b/a", b"a/b/c", b"b", b"c/c/c"):
            await put(store, path, b"x")
        await make_directory(store, b"c/a")
        await move(store, "demote", b"a/b/a", "nvme", "hdd")
        return store

    yield trio.run(fill)
    bench.close_all()


@given(paths=st.lists(PATHS, max_size=12))
def test_it_finds_what_one_lookup_after_another_finds(filled: Store, paths: list[bytes]) -> None:
    expected = []
    for path in paths:
        row = filled.volume.catalog.resolve(path)
        there = filled.attributes.replica_names(row.id) if row is not None else []
        if not there:
            break
        expected.append(there[0])

    async def look() -> tuple[list[str], str]:
        return await found(filled, *paths)

    tiers, _ = trio.run(look)
    assert tiers == expected
