"""Lending: a descriptor of one block's file for a client that reads it without the mount.

A block that is sealed, verified and on the tier that is called on the loop is lent between two
checkpoints. Every other one goes the way of an open through the mount, as long as the client waits.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import trio

from kvfs.blocks.blocks import Blocks
from kvfs.catalog.rows import GOOD, RAW, ZSTD, BlockState, Inode, Kind, Replica
from kvfs.config import LeaseWait
from kvfs.errors import (
    BlockBusy,
    BlockCorrupt,
    BlockStale,
    KvfsError,
    TierBusy,
    is_expected,
    is_shortage,
    reason_of,
)
from kvfs.leasing.credentials import READ, Credentials
from kvfs.leasing.lingering import Lingering
from kvfs.leasing.lookup import Name, Status
from kvfs.leasing.prefetch import Prefetcher
from kvfs.tiers.backing import Expected, open_file
from kvfs.tiers.tier import Tier, give_owner, sealed_mode
from kvfs.upkeep.sealer import Sealer
from kvfs.volume.open_block import OpenBlock
from kvfs.volume.volume import Volume

SEAL_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Terms:
    """How a client wants its blocks, and until when (by trio's clock) it waits for them."""

    who: Credentials
    direct: bool
    wait: LeaseWait
    until_s: float


@dataclass(slots=True, eq=False)
class Loan:
    """One block that a client has: a reader in the table of open blocks, and a duplicate of the
    client's descriptor. `row` is the block as it was then."""

    block: OpenBlock
    descriptor: int
    row: Inode
    direct: bool
    expected: Expected | None = None
    staged_bytes: int = 0
    codec: int = RAW


class Lender:
    """Owned by the trio loop."""

    def __init__(
        self, volume: Volume, blocks: Blocks, sealer: Sealer, prefetcher: Prefetcher,
        lingering: Lingering,
    ) -> None:  # fmt: skip
        self.volume = volume
        self.blocks = blocks
        self.sealer = sealer
        self.prefetcher = prefetcher
        self.lingering = lingering
        # Of remote blocks that loans hold in staging.
        self.staged_bytes = 0

    # --- between two checkpoints

    def at_once(self, names: Sequence[Name], terms: Terms) -> Iterator[Loan | Status | None]:
        """The block of each name, which was looked up since the last checkpoint, or why there is
        none; None when that takes waiting."""
        get, tier, who = self.volume.catalog.get, self.volume.tiers[0], terms.who
        for path, number, status in names:
            row = get(number) if number else None
            if row is None:
                yield Status.MISSING if number else status
            elif row.kind != Kind.BLOCK:
                yield Status.MISSING
            elif not who.may(row, READ):
                yield Status.DENIED
            elif row.state != BlockState.SEALED or not self.volume.claims.is_free(path):
                yield None
            else:
                yield self._lend_inline(tier, row, path, terms)

    def _lend_inline(self, tier: Tier, row: Inode, path: bytes, terms: Terms) -> Loan | None:
        """A block of the tier that is called on the loop; None when that cannot be now."""
        replica = self._inline_replica(row.id, tier)
        if replica is None:
            return None
        block = self.blocks.join(row.id, tier)
        loan = None
        try:
            if block.tier is tier and not block.fetched:
                loan = self._open_inline(block, row, replica, path, terms)
        except (OSError, BlockCorrupt):
            pass  # whoever waits for it says what is wrong
        finally:
            if loan is None:
                self.blocks.part(block)
        return loan

    def _inline_replica(self, number: int, tier: Tier) -> Replica | None:
        """A good raw replica on this tier, if it is called on the loop and can be now."""
        if tier.inline and tier.online and not tier.health.behind:
            for replica in self.volume.catalog.replicas(number):
                if replica.tier == tier.number:
                    good = replica.state == GOOD and replica.codec == RAW
                    return replica if good else None
        return None

    def _open_inline(
        self, block: OpenBlock, row: Inode, replica: Replica, path: bytes, terms: Terms
    ) -> Loan | None:
        tier, verifier = block.tier, self.blocks.verifier
        direct = terms.direct and tier.identity.probe.o_direct
        if not direct and (descriptor := block.hand_over()) >= 0:
            # Kept since its last reader, as it was then.
            return Loan(block, descriptor, row, direct, block.sealed)
        expected = verifier.expected(row, replica)
        if expected is None:
            return None
        flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
        try:
            descriptor = open_file(tier, path, bool(replica.fanned), flags, expected)
        except OSError as error:
            tier.health.failed(error)
            raise
        if verifier.is_due(replica, expected):
            os.close(descriptor)
            return None
        # Opened so that a fifo would not stop the loop; the client gets a file like any other.
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
        return Loan(block, descriptor, row, direct, expected)

    # --- with waiting

    async def in_time(self, name: Name, terms: Terms) -> Loan | Status:
        """The block, once it is sealed, verified, and where the terms want it."""
        status = Status.BUSY
        with trio.CancelScope(deadline=terms.until_s):
            try:
                return await self._follow(name, terms)
            except Exception as error:
                if not is_expected(error):
                    raise
                status = _status_of(error)
                if not isinstance(error, KvfsError):
                    text = f"lending {os.fsdecode(name.path)!r}: {error}"
                    self.volume.incidents.note("lends_failed", text, reason=reason_of(error))
        return status

    async def _follow(self, name: Name, terms: Terms) -> Loan | Status:
        """The block of a name, also when it gets another number meanwhile, because it was replaced
        or one of its replicas was bad."""
        number = name.inode
        while True:
            try:
                return await self._wait(number, terms)
            except BlockStale:
                row = self.volume.catalog.resolve(name.path)
                if row is None or row.id == number or row.kind != Kind.BLOCK:
                    return Status.MISSING
                if not terms.who.may(row, READ):
                    return Status.DENIED
                number = row.id

    async def _wait(self, number: int, terms: Terms) -> Loan:
        await self._sealed(number, terms)
        fastest = self.blocks.replicas.readable(number)
        if terms.wait == "promote" and fastest and fastest[0][0].index > 0:
            await self.prefetcher.promote(number, terms.until_s)
            fastest = self.blocks.replicas.readable(number)
        staged_bytes = 0
        if fastest and fastest[0][0].remote:
            staged_bytes = self._stage(number, terms)
        try:
            return await self._open(number, terms, staged_bytes)
        except BaseException:
            self.staged_bytes -= staged_bytes
            raise

    async def _sealed(self, number: int, terms: Terms) -> None:
        """What was just closed is sealed in a moment. Raises BlockBusy, BlockStale."""
        while True:
            row = self.volume.catalog.get(number)
            if row is None:
                raise BlockStale("the block is gone")
            if row.state == BlockState.SEALED:
                return
            if terms.wait == "none" or not self.sealer.can_seal(number):
                raise self.volume.not_sealed(number)
            self.volume.request_seal(number)
            await trio.sleep(SEAL_POLL_S)

    def _stage(self, number: int, terms: Terms) -> int:
        """Count a block that is to be fetched. Raises BlockBusy."""
        row = self.volume.catalog.get(number)
        size_bytes = row.size_bytes if row else 0
        if terms.wait == "none":
            raise BlockBusy("it is on a remote tier")
        if self.staged_bytes + size_bytes > self.volume.config.leases.staging:
            self.volume.counters.count("leases_refused", reason="staging")
            raise BlockBusy("leases have as many remote blocks in staging as they may")
        self.staged_bytes += size_bytes
        return size_bytes

    async def _open(self, number: int, terms: Terms, staged_bytes: int) -> Loan:
        block = await self.blocks.open_reader(number, stored=True)
        descriptor = -1
        try:
            if block.tier.remote and not block.fetched:
                raise BlockBusy("there is no room to fetch it from its remote tier")
            codec = RAW if block.decoder is None else ZSTD
            descriptor, direct = await self._reopen(block, number, terms)
            row = self.volume.catalog.get(number)
            if row is None or row.state != BlockState.SEALED:
                raise BlockBusy("it changed while it was opened")
        except BaseException:
            if descriptor >= 0:
                os.close(descriptor)
            self.blocks.part(block)
            raise
        return Loan(block, descriptor, row, direct, block.sealed, staged_bytes, codec)

    async def _reopen(self, block: OpenBlock, number: int, terms: Terms) -> tuple[int, bool]:
        """A file description of the client's own, and whether it is direct."""
        tier = self.volume.tiers[0] if block.fetched else block.tier
        if block.fetched:
            self._open_to_readers(block, number)
        if terms.direct and tier.identity.probe.o_direct:
            try:
                return await reopen(tier, block.reader_fd, os.O_RDONLY | os.O_DIRECT), True
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        return await reopen(tier, block.reader_fd, os.O_RDONLY), False

    def _open_to_readers(self, block: OpenBlock, number: int) -> None:
        """A copy in staging is the daemon's alone; libraries open what they are given once more."""
        row = self.volume.catalog.get(number)
        if row is not None:
            give_owner(block.reader_fd, row.uid, row.gid)
            os.fchmod(block.reader_fd, sealed_mode(row.mode))

    # --- ending

    def take_back(self, loan: Loan) -> None:
        """No client got it."""
        os.close(loan.descriptor)
        self.staged_bytes -= loan.staged_bytes
        self.blocks.part(loan.block)

    def end(self, loan: Loan, uid: int) -> None:
        """A user may have it open still."""
        self.staged_bytes -= loan.staged_bytes
        self.lingering.take(loan.block, uid, loan.descriptor, loan.expected)


async def reopen(tier: Tier, descriptor: int, flags: int) -> int:
    """The same file once more, with a description, flags and an offset of its own."""
    path = f"/proc/self/fd/{descriptor}"
    return await tier.run_open(os.open, path, flags | os.O_CLOEXEC)


def _status_of(error: Exception) -> Status:
    if isinstance(error, BlockStale | FileNotFoundError):
        return Status.MISSING
    if isinstance(error, TierBusy | BlockBusy) or is_shortage(error):
        return Status.BUSY
    return Status.OFFLINE
