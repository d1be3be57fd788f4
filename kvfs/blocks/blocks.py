"""Bytes of blocks: create, open, read, write, truncate, fsync and close.

All handles of a block share one `OpenBlock`. Its entry in the table is made before the first await,
so whoever decides about the block meanwhile (mover, eviction) sees that it is open.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sqlite3
import stat
from collections.abc import Awaitable, Callable
from functools import partial

from kvfs import failpoints, layout
from kvfs.blocks.closing import Closing
from kvfs.blocks.fetching import fetch
from kvfs.blocks.growth import Growth
from kvfs.blocks.idle_blocks import IdleBlocks
from kvfs.blocks.paths import Paths
from kvfs.blocks.verify import Verifier
from kvfs.catalog.rows import RAW, SUSPECT, BlockState, Inode, Kind, Replica
from kvfs.errors import (
    BlockCorrupt,
    BlockExists,
    BlockStale,
    TierFull,
    TierOffline,
)
from kvfs.policy import heat
from kvfs.tiers.backing import create_file, open_file
from kvfs.tiers.copying import try_write
from kvfs.tiers.decoder import open_decoder
from kvfs.tiers.fan_out import refuses_name
from kvfs.tiers.space import PAGE_BYTES
from kvfs.tiers.tier import Tier, close_descriptor
from kvfs.volume.open_block import OpenBlock
from kvfs.volume.relief import Relief
from kvfs.volume.replicas import Replicas
from kvfs.volume.standby import stands_in, takes_over
from kvfs.volume.volume import Volume

log = logging.getLogger(__name__)

# Called with an inode and the tier of its compressed replica: the tier of a raw one (`Mover`).
Unpack = Callable[[int, Tier], Awaitable[Tier]]


class Blocks:
    """Owned by the trio loop."""

    def __init__(
        self, volume: Volume, replicas: Replicas, verifier: Verifier, unpack: Unpack
    ) -> None:
        self.volume = volume
        self.replicas = replicas
        self.verifier = verifier
        self.unpack = unpack
        self.paths = Paths(volume)
        self.relief = Relief(volume, replicas)
        self.growth = Growth(volume, replicas, self.paths, self.relief)
        self._open = replicas.open_blocks
        self.idle = IdleBlocks()
        self.closing = Closing(volume, replicas, self.idle)
        volume.catalog.changing = self._changing

    def _changing(self, inode: int) -> None:
        """The catalog is about to have another row, or other replicas, for a block."""
        self.idle.forget(inode)
        block = self._open.get(inode)
        if block is not None:
            block.outdated = True

    # --- opening

    async def create(
        self, parent: int, name: bytes, mode: int, uid: int, gid: int
    ) -> tuple[Inode, OpenBlock]:
        """A new block in state writing, open for writing; on the next tier where one fails.

        Raises BlockExists, TierFull, OSError.
        """
        try:
            return await self._create(parent, name, mode, uid, gid)
        except (TierFull, OSError) as error:
            if not await self.relief.follows(error):
                raise
        return await self._create(parent, name, mode, uid, gid)

    async def _create(
        self, parent: int, name: bytes, mode: int, uid: int, gid: int, *, after: int = -1
    ) -> tuple[Inode, OpenBlock]:
        catalog, volume = self.volume.catalog, self.volume
        layout.check_name(name)
        path = self.paths.of_name(parent, name)
        self.paths.check_length(path)
        keys = (parent, layout.namespace_of(path))
        tier, reservation = await self.replicas.place(PAGE_BYTES, *keys, after=after)
        try:
            path = await self.paths.free_name(parent, name)
            fanned = catalog.is_crowded(parent)
            inode = self._insert(parent, name, path, (mode, uid, gid), tier, fanned)
        except BaseException:
            reservation.release()
            raise
        block = OpenBlock(inode.id, tier, writers=1, reservation=reservation)
        # The time that the row has: nothing was written yet.
        block.written, block.mtime_ns = True, inode.mtime_ns
        self._open[inode.id] = block
        try:
            async with block.lock:
                # A directory above must not move while the file is made.
                path = await self.paths.free_block(inode.id)
                async with self.volume.claims.hold(path):
                    block.writer_fd = await self._make_file(tier, path, fanned, inode)
        except BaseException as error:
            self._undo_create(block, inode)
            if takes_over(self.volume, tier, error):
                return await self._create(parent, name, mode, uid, gid, after=tier.index)
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
        with catalog.transaction("create"):
            number = catalog.insert_inode(
                Kind.BLOCK, stat.S_IMODE(mode), uid, gid, int(now_s * 1e9)
            )
            try:
                catalog.link(parent, name, number)
            except sqlite3.IntegrityError:
                raise BlockExists(os.fsdecode(path)) from None
            ghost = catalog.ghosts.take(path)
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
            if fanned or not await refuses_name(tier, error):
                raise
            with self.volume.catalog.transaction("fan_out"):
                self.volume.catalog.set_fanned(inode.id, tier.number, True)
            return await tier.run_open(create_file, tier, path, True, inode)

    def _undo_create(self, block: OpenBlock, inode: Inode) -> None:
        if block.reservation:
            block.reservation.release()
        del self._open[inode.id]
        with self.volume.catalog.transaction("undo_create"):
            self.volume.catalog.delete(inode.id)
        self.volume.space.remove(block.tier.index, 0)
        self.volume.blocks -= 1

    async def open_reader(
        self, inode: int, avoid: frozenset[Tier] = frozenset(), *, stored: bool = False
    ) -> OpenBlock:
        """Open for reading on the fastest good replica, or the one that is open already.

        Where the tier fails, on the next one. With `stored` a compressed replica of a local tier is
        not decoded into staging: its own file is open. Raises BlockStale (gone: the kernel looks
        the name up again), TierOffline, OSError.
        """
        while True:
            block = self._open.get(inode) or self._enter(inode, self.idle.take(inode), avoid)
            block.readers += 1
            try:
                if block.descriptor < 0:
                    with block.tier.admitted():
                        await self._open_descriptor(block, stored)
                elif block.users > 1 and block.is_touched():
                    await self.verifier.check_again(block)
            except BlockCorrupt:
                self.closing.drop_user(block, writer=False)
                await self.verifier.condemn(inode, block.tier)
                continue
            except FileNotFoundError as error:
                self.closing.drop_user(block, writer=False)
                row = self.volume.catalog.get(inode)
                if row is not None:
                    self.replicas.lose(row, block.tier, error.strerror or "no such file")
                continue
            except BaseException as error:
                self.closing.drop_user(block, writer=False)
                if stands_in(self.replicas, inode, block.tier, error, avoid):
                    return await self.open_reader(inode, avoid | {block.tier}, stored=stored)
                raise
            self.volume.counters.tier(block.tier.index).opens += 1
            return block

    def join(self, inode: int, tier: Tier) -> OpenBlock:
        """A reader with a descriptor of its own, of a block that is to stay on this tier; on the
        one where it is open, if it is."""
        block = self._open.get(inode)
        if block is None:
            block = self._open[inode] = self.idle.take(inode) or OpenBlock(inode, tier)
        block.readers += 1
        return block

    def part(self, block: OpenBlock) -> None:
        """Such a reader is gone, or any other: the close of a reader waits for nothing."""
        self.closing.drop_user(block, writer=False)

    def _enter(
        self, inode: int, idle: OpenBlock | None = None, avoid: frozenset[Tier] = frozenset()
    ) -> OpenBlock:
        """The block in the table, before anybody has it open."""
        block = self._open[inode] = idle or OpenBlock(inode, self._choose(inode, avoid))
        return block

    def _choose(self, inode: int, avoid: frozenset[Tier]) -> Tier:
        """The tier of the replica to open."""
        readable = [tier for tier, _ in self.replicas.readable(inode) if tier not in avoid]
        if readable:
            return readable[0]
        if self.volume.catalog.replicas(inode):
            raise TierOffline("every tier with a replica is offline")
        raise BlockStale("the block is gone")

    async def _open_descriptor(self, block: OpenBlock, stored: bool) -> None:
        opening = partial(self._open_for_reading, stored=stored)
        async with block.lock:
            if block.descriptor >= 0:
                return
            await self.replicas.catch_up(block.tier)
            path = await self.paths.free_block(block.inode)
            with contextlib.suppress(FileNotFoundError):
                await opening(block, path, self._replica_of(block))
                if self.volume.catalog.path_of(block.inode) == path:
                    return
                # Renamed meanwhile: another block's file may have been there.
                block.close_descriptors()
            await self._while_claimed(block, opening)

    async def _while_claimed(
        self, block: OpenBlock, opening: Callable[[OpenBlock, bytes, Replica], Awaitable[None]]
    ) -> None:
        """Open a file whose name nobody can change. FileNotFoundError: it is really gone.

        On a tier that was away its rename may be promised still: that is done first then.
        """
        await self.replicas.catch_up(block.tier)
        for settled in (False, True):
            path = await self.paths.free_block(block.inode)
            try:
                async with self.volume.claims.hold(path):
                    await opening(block, path, self._replica_of(block))
            except FileNotFoundError:
                if settled or self.growth.replica_of(block) is None:
                    await block.tier.confirm_present()
                    raise
            else:
                return
            await self.replicas.settle(block.tier)

    def _replica_of(self, block: OpenBlock) -> Replica:
        replica = self.growth.replica_of(block)
        if replica is None:
            raise FileNotFoundError(errno.ENOENT, "the replica went away")
        return replica

    async def _open_for_reading(
        self, block: OpenBlock, path: bytes, replica: Replica, *, stored: bool
    ) -> None:
        """The descriptor is set once its bytes may be read by anybody."""
        tier, fanned = block.tier, bool(replica.fanned)
        expected = self.verifier.expected(self.volume.catalog.get(block.inode), replica)
        # What is not sealed is raw.
        packed = expected is not None and expected.codec != RAW
        if tier.remote or (packed and not stored):
            fetched = await fetch(self.volume, block, path, fanned, expected)
            if fetched >= 0:
                block.reader_fd, block.fetched = fetched, True
                return
        descriptor = await tier.run_open(open_file, tier, path, fanned, os.O_RDONLY, expected)
        try:
            if expected is not None:
                await self.verifier.check(block.inode, tier, descriptor, expected, replica)
            decoder = await tier.run(open_decoder, tier, descriptor) if packed else None
        except BaseException:
            close_descriptor(tier, descriptor)
            raise
        block.reader_fd, block.decoder = descriptor, decoder
        block.sealed = None if tier.remote else expected

    async def open_writer(self, inode: int, *, truncate: bool = False) -> OpenBlock:
        """Open an existing block for writing; a sealed one is reopened.

        Its other replicas are suspect until the last close decides whether it changed.
        """
        while True:
            await self.paths.free_block(inode)
            self.volume.torn.discard(inode)
            block = self._open.get(inode)
            if block is None:
                self.idle.forget(inode)
                block = self._enter(inode)
            block.writers += 1
            try:
                with block.tier.admitted():
                    async with block.lock:
                        if block.writer_fd < 0:
                            await self._unpack(block)
                            opening = partial(self._open_for_writing, truncate=truncate)
                            await self._while_claimed(block, opening)
                if truncate:
                    await self.truncate(block, 0)
            except BlockCorrupt:
                await self.close(block, writer=True)
                await self.verifier.condemn(inode, block.tier)
                continue
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

    async def _unpack(self, block: OpenBlock) -> None:
        """A compressed replica is not written to: the block goes on on a raw one."""
        row, replica = self.volume.catalog.get(block.inode), self._replica_of(block)
        expected = self.verifier.expected(row, replica)
        if expected is not None and expected.codec != RAW:
            block.tier = await self.unpack(block.inode, block.tier)

    async def _open_for_writing(
        self, block: OpenBlock, path: bytes, replica: Replica, *, truncate: bool
    ) -> None:
        """Open the replica's file for writing and unseal the block. `block.lock` is held."""
        tier, fanned = block.tier, bool(replica.fanned)
        expected = self.verifier.expected(self.volume.catalog.get(block.inode), replica)
        if truncate:
            expected = None
        descriptor = await tier.run_open(open_file, tier, path, fanned, os.O_RDWR, expected)
        try:
            if expected is not None:
                # What is bad must not be sealed once more.
                await self.verifier.check(block.inode, tier, descriptor, expected, replica)
            if not block.written:
                block.size_bytes = (await tier.run(os.fstat, descriptor)).st_size
            # By descriptor: another file may have the name by now.
            await tier.run(tier.clear_seal, descriptor)
            failpoints.hit("reopen.seal_cleared")
            now = self.growth.replica_of(block)
            if now is None:
                raise BlockStale("the block is gone")
        except BaseException:
            close_descriptor(tier, descriptor)
            raise
        block.close_stand_in()
        if block.reservation:
            block.reservation.release()
        block.writer_fd, block.sealed = descriptor, None
        block.accounted_bytes = now.allocated_bytes
        block.reservation = self.volume.space.reserve(tier.index, 0)
        self._unseal(block)

    def _unseal(self, block: OpenBlock) -> None:
        catalog = self.volume.catalog
        self.volume.sealing.discard(block.inode)
        row = catalog.get(block.inode)
        if row is None:
            return
        with catalog.transaction("reopen"):
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
        if block.decoder is not None:
            data = await self._read_decoded(block, offset, size)
        elif block.local and not block.lock.locked():
            with (self.volume.tiers[0] if block.fetched else block.tier).judged():
                data = os.pread(block.descriptor, size, offset)
        else:
            with block.tier.admitted():
                async with block.lock if block.writers else contextlib.nullcontext():
                    data = await block.tier.run(os.pread, block.descriptor, size, offset)
        self.volume.counters.tier(block.tier.index).bytes_read += len(data)
        return data

    async def _read_decoded(self, block: OpenBlock, offset: int, size: int) -> bytes:
        async with block.lock:
            decoder = block.decoder
            if decoder is None:
                # A writer came meanwhile, and unpacked it.
                return await block.tier.run(os.pread, block.descriptor, size, offset)
            try:
                return await decoder.tier.run(decoder.read, offset, size)
            except BlockCorrupt as error:
                bad = error
        await self.verifier.condemn(block.inode, decoder.tier)
        raise bad

    async def write(self, block: OpenBlock, offset: int, data: bytes) -> int:
        """All of `data`. Raises TierFull, TierOffline, OSError."""
        end = offset + len(data)
        done = False
        try:
            if block.tier.inline and not block.lock.locked() and self.growth.cover(block, end):
                with block.tier.judged():
                    done = try_write(block.writer_fd, data, offset)
            if not done:
                with block.tier.admitted():
                    async with block.lock:
                        await self._write_locked(block, offset, data)
        except BaseException:
            # Some of it may have been written.
            block.changes += 1
            raise
        failpoints.hit("write.written")
        block.wrote(max(block.size_bytes, end))
        self.volume.counters.tier(block.tier.index).bytes_written += len(data)
        return len(data)

    async def _write_locked(self, block: OpenBlock, offset: int, data: bytes) -> None:
        end = offset + len(data)
        while True:
            if self.growth.cover(block, end) and await block.tier.run(
                try_write, block.writer_fd, data, offset
            ):
                return
            await self.growth.spill(block, end)

    async def truncate(self, block: OpenBlock, size: int) -> None:
        """Set the length of a block that is open for writing."""
        async with block.lock:
            while not self.growth.cover(block, size):
                await self.growth.spill(block, size)
            await block.tier.run(os.ftruncate, block.writer_fd, size)
            failpoints.hit("truncate.truncated")
            block.wrote(size)

    async def fsync(self, block: OpenBlock, *, data_only: bool) -> None:
        """Bytes are on the medium, and a file still being written is published."""
        flush = os.fdatasync if data_only else os.fsync
        with block.tier.admitted():
            async with block.lock:
                if block.descriptor >= 0 and not block.fetched:
                    await block.tier.run_in_thread(flush, block.descriptor)
        failpoints.hit("fsync.synced")
        block.look()
        row = self.volume.catalog.get(block.inode)
        if block.writers and row and row.state == BlockState.WRITING and not block.orphan:
            with self.volume.catalog.transaction("fsync"):
                self.volume.catalog.update(
                    row.id, state=int(BlockState.PUBLISHED), size_bytes=block.size_bytes
                )

    async def close(self, block: OpenBlock, *, writer: bool) -> None:
        """One handle is gone. Never raises for what the tier does: nobody would hear it."""
        await self.closing.close(block, writer=writer)
