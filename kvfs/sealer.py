"""Sealing: from published or closed to immutable, with a checksum.

A worker thread asks for the read lease (no writer left), hashes the file and writes the seal
record; the loop commits it if the block is still what was hashed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import trio

from kvfs.errors import TierOffline
from kvfs.replicas import Replicas, largest
from kvfs.rows import GOOD, BlockState, Inode, Kind
from kvfs.seal import Seal, checksum_of, no_writer_left
from kvfs.tier import TIER_ERRNOS, Tier
from kvfs.volume import SEALS_REMEMBERED, Volume

log = logging.getLogger(__name__)

BATCH_BLOCKS = 64
RETRY_S = 0.5
SCAN_S = 30.0


@dataclass(frozen=True, slots=True)
class Job:
    """One file to seal, as the catalog knew it."""

    inode: Inode
    path: bytes
    fanned: bool


@dataclass(frozen=True, slots=True)
class Sealed:
    """What a worker made of a job; `checksum` is None when a writer is left."""

    job: Job
    checksum: bytes | None = None
    generation: int = 0
    status: os.stat_result | None = None
    error: str = ""


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
        self._complained: set[int] = set()

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
            again: set[int] = set()
            with self.volume.tolerate("sealing"):
                again = await self.seal_pending()
            self.volume.to_seal.update(again)
            if again:
                await trio.sleep(RETRY_S)

    def scan(self) -> None:
        """Ask for everything that the catalog says is not sealed."""
        states = (BlockState.WRITING, BlockState.PUBLISHED, BlockState.REOPENED)
        for inode in self.volume.catalog.unsealed(states):
            self.volume.request_seal(inode)

    async def seal_pending(self) -> set[int]:
        """Work the queue off; what must be tried again later."""
        again: set[int] = set()
        while self.volume.to_seal:
            chosen = [self.volume.to_seal.pop() for _ in range(
                min(BATCH_BLOCKS, len(self.volume.to_seal)))]  # fmt: skip
            by_tier: dict[Tier, list[Job]] = {}
            for number in chosen:
                found = self._job(number)
                if found is not None:
                    by_tier.setdefault(found[0], []).append(found[1])
            async with trio.open_nursery() as nursery:
                for tier, jobs in by_tier.items():
                    nursery.start_soon(self._seal_on, tier, jobs, again)
            self.volume.sealing.clear()
        return again

    def _job(self, number: int) -> tuple[Tier, Job] | None:
        inode = self.volume.catalog.get(number)
        if inode is None or inode.kind != Kind.BLOCK or inode.state == BlockState.SEALED:
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
        self.volume.sealing.add(number)
        return tier, Job(inode, path, bool(replica.fanned))

    async def _seal_on(self, tier: Tier, jobs: list[Job], again: set[int]) -> None:
        # A remote call has a deadline, so a batch there is one block.
        size = 1 if tier.remote else len(jobs)
        for start in range(0, len(jobs), size):
            batch = jobs[start : start + size]
            try:
                results = await self._in_thread(tier, batch)
            except (OSError, TierOffline) as error:
                log.error("tier %s: sealing: %s", tier.name, error)
                again.update(job.inode.id for job in batch)
                continue
            self._complain(tier, results)
            late = {job.inode.id for job in batch}
            with self.volume.tolerate("recording seals"):
                late = self._commit(tier, results)
            again.update(late)
            again.update({job.inode.id for job in batch} - {done.job.inode.id for done in results})

    async def _in_thread(self, tier: Tier, jobs: list[Job]) -> list[Sealed]:
        """Hashing takes a while: never on the loop, and on a remote tier not without a deadline."""
        if tier.remote:
            return await tier.run(seal_files, tier, jobs)
        return await trio.to_thread.run_sync(seal_files, tier, jobs, limiter=tier.limiter)

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
        with self.volume.catalog.transaction():
            for sealed in results:
                verdict = self._is_current(tier, sealed)
                if verdict is None:
                    continue
                if not verdict:
                    again.add(sealed.job.inode.id)
                elif sealed.job.inode.state == BlockState.REOPENED:
                    reopened.append(sealed)
                else:
                    self.volume.catalog.update(sealed.job.inode.id, **_columns(sealed))
                    resized.append(self._set_allocated(tier, sealed))
        for change in resized:
            self._account(tier, change)
        for sealed in reopened:
            self._commit_reopened(tier, sealed)
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
            and (now.generation, now.state) == (before.generation, before.state)
            and not (block is not None and block.writers)
            and any(r.tier == tier.number for r in self.volume.catalog.replicas(before.id))
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
        """The record may have taken space of its own."""
        assert sealed.status is not None, "a sealed file has been looked at"
        catalog, number = self.volume.catalog, sealed.job.inode.id
        allocated = sealed.status.st_blocks * 512
        replicas = catalog.replicas(number)
        replica = next(r for r in replicas if r.tier == tier.number)
        catalog.set_allocated(number, tier.number, allocated)
        replicas.remove(replica)
        return Resized(replica.allocated_bytes, allocated, largest(replicas))

    def _account(self, tier: Tier, change: Resized) -> None:
        """Once the catalog has it."""
        self.volume.space.resize(
            tier.index, change.before_bytes, change.after_bytes, beside_bytes=change.beside_bytes
        )
        self.volume.counters.count("seals")


def _columns(sealed: Sealed) -> dict[str, Any]:
    assert sealed.status is not None, "a sealed file has been looked at"
    return {
        "state": int(BlockState.SEALED),
        "checksum": sealed.checksum,
        "size_bytes": sealed.status.st_size,
        "generation": sealed.generation,
    }


def seal_files(tier: Tier, jobs: list[Job]) -> list[Sealed]:
    """Hash each file and write its record; a file that is gone or in use is left out. Blocking."""
    results = []
    for job in jobs:
        try:
            results.append(_seal_file(tier, job))
        except FileNotFoundError:
            continue
        except OSError as error:
            # A file that cannot be sealed must not keep the others of its batch from it.
            if error.errno in TIER_ERRNOS:
                raise
            results.append(Sealed(job, error=str(error)))
    return results


def _seal_file(tier: Tier, job: Job) -> Sealed:
    absolute = tier.locate(job.path, job.fanned)
    descriptor = os.open(absolute, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if tier.identity.probe.leases and not no_writer_left(descriptor):
            return Sealed(job)
        before = os.fstat(descriptor)
        checksum = checksum_of(descriptor)
        after = os.fstat(descriptor)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            return Sealed(job)
        inode = job.inode
        same = checksum == inode.checksum and after.st_size == inode.size_bytes
        reopened = inode.state == BlockState.REOPENED
        generation = inode.generation + (reopened and not same)
        seal = Seal(
            inode.id, generation, after.st_size, checksum,
            inode.mode, inode.uid, inode.gid, inode.mtime_ns,
        )  # fmt: skip
        # By descriptor: another file may have the name by now.
        tier.write_seal(descriptor, seal)
        # Asked again: the record may have taken a page of its own.
        return Sealed(job, checksum, generation, os.fstat(descriptor))
    finally:
        os.close(descriptor)
