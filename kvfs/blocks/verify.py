"""Verification: is a replica what was sealed? Asked before its bytes reach anybody.

An open of a replica that this mount has read before costs a comparison: the number of the mount
that last verified it, and the file's size and time, come with what an open looks at anyway. What
has to be read is read in a worker thread. A replica that is not what was sealed is read once more
while nobody can change it, and goes to quarantine.
"""

from __future__ import annotations

import logging
import os
from functools import partial

from kvfs.blocks.quarantine import Quarantine
from kvfs.catalog.rows import RAW, BlockState, Inode, Kind, Replica
from kvfs.errors import BlockCorrupt, TierOffline, reason_of
from kvfs.tiers.backing import Expected, open_file
from kvfs.tiers.checksum import PIECE_BYTES, cached_bytes
from kvfs.tiers.forms import digest_of
from kvfs.tiers.seal import seal_from
from kvfs.tiers.tier import Tier, close_descriptor
from kvfs.volume.hindsight import holds_another
from kvfs.volume.open_block import OpenBlock
from kvfs.volume.replicas import Replicas
from kvfs.volume.volume import Volume

log = logging.getLogger(__name__)

# Read in one call of a thread: a remote tier answers each within its deadline.
SLICE_BYTES = 64 << 20


class Verifier:
    """Owned by the trio loop. Keeps nothing: what was verified is in the catalog."""

    def __init__(self, volume: Volume, replicas: Replicas, quarantine: Quarantine) -> None:
        self.volume = volume
        self.replicas = replicas
        self.quarantine = quarantine

    # --- opening

    def expected(self, row: Inode | None, replica: Replica) -> Expected | None:
        """What the file of a sealed block must be like; None of one that is not sealed."""
        if row is None or row.state != BlockState.SEALED or row.checksum is None:
            return None
        return Expected(row.size_bytes, replica.mtime_ns, row.checksum, replica.codec)

    def is_due(self, replica: Replica, expected: Expected) -> bool:
        """Whether a replica that was opened has to be read before anybody else may."""
        if expected.touched:
            return True
        policy = self.volume.config.tiering.verify
        if replica.verified == self.volume.mounts:
            return policy == "always"
        if policy == "after-crash":
            return replica.verified < max(1, self.volume.crashed)
        return policy != "never"

    async def check(
        self, inode: int, tier: Tier, descriptor: int, expected: Expected, replica: Replica
    ) -> None:
        """Read it if that is due. Raises BlockCorrupt, TierOffline, OSError."""
        if self.is_due(replica, expected):
            await self.read(tier, descriptor, expected)
            self._remember(inode, tier, expected)

    async def check_again(self, block: OpenBlock) -> None:
        """A reader joins a block whose file was touched while it is open. Raises BlockCorrupt."""
        async with block.lock:
            if block.sealed is None or not block.is_touched():
                return
            block.sealed.found(block.reader_fd, os.fstat(block.reader_fd))
            await self.read(block.tier, block.reader_fd, block.sealed)
            self._remember(block.inode, block.tier, block.sealed)

    async def read(
        self, tier: Tier, descriptor: int, expected: Expected, *, direct: bool = False
    ) -> None:
        """Read a whole file. Raises BlockCorrupt when it is not as expected."""
        digest = digest_of(descriptor, expected.codec, direct=direct)
        small = expected.codec == RAW and expected.size_bytes <= PIECE_BYTES
        small = small and tier.inline and not direct
        if small and cached_bytes(descriptor, expected.size_bytes) == expected.size_bytes:
            # A thread takes longer to be called than this takes.
            digest.advance()
        while not digest.done:
            await tier.run_in_thread(digest.advance, SLICE_BYTES, urgent=True)
        expected.compare(digest)

    def _remember(self, inode: int, tier: Tier, expected: Expected) -> None:
        """Losing it costs a verification, so a catalog whose disk is full is no reason to fail."""
        self.volume.counters.count("verified")
        expected.mtime_ns = expected.found_mtime_ns
        with self.volume.tolerate("recording a verification"):
            self.volume.catalog.update_replica(
                inode, tier.number, verified=self.volume.mounts, mtime_ns=expected.found_mtime_ns
            )

    # --- a replica that is not what was sealed

    async def condemn(self, number: int, tier: Tier, *, direct: bool = False) -> bool:
        """Read a replica again, with nobody who could change it; a bad one goes to quarantine.

        Whether it was bad, or its file gone. `direct` reads the medium, past the page cache.
        Raises TierOffline, OSError when it cannot be read.
        """
        path = self.volume.catalog.path_of(number)
        if path is None:
            return False
        async with self.volume.claims.hold(path):
            seen = self._may_be_seen(number, tier)
            if not await self._judge(number, tier, path, direct=direct):
                return False
            if seen:
                await self._part(number, path)
        return True

    async def is_sound(self, number: int, tier: Tier) -> bool:
        """Whether a replica, read now, is what was sealed. Raises TierOffline, OSError."""
        row, replica = self.volume.catalog.get(number), self._replica(number, tier)
        path = self.volume.catalog.path_of(number)
        expected = self.expected(row, replica) if replica is not None else None
        if replica is None or path is None or expected is None:
            return False
        try:
            await self._read_file(tier, path, bool(replica.fanned), expected, direct=False)
        except BlockCorrupt:
            return False
        return True

    def _may_be_seen(self, number: int, tier: Tier) -> bool:
        """Whether the kernel may have bytes of this replica, or handles that read it."""
        block, replica = self.replicas.open_blocks.get(number), self._replica(number, tier)
        if block is not None:
            return block.tier is tier and not block.fetched
        readable = self.replicas.readable(number)
        if replica is None or not readable or readable[0][0] is not tier:
            return False
        if replica.codec != RAW:
            # No byte was given out without its frame having been checked.
            return False
        policy = self.volume.config.tiering.verify
        return replica.verified == self.volume.mounts or policy in ("after-crash", "never")

    async def _judge(self, number: int, tier: Tier, path: bytes, *, direct: bool = False) -> bool:
        """Read a replica whose path the caller claims, and set it aside if it is bad."""
        catalog = self.volume.catalog
        row, replica = catalog.get(number), self._replica(number, tier)
        expected = self.expected(row, replica) if replica is not None else None
        if row is None or replica is None or expected is None:
            return False
        if catalog.path_of(number) != path or self._has_writer(number):
            return False
        try:
            await self._read_file(tier, path, bool(replica.fanned), expected, direct=direct)
        except BlockCorrupt as error:
            if await self._has_other_form(row, replica, tier, path, direct=direct):
                return False
            await self._set_aside(row, tier, path, error)
            return True
        except FileNotFoundError as error:
            self.replicas.lose(row, tier, error.strerror or "no such file")
            return True
        self._remember(number, tier, expected)
        return False

    async def _has_other_form(
        self, row: Inode, replica: Replica, tier: Tier, path: bytes, *, direct: bool
    ) -> bool:
        """Whether a file is raw, as its record says, and its row calls it compressed, or the other
        way: a crash came between. The row is corrected then."""
        fanned = bool(replica.fanned)
        seal = await tier.run(tier.read_seal, tier.locate(path, fanned))
        if seal is None or seal.codec == replica.codec or row.checksum is None:
            return False
        expected = Expected(row.size_bytes, 0, row.checksum, seal.codec)
        try:
            await self._read_file(tier, path, fanned, expected, direct=direct)
        except BlockCorrupt:
            return False
        status = await tier.run(tier.files.status, tier.locate(path, fanned))
        self.replicas.measured(
            row.id, tier, status.st_blocks * 512,
            codec=seal.codec, mtime_ns=status.st_mtime_ns, verified=self.volume.mounts,
        )  # fmt: skip
        return True

    # --- parting from what the kernel has

    async def _part(self, number: int, path: bytes) -> None:
        """The block goes on under a new inode number: whoever opens its name gets that.

        The kernel keeps pages and handles by inode, and refuses to open one inode on two files.
        The next replica has been read before: a second change of number while the kernel looks
        the name up again would be ESTALE to the opener.
        """
        catalog = self.volume.catalog
        self.replicas.open_blocks.pop(number, None)
        for tier, replica in self.replicas.readable(number):
            due = replica.verified != self.volume.mounts
            if not due or not await self._judge(number, tier, path):
                break
        row, entry = catalog.get(number), catalog.entry(number)
        if row is None or entry is None:
            return
        with catalog.transaction("renumber"):
            row = self._renumber(row, entry)
        self.volume.name_changed(*entry)
        for replica in catalog.replicas(row.id):
            tier = self.volume.by_number[replica.tier]
            absolute = tier.locate(path, bool(replica.fanned))
            # A record with the old number is as good until fsck or the next move writes it anew.
            seal = seal_from(row, replica.codec)
            record = partial(tier.write_seal, absolute, seal, keep_time=True)
            with self.volume.tolerate("seal record of a new inode number", tier.name):
                status = await tier.run(record)
                self.replicas.measured(row.id, tier, status.st_blocks * 512)

    def _renumber(self, row: Inode, entry: tuple[int, bytes]) -> Inode:
        catalog = self.volume.catalog
        replicas, xattrs = catalog.replicas(row.id), catalog.xattrs(row.id)
        catalog.delete(row.id)
        number = catalog.insert_inode(
            Kind.BLOCK, row.mode, row.uid, row.gid, row.mtime_ns, size_bytes=row.size_bytes,
            generation=row.generation, state=BlockState.SEALED, checksum=row.checksum,
        )  # fmt: skip
        catalog.update(
            number, atime_ns=row.atime_ns, ctime_ns=row.ctime_ns, pin=row.pin, ttl_s=row.ttl_s
        )
        catalog.link(*entry, number)
        for replica in replicas:
            catalog.add_replica(
                number, replica.tier, replica.allocated_bytes, replica.tau,
                fanned=bool(replica.fanned), state=replica.state,
                verified=replica.verified, mtime_ns=replica.mtime_ns,
                codec=replica.codec, saved_bytes=replica.saved_bytes,
            )  # fmt: skip
        for name, value in xattrs:
            catalog.set_xattr(number, name, value)
        return row._replace(id=number)

    def _replica(self, number: int, tier: Tier) -> Replica | None:
        found = [r for r in self.volume.catalog.replicas(number) if r.tier == tier.number]
        return found[0] if found else None

    def _has_writer(self, number: int) -> bool:
        block = self.replicas.open_blocks.get(number)
        return block is not None and block.writers > 0

    async def _read_file(
        self, tier: Tier, path: bytes, fanned: bool, expected: Expected, *, direct: bool
    ) -> None:
        flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
        descriptor = await tier.run_open(open_file, tier, path, fanned, flags, expected)
        try:
            await self.read(tier, descriptor, expected, direct=direct)
        finally:
            close_descriptor(tier, descriptor)

    async def _set_aside(self, row: Inode, tier: Tier, path: bytes, error: BlockCorrupt) -> None:
        """File first, then row: after a crash between them the row has no file, and goes."""
        replica = self._replica(row.id, tier)
        if replica is None:
            return
        absolute = tier.locate(path, bool(replica.fanned))
        if self.volume.catalog_behind and await tier.run(holds_another, tier, absolute, row):
            # It is not this block's any more: the walk, or who asks for the name, takes it in.
            self.replicas.forget_file(row, tier)
            return
        others = len(self.volume.catalog.replicas(row.id)) - 1
        left = f"{others} other replicas" if others else "it was the only replica: a miss"
        fanned = bool(replica.fanned)
        try:
            await self.quarantine.put(
                tier, path, fanned, reason=error.reason, message=f"is bad ({error}; {left})"
            )
        except TierOffline:
            raise
        except OSError as failure:
            # It is not served either way; a tier that takes no renames keeps the file.
            self.volume.incidents.note(
                "quarantine_failures", f"tier {tier.name}: {os.fsdecode(path)!r} is bad ({error}) "
                f"but stays: {failure}", reason=reason_of(failure), tier=tier.name,
            )  # fmt: skip
        self.replicas.forget_file(row, tier)
