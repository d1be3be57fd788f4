"""The verbs that look whether what is stored is sound: fsck, scrub and the quarantine."""

from __future__ import annotations

import os
from typing import Any

import trio

from kvfs.blocks.quarantine import look
from kvfs.errors import BlockNotFound, TierOffline
from kvfs.fsck import check_online
from kvfs.mount import arguments
from kvfs.mount.peers import Peer, Report
from kvfs.store import Store
from kvfs.tiers.pacing import Pacer
from kvfs.tiers.tier import Tier
from kvfs.upkeep.scrub import Tally

# Small blocks are read faster than anybody can watch.
REPORT_EVERY_S = 0.1


class Checks:
    """Owned by the trio loop. All of it is for root and the user of the daemon."""

    def __init__(self, store: Store) -> None:
        self.store = store

    async def fsck(self, peer: Peer, args: dict[str, Any], report: Report) -> dict[str, Any]:
        peer.require_owner()

        async def progress(done: int, total: int) -> None:
            await report({"done": done, "total": total, "bytes": 0, "path": b""})

        result = await check_online(self.store, repair=bool(args.get("repair")), progress=progress)
        return {
            "findings": [finding.as_document() for finding in result.findings],
            "checked": result.checked,
        }

    async def scrub(self, peer: Peer, args: dict[str, Any], report: Report) -> dict[str, Any]:
        """Read every replica of some tiers, or of what is at or below a path."""
        peer.require_owner()
        tiers, rate = self._tiers(args), arguments.number(args, "rate")
        next_s = trio.current_time()

        async def progress(tally: Tally) -> None:
            nonlocal next_s
            if trio.current_time() < next_s:
                return
            next_s = trio.current_time() + REPORT_EVERY_S
            await report({
                "done": tally.blocks, "total": max(tally.total, tally.blocks),
                "bytes": tally.size_bytes, "path": tally.path,
            })  # fmt: skip

        pacer = Pacer(lambda: rate)
        scrubber = self.store.scrubber
        path = os.fsencode(args.get("path") or b"").strip(b"/")
        if path:
            root = self.store.volume.catalog.resolve(path)
            if root is None:
                raise BlockNotFound(f"{os.fsdecode(path)}: no such block or directory")
            tally = await scrubber.scrub_below(root, tiers, pacer, progress)
        else:
            restart = bool(args.get("restart"))
            tally = await scrubber.scrub(tiers, pacer, progress, restart=restart)
        return {
            "checked": tally.blocks, "bytes": tally.size_bytes, "bad": tally.bad,
            "unreadable": tally.unreadable, "resumed": tally.resumed, "named": tally.named,
            "offline": [tier.name for tier in self.store.volume.tiers if not tier.online],
        }  # fmt: skip

    def _tiers(self, args: dict[str, Any]) -> list[Tier]:
        """The one that is named, or all. Raises TierError, TierOffline."""
        volume = self.store.volume
        name = arguments.name(args, "tier")
        if name is None:
            return volume.tiers
        tier = volume.tier_named(name)
        if not tier.online:
            raise TierOffline(f"tier {tier.name} is offline: {tier.health.last_error}")
        return [tier]

    async def quarantine(self, peer: Peer, args: dict[str, Any], report: Report) -> dict[str, Any]:
        """What is in quarantine; with `purge` it is removed."""
        peer.require_owner()
        files = []
        for tier in self._tiers(args):
            if not tier.online:
                continue
            found = await tier.run_in_thread(lambda at: look(at, with_paths=True), tier)
            files += [
                {
                    "tier": tier.name, "name": file.name, "path": file.path,
                    "reason": file.reason or "foreign", "size_bytes": file.allocated_bytes,
                    "at": file.moment_s,
                }
                for file in found
            ]  # fmt: skip
            if args.get("purge"):
                await self.store.quarantine.purge(tier)
        return {"files": files, "bytes": sum(file["size_bytes"] for file in files)}
