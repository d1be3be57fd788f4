"""Sealing: from published or closed to immutable, with a checksum.

A worker thread asks for the read lease (no writer left), hashes the file and writes the seal
record; the loop commits it if the block is still what was hashed. Bytes that are not in the page
cache (an engine wrote them with O_DIRECT) are read at a pace, and leave nothing in it. One small
block that a client waits for is hashed on the loop: that takes less than asking a thread.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import trio

from kvfs import failpoints
from kvfs.catalog.rows import GOOD, BlockState, Inode, Kind
from kvfs.errors import TierOffline, reason_of
from kvfs.tiers.backing import sync_names
from kvfs.tiers.checksum import cached_bytes, checksum_of, drop_cached
from kvfs.tiers.health import is_of_medium
from kvfs.tiers.pacing import Pacer
from kvfs.tiers.seal import Seal, no_writer_left
from kvfs.tiers.tier import Tier
from kvfs.volume.replicas import Replicas, largest
from kvfs.volume.volume import SEALS_REMEMBERED, Volume

log = logging.getLogger(__name__)

BATCH_BLOCKS = 64
RETRY_S = 0.5
GATHER_S = 0.02
SCAN_S = 30.0
# What one call of a thread may read from the medium before the pace is looked at.
MEDIUM_BYTES_AT_ONCE = 64 << 20
# Hashed within 30 us; a thread takes 200 us to begin and to be heard.
ON_LOOP_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Job:
    """One file to seal, as the catalog knew it."""

    inode: Inode
    path: bytes
    fanned: bool
    # Of the file when its last writer closed it; 0 when nobody looked then.
    closed_mtime_ns: int = 0


@dataclass(frozen=True, slots=True)
class Sealed:
    """What a worker made of a job; `checksum` is None when a writer is left.

    `stored_ns` is the file's time if a mapping that outlived its descriptor wrote to it, else 0.
    """

    job: Job
    checksum: bytes | None = None
    stored_ns: int = 0
    generation: int = 0
    status: os.stat_result | None = None
    error: str = ""
    medium_bytes: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class SealCosts:
    """What sealing took since the mount: bytes hashed, those the medium had to deliver, and time
    of worker threads."""

    size_bytes: int = 0
    medium_bytes: int = 0
    seconds: float = 0.0


class Resized(NamedTuple):
    """What a replica allocated before and after, beside the largest other one of its block."""

    before_bytes: int
    after_bytes: int
    beside_bytes: int


class Sealer:
    """The service and its queue (`volume.to_seal`). Owned by the trio loop."""

    def __init__(self, volume: Volume, replicas: Replicas) -> None:
        self.volume = volume
        self.replicas = replicas
        self.costs = SealCosts()
        self._complained: set[int] = set()
        # When a block that is being sealed, or is to be tried again, was first asked for.
        self._asked_s: dict[int, float] = {}
        self._pacers = {tier: Pacer(partial(self._rate, tier)) for tier in volume.tiers}

    def _rate(self, tier: Tier) -> int:
        """Bytes a second from the medium; as fast as it goes where blocks must leave: only sealed
        ones can."""
        account, tiering = self.volume.space[tier.index], self.volume.config.tiering
        _, high = tiering.watermarks(tier.config)
        return 0 if account.taken_bytes > high * account.planned_bytes else tiering.seal_rate

    def lag_s(self) -> float:
        """How long the oldest block that could be sealed has been waiting for it."""
        waiting = [*self._asked_s.values(), *self.volume.to_seal.values()]
        return time.monotonic() - min(waiting) if waiting else 0.0

    async def run(self) -> None:
        """Seal what is asked for, and look for what was forgotten every half minute."""
        next_scan_s = 0.0
        while True:
            if trio.current_time() >= next_scan_s:
                with self.volume.tolerate("looking for what is not sealed"):
                    self.scan()
                next_scan_s = trio.current_time() + SCAN_S
            with trio.move_on_after(RETRY_S if self.volume.to_seal else SCAN_S):
                await self.volume.sealing_due.wait()
            self.volume.sealing_due = trio.Event()
            # For more to come: a thread and a transaction for many blocks, not for each.
            await trio.sleep(GATHER_S)
            again: set[int] = set()
            with self.volume.tolerate("sealing"):
                again = await self.seal_pending(paced=True)
            for number in again:
                self.volume.to_seal.setdefault(number, self._asked_s.pop(number, time.monotonic()))
            if again:
                await trio.sleep(RETRY_S)

    def scan(self) -> None:
        """Ask for everything that the catalog says is not sealed."""
        states = (BlockState.WRITING, BlockState.PUBLISHED, BlockState.REOPENED)
        for inode in self.volume.catalog.unsealed(states):
            self.volume.request_seal(inode)

    async def seal_pending(self, *, paced: bool = False) -> set[int]:
        """Work the queue off, oldest first; what must be tried again later."""
        again: set[int] = set()
        waiting = self.volume.to_seal
        while waiting:
            chosen = list(islice(waiting, BATCH_BLOCKS))
            try:
                await self._seal_chosen(chosen, again, paced)
            finally:
                self.volume.sealing.difference_update(chosen)
                for number in set(chosen) - again:
                    self._asked_s.pop(number, None)
        return again

    async def seal_now(self, number: int, *, cached: bool) -> bool:
        """Seal one closed block out of turn; whether it is sealed then. Not while a writer is
        left. `cached`: its bytes are in the page cache."""
        self.volume.to_seal.pop(number, None)
        found = self._job(number)
        if found is not None:
            tier, job = found
            again: set[int] = set()
            try:
                small = job.inode.size_bytes <= ON_LOOP_BYTES
                on_loop = cached and small and tier.inline and not tier.durable
                await self._seal_on(tier, [job], again, paced=False, on_loop=on_loop)
            finally:
                self.volume.sealing.discard(number)
            for late in again:
                self.volume.request_seal(late)
        row = self.volume.catalog.get(number)
        return row is not None and row.state == BlockState.SEALED

    async def _seal_chosen(self, chosen: list[int], again: set[int], paced: bool) -> None:
        by_tier: dict[Tier, list[Job]] = {}
        for number in chosen:
            self._asked_s[number] = self.volume.to_seal.pop(number)
            found = self._job(number)
            if found is not None:
                by_tier.setdefault(found[0], []).append(found[1])
        async with trio.open_nursery() as nursery:
            for tier, jobs in by_tier.items():
                nursery.start_soon(self._seal_on, tier, jobs, again, paced)

    def can_seal(self, number: int) -> bool:
        """Whether waiting helps: it is closed, and neither is its last write known to have been
        refused nor its tier away."""
        return self._find(number) is not None

    def _job(self, number: int) -> tuple[Tier, Job] | None:
        found = self._find(number)
        if found is not None:
            self.volume.sealing.add(number)
        return found

    def _find(self, number: int) -> tuple[Tier, Job] | None:
        inode = self.volume.catalog.get(number)
        if inode is None or inode.kind != Kind.BLOCK or inode.state == BlockState.SEALED:
            self.volume.torn.discard(number)
            return None
        if number in self.volume.torn and inode.state == BlockState.WRITING:
            return None
        block = self.replicas.open_blocks.get(number)
        if block is not None and block.writers:
            return None  # its close asks again
        path = self.volume.catalog.path_of(number)
        good = [r for r in self.volume.catalog.replicas(number) if r.state == GOOD]
        if path is None or not good:
            return None
        tier, replica = min(
            ((self.volume.by_number[r.tier], r) for r in good), key=lambda pair: pair[0].index
        )
        if not tier.online:
            return None
        return tier, Job(inode, path, bool(replica.fanned), replica.mtime_ns)

    async def _seal_on(
        self, tier: Tier, jobs: list[Job], again: set[int], paced: bool, on_loop: bool = False
    ) -> None:
        # A remote call that is given up is lost as a whole, so a batch there is one block.
        size = 1 if tier.remote else len(jobs)
        while jobs:
            batch = jobs[:size]
            try:
                # Hashing takes a while: in a thread, given up where the tier hangs.
                call = tier.run if on_loop else tier.run_in_thread
                results, handled = await call(seal_files, tier, batch)
                batch, jobs = jobs[:handled], jobs[handled:]
            except (OSError, TierOffline) as error:
                jobs = jobs[size:]
                self.volume.incidents.note(
                    "seals_failed", f"tier {tier.name}: sealing: {error}",
                    reason=reason_of(error), tier=tier.name,
                )  # fmt: skip
                again.update(job.inode.id for job in batch)
                continue
            self._complain(tier, results)
            late = {job.inode.id for job in batch}
            with self.volume.tolerate("recording seals"):
                late = self._commit(tier, results)
            again.update(late)
            again.update({job.inode.id for job in batch} - {done.job.inode.id for done in results})
            medium_bytes = sum(sealed.medium_bytes for sealed in results)
            self.costs.medium_bytes += medium_bytes
            self.costs.seconds += sum(sealed.seconds for sealed in results)
            if paced and medium_bytes:
                await self._pacers[tier].spend(medium_bytes)

    def _complain(self, tier: Tier, results: Iterable[Sealed]) -> None:
        """Say once of a file that it cannot be sealed; it is tried again all the same."""
        for sealed in results:
            number = sealed.job.inode.id
            if not sealed.error:
                self._complained.discard(number)
            elif number not in self._complained and len(self._complained) < SEALS_REMEMBERED:
                self._complained.add(number)
                path = os.fsdecode(sealed.job.path)
                log.error("tier %s: sealing %r: %s", tier.name, path, sealed.error)

    def _commit(self, tier: Tier, results: Iterable[Sealed]) -> set[int]:
        """Record what was sealed; what must be tried again."""
        again: set[int] = set()
        reopened: list[Sealed] = []
        resized: list[Resized] = []
        with self.volume.catalog.transaction("seal"):
            for sealed in results:
                verdict = self._is_current(tier, sealed)
                if verdict is None:
                    continue
                if not verdict:
                    again.add(sealed.job.inode.id)
                    self._keep_times(tier, sealed)
                elif sealed.job.inode.state == BlockState.REOPENED:
                    reopened.append(sealed)
                else:
                    self.volume.catalog.update(sealed.job.inode.id, **_columns(sealed))
                    resized.append(self._set_allocated(tier, sealed))
        for change in resized:
            self._account(tier, change)
        for sealed in reopened:
            self._commit_reopened(tier, sealed)
        for sealed in results:
            if sealed.stored_ns:
                self.volume.attributes_changed(sealed.job.inode.id)
        return again

    def _is_current(self, tier: Tier, sealed: Sealed) -> bool | None:
        """Whether the block is still what was hashed; None when there is nothing left to do."""
        before = sealed.job.inode
        now = self.volume.catalog.get(before.id)
        block = self.replicas.open_blocks.get(before.id)
        if now is None or now.state == BlockState.SEALED:
            return None
        return (
            sealed.checksum is not None
            and before.id in self.volume.sealing
            and _recorded(now) == _recorded(before)
            and not (block is not None and block.writers)
            and any(r.tier == tier.number for r in self.volume.catalog.replicas(before.id))
        )

    def _keep_times(self, tier: Tier, sealed: Sealed) -> None:
        """A file got the time of a record that is not committed: the next seal must not take it
        for that of a store through a mapping."""
        job = sealed.job
        if sealed.status is None or sealed.stored_ns:
            return
        for replica in self.volume.catalog.replicas(job.inode.id):
            if (replica.tier, replica.mtime_ns) == (tier.number, job.closed_mtime_ns):
                self.volume.catalog.update_replica(
                    job.inode.id, tier.number, mtime_ns=sealed.status.st_mtime_ns
                )

    def _commit_reopened(self, tier: Tier, sealed: Sealed) -> None:
        """Unchanged content: the other replicas are good again. Changed: they go with it."""
        before = sealed.job.inode
        changed = sealed.generation != before.generation
        others = [r for r in self.volume.catalog.replicas(before.id) if r.tier != tier.number]
        # A directory above may have another name by now.
        path = self.volume.catalog.path_of(before.id) or sealed.job.path
        self.replicas.forget_replicas(
            before.id, path, others if changed else [], **_columns(sealed)
        )
        self._account(tier, self._set_allocated(tier, sealed))

    def _set_allocated(self, tier: Tier, sealed: Sealed) -> Resized:
        """The record may have taken space of its own, and the file has its time now."""
        assert sealed.status is not None, "a sealed file has been looked at"
        catalog, number = self.volume.catalog, sealed.job.inode.id
        allocated = sealed.status.st_blocks * 512
        replicas = catalog.replicas(number)
        replica = next(r for r in replicas if r.tier == tier.number)
        catalog.update_replica(
            number, tier.number, allocated_bytes=allocated,
            verified=self.volume.mounts, mtime_ns=sealed.status.st_mtime_ns,
        )  # fmt: skip
        self.costs.size_bytes += sealed.status.st_size
        replicas.remove(replica)
        return Resized(replica.allocated_bytes, allocated, largest(replicas))

    def _account(self, tier: Tier, change: Resized) -> None:
        """Once the catalog has it."""
        self.volume.space.resize(
            tier.index, change.before_bytes, change.after_bytes, beside_bytes=change.beside_bytes
        )
        self.volume.counters.count("seals")


def _recorded(inode: Inode) -> tuple[int, ...]:
    """What a seal record says of a block beside its bytes, and the state that it ends."""
    return inode.generation, inode.state, inode.mode, inode.uid, inode.gid, inode.mtime_ns


def _columns(sealed: Sealed) -> dict[str, Any]:
    assert sealed.status is not None, "a sealed file has been looked at"
    return {
        "state": int(BlockState.SEALED),
        "checksum": sealed.checksum,
        "size_bytes": sealed.status.st_size,
        "generation": sealed.generation,
        **({"mtime_ns": sealed.stored_ns} if sealed.stored_ns else {}),
    }


def seal_files(tier: Tier, jobs: list[Job]) -> tuple[list[Sealed], int]:
    """Hash files and write their records, until much was read from the medium. Blocking.

    The results, which leave out files that are gone or in use, and how many jobs they are of.
    """
    results, handled = _seal_some(tier, jobs)
    if tier.durable:
        done = [sealed.job for sealed in results if sealed.checksum is not None]
        sync_names(tier, [tier.locate(job.path, job.fanned) for job in done])
        failpoints.hit("seal.names_synced")
    return results, handled


def _seal_some(tier: Tier, jobs: list[Job]) -> tuple[list[Sealed], int]:
    results: list[Sealed] = []
    for handled, job in enumerate(jobs):
        if sum(sealed.medium_bytes for sealed in results) >= MEDIUM_BYTES_AT_ONCE:
            return results, handled
        try:
            results.append(_seal_file(tier, job))
        except FileNotFoundError:
            continue
        except OSError as error:
            # A file that cannot be sealed must not keep the others of its batch from it.
            if is_of_medium(error):
                raise
            results.append(Sealed(job, error=str(error)))
    return results, len(jobs)


def _seal_file(tier: Tier, job: Job) -> Sealed:
    absolute = tier.locate(job.path, job.fanned)
    descriptor = tier.files.open(absolute, os.O_RDONLY)
    try:
        if tier.identity.probe.leases and not no_writer_left(descriptor):
            return Sealed(job)
        before, started_s = os.fstat(descriptor), time.monotonic()
        cached = cached_bytes(descriptor, before.st_size)
        checksum = checksum_of(descriptor)
        if cached < before.st_size // 2:
            drop_cached(descriptor)
        failpoints.hit("seal.hashed")
        after = os.fstat(descriptor)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            return Sealed(job)
        inode = job.inode
        same = checksum == inode.checksum and after.st_size == inode.size_bytes
        reopened = inode.state == BlockState.REOPENED
        generation = inode.generation + (reopened and not same)
        stored = job.closed_mtime_ns not in (0, after.st_mtime_ns)
        stored_ns = after.st_mtime_ns if stored else 0
        seal = Seal(
            inode.id, generation, after.st_size, checksum,
            inode.mode, inode.uid, inode.gid, stored_ns or inode.mtime_ns,
        )  # fmt: skip
        # By descriptor: another file may have the name by now.
        tier.write_seal(descriptor, seal)
        failpoints.hit("seal.recorded")
        if tier.durable:
            os.fsync(descriptor)
            failpoints.hit("seal.synced")
        # Asked again: the record may have taken a page of its own.
        return Sealed(
            job, checksum, stored_ns, generation, os.fstat(descriptor),
            medium_bytes=before.st_size - cached, seconds=time.monotonic() - started_s,
        )  # fmt: skip
    finally:
        os.close(descriptor)
