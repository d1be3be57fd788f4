"""Queries that read many rows, for worker threads on a read-only connection.

They turn the catalog into the immutable snapshots that `kvfs.policy.plan` plans on, and into lists
for the command. Nothing here changes anything.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from kvfs import layout
from kvfs.catalog.rows import ROOT_INODE, BlockState, Kind
from kvfs.policy import heat
from kvfs.policy.plan import BlockView, PolicySettings, Snapshot, TierView

# Bounds of one plan: what does not fit waits for the next pass.
MAX_CANDIDATES = 20_000
MIN_CANDIDATES = 256
MAX_PROMOTIONS = 512
# How much more than needed is read, because some candidates turn out pinned or open.
SLACK = 1.25
# Candidates that may leave, per move that a plan may hold: a choice, without reading a whole tier.
CHOICE = 8


class Resident(NamedTuple):
    """A replica with what the policy must know of its block."""

    inode: int
    allocated_bytes: int
    tau: float
    state: int
    pin: str | None
    parent: int
    name: bytes
    # What a raw replica would allocate.
    raw_bytes: int
    tiers: str


_RESIDENT = (
    "SELECT r.inode, r.allocated_bytes, r.tau, i.state, i.pin, d.parent, d.name,"
    " r.allocated_bytes + r.saved_bytes,"
    " (SELECT group_concat(o.tier) FROM replica o WHERE o.inode = r.inode)"
    " FROM replica r JOIN inode i ON i.id = r.inode JOIN dirent d ON d.inode = r.inode"
)


@dataclass
class Survey:
    """What a plan starts from, collected on the trio loop and read in a worker thread."""

    now_s: float
    half_life_s: float
    tiers: tuple[TierView, ...]
    index_of: Mapping[int, int]
    open_inodes: frozenset[int]
    pending_tau: Mapping[int, float]
    keep: tuple[str, ...]
    settings: PolicySettings
    _pins: dict[int, bool] = field(default_factory=dict)


def snapshot(db: sqlite3.Connection, survey: Survey) -> Snapshot:
    """Candidates of every tier: enough to reach the watermarks, and the hottest below the first."""
    survey._pins = pinned_directories(db)
    numbers = {index: number for number, index in survey.index_of.items()}
    threshold = heat.tau_for(survey.settings.promote_heat, survey.now_s, survey.half_life_s)
    hottest: list[tuple[BlockView, ...]] = [
        tuple(_hottest(db, survey, numbers[tier.index], threshold)) if tier.index else ()
        for tier in survey.tiers
    ]
    coldest = []
    arrivals = 0.0
    for tier in survey.tiers:
        expected = tier.used_bytes + arrivals
        relief = max(0.0, expected - tier.low_watermark * tier.capacity_bytes) * SLACK
        if expected <= tier.high_watermark * tier.capacity_bytes:
            relief = 0.0
        coming = sum(b.size_bytes for blocks in hottest[tier.index + 1 :] for b in blocks)
        displaced = min(coming, tier.promote_budget_bytes, tier.capacity_bytes // 8)
        residents = _coldest(db, survey, numbers[tier.index], int(relief) + displaced)
        if tier.index and relief:
            residents = _with_copies(db, survey, numbers[tier.index], residents)
        coldest.append(tuple(residents))
        arrivals = relief + displaced
    return Snapshot(
        now=survey.now_s, half_life_s=survey.half_life_s, tiers=survey.tiers,
        coldest=tuple(coldest), hottest=tuple(hottest),
    )  # fmt: skip


def _coldest(
    db: sqlite3.Connection, survey: Survey, number: int, wanted_bytes: int
) -> list[BlockView]:
    found: list[BlockView] = []
    movable = movable_bytes = 0
    choice = CHOICE * survey.settings.max_moves
    rows = db.execute(f"{_RESIDENT} WHERE r.tier = ? ORDER BY r.tau", (number,))
    for row in rows:
        block = view(db, survey, Resident._make(row))
        found.append(block)
        if block.movable and not block.pinned and not block.keep:
            movable += 1
            movable_bytes += block.size_bytes
        enough = movable_bytes >= wanted_bytes and len(found) >= MIN_CANDIDATES
        if enough or movable >= choice or len(found) >= MAX_CANDIDATES:
            break
    return sorted(found, key=lambda block: block.tau)


def _with_copies(
    db: sqlite3.Connection, survey: Survey, number: int, residents: list[BlockView]
) -> list[BlockView]:
    """Add copies of blocks that also live above: they go first, and are hot."""
    rows = db.execute(
        f"{_RESIDENT} WHERE r.tier = ? ORDER BY r.tau DESC LIMIT ?", (number, MAX_CANDIDATES // 4)
    )
    index = survey.index_of[number]
    known = {block.inode for block in residents}
    for row in rows:
        block = view(db, survey, Resident._make(row))
        if block.inode not in known and block.tiers[0] < index:
            residents.append(block)
    return sorted(residents, key=lambda block: block.tau)


def _hottest(
    db: sqlite3.Connection, survey: Survey, number: int, threshold: float
) -> Iterator[BlockView]:
    rows = db.execute(
        f"{_RESIDENT} WHERE r.tier = ? AND r.tau >= ? ORDER BY r.tau DESC LIMIT ?",
        (number, threshold, MAX_CANDIDATES),
    )
    count = 0
    for row in rows:
        replica = Resident._make(row)
        block = view(db, survey, replica)
        if block.tiers[0] == survey.index_of[number]:
            # Where it goes it is raw.
            yield replace(block, size_bytes=replica.raw_bytes)
            count += 1
        if count >= MAX_PROMOTIONS:
            return


def view(db: sqlite3.Connection, survey: Survey, row: Resident) -> BlockView:
    """A resident as the policy sees it."""
    pending = survey.pending_tau.get(row.inode, heat.never)
    return BlockView(
        inode=row.inode,
        size_bytes=row.allocated_bytes,
        tau=heat.touch(row.tau, pending, survey.half_life_s),
        tiers=tuple(sorted(survey.index_of[int(number)] for number in row.tiers.split(","))),
        pinned=row.pin is not None or is_pinned(db, survey._pins, row.parent),
        keep=is_kept(row.name, survey.keep),
        movable=(
            row.state == BlockState.SEALED
            and row.inode not in survey.open_inodes
            and not layout.is_temporary(row.name)
        ),
    )


def resident(db: sqlite3.Connection, inode: int) -> Resident | None:
    """One block, by its fastest known replica."""
    row = db.execute(f"{_RESIDENT} WHERE r.inode = ? LIMIT 1", (inode,)).fetchone()
    return Resident._make(row) if row else None


def is_kept(name: bytes, patterns: tuple[str, ...]) -> bool:
    """Whether the name is of those that are never evicted by themselves."""
    return _any_of(patterns).match(os.fsdecode(name)) is not None


@functools.lru_cache(maxsize=8)
def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """One expression for all patterns: it is asked for every candidate of a plan."""
    return re.compile("|".join(map(fnmatch.translate, patterns)) or r"(?!)")


def pinned_directories(db: sqlite3.Connection) -> dict[int, bool]:
    """Directories with a pin of their own; the seed of the memory of `is_pinned`."""
    rows = db.execute("SELECT id FROM inode WHERE pin IS NOT NULL AND kind = 0")
    return {inode: True for (inode,) in rows}


def is_pinned(db: sqlite3.Connection, known: dict[int, bool], directory: int) -> bool:
    """Whether the directory or one above it is pinned. `known` remembers the answers."""
    if not known:
        return False
    trail = []
    while (answer := known.get(directory)) is None:
        trail.append(directory)
        # Until it is known better: the names of a damaged catalog may lead in a circle.
        known[directory] = False
        row = db.execute("SELECT parent FROM dirent WHERE inode = ?", (directory,)).fetchone()
        if row is None:
            answer = False
            break
        directory = row[0]
    for inode in trail:
        known[inode] = answer
    return answer


# UNION, not UNION ALL: the names of a damaged catalog may lead in a circle.
_BELOW = (
    "WITH RECURSIVE below (id) AS (SELECT ? UNION SELECT d.inode FROM dirent d"
    " JOIN below b ON d.parent = b.id)"
)


def blocks_below(db: sqlite3.Connection, directory: int) -> list[int]:
    """Every block in a directory and all below it, in the order of their numbers."""
    if directory == ROOT_INODE:
        rows = db.execute("SELECT id FROM inode WHERE kind = 1 ORDER BY id")
    else:
        rows = db.execute(
            f"{_BELOW} SELECT i.id FROM below b JOIN inode i ON i.id = b.id WHERE i.kind = 1"
            " ORDER BY i.id",
            (directory,),
        )
    return [row[0] for row in rows]


def below_by_heat(
    db: sqlite3.Connection, directory: int, *, coldest: bool, limit: int
) -> list[int]:
    """Blocks at or below an inode, hottest or coldest first."""
    order = "ASC" if coldest else "DESC"
    rows = db.execute(
        f"{_BELOW} SELECT r.inode, max(r.tau) AS tau FROM below b JOIN replica r ON r.inode = b.id"
        f" GROUP BY r.inode ORDER BY tau {order} LIMIT ?",
        (directory, limit),
    )
    return [row[0] for row in rows]


def expired(db: sqlite3.Connection, now_ns: int, limit: int) -> list[int]:
    """Blocks past the TTL that they or a directory above them have."""
    found: list[int] = []
    holders = db.execute("SELECT id, kind, ttl_s FROM inode WHERE ttl_s IS NOT NULL").fetchall()
    for inode, kind, ttl_s in holders:
        before_ns = now_ns - int(ttl_s * 1e9)
        if kind == Kind.BLOCK:
            rows = db.execute(
                "SELECT id FROM inode WHERE id = ? AND mtime_ns < ?", (inode, before_ns)
            )
        else:
            rows = db.execute(
                "WITH RECURSIVE below (id) AS (SELECT ? UNION SELECT d.inode FROM dirent d"
                " JOIN below b ON d.parent = b.id JOIN inode i ON i.id = d.inode"
                # A nearer TTL overrules: its own subtree is handled by itself.
                " WHERE i.ttl_s IS NULL)"
                " SELECT i.id FROM below b JOIN inode i ON i.id = b.id"
                " WHERE i.kind = 1 AND i.mtime_ns < ? LIMIT ?",
                (inode, before_ns, limit),
            )
        found += [row[0] for row in rows]
        if len(found) >= limit:
            break
    return found


def forgotten_temporaries(db: sqlite3.Connection, before_ns: int, limit: int) -> list[int]:
    """`*.tmp` blocks that nobody wrote since `before_ns`, whatever mtime a copy gave them."""
    rows = db.execute(
        "SELECT i.id FROM dirent d JOIN inode i ON i.id = d.inode"
        " WHERE substr(d.name, -4) = X'2E746D70' AND i.kind = 1 AND i.ctime_ns < ? LIMIT ?",
        (before_ns, limit),
    )
    return [row[0] for row in rows]


def by_heat(
    db: sqlite3.Connection, numbers: Iterable[int], *, coldest: bool, limit: int
) -> list[int]:
    """Blocks of any tier, hottest or coldest first."""
    order = "ASC" if coldest else "DESC"
    merged: dict[int, float] = {}
    for number in numbers:
        rows = db.execute(
            f"SELECT inode, tau FROM replica WHERE tier = ? ORDER BY tau {order} LIMIT ?",
            (number, limit),
        )
        merged.update(rows)
    ordered = sorted(merged, key=lambda inode: merged[inode], reverse=not coldest)
    return ordered[:limit]


# --- the whole catalog: at mount, and to check the accounts


def usage(connection: sqlite3.Connection) -> dict[int, tuple[int, int]]:
    """Per tier number: replicas, allocated bytes."""
    numbers = [row[0] for row in connection.execute("SELECT number FROM tier")]
    if not numbers:
        return {}
    # Grouped by tier, SQLite would walk the heat index and seek every row: ten times slower.
    columns = ", ".join(
        f"count(*) FILTER (WHERE tier = {number}),"
        f" sum(allocated_bytes) FILTER (WHERE tier = {number})"
        for number in numbers
    )
    found = connection.execute(f"SELECT {columns} FROM replica").fetchone()
    pairs = zip(numbers, found[::2], found[1::2], strict=True)
    return {number: (count, size) for number, count, size in pairs if count}


def saved_bytes(connection: sqlite3.Connection) -> dict[int, int]:
    """Per tier number: what its compressed replicas allocate less than their blocks have."""
    # Of the partial index alone.
    rows = connection.execute(
        "SELECT tier, sum(saved_bytes) FROM replica INDEXED BY replica_compressed"
        " WHERE codec != 0 GROUP BY tier"
    )
    return dict(rows.fetchall())


def duplicate_bytes(connection: sqlite3.Connection) -> int:
    """Bytes of replicas beyond the largest of each block."""
    row = connection.execute(
        "SELECT coalesce(sum(extra), 0) FROM (SELECT sum(allocated_bytes)"
        " - max(allocated_bytes) AS extra FROM replica GROUP BY inode HAVING count(*) > 1)"
    ).fetchone()
    return int(row[0])


def totals(connection: sqlite3.Connection) -> tuple[int, int]:
    """How many blocks and directories there are."""
    blocks, every = connection.execute(
        f"SELECT count(*) FILTER (WHERE kind = {int(Kind.BLOCK)}), count(*) FROM inode"
    ).fetchone()
    return blocks, every - blocks
