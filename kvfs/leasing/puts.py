"""Puts: blocks that clients write without the mount.

`begin` makes a file under a temporary name in the block's directory, as engines do, with room for
its size; the client writes to its descriptor. `commit` closes it, has it sealed, and gives it its
name. What is not committed when the connection ends is removed.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import NamedTuple

import trio

from kvfs import layout
from kvfs.blocks.blocks import Blocks
from kvfs.blocks.namespace import Namespace
from kvfs.catalog.rows import ROOT_INODE, BlockState, Inode, Kind
from kvfs.errors import (
    BlockBusy,
    BlockCorrupt,
    BlockExists,
    BlockStale,
    FilesystemError,
    InvalidOperation,
    NotPermitted,
)
from kvfs.leasing.credentials import SEARCH, WRITE, Credentials, inherited
from kvfs.leasing.leases import Holder
from kvfs.leasing.lending import reopen
from kvfs.leasing.lingering import Lingering
from kvfs.leasing.lookup import clean
from kvfs.leasing.quotas import Quotas
from kvfs.upkeep.sealer import Sealer
from kvfs.volume.open_block import OpenBlock
from kvfs.volume.volume import Volume

DIRECTORY_MODE = 0o755
SEAL_WAIT_S = 5.0
SEAL_POLL_S = 0.02
CLEANUP_S = 10.0
TELL_S = 1.0
# Of the block's name, in the one that it is written under.
NAME_PART_BYTES = 200


@dataclass(frozen=True, slots=True)
class Order:
    """What a client wants to write."""

    path: bytes
    size_bytes: int
    checksum: bytes | None = None
    mode: int = 0o644
    replace: bool = False
    direct: bool = False


@dataclass(slots=True, eq=False)
class Put:
    """A block that is being written: `block` is open for writing until it is `closed`."""

    number: int
    order: Order
    parent: int
    name: bytes
    block: OpenBlock
    closed: bool = False
    watched: bool = False


class Stored(NamedTuple):
    """The block that has the name now; `created` unless it was there with the same content."""

    row: Inode
    created: bool


class Puts:
    """Owned by the trio loop. A put belongs to a connection, whose requests come one by one."""

    def __init__(
        self, volume: Volume, blocks: Blocks, namespace: Namespace, sealer: Sealer,
        quotas: Quotas, lingering: Lingering,
    ) -> None:  # fmt: skip
        self.volume = volume
        self.blocks = blocks
        self.namespace = namespace
        self.sealer = sealer
        self.quotas = quotas
        self.lingering = lingering
        self._puts: dict[int, Put] = {}
        self._last = 0

    def __len__(self) -> int:
        return len(self._puts)

    # --- beginning

    async def begin(self, holder: Holder, order: Order) -> tuple[Put, int] | Stored:
        """A put and the client's descriptor; or the block, where it is there with this content.

        Raises BlockExists, NotPermitted, FilesystemError, QuotaExceeded, TierFull, OSError.
        """
        head, name = layout.split(clean(order.path))
        layout.check_name(name)
        parent = await self._directory(holder.who, head)
        existing = self.volume.catalog.lookup(parent, name)
        if existing is not None:
            if self._is_same(existing, order.size_bytes, order.checksum):
                return Stored(existing, created=False)
            self._check_replaceable(holder.who, parent, existing, order)
        elif not self._may_write(holder.who, parent):
            raise NotPermitted(f"{os.fsdecode(head)}: you may not write there")
        self.quotas.charge(holder.who.uid, order.size_bytes)
        try:
            block = await self._create(holder.who, parent, name, order)
        except BaseException:
            self.quotas.refund(holder.who.uid, order.size_bytes)
            raise
        self._last += 1
        put = Put(self._last, order, parent, name, block)
        self._puts[put.number] = put
        holder.puts.add(put.number)
        try:
            descriptor = await self._prepare(put)
        except BaseException:
            await self.abort(holder, put.number)
            raise
        return put, descriptor

    async def _directory(self, who: Credentials, path: bytes) -> int:
        """The inode of a directory, made with those above where they are missing."""
        catalog, number = self.volume.catalog, ROOT_INODE
        for name in path.split(b"/") if path else ():
            row = catalog.get(number)
            if row is None or not who.may(row, SEARCH):
                raise NotPermitted(f"{os.fsdecode(path)}: you may not go there")
            found = catalog.lookup(number, name) or await self._make_directory(who, row, name)
            if found.kind != Kind.DIRECTORY:
                raise FilesystemError(errno.ENOTDIR, os.fsdecode(path))
            number = found.id
        return number

    async def _make_directory(self, who: Credentials, above: Inode, name: bytes) -> Inode:
        if not who.may(above, WRITE | SEARCH):
            raise NotPermitted(f"{os.fsdecode(name)}: you may not make this directory")
        mode, gid = inherited(above, DIRECTORY_MODE, who.gid, is_directory=True)
        try:
            made = await self.namespace.mkdir(above.id, name, mode, who.uid, gid)
        except BlockExists:
            found = self.volume.catalog.lookup(above.id, name)
            if found is None:
                raise
            return found
        self.volume.name_changed(above.id, name)
        return made

    def _may_write(self, who: Credentials, directory: int) -> bool:
        row = self.volume.catalog.get(directory)
        return row is not None and who.may(row, WRITE | SEARCH)

    def _check_replaceable(
        self, who: Credentials, parent: int, existing: Inode, order: Order
    ) -> None:
        """Raise for a name that this put cannot have, as far as that is known before it is
        written."""
        shown = os.fsdecode(order.path)
        if existing.kind == Kind.DIRECTORY:
            raise FilesystemError(errno.EISDIR, shown)
        directory = self.volume.catalog.get(parent)
        if directory is None or not who.may_replace(directory, existing):
            raise NotPermitted(f"{shown}: you may not replace it")
        if order.replace or existing.state != BlockState.SEALED:
            return
        if order.checksum is not None or existing.size_bytes != order.size_bytes:
            raise BlockExists(f"{shown}: there is another block of this name")

    def _is_same(self, row: Inode, size_bytes: int, checksum: bytes | None) -> bool:
        sealed = row.kind == Kind.BLOCK and row.state == BlockState.SEALED
        return sealed and checksum is not None and (row.size_bytes, row.checksum) == (
            size_bytes, checksum,
        )  # fmt: skip

    async def _create(self, who: Credentials, parent: int, name: bytes, order: Order) -> OpenBlock:
        mode, gid = inherited(self.volume.catalog.get(parent), order.mode, who.gid)
        self._last += 1
        unique = (name[:NAME_PART_BYTES], self.volume.mounts, self._last)
        temporary = b"%s.%d-%d.put.tmp" % unique
        _, block = await self.blocks.create(parent, temporary, mode, who.uid, gid)
        self.namespace.directory_changed(parent)
        return block

    async def _prepare(self, put: Put) -> int:
        """Room for all of it, and a descriptor for the client."""
        block, growth = put.block, self.blocks.growth
        async with block.lock:
            while not growth.cover(block, put.order.size_bytes):
                await growth.spill(block, put.order.size_bytes)
        if not block.tier.identity.probe.leases:
            raise FilesystemError(
                errno.EOPNOTSUPP, f"tier {block.tier.name} cannot tell when a writer is gone"
            )
        # The daemon sees nothing of what the client writes.
        block.lose_sight()
        direct = put.order.direct and block.tier.identity.probe.o_direct
        flags = os.O_RDWR | (os.O_DIRECT if direct else 0)
        return await reopen(block.tier, block.writer_fd, flags)

    # --- ending

    async def commit(self, holder: Holder, number: int, checksum: bytes | None) -> Stored:
        """Give the block its name, atomically. The client has closed its descriptor.

        Raises BlockBusy, BlockCorrupt, BlockExists, InvalidOperation; the put is over then too.
        """
        put = self._take(holder, number)
        try:
            return await self._publish(holder, put, checksum or put.order.checksum)
        finally:
            await self._finish(holder, put)

    def _take(self, holder: Holder, number: int) -> Put:
        if number not in holder.puts:
            raise InvalidOperation(f"put {number} is not one of this connection, or is over")
        holder.puts.discard(number)
        return self._puts.pop(number)

    async def _publish(self, holder: Holder, put: Put, checksum: bytes | None) -> Stored:
        block, order = put.block, put.order
        status = await block.tier.run(os.fstat, block.writer_fd)
        if status.st_size != order.size_bytes:
            raise InvalidOperation(f"{status.st_size} bytes were written, not {order.size_bytes}")
        self._watch(put)
        put.closed = True
        await self.blocks.close(block, writer=True)
        sealed = await self.sealer.seal_now(block.inode, cached=not order.direct)
        row = self.volume.catalog.get(block.inode)
        if row is None:
            raise BlockStale("its temporary file was removed")
        if not sealed:
            raise BlockBusy("it cannot be sealed: somebody has it open for writing still")
        if checksum is not None and row.checksum != checksum:
            self.volume.counters.count("checksum_mismatches")
            raise BlockCorrupt("what was written has not the checksum that the client sent")
        return await self._rename(put, row)

    async def _rename(self, put: Put, row: Inode) -> Stored:
        catalog = self.volume.catalog
        while True:
            existing = await self._settled(put)
            if existing is not None:
                if self._is_same(existing, row.size_bytes, row.checksum):
                    return Stored(existing, created=False)
                if not put.order.replace:
                    shown = os.fsdecode(put.order.path)
                    raise BlockExists(f"{shown}: there is another block of this name")
            entry = catalog.entry(row.id)
            if entry is None:
                raise BlockStale("its temporary file was removed")
            try:
                await self.namespace.rename(*entry, put.parent, put.name, replace=put.order.replace)
            except BlockExists:
                continue
            self.volume.name_changed(put.parent, put.name)
            self.volume.counters.count("puts")
            # Whoever looked for it before is to see it now.
            with trio.move_on_after(TELL_S):
                await self.volume.names_told()
            return Stored(catalog.get(row.id) or row, created=True)

    async def _settled(self, put: Put) -> Inode | None:
        """The block that has the name, once it can be compared. Raises BlockBusy."""
        with trio.move_on_after(SEAL_WAIT_S):
            while True:
                row = self.volume.catalog.lookup(put.parent, put.name)
                if row is None or row.state == BlockState.SEALED or put.order.replace:
                    return row
                if not self.sealer.can_seal(row.id):
                    break
                self.volume.request_seal(row.id)
                await trio.sleep(SEAL_POLL_S)
        raise BlockBusy(f"{os.fsdecode(put.order.path)}: somebody else is writing it")

    async def abort(self, holder: Holder, number: int) -> None:
        """Give a put up."""
        put = self._take(holder, number)
        await self._finish(holder, put)

    async def leave(self, holder: Holder) -> None:
        """The connection is closed."""
        for number in list(holder.puts):
            await self.abort(holder, number)

    async def _finish(self, holder: Holder, put: Put) -> None:
        """Remove what has no name of its own. What fails here the next expiry of temporary files
        removes."""
        self.quotas.refund(holder.who.uid, put.order.size_bytes)
        cleanup = self.volume.tolerate("removal of what was not committed")
        with trio.CancelScope(shield=True) as scope, cleanup:
            scope.deadline = trio.current_time() + CLEANUP_S
            entry = self.volume.catalog.entry(put.block.inode)
            if not put.closed:
                self._watch(put)
            if entry is not None and entry != (put.parent, put.name):
                await self.namespace.unlink(*entry)
                self.volume.counters.count("puts_dropped")
            if not put.closed:
                await self.blocks.close(put.block, writer=True)
        if put.watched:
            self.lingering.take(put.block, holder.who.uid)

    def _watch(self, put: Put) -> None:
        """As long as the client has it open its space counts, whatever becomes of its name."""
        try:
            put.block.read_only_descriptor()
        except OSError:
            return  # without a descriptor to spare nobody looks
        put.block.readers += 1
        put.watched = True
