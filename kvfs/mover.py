"""The mover: one promotion or demotion, crash-safe at every arrow.

reserve -> copy to staging on the target -> fsync -> read back past the page cache and verify ->
rename into place -> catalog commit -> (demotion only) unlink the source. Never the other way round:
until the commit the copy is litter that recovery sweeps; after it the block has two replicas.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import trio

from kvfs import layout
from kvfs.attributes import PIN, TTL, seal_from
from kvfs.backing import rename_into_place
from kvfs.copying import copy_file
from kvfs.errors import BlockBusy, BlockCorrupt, BlockNotFound, TierFull, TierOffline
from kvfs.policy import Move, MoveKind
from kvfs.replicas import Replicas, largest
from kvfs.rows import BlockState, Inode, Kind
from kvfs.seal import Seal, checksum_of
from kvfs.space import sealed
from kvfs.tier import TIER_ERRNOS, Tier
from kvfs.volume import Volume

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Running:
    """A copy under way. `done_bytes` is written by its worker thread."""

    kind: MoveKind
    path: bytes
    source: str
    target: str
    size_bytes: int
    done_bytes: int = 0


class Mover:
    """Owned by the trio loop."""

    def __init__(self, volume: Volume, replicas: Replicas) -> None:
        self.volume = volume
        self.replicas = replicas
        self.running: dict[int, Running] = {}

    async def execute(self, move: Move, still_wanted: Callable[[], bool] = lambda: True) -> int:
        """Carry out one planned move; bytes moved or freed.

        Raises BlockBusy or BlockNotFound when the block is not what the plan saw, TierFull,
        TierOffline, BlockCorrupt, OSError: the block is then where it was.
        """
        tiers = self.volume.tiers
        source = tiers[move.source]
        if move.kind == "evict":
            freed = self.replicas.evict(move.inode, from_tier=source)
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
        inode = self.volume.catalog.get(number)
        path = self.volume.catalog.path_of(number)
        if inode is None or path is None or inode.kind != Kind.BLOCK:
            raise BlockNotFound("no such block")
        if inode.state != BlockState.SEALED:
            raise BlockBusy("it is not sealed yet")
        if layout.is_temporary(path):
            raise BlockBusy("it is a temporary file")
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
        """Add a replica on `target`; bytes copied, 0 when it is there already."""
        inode, path = self.movable(number)
        replicas = {r.tier: r for r in self.volume.catalog.replicas(number)}
        if target.number in replicas:
            return 0
        if source.number not in replicas:
            raise BlockBusy(f"it is not on {source.name} any more")
        if number in self.running:
            raise BlockBusy("it is being moved already")
        if not target.online:
            raise TierOffline(f"tier {target.name} is offline")
        reservation = self.volume.space.reserve(target.index, sealed(inode.size_bytes))
        if reservation is None:
            raise TierFull(f"tier {target.name} is full")
        fanned = bool(replicas[source.number].fanned)
        running = Running(kind, path, source.name, target.name, inode.size_bytes)
        self.running[number] = running
        staging = target.root + b"/" + layout.staging_path(inode.id, inode.generation)
        try:
            copied = await self._copy_to_staging(
                inode, source.locate(path, fanned), source, target, staging, running
            )
            await self._publish(inode, source, target, staging, still_wanted)
        except BlockCorrupt:
            now = self.volume.catalog.get(number)
            if now is None or (now.state, now.generation) != (inode.state, inode.generation):
                raise BlockBusy("it changed while it was copied") from None
            self.volume.counters.count("checksum_mismatches")
            raise
        finally:
            del self.running[number]
            reservation.release()
        arrived = self.volume.counters.tier(target.index)
        arrived.moved_in_bytes += copied
        if target.index < source.index:
            arrived.promotions += 1
        return copied

    async def _copy_to_staging(
        self, inode: Inode, source_path: bytes, source: Tier, target: Tier,
        staging: bytes, running: Running,
    ) -> int:  # fmt: skip
        xattrs = self._xattrs(inode)
        slower = max(source, target, key=lambda tier: tier.index)
        remote = source.remote or target.remote

        def work() -> int:
            return copy_verified(source_path, target, staging, seal_from(inode), xattrs, running)

        try:
            async with _progress_deadline(slower if remote else None, running):
                return await trio.to_thread.run_sync(
                    work, limiter=slower.limiter, abandon_on_cancel=remote
                )
        except OSError as error:
            # Either may be to blame: the fastest tier must not go for a bad sector of a disk.
            if error.errno in TIER_ERRNOS:
                slower.note_error(str(error))
            raise

    def _xattrs(self, inode: Inode) -> list[tuple[bytes, bytes]]:
        xattrs = list(self.volume.catalog.xattrs(inode.id))
        if inode.pin:
            xattrs.append((PIN, inode.pin.encode()))
        if inode.ttl_s:
            xattrs.append((TTL, f"{inode.ttl_s:g}s".encode()))
        return xattrs

    async def _publish(
        self, before: Inode, source: Tier, target: Tier, staging: bytes,
        still_wanted: Callable[[], bool],
    ) -> None:  # fmt: skip
        """Rename into place and commit, if the block is still the one that was copied."""
        catalog = self.volume.catalog
        try:
            inode, path = self.movable(before.id)
            async with self.volume.claims.hold(path):
                # Whoever held the claim before may have changed it.
                inode, now_at = self.movable(before.id)
                if now_at != path or inode.generation != before.generation or not still_wanted():
                    raise BlockBusy("it changed while it was copied")
                replicas = {r.tier: r for r in catalog.replicas(inode.id)}
                if source.number not in replicas:
                    raise BlockBusy(f"it left {source.name} while it was copied")
                fanned = bool(replicas[source.number].fanned)
                # A promotion keeps its source: only a demotion must outlive a power loss.
                durable = target.index > source.index
                final = target.locate(path, fanned)
                allocated = await target.run(put_in_place, target, staging, final, durable)
                tau = replicas[source.number].tau
                with catalog.transaction():
                    catalog.add_replica(inode.id, target.number, allocated, tau, fanned=fanned)
                self.volume.space.add(
                    target.index, allocated, beside_bytes=largest(replicas.values())
                )
        except BaseException:
            with contextlib.suppress(OSError, TierOffline), trio.CancelScope(shield=True):
                await target.run(_discard, staging)
            raise


@contextlib.asynccontextmanager
async def _progress_deadline(tier: Tier | None, running: Running) -> AsyncIterator[None]:
    """Give up a copy that made no progress for the tier's deadline. None: wait forever."""
    if tier is None:
        yield
        return
    expired = False
    failure: Exception | None = None

    async def watch(scope: trio.CancelScope) -> None:
        nonlocal expired
        before = -1
        while running.done_bytes != before:
            before = running.done_bytes
            await trio.sleep(tier.config.deadline_s)
        expired = True
        scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch, nursery.cancel_scope)
        try:
            yield
        except Exception as error:
            # Out of the nursery it would come as a group.
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    if expired:
        tier.note_error(f"a copy made no progress for {tier.config.deadline_s:g} s")
        raise TierOffline(f"tier {tier.name}: {tier.last_error}")


def copy_verified(
    source_path: bytes, target: Tier, staging: bytes, seal: Seal,
    xattrs: list[tuple[bytes, bytes]], running: Running,
) -> int:  # fmt: skip
    """Copy into staging, read it back from the medium, attach the seal, fsync. Blocking.

    Raises BlockCorrupt, with the copy dropped, when what arrived is not what was sealed.
    """

    def progress(done_bytes: int) -> None:
        running.done_bytes = done_bytes
        # Whoever unmounts does not wait for the rest of a large copy.
        trio.from_thread.check_cancelled()

    _discard(staging)
    source = os.open(source_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        copy = os.open(staging, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except BaseException:
        os.close(source)
        raise
    try:
        copied = copy_file(source, copy, progress)
        if target.identity.probe.xattrs:
            for name, value in xattrs:
                os.setxattr(copy, name, value)
        if os.geteuid() == 0 and (seal.uid, seal.gid) != (0, 0):
            os.fchown(copy, seal.uid, seal.gid)
        target.write_seal(staging, seal)
        # One fsync for bytes and record: what is read back after it is what the medium has.
        os.fsync(copy)
        if checksum_of(copy, past_page_cache=True) != seal.checksum:
            raise BlockCorrupt(f"{os.fsdecode(source_path)}: the copy has not the sealed checksum")
    except BaseException:
        _discard(staging)
        raise
    finally:
        os.close(source)
        os.close(copy)
    return copied


def put_in_place(tier: Tier, staging: bytes, final: bytes, durable: bool) -> int:
    """Rename a complete copy to its name; the bytes it allocates. Blocking."""
    rename_into_place(tier, staging, final)
    if durable:
        directory = os.open(os.path.dirname(final), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    return os.stat(final).st_blocks * 512


def _discard(staging: bytes) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(staging)
