"""Puts: nothing is under the name before the commit, and all of it afterwards."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from typing import Any

import msgspec
import pytest
import trio
import xxhash

from kvfs.catalog.rows import ROOT_INODE, BlockState
from kvfs.errors import (
    BlockBusy,
    BlockCorrupt,
    BlockExists,
    BlockStale,
    FilesystemError,
    InvalidOperation,
    KvfsError,
    NotPermitted,
    QuotaExceeded,
    TierFull,
)
from kvfs.leasing.credentials import Credentials
from kvfs.leasing.puts import Order, Put, Stored
from kvfs.store import Store
from kvfs.tiers.tier import Tier
from kvfs.upkeep.sealer import ON_LOOP_BYTES
from tests.conftest import MIB
from tests.store.borrowing import STRANGER, Borrower
from tests.store.helpers import (
    Workbench,
    assert_consistent,
    create,
    files_on,
    put,
    read,
    row_at,
    seal_all,
    tiers_of,
    unlink,
)


def checksum(data: bytes) -> bytes:
    return xxhash.xxh3_128_digest(data)


async def begin(borrower: Borrower, path: bytes, data: bytes | mmap.mmap, **options: Any) -> Put:
    """Up to where the client has written and closed."""
    order = Order(path, len(data), **options)
    begun = await borrower.store.puts.begin(borrower.holder, order)
    assert not isinstance(begun, Stored), "it is there already"
    put, descriptor = begun
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        file.write(data)
    return put


async def commit(borrower: Borrower, put: Put, **options: bytes | None) -> Stored:
    given = options.get("checksum")
    return await borrower.store.puts.commit(borrower.holder, put.number, given)


async def store_block(
    borrower: Borrower, path: bytes, data: bytes | mmap.mmap, **options: Any
) -> Stored:
    return await commit(borrower, await begin(borrower, path, data, **options))


def names(store: Store, directory: bytes = b"") -> set[bytes]:
    children = store.namespace.children(row_at(store, directory).id, 0, 1000)
    return {name for name, _ in children}


def is_clean(store: Store) -> bool:
    """No put is under way, nobody is charged, and no temporary file is left."""
    idle = len(store.puts) == 0 and store.quotas.total.empty
    return idle and not any(b".put.tmp" in path for path in files_on(store.volume.tiers[0]))


async def check(store: Store) -> None:
    """No put is under way, and all is consistent."""
    assert is_clean(store)
    await store.lingering.settle()
    await assert_consistent(store)


@pytest.fixture
async def borrower(bench: Workbench) -> Borrower:
    return Borrower(await bench.start())


@pytest.mark.semantics("S-put-1")
async def test_a_block_appears_whole_with_its_directories(borrower: Borrower) -> None:
    store, data = borrower.store, os.urandom(3 * MIB)
    put = await begin(borrower, b"engine/model/block", data)
    assert names(store) == {b"engine"}
    assert store.volume.catalog.resolve(b"engine/model/block") is None
    stored = await commit(borrower, put, checksum=checksum(data))
    row = row_at(store, b"engine/model/block")
    assert (stored.created, stored.row) == (True, row)
    assert (row.state, row.checksum, row.size_bytes) == (
        BlockState.SEALED, checksum(data), len(data),
    )  # fmt: skip
    assert await read(store, b"engine/model/block") == data
    assert names(store, b"engine/model") == {b"block"}
    await check(store)


@pytest.mark.parametrize("size", [0, 1, 4096, 100_001])
async def test_any_size(borrower: Borrower, size: int) -> None:
    data = os.urandom(size)
    await store_block(borrower, b"a", data)
    assert await read(borrower.store, b"a") == data
    await check(borrower.store)


@pytest.mark.parametrize(
    ("size", "options", "threads"),
    [(ON_LOOP_BYTES, {}, 0), (ON_LOOP_BYTES + 1, {}, 1), (4096, {"direct": True}, 1)],
    ids=["small", "large", "past-the-page-cache"],
)
async def test_only_a_small_block_is_hashed_on_the_loop(
    borrower: Borrower, monkeypatch: pytest.MonkeyPatch,
    size: int, options: dict[str, bool], threads: int,
) -> None:  # fmt: skip
    calls = []

    async def counted(tier: Tier, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return await in_thread(tier, *args, **kwargs)

    in_thread = Tier.run_in_thread
    monkeypatch.setattr(Tier, "run_in_thread", counted)
    with mmap.mmap(-1, size) as data:
        stored = await store_block(borrower, b"a", data, **options)
    assert stored.row.state == BlockState.SEALED
    assert len(calls) == threads


async def test_the_name_changes_hands_and_whoever_looked_is_told(borrower: Borrower) -> None:
    told: list[tuple[int, bytes]] = []
    waited: list[int] = []

    async def names_told() -> None:
        waited.append(len(told))

    borrower.store.volume.name_changed = lambda parent, name: told.append((parent, name))
    borrower.store.volume.names_told = names_told
    await store_block(borrower, b"d/a", b"1")
    directory = row_at(borrower.store, b"d").id
    assert told == [(ROOT_INODE, b"d"), (directory, b"a")]
    assert waited == [2]


# --- a block that is there


async def test_the_same_content_is_not_written_again(borrower: Borrower) -> None:
    store, data = borrower.store, b"x" * 10_000
    first = await store_block(borrower, b"a", data)
    order = Order(b"a", len(data), checksum(data))
    again = await store.puts.begin(borrower.holder, order)
    assert again == Stored(first.row, created=False)
    # Nor is it published when the daemon finds out at the end only.
    late = await store_block(borrower, b"a", data)
    assert late == Stored(first.row, created=False)
    await check(store)


@pytest.mark.semantics("S-put-2")
async def test_another_content_is_refused_unless_it_is_to_replace_it(borrower: Borrower) -> None:
    store = borrower.store
    first = await store_block(borrower, b"a", b"old")
    for order in (Order(b"a", 4), Order(b"a", 3, checksum(b"new"))):
        with pytest.raises(BlockExists, match="another block of this name"):
            await store.puts.begin(borrower.holder, order)
    with pytest.raises(BlockExists, match="another block of this name"):
        await store_block(borrower, b"a", b"new")
    assert await read(store, b"a") == b"old"
    replaced = await store_block(borrower, b"a", b"newer", replace=True)
    assert replaced.row.id != first.row.id
    assert await read(store, b"a") == b"newer"
    await check(store)


async def test_two_puts_of_one_name(borrower: Borrower) -> None:
    store = borrower.store
    same = [await begin(borrower, b"a", b"123") for _ in range(2)]
    other = await begin(borrower, b"a", b"456")
    assert [(await commit(borrower, put)).created for put in same] == [True, False]
    with pytest.raises(BlockExists):
        await commit(borrower, other)
    await check(store)


async def test_a_block_that_is_being_sealed_is_compared_when_it_is(borrower: Borrower) -> None:
    store = borrower.store
    writing = await create(store, b"a", b"123")
    mine = await begin(borrower, b"a", b"123")
    with pytest.raises(BlockBusy, match="somebody else is writing it"):
        await commit(borrower, mine)
    mine = await begin(borrower, b"a", b"123")
    await store.blocks.close(writing, writer=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.sealer.run)
        stored = await commit(borrower, mine)
        nursery.cancel_scope.cancel()
    assert not stored.created
    await check(store)


# --- what is wrong with it


@pytest.mark.semantics("S-put-5")
async def test_bytes_that_did_not_arrive_are_not_published(borrower: Borrower) -> None:
    store = borrower.store
    for data, size, given, expected in (
        (b"12", 3, None, InvalidOperation), (b"1234", 3, None, InvalidOperation),
        (b"123", 3, checksum(b"124"), BlockCorrupt),
    ):  # fmt: skip
        put = await begin(borrower, b"a", data)
        put.order = Order(b"a", size, given)
        with pytest.raises(expected):
            await commit(borrower, put)
        assert store.volume.catalog.resolve(b"a") is None
    await check(store)


@pytest.mark.semantics("S-put-5")
async def test_while_a_writer_is_left_it_is_not_published(borrower: Borrower) -> None:
    store = borrower.store
    begun = await store.puts.begin(borrower.holder, Order(b"a", 3))
    assert not isinstance(begun, Stored)
    put, descriptor = begun
    os.write(descriptor, b"123")
    with pytest.raises(BlockBusy, match="open for writing still"):
        await commit(borrower, put)
    assert names(store) == set()
    os.close(descriptor)
    assert (await store_block(borrower, b"a", b"123")).created
    await check(store)


async def test_its_temporary_file_is_removed_by_somebody(borrower: Borrower) -> None:
    store = borrower.store
    put = await begin(borrower, b"d/a", b"123")
    (temporary,) = names(store, b"d")
    await unlink(store, b"d/" + temporary)
    with pytest.raises(BlockStale):
        await commit(borrower, put)
    await check(store)


async def test_a_put_is_over_after_its_end(borrower: Borrower) -> None:
    put = await begin(borrower, b"a", b"123")
    stranger = Borrower(borrower.store)
    for holder in (stranger, borrower):
        number = put.number + (holder is borrower)
        with pytest.raises(InvalidOperation, match="not one of this connection"):
            await borrower.store.puts.commit(holder.holder, number, None)
    await commit(borrower, put)
    for again in (commit(borrower, put), borrower.store.puts.abort(borrower.holder, put.number)):
        with pytest.raises(InvalidOperation, match="or is over"):
            await again


async def test_an_abort_leaves_nothing_but_what_the_client_has_open(borrower: Borrower) -> None:
    store = borrower.store
    begun = await store.puts.begin(borrower.holder, Order(b"a", MIB))
    assert not isinstance(begun, Stored)
    put, descriptor = begun
    os.pwrite(descriptor, bytes(MIB), 0)
    store.blocks.growth.account_unseen()
    await store.puts.abort(borrower.holder, put.number)
    assert is_clean(store)
    await store.lingering.settle()
    block = store.replicas.open_blocks[put.block.inode]
    assert (block.readers, block.writers) == (1, 0)
    os.close(descriptor)
    await check(store)


@pytest.mark.semantics("S-put-3")
async def test_puts_end_with_their_connection(borrower: Borrower) -> None:
    store = borrower.store
    for name in (b"a", b"b/c"):
        await begin(borrower, name, b"123")
    await store.puts.leave(borrower.holder)
    assert is_clean(store)
    assert names(store) == {b"b"}
    await check(store)


# --- who may


@pytest.mark.semantics("S-put-4")
async def test_a_client_writes_as_himself_where_he_may(borrower: Borrower) -> None:
    store = borrower.store
    await put(store, b"shared/x", b"")
    await put(store, b"closed/x", b"")
    await put(store, b"mine/x", b"theirs", mode=0o600)
    set_attributes = store.attributes.set
    await set_attributes(row_at(store, b"shared").id, mode=0o3777, gid=77)
    await set_attributes(row_at(store, b"mine").id, uid=STRANGER.uid)
    stranger = Borrower(store, STRANGER)
    stored = await store_block(stranger, b"shared/sub/a", b"1", mode=0o640)
    assert (stored.row.uid, stored.row.gid, stored.row.mode) == (STRANGER.uid, 77, 0o640)
    directory = row_at(store, b"shared/sub")
    assert (directory.uid, directory.gid) == (STRANGER.uid, 77)
    assert directory.mode == 0o755 | stat.S_ISGID
    # He owns the directory, so he may replace what is in it.
    assert (await store_block(stranger, b"mine/x", b"his", replace=True)).created
    refused = [
        store_block(stranger, b"closed/a", b"1"), store_block(stranger, b"closed/new/a", b"1"),
        store_block(stranger, b"a", b"1"), store_block(stranger, b"shared/x", b"1", replace=True),
    ]  # fmt: skip
    for attempt in refused:
        with pytest.raises(NotPermitted):
            await attempt
    await set_attributes(row_at(store, b"closed").id, mode=0o700)
    with pytest.raises(NotPermitted):
        await store_block(stranger, b"closed/x/a", b"1")
    assert is_clean(store)


async def test_the_group_that_lets_him_write_may_be_a_supplementary_one(
    borrower: Borrower,
) -> None:
    store = borrower.store
    await put(store, b"team/x", b"")
    await store.attributes.set(row_at(store, b"team").id, mode=0o770, gid=88)
    member = Borrower(store, Credentials(5, 5, frozenset({88})))
    assert (await store_block(member, b"team/a", b"1")).created
    with pytest.raises(NotPermitted):
        await store_block(Borrower(store, Credentials(5, 5)), b"team/b", b"1")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (b"", errno.EINVAL), (b".", errno.EINVAL), (b"..", errno.EINVAL),
        (b"../a", errno.EINVAL), (b"d/../a", errno.EINVAL), (b"a\0b", errno.EINVAL),
        (b"x//a", errno.EINVAL), (b".kvfs/a", errno.EPERM), (b"d/.kvfs.d", errno.EPERM),
        (b"d", errno.EISDIR), (b"d/file/a", errno.ENOTDIR), (b"n" * 256, errno.ENAMETOOLONG),
        (b"/".join([b"d" * 200] * 30), errno.ENAMETOOLONG),
    ],
)  # fmt: skip
async def test_names_that_no_block_can_have(borrower: Borrower, path: bytes, expected: int) -> None:
    await put(borrower.store, b"d/file", b"1")
    with pytest.raises(KvfsError) as caught:
        await store_block(borrower, path, b"1")
    assert caught.value.errno == expected
    assert is_clean(borrower.store)


# --- room


async def test_a_put_that_fits_no_tier_is_refused_before_it_is_written(bench: Workbench) -> None:
    bench.configure(nvme_mib=2, hdd_mib=3, remote_mib=2, on_full="refuse")
    borrower = Borrower(await bench.start())
    with pytest.raises(TierFull):
        await begin(borrower, b"a", bytes(4 * MIB))
    assert is_clean(borrower.store)
    await store_block(borrower, b"a", bytes(2 * MIB))
    assert tiers_of(borrower.store, b"a") == ["hdd"]
    await check(borrower.store)


async def test_a_tier_that_cannot_tell_writers_takes_no_puts(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    borrower = Borrower(await bench.start())
    tier = borrower.store.volume.tiers[0]
    probe = msgspec.structs.replace(tier.identity.probe, leases=False)
    tier.identity = msgspec.structs.replace(tier.identity, probe=probe)
    with pytest.raises(FilesystemError) as caught:
        await begin(borrower, b"a", b"123")
    assert caught.value.errno == errno.EOPNOTSUPP
    assert is_clean(borrower.store)


async def test_what_a_client_is_writing_counts_for_his_limits(borrower: Borrower) -> None:
    store = borrower.store
    leases = msgspec.structs.replace(store.volume.config.leases, max_bytes=1000, max_leases=2)
    store.volume.config = msgspec.structs.replace(store.volume.config, leases=leases)
    first = await begin(borrower, b"a", bytes(600))
    with pytest.raises(QuotaExceeded):
        await begin(Borrower(store), b"b", bytes(600))
    await begin(borrower, b"c", bytes(100))
    with pytest.raises(QuotaExceeded):
        await begin(borrower, b"d", b"1")
    await commit(borrower, first)
    await store_block(borrower, b"d", b"1")
    await store.puts.leave(borrower.holder)
    assert is_clean(store)


@pytest.mark.semantics("S-put-3")
async def test_a_crash_leaves_nothing_of_a_put(bench: Workbench) -> None:
    borrower = Borrower(await bench.start())
    await begin(borrower, b"d/a", b"123")
    stored = await store_block(borrower, b"d/b", b"456")
    store = await bench.restart_after_crash(borrower.store)
    await store.recovery.reconcile()
    assert names(store, b"d") == {b"b"}
    assert row_at(store, b"d/b").checksum == stored.row.checksum
    await seal_all(store)
    await check(store)
