"""What each verb of the control protocol does."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from kvfs import layout
from kvfs.catalog import scans
from kvfs.catalog.rows import ROOT_INODE, Inode, Kind
from kvfs.config import config_to_builtins
from kvfs.control import Request
from kvfs.errors import (
    BlockNotFound,
    InvalidOperation,
    KvfsError,
    NotPermitted,
    TierError,
    TierFull,
    UsageError,
)
from kvfs.leasing.credentials import READ, SEARCH, WRITE
from kvfs.mount import arguments
from kvfs.mount.checks import Checks
from kvfs.mount.lease_verbs import LeaseVerbs
from kvfs.mount.peers import Answer, Peer, Report
from kvfs.mount.tiering import Tiering
from kvfs.policy import heat
from kvfs.store import Store
from kvfs.tiers.tier import Tier
from kvfs.views import Views

log = logging.getLogger(__name__)

SEAL_WAIT_S = 30.0
MAX_LISTED = 5000
PAGE_BLOCKS = 1000
PARALLEL_MOVES = 4
MAX_SKIPS_REPORTED = 100


@dataclass(slots=True)
class Outcome:
    """Running totals of a verb over many blocks."""

    total: int
    done: int = 0
    count: int = 0
    size_bytes: int = 0
    skipped: list[dict[str, Any]] = field(default_factory=list)
    skipped_count: int = 0

    def skip(self, path: bytes, reason: str) -> None:
        self.skipped_count += 1
        if len(self.skipped) < MAX_SKIPS_REPORTED:
            self.skipped.append({"path": path, "reason": reason})

    def progress(self, path: bytes) -> dict[str, Any]:
        return {"done": self.done, "total": self.total, "bytes": self.size_bytes, "path": path}


class Verbs:
    """Owned by the trio loop. `reload` is how the daemon takes a new configuration."""

    def __init__(
        self, store: Store, views: Views, tiering: Tiering,
        reload: Callable[[], tuple[list[str], list[str]]],
    ) -> None:  # fmt: skip
        self.store = store
        self.views = views
        self.tiering = tiering
        self._reload = reload
        self._draining = trio.Lock()
        checks = Checks(store)
        self._lease_verbs = LeaseVerbs(store)
        self._others = {
            "fsck": checks.fsck, "scrub": checks.scrub, "quarantine": checks.quarantine,
            **self._lease_verbs.verbs,
        }  # fmt: skip

    async def call(self, peer: Peer, request: Request, report: Report) -> Answer:
        """The answer to a request. Raises KvfsError; KeyError, TypeError for bad arguments."""
        handler = self._others.get(request.verb) or getattr(self, f"_verb_{request.verb}", None)
        if handler is None:
            raise InvalidOperation(f"unknown verb {request.verb!r}: use one kvfs version")
        result: dict[str, Any] | Answer = await handler(peer, request.args, report)
        return result if isinstance(result, Answer) else Answer(result)

    async def farewell(self, peer: Peer) -> None:
        """A connection is closed."""
        await self._lease_verbs.farewell(peer)

    # --- reading

    async def _verb_status(
        self, peer: Peer, args: dict[str, Any], report: Report
    ) -> dict[str, Any]:
        return self.views.statistics()

    async def _verb_config(
        self, peer: Peer, args: dict[str, Any], report: Report
    ) -> dict[str, Any]:
        return config_to_builtins(self.store.volume.config)

    async def _verb_info(self, peer: Peer, args: dict[str, Any], report: Report) -> dict[str, Any]:
        inode, path = self._seen(peer, args["path"])
        return self.views.describe(inode, path, why=True)

    async def _verb_ls(self, peer: Peer, args: dict[str, Any], report: Report) -> dict[str, Any]:
        inode, path = self._seen(peer, args["path"])
        if inode.kind == Kind.BLOCK:
            return {"entries": [self._listed(inode, path)], "next": None}
        if not peer.may(inode, READ):
            raise NotPermitted(f"{os.fsdecode(path)}: you may not list it")
        limit = arguments.number(args, "limit", PAGE_BLOCKS, MAX_LISTED)
        rows = self.store.namespace.children(inode.id, arguments.number(args, "after"), limit)
        entries = [self._listed(child, layout.join(path, name)) for name, child in rows]
        return {"entries": entries, "next": rows[-1][1].id if len(rows) == limit else None}

    def _listed(self, inode: Inode, path: bytes) -> dict[str, Any]:
        return {"name": layout.split(path)[1], **self.views.describe(inode, path)}

    async def _verb_heat(self, peer: Peer, args: dict[str, Any], report: Report) -> dict[str, Any]:
        root, _ = self._seen(peer, args.get("path") or b"")
        limit = arguments.number(args, "limit", 20, MAX_LISTED)
        coldest = bool(args.get("coldest"))
        numbers = await trio.to_thread.run_sync(self._by_heat, root.id, coldest, limit)
        blocks = []
        for number in numbers:
            inode, path = self.store.namespace.get(number), self._path(number)
            if inode is not None and path is not None and self._may_reach(peer, number):
                blocks.append(self._listed(inode, path))
        return {"blocks": blocks}

    def _by_heat(self, root: int, coldest: bool, limit: int) -> list[int]:
        reader = self.store.volume.catalog.reader()
        try:
            if root == ROOT_INODE:
                numbers = [tier.number for tier in self.store.volume.tiers]
                return scans.by_heat(reader, numbers, coldest=coldest, limit=limit)
            return scans.below_by_heat(reader, root, coldest=coldest, limit=limit)
        finally:
            reader.close()

    # --- orders

    async def _verb_pin(self, peer: Peer, args: dict[str, Any], report: Report) -> dict[str, Any]:
        tier = arguments.name(args, "tier")
        value = (tier or "1").encode()
        if tier:
            target = self.store.volume.tier_named(tier)
            for path in args["paths"]:
                inode, _ = self._may_change(peer, path)
                if inode.kind == Kind.BLOCK:
                    await self._bring(inode.id, target)
        return await self._set_pins(peer, args["paths"], value)

    async def _verb_unpin(self, peer: Peer, args: dict[str, Any], report: Report) -> dict[str, Any]:
        return await self._set_pins(peer, args["paths"], b"0")

    async def _set_pins(self, peer: Peer, paths: list[bytes], value: bytes) -> dict[str, Any]:
        changed = 0
        for path in paths:
            inode, _ = self._may_change(peer, path)
            await self.store.attributes.set_xattr(inode.id, b"user.kvfs.pin", value)
            changed += 1
        return {"changed": changed}

    async def _verb_touch(self, peer: Peer, args: dict[str, Any], report: Report) -> dict[str, Any]:
        touched = 0
        now_s = self.store.volume.clock.now_s()
        for path in args["paths"]:
            inode, _ = self._seen(peer, path)
            if not peer.may(inode, READ):
                raise NotPermitted(f"{os.fsdecode(path)}: you may not read it")
            touched += self.store.volume.accesses.touch(inode.id, now_s)
        return {"touched": touched}

    async def _verb_promote(
        self, peer: Peer, args: dict[str, Any], report: Report
    ) -> dict[str, Any]:
        target = self._target(args)
        return _moved(await self._each(peer, args["paths"], report, self._promote, target))

    async def _verb_demote(
        self, peer: Peer, args: dict[str, Any], report: Report
    ) -> dict[str, Any]:
        target = self._target(args)
        return _moved(await self._each(peer, args["paths"], report, self._demote, target))

    async def _verb_evict(self, peer: Peer, args: dict[str, Any], report: Report) -> dict[str, Any]:
        outcome = await self._each(peer, args["paths"], report, self._evict, None)
        self.store.volume.settling_due.set()
        answer = _moved(outcome)
        return {"evicted": answer.pop("moved"), **answer}

    def _target(self, args: dict[str, Any]) -> Tier | None:
        name = arguments.name(args, "to")
        return self.store.volume.tier_named(name) if name else None

    async def _promote(self, number: int, target: Tier | None) -> int:
        source = self._fastest(number)
        if target is None:
            if source.index == 0:
                return 0
            target = self.store.volume.tiers[source.index - 1]
        if target.index >= source.index:
            return 0
        return await self.store.mover.copy(number, source, target, "promote")

    async def _demote(self, number: int, target: Tier | None) -> int:
        tiers = self.store.volume.tiers
        source = self._fastest(number)
        if target is None:
            if source.index + 1 == len(tiers):
                return 0
            target = tiers[source.index + 1]
        if target.index <= source.index:
            return 0
        copied = await self._bring(number, target)
        self._cool(number)
        dropped = [await self._drop_if_there(number, tier) for tier in tiers[: target.index]]
        return copied or max(dropped)

    def _cool(self, number: int) -> None:
        """What an admin demotes stays there until it is used again, however hot it was."""
        volume = self.store.volume
        volume.accesses.forget(number)
        tiering = volume.config.tiering
        cool = heat.tau_for(tiering.promote_heat / 4, volume.clock.now_s(), tiering.half_life_s)
        stored = volume.catalog.tau_of(number)
        inode = volume.catalog.get(number)
        if stored is not None and inode is not None and stored > cool:
            volume.catalog.set_tau(number, cool, inode.atime_ns)

    async def _drop_if_there(self, number: int, tier: Tier) -> int:
        there = {replica.tier for replica in self.store.volume.catalog.replicas(number)}
        return await self.store.mover.drop(number, tier) if tier.number in there else 0

    async def _bring(self, number: int, target: Tier) -> int:
        """Have a replica on `target`, making room there if need be."""
        source = self._fastest(number)
        try:
            return await self.store.mover.copy(number, source, target, "demote")
        except TierFull:
            last = target is self.store.volume.tiers[-1]
            if not last or self.store.volume.config.tiering.on_full != "evict":
                raise
            inode = self.store.volume.catalog.get(number)
            size = inode.size_bytes if inode else 0
            await self.store.replicas.wait_for_room(target, size)
            return await self.store.mover.copy(number, source, target, "demote")

    async def _evict(self, number: int, target: Tier | None) -> int:
        return self.store.replicas.evict(number, reason="asked")

    def _fastest(self, number: int) -> Tier:
        readable = self.store.replicas.readable(number)
        if not readable:
            raise TierError("every tier with a replica is offline")
        return readable[0][0]

    async def _each(
        self, peer: Peer, paths: list[bytes], report: Report,
        action: Callable[[int, Tier | None], Awaitable[int]], target: Tier | None,
    ) -> Outcome:  # fmt: skip
        """Apply an action to every block at or below the paths, a few at a time."""
        roots = [self._may_change(peer, path)[0] for path in paths]
        numbers = [number for root in roots for number in await self._blocks_of(root)]
        outcome = Outcome(total=len(numbers))
        queue = iter(numbers)
        failure: list[OSError | trio.TooSlowError] = []

        async def work() -> None:
            for number in queue:
                await self._one(number, action, target, outcome, peer)
                if failure:
                    return
                try:
                    await report(outcome.progress(self._path(number) or b""))
                except (OSError, trio.TooSlowError) as error:
                    failure.append(error)
                    return

        async with trio.open_nursery() as nursery:
            for _ in range(PARALLEL_MOVES):
                nursery.start_soon(work)
        if failure:
            raise failure[0]
        return outcome

    async def _one(
        self, number: int, action: Callable[[int, Tier | None], Awaitable[int]],
        target: Tier | None, outcome: Outcome, peer: Peer | None = None,
    ) -> None:  # fmt: skip
        """One block; `peer` is who orders it, if the order was not for one block alone."""
        try:
            inode = self.store.volume.catalog.get(number)
            if peer is not None and inode is not None and not peer.may(inode, WRITE):
                raise NotPermitted("you may not write it")
            await self._wait_sealed(number)
            size = await action(number, target)
        except (KvfsError, OSError) as error:
            outcome.skip(self._path(number) or b"", str(error))
        else:
            outcome.count += size > 0
            outcome.size_bytes += size
        outcome.done += 1

    async def _wait_sealed(self, number: int) -> None:
        """A block that was just closed is sealed in a moment; one that is being written is not."""
        with trio.move_on_after(SEAL_WAIT_S):
            while True:
                if not self.store.sealer.can_seal(number):
                    return
                self.store.volume.request_seal(number)
                await trio.sleep(0.02)

    async def _blocks_of(self, root: Inode) -> list[int]:
        if root.kind == Kind.BLOCK:
            return [root.id]
        return await trio.to_thread.run_sync(self._all_below, root.id)

    def _all_below(self, directory: int) -> list[int]:
        reader = self.store.volume.catalog.reader()
        try:
            return scans.blocks_below(reader, directory)
        finally:
            reader.close()

    # --- tiers

    async def _verb_tier_run(
        self, peer: Peer, args: dict[str, Any], report: Report
    ) -> dict[str, Any]:
        if not args.get("dry_run"):
            peer.require_owner()
            self.store.volume.request_tiering()
        planned = await self.tiering.plan()
        return {
            "moves": self.tiering.as_documents(planned.plan),
            "notes": list(planned.plan.notes),
            "planning_s": round(planned.planning_s, 6),
        }

    async def _verb_tier_drain(
        self, peer: Peer, args: dict[str, Any], report: Report
    ) -> dict[str, Any]:
        """Give every block of a tier a replica elsewhere, then drop it there. Resumable."""
        peer.require_owner()
        tier = self.store.volume.tier_named(args["name"])
        others = [t for t in self.store.volume.tiers if t is not tier and t.accepts]
        if not others:
            raise UsageError(f"no tier but {tier.name} takes blocks: it cannot be drained")
        async with self._draining:
            outcome = await self._drain(tier, others, report)
        remaining = self.store.volume.space[tier.index].blocks
        return {
            "moved": outcome.count, "bytes": outcome.size_bytes, "remaining": remaining,
            "skipped": outcome.skipped,
        }  # fmt: skip

    async def _drain(self, tier: Tier, others: list[Tier], report: Report) -> Outcome:
        outcome = Outcome(total=self.store.volume.space[tier.index].blocks)
        order = [t for t in others if t.index > tier.index] + [
            t for t in reversed(others) if t.index < tier.index
        ]
        # It stays so when it is empty: the next step is a configuration without it.
        tier.draining = True
        try:
            after = 0
            while rows := self.store.volume.catalog.replica_page(tier.number, after):
                for number, *_ in rows:
                    await self._one(number, lambda n, _: self._leave(n, tier, order), None, outcome)
                    await report(outcome.progress(self._path(number) or b""))
                after = rows[-1][0]
        except BaseException:
            tier.draining = False
            raise
        return outcome

    async def _leave(self, number: int, tier: Tier, order: list[Tier]) -> int:
        there = {replica.tier for replica in self.store.volume.catalog.replicas(number)}
        size = 0
        if not any(other.number in there for other in order):
            for place, other in enumerate(order):
                try:
                    size = await self.store.mover.copy(number, tier, other, "demote")
                    break
                except TierFull:
                    if place + 1 == len(order):
                        raise
        return max(size, await self.store.mover.drop(number, tier))

    async def _verb_reload(
        self, peer: Peer, args: dict[str, Any], report: Report
    ) -> dict[str, Any]:
        peer.require_owner()
        applied, needs_remount = self._reload()
        return {"applied": applied, "needs_remount": needs_remount}

    # --- helpers

    def _at(self, path: bytes) -> tuple[Inode, bytes]:
        path = os.fsencode(path).strip(b"/")
        inode = self.store.volume.catalog.resolve(path)
        if inode is None:
            raise BlockNotFound(f"{os.fsdecode(path)}: no such block or directory")
        return self.store.namespace.current(inode), path

    def _seen(self, peer: Peer, path: bytes) -> tuple[Inode, bytes]:
        """`_at`, for somebody who would find it in the mount too."""
        inode, path = self._at(path)
        if not self._may_reach(peer, inode.id):
            raise NotPermitted(f"{os.fsdecode(path)}: you may not search the directories above")
        return inode, path

    def _may_reach(self, peer: Peer, number: int) -> bool:
        catalog = self.store.volume.catalog
        while entry := catalog.entry(number):
            number = entry[0]
            row = catalog.get(number)
            if row is None or not peer.may(row, SEARCH):
                return False
        return True

    def _path(self, number: int) -> bytes | None:
        return self.store.volume.catalog.path_of(number)

    def _may_change(self, peer: Peer, path: bytes) -> tuple[Inode, bytes]:
        inode, path = self._seen(peer, path)
        if peer.uid != inode.uid and not peer.may(inode, WRITE):
            raise NotPermitted(f"{os.fsdecode(path)}: you may not write it")
        return inode, path


def _moved(outcome: Outcome) -> dict[str, Any]:
    return {
        "moved": outcome.count,
        "bytes": outcome.size_bytes,
        "skipped": outcome.skipped,
        "skipped_count": outcome.skipped_count,
    }
