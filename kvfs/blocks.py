"""Bytes of blocks: create, open, read, write, truncate, fsync and close.

All handles of a block share one `OpenBlock`. Its entry in the table is made before the first await,
so whoever decides about the block meanwhile (mover, eviction) sees that it is open.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Awaitable, Callable

from kvfs import heat, layout
from kvfs.backing import continue_file, create_file, fetch_file, open_file
from kvfs.copying import try_write
from kvfs.errors import BlockExists, BlockStale, TierFull, TierOffline
from kvfs.open_block import OpenBlock
from kvfs.paths import Paths
from kvfs.replicas import Replicas, ghost_key, largest
from kvfs.rows import SUSPECT, BlockState, Inode, Kind, Replica
from kvfs.space import PAGE_BYTES, Reservation, rounded, sealed
from kvfs.tier import Tier, close_descriptor
from kvfs.volume import Volume

log = logging.getLogger(__name__)


class Blocks:
    """Owned by the trio loop."""

    def __init__(self, volume: Volume, replicas: Replicas) -> None:
        self.volume = volume
        self.replicas = replicas
        self.paths = Paths(volume)
        self._open = replicas.open_blocks

    # --- opening

    async def create(
        self, parent: int, name: bytes, mode: int, uid: int, gid: int
    ) -> tuple[Inode, OpenBlock]:
        """A new block in state writing, open for writing. Raises BlockExists, TierFull."""
        catalog, volume = self.volume.catalog, self.volume
        layout.check_name(name)
        path = self.paths.of_name(parent, name)
        self.paths.check_length(path)
        keys = (parent, layout.namespace_of(path))
        tier, reservation = await self.replicas.place(PAGE_BYTES, *keys)
        try:
            path = await self.paths.free_name(parent, name)
            if catalog.lookup(parent, name) is not None:
                raise BlockExists(os.fsdecode(path))
            fanned = catalog.is_crowded(parent)
            inode = self._insert(parent, name, path, (mode, uid, gid), tier, fanned)
        except BaseException:
            reservation.release()
            raise
        block = OpenBlock(inode.id, tier, writers=1, reservation=reservation)
        block.wrote(0)
        self._open[inode.id] = block
        try:
            async with block.lock:
                # A directory above must not move while the file is made.
                path = await self.paths.free_block(inode.id)
                async with self.volume.claims.hold(path):
                    block.writer_fd = await self._make_file(tier, path, fanned, inode)
        except BaseException:
            self._undo_create(block, inode)
            raise
        volume.counters.count("creates")
        return inode, block

    def _insert(
        self, parent: int, name: bytes, path: bytes, owner: tuple[int, int, int],
        tier: Tier, fanned: bool,
    ) -> Inode:  # fmt: skip
        catalog, volume = self.volume.catalog, self.volume
        now_s = volume.clock.now_s()
        mode, uid, gid = owner
        with catalog.transaction():
            number = catalog.insert_inode(
                Kind.BLOCK, stat.S_IMODE(mode), uid, gid, int(now_s * 1e9)
            )
            catalog.link(parent, name, number)
            ghost = catalog.take_ghost(ghost_key(path))
            tau = heat.touch(ghost or heat.never, now_s, volume.config.tiering.half_life_s)
            catalog.add_replica(number, tier.number, 0, tau, fanned=fanned)
        volume.space.add(tier.index, 0)
        volume.blocks += 1
        inode = catalog.get(number)
        assert inode is not None
        return inode

    async def _make_file(self, tier: Tier, path: bytes, fanned: bool, inode: Inode) -> int:
        try:
            return await tier.run_open(create_file, tier, path, fanned, inode)
        except OSError as error:
            # ext4 refuses names of a crowded directory with space and inodes free.
            if error.errno != errno.ENOSPC or fanned:
                raise
            if await tier.run(tier.free_bytes) < PAGE_BYTES:
                raise
            with self.volume.catalog.transaction():
                self.volume.catalog.set_fanned(inode.id, tier.number, True)
            return await tier.run_open(create_file, tier, path, True, inode)

    def _undo_create(self, block: OpenBlock, inode: Inode) -> None:
        if block.reservation:
            block.reservation.release()
        del self._open[inode.id]
        with self.volume.catalog.transaction():
            self.volume.catalog.delete(inode.id)
        self.volume.space.remove(block.tier.index, 0)
        self.volume.blocks -= 1

    async def open_reader(self, inode: int) -> OpenBlock:
        """Open for reading on the fastest replica, or the one that is open already.

        Raises BlockStale (gone: the kernel looks the name up again), TierOffline.
        """
        while True:
            block = self._open.get(inode)
            if block is None:
                block = OpenBlock(inode, self._choose(inode)[0])
                self._open[inode] = block
            block.readers += 1
            try:
                if block.descriptor < 0:
                    await self._open_descriptor(block)
            except FileNotFoundError as error:
                self._drop_user(block, writer=False)
                row = self.volume.catalog.get(inode)
                if row is not None:
                    self.replicas.lose(row, block.tier, error.strerror or "no such file")
                continue
            except BaseException:
                self._drop_user(block, writer=False)
                raise
            self.volume.counters.tier(block.tier.index).opens += 1
            return block

    def _choose(self, inode: int) -> tuple[Tier, int]:
        """The replica to open: its tier and allocated bytes."""
        readable = self.replicas.readable(inode)
        if readable:
            tier, replica = readable[0]
            return tier, replica.allocated_bytes
        if self.volume.catalog.replicas(inode):
            raise TierOffline("every tier with a replica is offline")
        raise BlockStale("the block is gone")

    async def _open_descriptor(self, block: OpenBlock) -> None:
        async with block.lock:
            if block.descriptor >= 0:
                return
            await self.replicas.catch_up(block.tier)
            path = await self.paths.free_block(block.inode)
            with contextlib.suppress(FileNotFoundError):
                await self._open_for_reading(block, path, self._is_fanned(block))
                if self.volume.catalog.path_of(block.inode) == path:
                    return
                # Renamed meanwhile: another block's file may have been there.
                block.close_descriptors()
            await self._while_claimed(block, self._open_for_reading)

    async def _while_claimed(
        self, block: OpenBlock, opening: Callable[[OpenBlock, bytes, bool], Awaitable[None]]
    ) -> None:
        """Open a file whose name nobody can change. FileNotFoundError: it is really gone.

        On a tier that was away its rename may be promised still: that is done first then.
        """
        await self.replicas.catch_up(block.tier)
        for settled in (False, True):
            path = await self.paths.free_block(block.inode)
            try:
                async with self.volume.claims.hold(path):
                    await opening(block, path, self._is_fanned(block))
            except FileNotFoundError:
                if settled or self._replica_of(block) is None:
                    raise
            else:
                return
            await self.replicas.settle(block.tier)

    def _is_fanned(self, block: OpenBlock) -> bool:
        replica = self._replica_of(block)
        if replica is None:
            raise FileNotFoundError(errno.ENOENT, "the replica went away")
        return bool(replica.fanned)

    async def _open_for_reading(self, block: OpenBlock, path: bytes, fanned: bool) -> None:
        row = self.volume.catalog.get(block.inode)
        expected = row.size_bytes if row and row.state == BlockState.SEALED else None
        if block.tier.remote:
            fetched = await self._fetch(block, path, fanned, expected)
            if fetched >= 0:
                block.reader_fd, block.fetched = fetched, True
                return
        block.reader_fd = await block.tier.run_open(
            open_file, block.tier, path, fanned, os.O_RDONLY, expected
        )

    def _replica_of(self, block: OpenBlock) -> Replica | None:
        for replica in self.volume.catalog.replicas(block.inode):
            if replica.tier == block.tier.number:
                return replica
        return None

    async def _fetch(
        self, block: OpenBlock, path: bytes, fanned: bool, expected: int | None
    ) -> int:
        """Bring a remote block whole into local staging, so that no later read can fail.

        -1 when the fastest tier has no room: the block is then read where it lies.
        """
        local = self.volume.tiers[0]
        if local.remote or expected is None:
            return -1
        reservation = self.volume.space.reserve(local.index, rounded(expected))
        if reservation is None:
            return -1
        try:
            descriptor = await block.tier.run_open(
                fetch_file, block.tier, path, fanned, expected, local.root
            )
        except BaseException:
            reservation.release()
            raise
        block.reservation = reservation
        return descriptor

    async def open_writer(self, inode: int, *, truncate: bool = False) -> OpenBlock:
        """Open an existing block for writing; a sealed one is reopened.

        Its other replicas are suspect until the last close decides whether it changed.
        """
        while True:
            await self.paths.free_block(inode)
            block = self._open.get(inode)
            if block is None:
                block = OpenBlock(inode, self._choose(inode)[0])
                self._open[inode] = block
            block.writers += 1
            try:
                async with block.lock:
                    if block.writer_fd < 0:
                        await self._while_claimed(block, self._open_for_writing)
                if truncate:
                    await self.truncate(block, 0)
            except FileNotFoundError:
                await self.close(block, writer=True)
                row = self.volume.catalog.get(inode)
                if row is None or block.users:
                    raise BlockStale("the block is gone") from None
                self.replicas.lose(row, block.tier)
                continue
            except BaseException:
                await self.close(block, writer=True)
                raise
            return block

    async def _open_for_writing(self, block: OpenBlock, path: bytes, fanned: bool) -> None:
        """Open the replica's file for writing and unseal the block. `block.lock` is held."""
        tier = block.tier
        descriptor = await tier.run_open(open_file, tier, path, fanned, os.O_RDWR, None)
        try:
            if not block.written:
                block.size_bytes = (await tier.run(os.fstat, descriptor)).st_size
            # By descriptor: another file may have the name by now.
            await tier.run(tier.clear_seal, descriptor)
            replica = self._replica_of(block)
            if replica is None:
                raise BlockStale("the block is gone")
        except BaseException:
            close_descriptor(tier, descriptor)
            raise
        if block.fetched:
            os.close(block.reader_fd)
            block.reader_fd, block.fetched = -1, False
        if block.reservation:
            block.reservation.release()
        block.writer_fd = descriptor
        block.accounted_bytes = replica.allocated_bytes
        block.reservation = self.volume.space.reserve(tier.index, 0)
        self._unseal(block)

    def _unseal(self, block: OpenBlock) -> None:
        catalog = self.volume.catalog
        self.volume.sealing.discard(block.inode)
        row = catalog.get(block.inode)
        if row is None:
            return
        with catalog.transaction():
            if row.state in (BlockState.SEALED, BlockState.REOPENED):
                catalog.update(row.id, state=int(BlockState.REOPENED))
                catalog.set_replica_states(row.id, SUSPECT, besides=block.tier.number)
            else:
                # A record that the sealer attaches too late is of an older generation.
                generation = row.generation + 1
                catalog.update(row.id, state=int(BlockState.WRITING), generation=generation)

    # --- bytes

    async def read(self, block: OpenBlock, offset: int, size: int) -> bytes:
        """Up to `size` bytes; short only at the end of the file."""
        if block.local and not block.lock.locked():
            data = os.pread(block.descriptor, size, offset)
        elif block.writers:
            async with block.lock:
                data = await block.tier.run(os.pread, block.descriptor, size, offset)
        else:
            data = await block.tier.run(os.pread, block.descriptor, size, offset)
        self.volume.counters.tier(block.tier.index).bytes_read += len(data)
        return data

    async def write(self, block: OpenBlock, offset: int, data: bytes) -> int:
        """All of `data`. Raises TierFull, TierOffline, OSError."""
        end = offset + len(data)
        done = False
        if block.tier.inline and not block.lock.locked() and self._cover(block, end):
            done = try_write(block.writer_fd, data, offset)
        if not done:
            async with block.lock:
                await self._write_locked(block, offset, data)
        block.wrote(max(block.size_bytes, end))
        self.volume.counters.tier(block.tier.index).bytes_written += len(data)
        return len(data)

    async def _write_locked(self, block: OpenBlock, offset: int, data: bytes) -> None:
        end = offset + len(data)
        while True:
            if self._cover(block, end) and await block.tier.run(
                try_write, block.writer_fd, data, offset
            ):
                return
            await self._spill(block, end)

    def _cover(self, block: OpenBlock, end: int) -> bool:
        """Whether a file of `end` bytes is within what the block has been granted."""
        assert block.reservation is not None, "an open writer has a reservation"
        return block.reservation.grow_to(sealed(end) - block.accounted_bytes - block.held_bytes)

    async def _spill(self, block: OpenBlock, end: int) -> None:
        """The tier is full: the partial file goes on to the next one. `block.lock` is held."""
        if block.orphan is not None:
            raise TierFull("a file without a name does not move")
        if await self.replicas.relieve(block, end):
            return
        if block.backing_id:
            raise TierFull("the kernel reads its file: it stays where it is until the last close")
        target, reservation = await self.replicas.place(end, after=block.tier.index)
        try:
            path = await self.paths.free_block(block.inode)
            async with self.volume.claims.hold(path):
                await self._continue_on(block, target, path, reservation)
        except BaseException:
            if block.reservation is not reservation:
                reservation.release()
            raise
        self.volume.counters.count("spills")

    async def _continue_on(
        self, block: OpenBlock, target: Tier, path: bytes, reservation: Reservation
    ) -> None:
        catalog, source = self.volume.catalog, block.tier
        row, replica = catalog.get(block.inode), self._replica_of(block)
        if row is None or replica is None:
            raise BlockStale("the block is gone")
        fanned = bool(replica.fanned)
        descriptor = await target.run_open(
            continue_file, target, path, fanned, row, block.writer_fd
        )
        try:
            with catalog.transaction():
                replicas = catalog.replicas(row.id)
                promised = self.replicas.promise_removal(row.id, path, [replica], inline_too=True)
                catalog.drop_replica(row.id, source.number)
                catalog.add_replica(row.id, target.number, 0, replica.tau, fanned=fanned)
        except BaseException:
            close_descriptor(target, descriptor)
            raise
        self.replicas.account_spill(replicas, source, target)
        block.close_descriptors()
        block.tier, block.writer_fd, block.accounted_bytes = target, descriptor, 0
        if block.reservation:
            block.reservation.release()
        block.reservation = reservation
        # Promised: a tier that fails now does it later.
        with contextlib.suppress(OSError, TierOffline):
            await source.run(source.remove, path, fanned)
            catalog.intent_done(promised[source.number])

    async def truncate(self, block: OpenBlock, size: int) -> None:
        """Set the length of a block that is open for writing."""
        async with block.lock:
            while not self._cover(block, size):
                await self._spill(block, size)
            await block.tier.run(os.ftruncate, block.writer_fd, size)
            block.wrote(size)

    async def fsync(self, block: OpenBlock, *, data_only: bool) -> None:
        """Bytes are on the medium, and a file still being written is published."""
        flush = os.fdatasync if data_only else os.fsync
        async with block.lock:
            if block.descriptor >= 0 and not block.fetched:
                await block.tier.run_in_thread(flush, block.descriptor)
        row = self.volume.catalog.get(block.inode)
        if block.writers and row and row.state == BlockState.WRITING and not block.orphan:
            with self.volume.catalog.transaction():
                self.volume.catalog.update(
                    row.id, state=int(BlockState.PUBLISHED), size_bytes=block.size_bytes
                )

    # --- closing

    async def close(self, block: OpenBlock, *, writer: bool) -> None:
        """One handle is gone. Never raises for what the tier does: nobody would hear it."""
        if not writer:
            self._drop_user(block, writer=False)
            return
        if block.writers == 1 and block.writer_fd >= 0:
            try:
                async with block.lock:
                    if block.writers == 1:
                        await self._finish_writing(block)
            finally:
                self._drop_user(block, writer=True)
            return
        self._drop_user(block, writer=True)

    def _drop_user(self, block: OpenBlock, *, writer: bool) -> None:
        if writer:
            block.writers -= 1
        else:
            block.readers -= 1
        if block.users:
            return
        if self._open.get(block.inode) is block:
            del self._open[block.inode]
        block.close_descriptors()
        if block.reservation:
            block.reservation.release()
        self.volume.space[block.tier.index].held_bytes -= block.held_bytes
        block.held_bytes = 0

    async def _finish_writing(self, block: OpenBlock) -> None:
        """The last writer closes: record size and allocation, let the sealer have it."""
        try:
            status = await block.tier.run(os.fstat, block.writer_fd)
        except (OSError, TierOffline) as error:
            log.error("tier %s: close of inode %d: %s", block.tier.name, block.inode, error)
            block.retire_writer()
            return
        if block.orphan is None:
            # What is not recorded now the sealer records.
            with self.volume.tolerate("recording a closed file"):
                self._record(block, status)
        try:
            if block.readers and block.reader_fd < 0:
                block.reader_fd = await block.tier.run_open(
                    os.open, f"/proc/self/fd/{block.writer_fd}", os.O_RDONLY | os.O_CLOEXEC
                )
            descriptor, block.writer_fd = block.writer_fd, -1
            # A network filesystem writes what it has of the file now.
            await block.tier.run(os.close, descriptor)
        except (OSError, TierOffline) as error:
            log.error("tier %s: close of inode %d: %s", block.tier.name, block.inode, error)
            block.retire_writer()
        block.unseen = False
        if block.reservation:
            block.reservation.release()
        if block.orphan is None:
            self.volume.request_seal(block.inode)

    def _record(self, block: OpenBlock, status: os.stat_result) -> None:
        volume = self.volume
        allocated = status.st_blocks * 512
        columns = {"size_bytes": status.st_size}
        if block.unseen:
            block.attributes_of(status)
        row = volume.catalog.get(block.inode)
        if block.written and row is not None:
            # The mtime may have been set to an older one since.
            ctime_ns = max(row.ctime_ns, block.mtime_ns)
            columns |= {"mtime_ns": block.mtime_ns, "ctime_ns": ctime_ns}
        with volume.catalog.transaction():
            volume.catalog.update(block.inode, **columns)
            volume.catalog.set_allocated(block.inode, block.tier.number, allocated)
        others = [r for r in volume.catalog.replicas(block.inode) if r.tier != block.tier.number]
        volume.space.resize(
            block.tier.index, block.accounted_bytes, allocated, beside_bytes=largest(others)
        )
        block.accounted_bytes = allocated
        entry = volume.catalog.entry(block.inode)
        path = volume.catalog.path_of(block.inode)
        if entry and path:
            volume.space.learn(status.st_size, entry[0], layout.namespace_of(path))
