"""Leases: what is lent and what is not, that it stays, and how a lease ends."""

from __future__ import annotations

import fcntl
import mmap
import os
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio

from kvfs.config import LeasesConfig
from kvfs.errors import BlockBusy, QuotaExceeded, TierFull
from kvfs.leasing.lending import Terms
from kvfs.leasing.lookup import BATCH_NAMES
from kvfs.store import Store
from tests.conftest import MIB
from tests.store.borrowing import ROOT, STRANGER, Borrower
from tests.store.helpers import (
    Workbench,
    assert_consistent,
    create,
    file_on,
    move,
    put,
    put_on,
    read,
    rename,
    rewrite,
    row_at,
    seal_all,
    take_away,
    tiers_of,
    unlink,
    until,
)


def limit(store: Store, **settings: object) -> None:
    """Change `[leases]`."""
    leases = msgspec.structs.replace(store.volume.config.leases, **settings)
    store.volume.config = msgspec.structs.replace(store.volume.config, leases=leases)


def descriptors(store: Store) -> int:
    """Those of the process, but for the one of each block that is kept open."""
    return len(os.listdir("/proc/self/fd")) - len(store.blocks.idle)


def used(store: Store, tier: str = "nvme") -> tuple[int, int]:
    """Used and held bytes."""
    account = store.volume.space[store.volume.tier_named(tier).index]
    return account.used_bytes, account.held_bytes


# --- what is lent


async def test_leading_blocks_are_lent_with_what_is_known_of_them(bench: Workbench) -> None:
    store = await bench.start()
    data = [os.urandom(5000), b"", os.urandom(70_000)]
    for number, content in enumerate(data):
        await put(store, b"m/%d" % number, content)
    borrower = Borrower(store)
    got = await borrower.lease(b"m/0", b"m/1", b"m/2")
    assert got.statuses == ["FOUND"] * 3
    assert [got.read(place) for place in range(3)] == data
    for number, loan in enumerate(borrower.loans):
        row = row_at(store, b"m/%d" % number)
        assert (loan.row.checksum, loan.row.size_bytes) == (row.checksum, len(data[number]))
        assert loan.block.tier.name == "nvme"
    await borrower.give_back(got)
    await assert_consistent(store)


async def test_a_miss_ends_the_lease_and_sparse_goes_on(bench: Workbench) -> None:
    store = await bench.start()
    for name in (b"a", b"c"):
        await put(store, name, name)
    borrower = Borrower(store)
    got = await borrower.lease(b"a", b"b", b"c")
    assert (got.statuses, list(got.descriptors)) == (["FOUND", "MISSING"], [0])
    sparse = await borrower.lease(b"a", b"b", b"c", sparse=True)
    assert sparse.statuses == ["FOUND", "MISSING", "FOUND"]
    assert [sparse.read(0), sparse.read(2)] == [b"a", b"c"]
    none = await borrower.lease(b"b", b"a")
    assert (none.lease, none.statuses) == (None, ["MISSING"])
    nothing = await borrower.lease()
    assert (nothing.lease, nothing.statuses) == (None, [])
    for each in (got, sparse):
        await borrower.give_back(each)
    assert len(store.leases) == 0
    await assert_consistent(store)


async def test_descriptors_are_read_only_and_of_the_client_alone(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"a", b"x" * 8192)
    borrower = Borrower(store)
    one, other = [await borrower.lease(b"a") for _ in range(2)]
    assert fcntl.fcntl(one.descriptors[0], fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    assert not fcntl.fcntl(one.descriptors[0], fcntl.F_GETFL) & os.O_NONBLOCK
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(one.descriptors[0], b"y")
    os.lseek(one.descriptors[0], 100, os.SEEK_SET)
    assert os.lseek(other.descriptors[0], 0, os.SEEK_CUR) == 0
    block = await store.blocks.open_reader(row_at(store, b"a").id)
    # What a client does to its description must not reach the daemon's reads.
    fcntl.fcntl(one.descriptors[0], fcntl.F_SETFL, os.O_DIRECT)
    assert await store.blocks.read(block, 1, 10) == b"x" * 10
    await store.blocks.close(block, writer=False)
    for each in (one, other):
        await borrower.give_back(each)


async def test_a_block_that_was_leased_lately_is_lent_without_opening_it(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    inode = await put(store, b"a", b"x" * 8192)
    borrower = Borrower(store)
    first = await borrower.lease(b"a")
    os.lseek(first.descriptors[0], 100, os.SEEK_SET)
    fcntl.fcntl(first.descriptors[0], fcntl.F_SETFL, os.O_DIRECT)
    await borrower.give_back(first)
    assert inode not in store.replicas.open_blocks
    monkeypatch.setattr("kvfs.leasing.lending.open_file", None)
    again = await borrower.lease(b"a")
    # With a description that nobody has had.
    assert os.lseek(again.descriptors[0], 0, os.SEEK_CUR) == 0
    assert not fcntl.fcntl(again.descriptors[0], fcntl.F_GETFL) & (os.O_DIRECT | os.O_NONBLOCK)
    assert again.read() == b"x" * 8192
    monkeypatch.undo()
    # Two at one time share none, and a mount that has it open shares none either.
    other = await borrower.lease(b"a")
    os.lseek(other.descriptors[0], 100, os.SEEK_SET)
    assert os.lseek(again.descriptors[0], 0, os.SEEK_CUR) == 0
    for each in (again, other):
        await borrower.give_back(each)
    block = await store.blocks.open_reader(inode)
    shared = await borrower.lease(b"a")
    fcntl.fcntl(shared.descriptors[0], fcntl.F_SETFL, os.O_DIRECT)
    assert await store.blocks.read(block, 1, 10) == b"x" * 10
    await store.blocks.close(block, writer=False)
    await borrower.give_back(shared)
    await assert_consistent(store)


@pytest.mark.parametrize("touch", ["rewritten", "replaced", "renamed", "demoted"])
async def test_one_that_changed_since_its_last_lease_is_looked_at_anew(
    bench: Workbench, touch: str, expect_log: list[str]
) -> None:
    store = await bench.start()
    await put(store, b"a", b"x" * 8192)
    borrower, name = Borrower(store), b"a"
    await borrower.give_back(await borrower.lease(b"a"))
    assert len(store.blocks.idle) == 1
    if touch == "rewritten":
        file_on(store, "nvme", b"a").write_bytes(b"y" * 8192)
    elif touch == "replaced":
        await put(store, b"b", b"z" * 10)
        await rename(store, b"b", b"a")
    elif touch == "renamed":
        await rename(store, b"a", b"c")
        name = b"c"
    else:
        await move(store, "demote", b"a", "nvme", "hdd")
    got = await borrower.lease(name)
    if touch == "rewritten":
        # The only replica is not what was sealed.
        expect_log.append("'a' is bad")
        assert got.statuses == ["MISSING"]
        return
    assert got.read() == (b"z" * 10 if touch == "replaced" else b"x" * 8192)
    assert borrower.loans[-1].block.tier.name == ("hdd" if touch == "demoted" else "nvme")
    await borrower.give_back(got)
    await assert_consistent(store)


@pytest.mark.parametrize("tier", ["nvme", "hdd", "remote"])
async def test_direct_descriptors(bench: Workbench, tier: str) -> None:
    store = await bench.start()
    await put_on(store, b"a", os.urandom(8192), tier)
    borrower = Borrower(store)
    for direct in (True, False):
        got = await borrower.lease(b"a", direct=direct)
        flags = fcntl.fcntl(got.descriptors[0], fcntl.F_GETFL)
        assert bool(flags & os.O_DIRECT) == direct == borrower.loans[-1].direct
        await borrower.give_back(got)


async def test_more_blocks_than_a_message_brings(bench: Workbench) -> None:
    store = await bench.start()
    paths = [b"m/%03d" % number for number in range(2 * BATCH_NAMES + 7)]
    for path in paths:
        block = await create(store, path, path)
        await store.blocks.close(block, writer=True)
    await seal_all(store)
    borrower = Borrower(store)
    got = await borrower.lease(*paths, b"missing")
    assert got.statuses == ["FOUND"] * len(paths) + ["MISSING"]
    assert [got.read(place) for place in range(len(paths))] == paths
    await borrower.give_back(got)
    await assert_consistent(store)


@pytest.mark.semantics("S-lease-5")
async def test_permissions_are_those_of_the_kernel(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"mine", b"1", mode=0o600)
    await put(store, b"all", b"2", mode=0o604)
    await put(store, b"dir/closed", b"3", mode=0o644)
    await store.attributes.set(row_at(store, b"dir").id, mode=0o750)
    stranger, root = Borrower(store, STRANGER), Borrower(store)
    got = await stranger.lease(b"all", b"mine", b"dir/closed", b"dir/no", sparse=True)
    assert got.statuses == ["FOUND", "DENIED", "DENIED", "DENIED"]
    assert (await stranger.lease(b"mine")).statuses == ["DENIED"]
    everything = await root.lease(b"all", b"mine", b"dir/closed")
    assert everything.statuses == ["FOUND"] * 3
    await stranger.give_back(got)
    await root.give_back(everything)


@pytest.mark.semantics("S-lease-3")
async def test_a_lease_counts_as_one_access(bench: Workbench) -> None:
    store = await bench.start()
    inode = await put(store, b"a", b"1")
    borrower = Borrower(store)
    first, second = await borrower.lease(b"a"), await borrower.lease(b"a")
    assert store.volume.accesses.pending().keys() == {inode}
    assert store.volume.counters.tier(0).opens == 2
    quiet = msgspec.structs.replace(store.volume.config.tiering, quiet_uids=(STRANGER.uid,))
    store.volume.config = msgspec.structs.replace(store.volume.config, tiering=quiet)
    other = await put(store, b"b", b"1")
    backup = Borrower(store, STRANGER)
    third = await backup.lease(b"b")
    assert other not in store.volume.accesses.pending()
    await borrower.give_back(first)
    await borrower.give_back(second)
    await backup.give_back(third)


# --- that it stays


@pytest.mark.semantics("S-lease-2")
async def test_what_is_lent_is_not_moved_away_evicted_or_drained(bench: Workbench) -> None:
    store = await bench.start()
    inode = await put_on(store, b"a", b"1234", "nvme", "hdd")
    borrower = Borrower(store)
    got = await borrower.lease(b"a")
    with pytest.raises(BlockBusy, match="it is open"):
        await move(store, "drop", b"a", "nvme", None)
    with pytest.raises(BlockBusy, match="it is open"):
        store.replicas.evict(inode, reason="asked")
    await store.mover.drop(inode, store.volume.tier_named("hdd"))
    assert tiers_of(store, b"a") == ["nvme"]
    # What a drain does: a copy elsewhere, and then the replica here.
    nvme, hdd, _ = store.volume.tiers
    await store.mover.copy(inode, nvme, hdd, "demote")
    with pytest.raises(BlockBusy, match="it is open"):
        await store.mover.drop(inode, nvme)
    await borrower.give_back(got)
    store.replicas.evict(inode, reason="asked")
    await assert_consistent(store)


@pytest.mark.semantics("S-lease-1", "S-lease-6")
async def test_an_unlinked_block_can_be_read_and_counts_until_the_lease_ends(
    bench: Workbench,
) -> None:
    store = await bench.start()
    data = os.urandom(3 * MIB)
    await put(store, b"a", data)
    size, _ = used(store)
    borrower = Borrower(store)
    got = await borrower.lease(b"a")
    await unlink(store, b"a")
    assert used(store) == (0, size)
    assert got.read() == data
    assert (await borrower.lease(b"a")).statuses == ["MISSING"]
    await borrower.give_back(got)
    assert used(store) == (0, 0)
    await assert_consistent(store)


async def test_readers_of_the_mount_and_leases_share_a_block(bench: Workbench) -> None:
    store = await bench.start()
    inode = await put(store, b"a", b"1234")
    borrower = Borrower(store)
    got = await borrower.lease(b"a")
    assert await read(store, b"a") == b"1234"
    block = await store.blocks.open_reader(inode)
    await borrower.give_back(got)
    assert store.replicas.open_blocks[inode] is block
    again = await borrower.lease(b"a")
    await store.blocks.close(block, writer=False)
    assert store.replicas.open_blocks[inode] is block
    assert again.read() == b"1234"
    await borrower.give_back(again)
    await assert_consistent(store)


@pytest.mark.semantics("S-lease-1")
async def test_a_rename_takes_the_lease_along(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"a", b"old")
    await put(store, b"b", b"new")
    borrower = Borrower(store)
    got = await borrower.lease(b"a", b"b")
    await store.namespace.rename(1, b"b", 1, b"a")
    fresh = await borrower.lease(b"a")
    assert [got.read(0), got.read(1), fresh.read()] == [b"old", b"new", b"new"]
    await borrower.give_back(got)
    await borrower.give_back(fresh)
    await assert_consistent(store)


@pytest.mark.semantics("S-weak-5")
async def test_what_is_written_in_place_while_it_is_lent_is_read_by_who_has_it(
    bench: Workbench,
) -> None:
    store = await bench.start()
    inode = await put(store, b"a", b"12345678")
    borrower = Borrower(store)
    got = await borrower.lease(b"a")
    writer = await store.blocks.open_writer(inode)
    await store.blocks.write(writer, 2, b"xx")
    assert got.read() == b"12xx5678"
    assert (await borrower.lease(b"a", wait="none")).statuses == ["BUSY"]
    await store.blocks.close(writer, writer=True)
    await seal_all(store)
    fresh = await borrower.lease(b"a")
    assert borrower.loans[-1].row.checksum != borrower.loans[0].row.checksum
    for each in (got, fresh):
        await borrower.give_back(each)
    await assert_consistent(store)


# --- how it ends


@pytest.mark.semantics("S-lease-7")
async def test_what_a_client_has_open_after_its_lease_stays_counted(bench: Workbench) -> None:
    store = await bench.start()
    inode = await put_on(store, b"a", b"x" * 10_000, "nvme", "hdd")
    size, _ = used(store)
    borrower = Borrower(store)
    got = await borrower.lease(b"a")
    store.leases.release(borrower.holder, [got.number])
    await store.lingering.settle()
    with pytest.raises(BlockBusy, match="it is open"):
        await move(store, "drop", b"a", "nvme", None)
    await unlink(store, b"a")
    await store.lingering.settle()
    assert used(store) == (0, size)
    assert store.lingering.of_user == {0: 1}
    got.close()
    await store.lingering.settle()
    assert inode not in store.replicas.open_blocks
    assert not store.lingering.of_user
    await assert_consistent(store)


@pytest.mark.semantics("S-lease-7")
async def test_a_mapping_keeps_a_block_like_a_descriptor(bench: Workbench) -> None:
    store = await bench.start()
    inode = await put(store, b"a", b"x" * 10_000)
    borrower = Borrower(store)
    got = await borrower.lease(b"a")
    with mmap.mmap(got.descriptors[0], 0, prot=mmap.PROT_READ) as mapping:
        await borrower.give_back(got)
        assert inode in store.replicas.open_blocks
        assert mapping[:3] == b"xxx"
    await store.lingering.settle()
    assert inode not in store.replicas.open_blocks


async def test_several_ended_leases_of_one_block(bench: Workbench) -> None:
    store = await bench.start()
    inode = await put(store, b"a", b"x")
    before = descriptors(store)
    borrowers = [Borrower(store), Borrower(store, STRANGER), Borrower(store)]
    leases = [await borrower.lease(b"a") for borrower in borrowers]
    for borrower, got in zip(borrowers, leases, strict=True):
        store.leases.release(borrower.holder, [got.number])
    await store.lingering.settle()
    # One description of the daemon's own, and the clients' three.
    assert descriptors(store) == before + 1 + 3
    assert store.replicas.open_blocks[inode].readers == 3
    for got in leases[:2]:
        got.close()
        await store.lingering.settle()
        assert inode in store.replicas.open_blocks
    leases[2].close()
    await store.lingering.settle()
    assert inode not in store.replicas.open_blocks
    assert descriptors(store) == before


async def test_while_somebody_reads_it_nobody_asks_who_else_does(bench: Workbench) -> None:
    store = await bench.start()
    inode = await put(store, b"a", b"x")
    borrower = Borrower(store)
    got = await borrower.lease(b"a")
    block = await store.blocks.open_reader(inode)
    await borrower.give_back(got)
    assert block.readers == 2
    await store.blocks.close(block, writer=False)
    await store.lingering.settle()
    assert inode not in store.replicas.open_blocks
    await assert_consistent(store)


@pytest.mark.semantics("S-lease-8")
async def test_a_lease_that_is_not_renewed_ends(bench: Workbench) -> None:
    store = await bench.start()
    inode = await put(store, b"a", b"x")
    borrower = Borrower(store)
    got, kept = await borrower.lease(b"a"), await borrower.lease(b"a")
    store.leases.expire()
    assert len(store.leases) == 2
    limit(store, max_lease_s=1e-6)
    assert store.leases.renew(borrower.holder, [got.number]) == 1
    limit(store, max_lease_s=600.0)
    assert store.leases.renew(borrower.holder, [kept.number]) == 1
    await trio.sleep(0.01)
    store.leases.expire()
    assert store.leases.renew(borrower.holder, [got.number, kept.number]) == 1
    assert store.volume.counters.events["leases_expired"] == 1
    assert store.quotas.account(0).leases == 1
    assert got.read() == b"x"
    await borrower.give_back(kept)
    assert inode in store.replicas.open_blocks
    got.close()
    await store.lingering.settle()
    assert inode not in store.replicas.open_blocks


@pytest.mark.semantics("S-lease-8")
async def test_leases_end_with_their_connection_and_only_then(bench: Workbench) -> None:
    store = await bench.start()
    for name in (b"a", b"b"):
        await put(store, name, name)
    one, other = Borrower(store), Borrower(store)
    leases = [await one.lease(b"a"), await one.lease(b"b"), await other.lease(b"a")]
    # Nobody releases or renews what is another connection's.
    assert store.leases.release(other.holder, [leases[0].number, 99]) == 0
    assert store.leases.renew(other.holder, [leases[0].number]) == 0
    for got in leases:
        got.close()
    store.leases.leave(one.holder)
    await store.lingering.settle()
    assert len(store.leases) == 1
    assert store.replicas.open_blocks.keys() == {row_at(store, b"a").id}
    store.leases.leave(other.holder)
    store.leases.leave(other.holder)
    await store.lingering.settle()
    await assert_consistent(store)


async def test_a_lease_that_cannot_be_delivered_leaves_nothing(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"a", b"x")
    borrower, before = Borrower(store), descriptors(store)

    async def broken(*_: object) -> None:
        raise BrokenPipeError

    terms = Terms(ROOT, False, "none", trio.current_time() + 5)
    paths = [b"a"] * (BATCH_NAMES + 1)
    with pytest.raises(BrokenPipeError):
        await store.leases.grant(borrower.holder, paths, terms, broken, sparse=False)
    await store.lingering.settle()
    assert descriptors(store) == before
    assert (len(store.leases), borrower.holder.leases) == (0, set())
    await assert_consistent(store)


# --- limits


@pytest.mark.semantics("S-lease-10")
async def test_a_user_over_a_limit_is_refused_and_keeps_what_he_has(bench: Workbench) -> None:
    store = await bench.start()
    for number in range(6):
        await put(store, b"%d" % number, b"x" * 1000)
    limit(store, max_leases=3)
    one, other, stranger = Borrower(store), Borrower(store), Borrower(store, STRANGER)
    got = await one.lease(b"0", b"1")
    with pytest.raises(QuotaExceeded, match="5 blocks would be leased, of at most 3: release some"):
        await other.lease(b"2", b"3", b"4")
    assert store.quotas.account(0).leases == 2
    third = await other.lease(b"2")
    theirs = await stranger.lease(b"0", b"1", b"2")
    limit(store, max_leases=100, max_bytes=4000)
    with pytest.raises(QuotaExceeded, match=r"would be leased, of at most .* KiB: release some"):
        await other.lease(b"3", b"4")
    assert [got.read(0), third.read()] == [b"x" * 1000] * 2
    for borrower, each in ((one, got), (other, third), (stranger, theirs)):
        await borrower.give_back(each)
    assert store.quotas.account(0).empty
    assert store.volume.counters.reasons["leases_refused", "leases", ""] == 1
    assert store.volume.counters.reasons["leases_refused", "bytes", ""] == 1
    await store.lingering.settle()
    await assert_consistent(store)


async def test_files_kept_open_after_their_leases_are_limited_too(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"a", b"x")
    limit(store, max_leases=2)
    borrower = Borrower(store)
    kept = [await borrower.lease(b"a") for _ in range(2)]
    for got in kept:
        store.leases.release(borrower.holder, [got.number])
    kept += [await borrower.lease(b"a") for _ in range(2)]
    for got in kept[2:]:
        store.leases.release(borrower.holder, [got.number])
    with pytest.raises(QuotaExceeded, match="open after their lease"):
        await borrower.lease(b"a")
    for got in kept:
        got.close()
    await store.lingering.settle()
    await borrower.give_back(await borrower.lease(b"a"))


async def test_leases_leave_descriptors_for_the_mount(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    for number in range(4):
        await put(store, b"%d" % number, b"x")
    monkeypatch.setattr(store.quotas, "_most_leases", 2)
    borrower = Borrower(store)
    with pytest.raises(QuotaExceeded, match="the daemon needs descriptors"):
        await borrower.lease(b"0", b"1", b"2")
    await store.lingering.settle()
    await borrower.give_back(await borrower.lease(b"0", b"1"))
    await assert_consistent(store)


# --- what has to be waited for


async def test_a_block_that_was_just_written_is_sealed_first(bench: Workbench) -> None:
    store = await bench.start()
    borrower = Borrower(store)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.sealer.run)
        writing = await create(store, b"a", b"123")
        assert (await borrower.lease(b"a")).statuses == ["BUSY"]
        await store.blocks.close(writing, writer=True)
        assert (await borrower.lease(b"a", wait="none")).statuses == ["BUSY"]
        got = await borrower.lease(b"a")
        assert (got.statuses, got.read()) == (["FOUND"], b"123")
        nursery.cancel_scope.cancel()
    await borrower.give_back(got)


@pytest.mark.semantics("S-write-7")
async def test_nobody_waits_for_a_block_whose_last_write_was_refused(bench: Workbench) -> None:
    bench.configure(nvme_mib=1, hdd_mib=1, remote_mib=1, on_full="refuse")
    store = await bench.start()
    block = await create(store, b"a", bytes(MIB // 2))
    with pytest.raises(TierFull):
        await store.blocks.write(block, MIB // 2, bytes(MIB))
    await store.blocks.close(block, writer=True)
    with trio.fail_after(20):
        assert (await Borrower(store).lease(b"a", deadline_s=3600.0)).statuses == ["BUSY"]
    with pytest.raises(BlockBusy, match="last write was refused; remove it or write it again"):
        store.replicas.evict(block.inode, reason="asked")
    await rewrite(store, b"a", b"123")
    await seal_all(store)
    got = await Borrower(store).lease(b"a")
    assert (got.statuses, got.read()[:4]) == (["FOUND"], b"123\0")
    got.close()


async def test_a_slower_local_tier_is_read_in_place(bench: Workbench) -> None:
    store = await bench.start()
    await put_on(store, b"a", b"123", "hdd")
    borrower = Borrower(store)
    for wait in ("none", "staging"):
        got = await borrower.lease(b"a", wait=wait)
        assert (got.statuses, borrower.loans[-1].block.tier.name) == (["FOUND"], "hdd")
        assert os.fstat(got.descriptors[0]).st_ino == file_on(store, "hdd", b"a").stat().st_ino
        await borrower.give_back(got)
    await assert_consistent(store)


async def test_a_remote_block_is_staged_within_bounds(bench: Workbench) -> None:
    store = await bench.start()
    data = os.urandom(MIB)
    for name in (b"a", b"b"):
        await put_on(store, name, data, "remote")
    limit(store, staging=MIB + 1)
    borrower = Borrower(store)
    assert (await borrower.lease(b"a", wait="none")).statuses == ["BUSY"]
    got = await borrower.lease(b"a", b"b")
    assert (got.statuses, got.read()) == (["FOUND", "BUSY"], data)
    assert store.volume.space[0].reserved_bytes >= MIB
    store.leases.release(borrower.holder, [got.number])
    await store.lingering.settle()
    assert store.volume.space[0].reserved_bytes >= MIB
    await borrower.give_back(got)
    assert store.volume.space[0].reserved_bytes == 0
    again = await borrower.lease(b"b")
    assert again.statuses == ["FOUND"]
    await borrower.give_back(again)
    await assert_consistent(store)


async def test_a_staged_copy_can_be_opened_once_more_by_who_may_read_it(bench: Workbench) -> None:
    store = await bench.start()
    await put_on(store, b"a", b"123", "remote")
    await store.attributes.set(row_at(store, b"a").id, mode=0o640, uid=12, gid=34)
    borrower = Borrower(store)
    got = await borrower.lease(b"a")
    status = os.fstat(got.descriptors[0])
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (12, 34, 0o440)
    await borrower.give_back(got)


@pytest.mark.semantics("S-lease-4")
async def test_promotion_first(bench: Workbench) -> None:
    store = await bench.start()
    for name, tier in ((b"a", "hdd"), (b"b", "remote")):
        await put_on(store, name, b"123", tier)
    borrower = Borrower(store)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.prefetcher.run)
        got = await borrower.lease(b"a", b"b", wait="promote")
        nursery.cancel_scope.cancel()
    assert [loan.block.tier.name for loan in borrower.loans] == ["nvme", "nvme"]
    assert (tiers_of(store, b"a"), tiers_of(store, b"b")) == (["nvme", "hdd"], ["nvme", "remote"])
    await borrower.give_back(got)
    await assert_consistent(store)


async def test_where_a_block_cannot_be_promoted_it_is_lent_as_it_is(bench: Workbench) -> None:
    bench.configure(nvme_mib=2)
    store = await bench.start()
    await put_on(store, b"large", bytes(3 * MIB), "hdd")
    borrower = Borrower(store)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.prefetcher.run)
        got = await borrower.lease(b"large", wait="promote")
        nursery.cancel_scope.cancel()
    assert [loan.block.tier.name for loan in borrower.loans] == ["hdd"]
    await borrower.give_back(got)


@pytest.mark.semantics("S-lease-4")
async def test_the_deadline_ends_the_wait_and_what_is_ready_is_lent(
    bench: Workbench,
) -> None:
    store = await bench.start()
    await put(store, b"a", b"1")
    await put_on(store, b"slow", b"2", "hdd")
    borrower = Borrower(store)
    # Nobody carries promotions out.
    got = await borrower.lease(b"a", b"slow", b"a", wait="promote", deadline_s=0.1, sparse=True)
    assert got.statuses == ["FOUND", "BUSY", "FOUND"]
    at_once = await borrower.lease(b"slow", deadline_s=0)
    assert at_once.statuses == ["BUSY"]
    assert store.quotas.account(0).waiting == 0
    await borrower.give_back(got)


@pytest.mark.semantics("S-lease-4")
async def test_a_miss_does_not_wait_for_what_comes_before(
    bench: Workbench,
) -> None:
    store = await bench.start()
    await put_on(store, b"slow", b"2", "hdd")
    with trio.fail_after(30):
        got = await Borrower(store).lease(b"missing", b"slow", wait="promote", deadline_s=1e6)
    assert got.statuses == ["MISSING"]


async def test_requests_that_wait_are_limited(
    bench: Workbench,
) -> None:
    store = await bench.start()
    await put_on(store, b"slow", b"2", "hdd")
    limit(store, max_waiting=1)
    async with trio.open_nursery() as nursery:
        waiting = Borrower(store)
        nursery.start_soon(partial(waiting.lease, b"slow", wait="promote", deadline_s=1e6))
        await until(lambda: store.quotas.account(0).waiting, "it waits")
        with pytest.raises(QuotaExceeded, match="1 requests wait already"):
            await Borrower(store).lease(b"slow", wait="promote")
        assert (await Borrower(store, STRANGER).lease(b"x", b"slow")).statuses == ["MISSING"]
        nursery.cancel_scope.cancel()
    assert store.quotas.account(0).empty


async def lease_in_vain(borrower: Borrower) -> None:
    """Nobody carries the promotion out."""
    with pytest.raises(BrokenPipeError):
        await borrower.lease(b"a", b"slow", wait="promote", deadline_s=1e6)


async def test_a_client_that_hangs_up_ends_its_wait(
    bench: Workbench,
) -> None:
    store = await bench.start()
    await put(store, b"a", b"1")
    await put_on(store, b"slow", b"2", "hdd")
    borrower = Borrower(store)
    gone = trio.Event()
    borrower.holder.hung_up = gone.wait
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lease_in_vain, borrower)
        await until(lambda: store.quotas.account(0).waiting, "it waits")
        gone.set()
    await store.lingering.settle()
    assert len(store.leases) == 0
    assert row_at(store, b"a").id not in store.replicas.open_blocks


async def test_a_tier_that_is_away_is_offline_at_once(bench: Workbench) -> None:
    store = await bench.start()
    await put_on(store, b"a", b"1", "remote")
    await put_on(store, b"b", b"2", "hdd", "remote")
    take_away(store.volume.tier_named("remote"))
    got = await Borrower(store).lease(b"b", b"a", sparse=True)
    assert got.statuses == ["FOUND", "OFFLINE"]
    got.close()


# --- verification


async def test_a_block_is_verified_before_it_is_lent_for_the_first_time(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"a", b"x" * 5000)
    bench.stop(store)
    store = await bench.start()
    borrower = Borrower(store)
    got = await borrower.lease(b"a")
    assert store.volume.counters.events["verified"] == 1
    again = await borrower.lease(b"a")
    assert store.volume.counters.events["verified"] == 1
    for each in (got, again):
        await borrower.give_back(each)


@pytest.mark.parametrize("elsewhere", [True, False])
async def test_a_bad_replica_is_never_lent(
    bench: Workbench, expect_log: list[str], elsewhere: bool
) -> None:
    expect_log.append("is bad")
    store = await bench.start()
    await put_on(store, b"a", b"x" * 5000, "nvme", *(["hdd"] if elsewhere else []))
    _rot(file_on(store, "nvme", b"a"))
    borrower = Borrower(store)
    got = await borrower.lease(b"a")
    if elsewhere:
        assert (got.statuses, got.read()) == (["FOUND"], b"x" * 5000)
        await borrower.give_back(got)
    else:
        assert got.statuses == ["MISSING"]
    assert store.volume.space[0].quarantine_files == 1


async def test_a_lost_file_is_a_miss(bench: Workbench, expect_log: list[str]) -> None:
    expect_log.append("tier nvme lost")
    store = await bench.start()
    await put(store, b"a", b"1")
    await put(store, b"b", b"1")
    file_on(store, "nvme", b"a").unlink()
    got = await Borrower(store).lease(b"b", b"a", sparse=True)
    assert got.statuses == ["FOUND", "MISSING"]
    got.close()


async def test_a_replica_that_turns_bad_while_it_is_lent_is_not_lent_again(
    bench: Workbench, expect_log: list[str]
) -> None:
    expect_log.append("is bad")
    store = await bench.start()
    await put_on(store, b"a", b"x" * 5000, "nvme", "hdd")
    borrower = Borrower(store)
    got = await borrower.lease(b"a")
    _rot(file_on(store, "nvme", b"a"))
    fresh = await borrower.lease(b"a")
    assert fresh.read() == b"x" * 5000
    assert borrower.loans[-1].block.tier.name == "hdd"
    await borrower.give_back(got)
    await borrower.give_back(fresh)
    await until(lambda: not store.replicas.open_blocks, "closed")


def _rot(path: Path) -> None:
    """Other bytes of the same length, with another time."""
    path.chmod(0o600)
    path.write_bytes(b"y" * path.stat().st_size)


async def test_the_defaults_suit_a_long_prompt() -> None:
    assert LeasesConfig().max_leases >= 8192
    assert LeasesConfig().prefetches >= 8192
