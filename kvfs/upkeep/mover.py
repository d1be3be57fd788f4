"""The mover: one promotion or demotion, crash-safe at every arrow.

reserve -> copy to staging on the target -> fsync -> read back past the page cache and verify ->
rename into place -> catalog commit -> (demotion only) unlink the source. Never the other way round:
until the commit the copy is litter that recovery sweeps; after it the block has two replicas. What
is read and written has the form that the tier asks for (`kvfs.tiers.forms`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import trio

from kvfs import failpoints, layout
from kvfs.blocks.attributes import PIN, TTL
from kvfs.blocks.verify import Verifier
from kvfs.catalog.rows import RAW, BlockState, Inode, Kind
from kvfs.config import Compress
from kvfs.errors import BlockBusy, BlockCorrupt, BlockNotFound, TierFull, TierOffline
from kvfs.policy.plan import Move, MoveKind
from kvfs.tiers.backing import rename_into_place, sync_names
from kvfs.tiers.checksum import drop_cached
from kvfs.tiers.deadlines import run_watched
from kvfs.tiers.fan_out import refuses_name
from kvfs.tiers.forms import digest_of, is_readable, transfer
from kvfs.tiers.health import is_full, is_of_medium
from kvfs.tiers.seal import Seal, seal_from
from kvfs.tiers.space import saved_by, sealed
from kvfs.tiers.tier import UNSEALED_MODE, Tier
from kvfs.volume.replicas import Replicas, largest
from kvfs.volume.volume import Volume

log = logging.getLogger(__name__)

UNPACK_ATTEMPTS = 3


@dataclass(slots=True)
class Running:
    """A copy under way. `done_bytes` and `steps` are written by its worker thread."""

    kind: MoveKind
    path: bytes
    source: str
    target: str
    size_bytes: int
    # Of the source, and what the target is to have.
    codec: int = RAW
    compress: Compress = "none"
    done_bytes: int = 0
    # The tiers that its steps were at; the last one is to blame for an error.
    steps: list[Tier] = field(default_factory=list)
    ended: trio.Event = field(default_factory=trio.Event)

    @property
    def progress(self) -> int:
        """Another number while it gets on."""
        return self.done_bytes + len(self.steps)


@dataclass(frozen=True, slots=True)
class Copied:
    """A copy that was verified: its codec, and the length of its file."""

    codec: int
    file_bytes: int


class Mover:
    """Owned by the trio loop."""

    def __init__(self, volume: Volume, replicas: Replicas, verifier: Verifier) -> None:
        self.volume = volume
        self.replicas = replicas
        self.verifier = verifier
        self.running: dict[int, Running] = {}

    async def execute(self, move: Move, still_wanted: Callable[[], bool] = lambda: True) -> int:
        """Carry out one planned move; bytes moved or freed.

        Raises BlockBusy or BlockNotFound when the block is not what the plan saw, TierFull,
        TierOffline, BlockCorrupt, OSError: the block is then where it was.
        """
        tiers = self.volume.tiers
        source = tiers[move.source]
        if move.kind == "evict":
            freed = self.replicas.evict(move.inode, from_tier=source, reason="watermark")
            await self.replicas.settle(source)
            return freed
        if move.kind == "drop":
            return await self.drop(move.inode, source)
        assert move.target is not None, "a copy has a target"
        copied = await self.copy(move.inode, source, tiers[move.target], move.kind, still_wanted)
        if move.kind == "demote":
            await self.drop(move.inode, source)
        return copied

    def movable(self, number: int) -> tuple[Inode, bytes]:
        """A block that may be copied now, and its path. Raises BlockBusy, BlockNotFound."""
        inode, path = self._sealed_block(number)
        if layout.is_temporary(path):
            raise BlockBusy("it is a temporary file")
        return inode, path

    def _sealed_block(self, number: int) -> tuple[Inode, bytes]:
        inode = self.volume.catalog.get(number)
        path = self.volume.catalog.path_of(number)
        if inode is None or path is None or inode.kind != Kind.BLOCK:
            raise BlockNotFound("no such block")
        if inode.state != BlockState.SEALED:
            raise self.volume.not_sealed(number)
        return inode, path

    async def drop(self, number: int, tier: Tier) -> int:
        """Remove one replica of a block that has another one; bytes freed."""
        while True:
            inode, path = self.movable(number)
            block = self.replicas.open_blocks.get(number)
            if block is not None and block.tier is tier:
                raise BlockBusy("it is open")
            replicas = self.volume.catalog.replicas(number)
            if not any(replica.tier == tier.number for replica in replicas):
                return 0
            online = [r for r in replicas if self.volume.by_number[r.tier].online]
            if len(online) < 2:
                raise BlockBusy("it is its only replica that can be read")
            if self.volume.claims.is_free(path):
                break
            await self.volume.claims.wait(path)
        async with self.volume.claims.hold(path):
            freed = await self.replicas.drop(inode, tier, path)
        self.volume.counters.tier(tier.index).demotions += 1
        self.volume.counters.tier(tier.index).moved_out_bytes += freed
        return freed

    async def copy(
        self, number: int, source: Tier, target: Tier, kind: MoveKind,
        still_wanted: Callable[[], bool] = lambda: True,
    ) -> int:  # fmt: skip
        """Add a replica on `target`; bytes written, 0 when it is there already."""
        self.movable(number)
        if any(r.tier == target.number for r in self.volume.catalog.replicas(number)):
            return 0
        return await self._copy(number, source, target, kind, target.config.compress, still_wanted)

    async def _copy(
        self, number: int, source: Tier, target: Tier, kind: MoveKind, compress: Compress,
        still_wanted: Callable[[], bool] = lambda: True,
    ) -> int:  # fmt: skip
        """Add a replica on `target`, or replace the one that is there if that is the source."""
        inode, path = self._sealed_block(number)
        replicas = {r.tier: r for r in self.volume.catalog.replicas(number)}
        if source.number not in replicas:
            raise BlockBusy(f"it is not on {source.name} any more")
        if number in self.running:
            raise BlockBusy("it is being moved already")
        if not target.online:
            raise TierOffline(f"tier {target.name} is offline")
        # As if it were to be raw: what compression saves is given back afterwards.
        reservation = self.volume.space.reserve(target.index, sealed(inode.size_bytes))
        if reservation is None:
            raise TierFull(f"tier {target.name} is full")
        replica = replicas[source.number]
        running = Running(
            kind, path, source.name, target.name, inode.size_bytes, replica.codec, compress
        )
        self.running[number] = running
        staging = target.root + b"/" + layout.staging_path(inode.id, inode.generation)
        try:
            failpoints.hit("move.reserved")
            source_path = source.locate(path, bool(replica.fanned))
            copied = await self._copy_to_staging(
                inode, source_path, source, target, staging, running
            )
            await self._publish(inode, source, target, staging, copied, still_wanted)
        except BlockCorrupt:
            now = self.volume.catalog.get(number)
            if now is None or (now.state, now.generation) != (inode.state, inode.generation):
                raise BlockBusy("it changed while it was copied") from None
            self.volume.counters.count("checksum_mismatches")
            # Either the copy went wrong, or what it was made of is bad.
            await self.verifier.condemn(number, source)
            raise
        finally:
            del self.running[number]
            running.ended.set()
            reservation.release()
        arrived = self.volume.counters.tier(target.index)
        arrived.moved_in_bytes += copied.file_bytes
        if target.index < source.index:
            arrived.promotions += 1
        return copied.file_bytes

    async def unpack(self, number: int, source: Tier) -> Tier:
        """A tier with a raw replica of a block, for a writer, whose fastest one, on `source`, is
        compressed. One is made on the fastest tier with room, else in place of the compressed one.

        The block must be open, so that nobody drops it. Raises TierFull, TierOffline, BlockBusy,
        BlockNotFound, BlockCorrupt, OSError.
        """
        for attempt in range(UNPACK_ATTEMPTS):
            while number in self.running:
                await self.running[number].ended.wait()
            for tier, replica in self.replicas.readable(number):
                if replica.codec == RAW and tier.index <= source.index:
                    return tier
            try:
                return await self._unpack(number, source)
            except BlockBusy:
                # It was renamed meanwhile, say.
                if attempt == UNPACK_ATTEMPTS - 1:
                    raise
        raise AssertionError("the last attempt returns or raises")

    async def _unpack(self, number: int, source: Tier) -> Tier:
        there = {replica.tier for replica in self.volume.catalog.replicas(number)}
        for target in self.volume.tiers[: source.index]:
            if target.accepts and target.number not in there:
                try:
                    await self._copy_raw(number, source, target)
                except (TierFull, TierOffline, OSError) as error:
                    log.debug("unpacking onto %s: %s", target.name, error)
                else:
                    return target
        inode, _ = self._sealed_block(number)
        if self.volume.config.tiering.on_full == "evict":
            await self.replicas.make_room(source, sealed(inode.size_bytes))
        await self._copy_raw(number, source, source)
        return source

    async def _copy_raw(self, number: int, source: Tier, target: Tier) -> None:
        try:
            await self._copy(number, source, target, "promote", "none")
        except BlockCorrupt as error:
            if await self.verifier.is_sound(number, source):
                # What the target gave back was not.
                raise OSError(errno.EIO, f"tier {target.name}: {error}") from None
            raise

    async def _copy_to_staging(
        self, inode: Inode, source_path: bytes, source: Tier, target: Tier,
        staging: bytes, running: Running,
    ) -> Copied:  # fmt: skip
        xattrs = self._xattrs(inode)
        slower = max(source, target, key=lambda tier: tier.index)

        def work() -> Copied:
            return copy_verified(
                source, source_path, target, staging, seal_from(inode, RAW), xattrs, running
            )

        hung: list[Tier] = []

        async def watch() -> None:
            async with trio.open_nursery() as nursery:
                for tier in (source, target):
                    nursery.start_soon(_watch, tier, running, hung, nursery.cancel_scope)

        try:
            return await run_watched(work, limiter=slower.long_limiter, watch=watch)
        except trio.TooSlowError:
            raise hung[0].gave_up(hung[0].health.answers) from None
        except OSError as error:
            blamed = running.steps[-1] if running.steps else slower
            blamed.health.failed(error)
            if blamed is target and is_of_medium(error) and error.errno != errno.EROFS:
                target.health.refuse("failing", error)
            if is_full(error) and blamed is target:
                target.health.refuse("full", error)
                raise TierFull(f"tier {target.name}: {error}") from None
            raise
        except BaseException as error:
            # Cancelled when it was done.
            if not isinstance(error, Exception):
                await self._discard(target, staging)
            raise

    async def _discard(self, tier: Tier, staging: bytes) -> None:
        """What cannot be removed the next mount sweeps."""
        with self.volume.overlook("copies_left", tier), trio.CancelScope(shield=True):
            await tier.run(_discard, tier, staging)

    def _xattrs(self, inode: Inode) -> list[tuple[bytes, bytes]]:
        xattrs = list(self.volume.catalog.xattrs(inode.id))
        if inode.pin:
            xattrs.append((PIN, inode.pin.encode()))
        if inode.ttl_s:
            xattrs.append((TTL, f"{inode.ttl_s:g}s".encode()))
        return xattrs

    async def _publish(
        self, before: Inode, source: Tier, target: Tier, staging: bytes, copied: Copied,
        still_wanted: Callable[[], bool],
    ) -> None:  # fmt: skip
        """Rename into place and commit, if the block is still the one that was copied."""
        catalog = self.volume.catalog
        try:
            inode, path = self._sealed_block(before.id)
            async with self.volume.claims.hold(path):
                # Whoever held the claim before may have changed it.
                inode, now_at = self._sealed_block(before.id)
                if now_at != path or inode.generation != before.generation or not still_wanted():
                    raise BlockBusy("it changed while it was copied")
                replicas = {r.tier: r for r in catalog.replicas(inode.id)}
                if source.number not in replicas:
                    raise BlockBusy(f"it left {source.name} while it was copied")
                fanned = bool(replicas[source.number].fanned)
                # A promotion keeps its source: only a demotion must outlive a power loss.
                durable = target.index > source.index or target.durable
                # An unmount waits, within the deadline, for the file and its row.
                with trio.CancelScope(shield=True):
                    try:
                        final = target.locate(path, fanned)
                        status = await _settle(target, staging, final, durable)
                    except OSError as error:
                        if fanned or not await refuses_name(target, error):
                            raise
                        fanned, final = True, target.locate(path, fanned=True)
                        status = await _settle(target, staging, final, durable)
                allocated, tau = status.st_blocks * 512, replicas[source.number].tau
                saved = saved_by(copied.codec, inode.size_bytes, allocated)
                with catalog.transaction("move"):
                    catalog.add_replica(
                        inode.id, target.number, allocated, tau, fanned=fanned,
                        verified=self.volume.mounts, mtime_ns=status.st_mtime_ns,
                        codec=copied.codec, saved_bytes=saved,
                    )  # fmt: skip
                replaced = replicas.pop(target.number, None)
                if replaced is not None:
                    self.replicas.uncount(replaced, list(replicas.values()))
                self.volume.space.add(
                    target.index, allocated, beside_bytes=largest(replicas.values()),
                    saved_bytes=saved,
                )  # fmt: skip
        except BaseException:
            await self._discard(target, staging)
            raise


async def _watch(tier: Tier, running: Running, hung: list[Tier], scope: trio.CancelScope) -> None:
    """Until one of the tiers of a copy hangs: which one."""
    await tier.until_it_hangs(lambda: running.progress)
    hung.append(tier)
    scope.cancel()


def copy_verified(
    origin: Tier, source_path: bytes, target: Tier, staging: bytes, seal: Seal,
    xattrs: list[tuple[bytes, bytes]], running: Running,
) -> Copied:  # fmt: skip
    """Copy into staging, read it back from the medium, attach the seal, fsync. Blocking.

    Raises BlockCorrupt, with the copy dropped, when what arrived is not what was sealed.
    """

    def progress(done_bytes: int) -> None:
        running.done_bytes = done_bytes
        # Whoever unmounts does not wait for the rest of a large copy.
        trio.from_thread.check_cancelled()

    running.steps.append(target)
    _discard(target, staging)
    running.steps.append(origin)
    source = origin.files.open(source_path, os.O_RDONLY)
    running.steps.append(target)
    try:
        copy = target.files.open(staging, os.O_RDWR | os.O_CREAT | os.O_EXCL, UNSEALED_MODE)
    except BaseException:
        os.close(source)
        raise
    try:
        try:
            codec = transfer(source, running.codec, copy, running.compress, progress)
        except OSError:
            if not is_readable(source, running.codec, running.done_bytes):
                running.steps.append(origin)
            raise
        failpoints.hit("move.copied")
        if target.identity.probe.xattrs:
            for name, value in xattrs:
                os.setxattr(copy, name, value)
        target.write_seal(copy, replace(seal, codec=codec))
        failpoints.hit("move.recorded")
        # One fsync for bytes and record: what is read back after it is what the medium has.
        os.fsync(copy)
        running.steps.append(target)
        failpoints.hit("move.synced")
        drop_cached(copy)
        digest = digest_of(copy, codec)
        digest.advance()
        if digest.checksum() != seal.checksum:
            raise BlockCorrupt(f"{os.fsdecode(source_path)}: the copy has not the sealed checksum")
        failpoints.hit("move.verified")
        # Nobody else would remove it, were it given up by now.
        trio.from_thread.check_cancelled()
        return Copied(codec, os.fstat(copy).st_size)
    except BaseException:
        _discard(target, staging)
        raise
    finally:
        os.close(source)
        os.close(copy)


async def _settle(target: Tier, staging: bytes, final: bytes, durable: bool) -> os.stat_result:
    """`put_in_place`; the fsync of a directory takes as long as its disk."""
    run = target.run_in_thread if durable else target.run
    return await run(put_in_place, target, staging, final, durable)


def put_in_place(tier: Tier, staging: bytes, final: bytes, durable: bool) -> os.stat_result:
    """Rename a complete copy to its name; what it is like there. Blocking."""
    if not tier.identity.probe.xattrs:
        # Of the compressed file that it replaces, which would leave its record behind.
        tier.clear_seal(final)
    rename_into_place(tier, staging, final)
    failpoints.hit("move.placed")
    if durable:
        sync_names(tier, [final])
        failpoints.hit("move.directory_synced")
    return tier.files.status(final)


def _discard(tier: Tier, staging: bytes) -> None:
    with contextlib.suppress(FileNotFoundError):
        tier.files.unlink(staging)
