"""Quarantine: where files go that must never be served, until an admin has looked or time is up.

Each tier has its own, below `.kvfs/`. It is bounded in bytes, files and age, the oldest go first,
and it counts against the tier's capacity.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvfs import failpoints, layout
from kvfs.tiers.tier import Tier
from kvfs.volume.volume import Volume

log = logging.getLogger(__name__)

# Where the file lay, for whoever wants it back.
PATH_XATTR = "user.kvfs.path"
MAX_FILES = 10_000
# A small tier gives at most this part of itself.
MOST_OF_CAPACITY = 10
# Above a bound it is emptied down to this share of it, so that not every arrival lists it.
EMPTIED_TO = 0.9


@dataclass(frozen=True, slots=True)
class Quarantined:
    """One file of a tier's quarantine; `reason` is "" for one that kvfs did not put there."""

    name: bytes
    moment_s: float
    reason: str
    path: bytes
    allocated_bytes: int


class Quarantine:
    """Owned by the trio loop. What it holds is in the accounts of the tiers (`TierSpace`)."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume

    async def put(
        self, tier: Tier, path: bytes, fanned: bool, *, reason: str, message: str
    ) -> None:
        """Take a file out of the namespace; the caller claims its path and sees to its row.

        `reason` is one word. Raises FileNotFoundError, OSError, TierOffline.
        """
        allocated_bytes = await tier.run(set_aside, tier, path, fanned, reason)
        account = self.volume.space[tier.index]
        account.quarantine_bytes += allocated_bytes
        account.quarantine_files += 1
        where = f"tier {tier.name}: {os.fsdecode(path)!r}"
        self.volume.incidents.note(
            "quarantined", f"{where} {message}: quarantined",
            reason=reason, tier=tier.name, level=logging.WARNING,
        )  # fmt: skip
        if account.quarantine_files > MAX_FILES or account.quarantine_bytes > self._most(tier):
            await self.tidy(tier)

    def _most(self, tier: Tier) -> int:
        account = self.volume.space[tier.index]
        share = account.capacity_bytes // MOST_OF_CAPACITY
        return min(self.volume.config.tiering.quarantine_max, share)

    async def tidy(self, tier: Tier) -> None:
        """Count what is there, and remove what is too old or too much; the newest may stay."""
        files = await tier.run_in_thread(look, tier)
        expired_s = time.time() - self.volume.config.tiering.quarantine_ttl_s
        total_bytes, most_bytes = sum(file.allocated_bytes for file in files), self._most(tier)
        crowded = total_bytes > most_bytes or len(files) > MAX_FILES
        share = EMPTIED_TO if crowded else 1.0

        def must_go(place: int, file: Quarantined) -> bool:
            if file.moment_s < expired_s:
                return True
            left = len(files) - place
            too_much = total_bytes > most_bytes * share or left > MAX_FILES * share
            return too_much and left > 1

        gone = []
        for place, file in enumerate(files):
            if not must_go(place, file):
                break
            gone.append(file)
            total_bytes -= file.allocated_bytes
        await self._remove(tier, gone)
        self._account(tier, files[len(gone) :])

    async def purge(self, tier: Tier) -> list[Quarantined]:
        """Remove all of it; what is gone."""
        files = await tier.run_in_thread(look, tier)
        await self._remove(tier, files)
        self._account(tier, [])
        return files

    async def _remove(self, tier: Tier, files: list[Quarantined]) -> None:
        if files:
            await tier.run_in_thread(remove_files, tier, files)
            self.volume.counters.count("quarantine_removed", len(files))

    def _account(self, tier: Tier, files: list[Quarantined]) -> None:
        account = self.volume.space[tier.index]
        account.quarantine_bytes = sum(file.allocated_bytes for file in files)
        account.quarantine_files = len(files)

    async def run_once(self) -> None:
        """`tidy` on each tier that answers."""
        for tier in self.volume.tiers:
            if tier.online:
                with self.volume.tolerate("quarantine", tier.name):
                    await self.tidy(tier)


def set_aside(tier: Tier, path: bytes, fanned: bool, reason: str) -> int:
    """Move a block's file into quarantine; the bytes it allocates. Blocking."""
    source = tier.locate(path, fanned)
    if tier.identity.probe.xattrs:
        _try(lambda: tier.mirror_xattr(source, os.fsencode(PATH_XATTR), path))
    else:
        tier.clear_seal(source)
    allocated_bytes = tier.files.status(source).st_blocks * 512
    name = layout.quarantine_name(time.time_ns(), reason, path)
    tier.files.rename(source, _directory(tier) + b"/" + name)
    failpoints.hit("quarantine.moved")
    if tier.index > 0:
        tier.remove_empty_parents(os.path.dirname(source))
    return allocated_bytes


def _try(act: Callable[[], None]) -> None:
    """What is only a help to whoever looks: a full or odd filesystem goes without. Blocking."""
    try:
        act()
    except FileNotFoundError:
        raise
    except OSError as error:
        log.debug("quarantine: %s", error)


def look(tier: Tier, *, with_paths: bool = False) -> list[Quarantined]:
    """What is in a tier's quarantine, oldest first. Blocking.

    `with_paths` asks each file where it lay; else, and where it does not know, its name must do.
    """
    directory = _directory(tier)
    found = []
    for name in tier.files.names(directory):
        absolute = directory + b"/" + name
        try:
            status = tier.files.status(absolute)
        except FileNotFoundError:
            continue
        parsed = layout.parse_quarantine_name(name)
        moment_ns, reason, path = parsed or (status.st_ctime_ns, "", name)
        if with_paths:
            path = _former_path(tier, absolute) or path
        found.append(Quarantined(name, moment_ns / 1e9, reason, path, status.st_blocks * 512))
    return sorted(found, key=lambda file: file.moment_s)


def _former_path(tier: Tier, absolute: bytes) -> bytes:
    try:
        descriptor = tier.files.open(absolute, os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.getxattr(descriptor, PATH_XATTR)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def take_charge(tier: Tier, file: Quarantined) -> None:
    """Give what somebody else put there a name of ours, so that it is shown and goes in time.
    Blocking."""
    name = layout.quarantine_name(time.time_ns(), "foreign", file.name)
    directory = _directory(tier)
    tier.files.rename(directory + b"/" + file.name, directory + b"/" + name)


def remove_files(tier: Tier, files: list[Quarantined]) -> None:
    """Unlink; what is gone already is fine. Blocking."""
    directory = _directory(tier)
    for file in files:
        absolute = directory + b"/" + file.name
        try:
            tier.files.unlink(absolute)
        except FileNotFoundError:
            continue
        except IsADirectoryError:
            # Somebody else's: fsck names it.
            continue
        failpoints.hit("quarantine.removed")


def _directory(tier: Tier) -> bytes:
    return tier.root + b"/" + layout.QUARANTINE_DIR
