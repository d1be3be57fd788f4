"""Blocks kept open after their last close."""

from __future__ import annotations

import os

from kvfs.errors import BlockStale
from kvfs.store import Store
from kvfs.tiers.space import PAGE_BYTES
from kvfs.volume.open_block import OpenBlock
from tests.store.borrowing import Borrower
from tests.store.helpers import (
    Workbench,
    assert_consistent,
    create,
    file_on,
    move,
    put,
    row_at,
    seal_all,
    unlink,
)

BACKING_ID = 7


class Kernel:
    """What a mount tells the kernel of open blocks."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.unregistered: list[int] = []

    async def open(self, inode: int) -> OpenBlock:
        block = await self.store.blocks.open_reader(inode)
        if not block.backing_id:
            block.backing_id, block.unregister = BACKING_ID, self.unregistered.append
        return block

    async def open_and_close(self, inode: int) -> OpenBlock:
        block = await self.open(inode)
        await self.store.blocks.close(block, writer=False)
        return block


async def test_a_block_is_opened_again_as_it_was_left(bench: Workbench) -> None:
    store = await bench.start()
    kernel = Kernel(store)
    inode = await put(store, b"hot", b"content")
    first = await kernel.open_and_close(inode)
    assert inode not in store.replicas.open_blocks
    assert kernel.unregistered == []
    again = await kernel.open(inode)
    assert again is first
    assert os.pread(again.descriptor, 7, 0) == b"content"
    await store.blocks.close(again, writer=False)
    store.blocks.idle.clear()
    assert kernel.unregistered == [BACKING_ID]
    assert first.descriptor == -1


async def test_a_lease_takes_it_out_of_the_kernels_hands(bench: Workbench) -> None:
    store = await bench.start()
    kernel, borrower = Kernel(store), Borrower(store)
    inode = await put(store, b"hot", b"content")
    await kernel.open_and_close(inode)
    got = await borrower.lease(b"hot")
    # Else the kernel would have it open for good, and nobody could tell when the client is gone.
    assert kernel.unregistered == [BACKING_ID]
    assert got.read() == b"content"
    await borrower.give_back(got)
    assert inode not in store.replicas.open_blocks
    # While the kernel's readers have it open it stays theirs.
    block = await kernel.open(inode)
    got = await borrower.lease(b"hot")
    assert (kernel.unregistered, block.backing_id) == ([BACKING_ID], BACKING_ID)
    assert os.pread(block.descriptor, 7, 0) == b"content"
    await store.blocks.close(block, writer=False)
    await borrower.give_back(got)
    await assert_consistent(store)


async def test_its_bytes_are_free_as_soon_as_it_is_removed(bench: Workbench) -> None:
    store = await bench.start()
    kernel = Kernel(store)
    inode = await put(store, b"gone", b"content")
    block = await kernel.open_and_close(inode)
    await unlink(store, b"gone")
    assert kernel.unregistered == [BACKING_ID]
    assert block.descriptor == -1
    try:
        await kernel.open(inode)
    except BlockStale:
        pass
    else:
        raise AssertionError("it is gone")


async def test_after_a_move_it_is_opened_where_it_is(bench: Workbench) -> None:
    store = await bench.start()
    kernel = Kernel(store)
    inode = await put(store, b"moved", b"content")
    await kernel.open_and_close(inode)
    await move(store, "demote", b"moved", "nvme", "hdd")
    block = await kernel.open(inode)
    assert block.tier.name == "hdd"
    # It moves while it is open: the handle keeps its replica, the next one does not get it.
    await move(store, "promote", b"moved", "hdd", "nvme")
    await store.blocks.close(block, writer=False)
    assert (await kernel.open_and_close(inode)).tier.name == "nvme"


async def test_a_file_that_was_touched_behind_kvfs_is_looked_at_anew(bench: Workbench) -> None:
    store = await bench.start()
    kernel = Kernel(store)
    inode = await put(store, b"touched", b"content")
    first = await kernel.open_and_close(inode)
    os.utime(file_on(store, "nvme", b"touched"), ns=(1, 1))
    again = await kernel.open(inode)
    assert again is not first
    await store.blocks.close(again, writer=False)
    file = file_on(store, "nvme", b"touched")
    file.unlink()
    file.write_bytes(b"content")
    assert store.blocks.idle.take(inode) is None


async def test_a_writer_ends_it(bench: Workbench) -> None:
    store = await bench.start()
    kernel = Kernel(store)
    inode = await put(store, b"written", b"content")
    await kernel.open_and_close(inode)
    writer = await store.blocks.open_writer(inode)
    assert kernel.unregistered == [BACKING_ID]
    reader = await kernel.open(inode)
    assert reader is writer
    await store.blocks.write(writer, 0, b"changed")
    await store.blocks.close(writer, writer=True)
    await store.blocks.close(reader, writer=False)
    assert len(store.blocks.idle) == 0
    await seal_all(store)
    block = await kernel.open(inode)
    assert os.pread(block.descriptor, 7, 0) == b"changed"


async def test_they_are_bounded_and_the_least_used_leaves(bench: Workbench) -> None:
    store = await bench.start()
    kernel = Kernel(store)
    store.blocks.idle.limit = 2
    inodes = [await put(store, b"%d" % number, b"x") for number in range(3)]
    blocks = [await kernel.open_and_close(inode) for inode in inodes]
    assert len(store.blocks.idle) == 2
    assert [block.descriptor >= 0 for block in blocks] == [False, True, True]
    store.blocks.idle.clear()


async def test_what_the_kernel_wrote_past_the_daemon_is_reserved(bench: Workbench) -> None:
    store = await bench.start()
    account = store.volume.space[0]
    block = await create(store, b"grows")
    assert store.blocks.growth.may_be_unseen(block)
    block.lose_sight()
    before = account.reserved_bytes
    os.pwrite(block.writer_fd, bytes(1 << 20), 3 << 20)
    store.blocks.growth.account_unseen()
    assert account.reserved_bytes >= max(before, 4 << 20)
    assert store.namespace.get(block.inode) is not None
    os.ftruncate(block.writer_fd, account.capacity_bytes + (1 << 20))
    store.blocks.growth.account_unseen()
    assert account.taken_bytes > account.capacity_bytes
    assert store.volume.counters.events["overdrafts"] == 1
    assert store.volume.tiering_due.is_set()
    os.ftruncate(block.writer_fd, 0)
    os.pwrite(block.writer_fd, bytes(4096), 0)
    await store.blocks.close(block, writer=True)
    assert row_at(store, b"grows").size_bytes == 4096
    assert (account.used_bytes, account.reserved_bytes) == (4096 + PAGE_BYTES, 0)


async def test_near_the_capacity_the_daemon_sees_what_is_written(bench: Workbench) -> None:
    store = await bench.start()
    block = await create(store, b"last")
    account = store.volume.space[0]
    rest = store.volume.space.reserve(0, account.free_bytes)
    assert rest is not None
    assert not store.blocks.growth.may_be_unseen(block)
    rest.release()
    await store.blocks.close(block, writer=True)
