"""Which block moves where: a snapshot of the tiers in, a plan of moves out.

Owns every placement decision that is made by heat: the watermarks, the order in which blocks leave
a tier, and what a hot block may displace. Pure: clock and budgets come in the snapshot; it never
touches a file or the catalog. The tiering service plans with it and checks each move again when it
is carried out; `kvfs tier run --dry-run` and `kvfs info` show its answers.

Tiers are relieved from the fastest to the slowest, so that each sees what the one above sends down.
A tier that is to take a block sends its own coldest ones away first, if it has to. Promotions come
last and never fill a tier above its high watermark: they make no work for the next pass.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal

from kvfs.policy.heat import heat_at, never

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MoveKind = Literal["promote", "demote", "drop", "evict"]


@dataclass(frozen=True, slots=True)
class TierView:
    """One tier as the plan sees it; `used_bytes` counts reservations and held space."""

    index: int
    name: str
    capacity_bytes: int
    used_bytes: int
    high_watermark: float
    low_watermark: float
    promote_budget_bytes: int
    online: bool
    # Whether it takes new bytes now (a disk that somebody else filled does not), and gives any up.
    accepts: bool = True
    read_only: bool = False

    @property
    def high_bytes(self) -> int:
        """Above this the tier is relieved."""
        return int(self.capacity_bytes * self.high_watermark)

    @property
    def low_bytes(self) -> int:
        """Down to this the tier is relieved."""
        return int(self.capacity_bytes * self.low_watermark)


@dataclass(frozen=True, slots=True)
class BlockView:
    """One block; `tiers` hold its replicas, ascending. Open, unsealed, `*.tmp`: not movable."""

    inode: int
    size_bytes: int
    tau: float
    tiers: tuple[int, ...]
    pinned: bool
    keep: bool
    movable: bool


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The tiers, fastest first; per tier its residents coldest first, its candidates hottest first.

    Either list may be cut short: a plan is as good as the candidates it is given.
    """

    now: float
    half_life_s: float
    tiers: tuple[TierView, ...]
    coldest: tuple[tuple[BlockView, ...], ...]
    hottest: tuple[tuple[BlockView, ...], ...]


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """The knobs of `[tiering]` that decide a plan, and how many moves one plan may have."""

    promote_heat: float
    hysteresis: float
    on_full: Literal["evict", "refuse"]
    max_moves: int


@dataclass(frozen=True, slots=True)
class Move:
    """One step: `promote` keeps its source, `demote` drops it; `drop` and `evict` lack a target."""

    kind: MoveKind
    inode: int
    size_bytes: int
    source: int
    target: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Moves, in an order that frees space before it is filled, and what an admin should know."""

    moves: tuple[Move, ...]
    notes: tuple[str, ...]


def plan(snapshot: Snapshot, settings: PolicySettings) -> Plan:
    """The moves that bring every tier below its watermark and the hottest blocks up."""
    planner = _Planner(snapshot, settings)
    for tier in snapshot.tiers:
        if tier.online and tier.read_only:
            planner.notes[f"{tier.name} is read-only: nothing moves off it"] = None
        elif tier.online:
            planner.relieve(tier.index)
        else:
            planner.notes[f"{tier.name} is offline: nothing moves to or from it"] = None
    planner.promote()
    return planner.result()


def explain(block: BlockView, snapshot: Snapshot, settings: PolicySettings) -> str:
    """One sentence: why `block` is where it is, or what moves it next."""
    tiers = snapshot.tiers
    online = [tier for tier in block.tiers if tiers[tier].online]
    if not online:
        where = " and ".join(tiers[tier].name for tier in block.tiers)
        return f"its only replica is on {where}, which is offline"
    home = tiers[online[0]]
    if block.pinned:
        return f"it is pinned, so it stays on {home.name}"
    if not block.movable:
        return f"it is open or not sealed yet, so it stays on {home.name}"
    for move in plan(snapshot, settings).moves:
        if move.inode == block.inode:
            return _explain_move(move, tiers)
    heat = heat_at(block.tau, snapshot.now, snapshot.half_life_s)
    faster = [tier for tier in tiers[: home.index] if tier.online]
    if not faster:
        return (
            f"{home.name} is the fastest tier online; heat {heat:.1f}, and the coldest leave when "
            f"{home.name} is more than {100 * home.high_watermark:.0f} % full"
        )
    if heat < settings.promote_heat:
        return f"it stays on {home.name}: heat {heat:.1f} is below {settings.promote_heat:g}"
    hot = f"it is hot enough to leave {home.name} (heat {heat:.1f})"
    if all(block.size_bytes > tier.promote_budget_bytes for tier in faster):
        return f"{hot}, but the promotion budget of {faster[0].name} is used up"
    return (
        f"{hot}, but too few blocks on {faster[0].name} are at least "
        f"{settings.hysteresis:g}x colder and free to make room"
    )


def _explain_move(move: Move, tiers: tuple[TierView, ...]) -> str:
    source = tiers[move.source].name
    verb = {
        "promote": f"be copied from {source}",
        "demote": f"move from {source}",
        "drop": f"lose its copy on {source}",
        "evict": f"be evicted from {source}",
    }[move.kind]
    target = "" if move.target is None else f" to {tiers[move.target].name}"
    return f"the next pass lets it {verb}{target}: {move.reason}"


# The order in which blocks leave a tier.
_SPARE = 0  # also on a faster tier: hottest first, since those are read there, not here
_COVERED = 1  # also on a slower tier: coldest first
_SOLE = 2  # coldest first


class _Queue:
    """What may leave one tier, by rank, and how far a plan has used each rank up."""

    __slots__ = ("cursors", "ranks")

    def __init__(self, *ranks: list[BlockView]) -> None:
        self.ranks = ranks
        self.cursors = [0] * len(ranks)


class _Level:
    """How full arrivals may make each tier, and which sizes a tier was found to have no room for.

    What a tier can send away only shrinks while a plan grows: a size refused once stays refused,
    which keeps planning linear in the candidates when nothing fits.
    """

    __slots__ = ("ceilings", "refused")

    def __init__(self, ceilings: list[int]) -> None:
        self.ceilings = ceilings
        self.refused: list[float] = [math.inf] * len(ceilings)


@dataclass(frozen=True, slots=True)
class _Cause:
    """Why blocks have to leave, how full that may make other tiers, and for which heat."""

    why: str
    levels: tuple[_Level, ...]
    hotter_tau: float = math.inf


@dataclass(frozen=True, slots=True)
class _Mark:
    """A point in a growing plan to which `_Planner.undo` can return."""

    moves: int
    cursors: dict[int, tuple[int, ...]]
    hottest_left: tuple[float, ...]


class _Planner:
    """A plan under construction; lives within one call of `plan`."""

    def __init__(self, snapshot: Snapshot, settings: PolicySettings) -> None:
        self.snapshot = snapshot
        self.settings = settings
        self.tiers = snapshot.tiers
        self.online = [tier.index for tier in self.tiers if tier.online]
        self.used_bytes = [tier.used_bytes for tier in self.tiers]
        self.budget_bytes = [tier.promote_budget_bytes for tier in self.tiers]
        self.margin_s = snapshot.half_life_s * math.log2(settings.hysteresis)
        self.watermark = _Level([min(t.high_bytes, t.capacity_bytes) for t in self.tiers])
        self.capacity = _Level([t.capacity_bytes for t in self.tiers])
        self.queues: dict[int, _Queue] = {}
        self.moves: list[Move] = []
        self.moved: list[BlockView] = []
        self.taken: set[int] = set()
        # Of what leaves each tier for want of space; what comes up into it has to be hotter.
        self.hottest_left = [never] * len(self.tiers)
        self.notes: dict[str, None] = {}

    # What a plan consists of

    def result(self) -> Plan:
        """The plan so far; all that frees comes before all that fills, slowest tier first."""
        frees = [move for move in self.moves if move.kind != "promote"]
        frees.sort(key=lambda move: -move.source)
        fills = [move for move in self.moves if move.kind == "promote"]
        if self.is_full:
            self.notes[f"stopped at {self.settings.max_moves} moves: the next pass goes on"] = None
        return Plan(tuple(frees + fills), tuple(self.notes))

    @property
    def is_full(self) -> bool:
        return len(self.moves) >= self.settings.max_moves

    def add(self, block: BlockView, move: Move) -> None:
        self.moves.append(move)
        self.moved.append(block)
        self.taken.add(block.inode)
        self._account(move, 1)
        if move.kind != "promote" and _replica_among(block, self._above(move.source)) is None:
            self.hottest_left[move.source] = max(self.hottest_left[move.source], block.tau)

    def mark(self) -> _Mark:
        cursors = {tier: tuple(queue.cursors) for tier, queue in self.queues.items()}
        return _Mark(len(self.moves), cursors, tuple(self.hottest_left))

    def undo(self, mark: _Mark) -> None:
        for move in self.moves[mark.moves :]:
            self.taken.discard(move.inode)
            self._account(move, -1)
        del self.moves[mark.moves :], self.moved[mark.moves :]
        self.hottest_left[:] = mark.hottest_left
        for tier, queue in self.queues.items():
            queue.cursors[:] = mark.cursors.get(tier, [0] * len(queue.cursors))

    def _account(self, move: Move, sign: int) -> None:
        if move.kind != "promote":
            self.used_bytes[move.source] -= sign * move.size_bytes
        if move.target is not None:
            self.used_bytes[move.target] += sign * move.size_bytes

    # Who may leave a tier

    def _queue(self, tier: int) -> _Queue:
        if tier not in self.queues:
            self.queues[tier] = self._sort_out(tier)
        return self.queues[tier]

    def _sort_out(self, tier: int) -> _Queue:
        coldest = [block for block in self.snapshot.coldest[tier] if _may_move(block)]
        hottest = [block for block in self.snapshot.hottest[tier] if _may_move(block)]
        by_heat = chain(hottest, reversed(coldest))
        above, below = self._above(tier), self._below(tier)
        spare = {b.inode: b for b in by_heat if _replica_among(b, above) is not None}
        rest = [block for block in coldest if block.inode not in spare]
        covered = [block for block in rest if _replica_among(block, below) is not None]
        sole = [block for block in rest if _replica_among(block, below) is None]
        if not below:
            may_evict = self.settings.on_full == "evict"
            sole = [block for block in sole if may_evict and not block.keep]
        return _Queue(list(spare.values()), covered, sole)

    def _next_victim(self, tier: int, hotter_tau: float) -> tuple[int, BlockView] | None:
        """The next block to leave and its rank; all but spare copies have to be cold enough."""
        queue = self._queue(tier)
        for rank, blocks in enumerate(queue.ranks):
            cursor = queue.cursors[rank]
            while cursor < len(blocks) and blocks[cursor].inode in self.taken:
                cursor += 1
            queue.cursors[rank] = cursor
            if cursor == len(blocks):
                continue
            block = blocks[cursor]
            if rank == _SPARE or hotter_tau - block.tau >= self.margin_s:
                queue.cursors[rank] = cursor + 1
                return rank, block
        return None

    def _above(self, tier: int) -> list[int]:
        return [other for other in self.online if other < tier]

    def _below(self, tier: int) -> list[int]:
        return [other for other in self.online if other > tier]

    # Down

    def relieve(self, tier: int) -> None:
        """From above the high watermark to the low one, as far as blocks may leave."""
        view = self.tiers[tier]
        # Making room for arrivals may have brought it below the watermark: it is still relieved.
        used_bytes = max(view.used_bytes, self.used_bytes[tier])
        if used_bytes <= view.high_bytes:
            return
        verb = "is" if used_bytes == view.used_bytes else "gets"
        why = f"{view.name} {verb} {_percent(used_bytes, view.capacity_bytes)} full"
        cause = _Cause(why, (self.watermark, self.capacity))
        while self.used_bytes[tier] > view.low_bytes and not self.is_full:
            victim = self._next_victim(tier, cause.hotter_tau)
            if victim is None:
                self.notes[f"{why}: {self._why_stuck(tier)}"] = None
                return
            self._displace(tier, victim, cause)

    def _why_stuck(self, tier: int) -> str:
        if self._below(tier):
            return "its other blocks are pinned, open or unsealed, or find no room below"
        if self.settings.on_full == "refuse":
            return "nothing is evicted, since on_full is refuse"
        return "its other blocks are pinned, open, unsealed or to be kept"

    def _displace(self, tier: int, victim: tuple[int, BlockView], cause: _Cause) -> None:
        rank, block = victim
        if rank == _SOLE and self._below(tier):
            self._demote(tier, block, cause)
            return
        others = [self.tiers[other] for other in block.tiers if other != tier]
        if not others:
            reason = f"{cause.why}, coldest first"
            self.add(block, Move("evict", block.inode, block.size_bytes, tier, None, reason))
            return
        stays = next((f"on {o.name}" for o in others if o.online), f"on {others[0].name} (offline)")
        reason = f"{cause.why}, a copy stays {stays}"
        self.add(block, Move("drop", block.inode, block.size_bytes, tier, None, reason))

    def _demote(self, tier: int, block: BlockView, cause: _Cause) -> None:
        """Send a sole replica to the nearest slower tier that takes it, if one does."""
        name = self.tiers[tier].name
        for level in cause.levels:
            for target in self._below(tier):
                if not self.tiers[target].accepts:
                    self.notes[f"{self.tiers[target].name} takes nothing new now"] = None
                    continue
                why = f"{self.tiers[target].name} makes room for what leaves {name}"
                room = self._make_room(target, block, _Cause(why, (level,), cause.hotter_tau))
                if self.is_full:
                    return
                if room:
                    reason = f"{cause.why}, coldest first"
                    move = Move("demote", block.inode, block.size_bytes, tier, target, reason)
                    self.add(block, move)
                    return

    def _make_room(self, tier: int, block: BlockView, cause: _Cause) -> bool:
        """Let others leave until `block` fits below the ceiling; where it cannot, change nothing.

        A plan that is full keeps what it has freed: the next pass starts from there, so a block
        that is larger than everything one plan can free still gets its room.
        """
        level, size_bytes = cause.levels[0], block.size_bytes
        limit_bytes = level.ceilings[tier] - size_bytes
        if self.used_bytes[tier] <= limit_bytes:
            return True
        if limit_bytes < 0 or size_bytes >= level.refused[tier]:
            return False
        mark = self.mark()
        while self.used_bytes[tier] > limit_bytes and not self.is_full:
            victim = self._next_victim(tier, cause.hotter_tau)
            if victim is None:
                self.undo(mark)
                level.refused[tier] = size_bytes
                return False
            self._displace(tier, victim, cause)
        return self.used_bytes[tier] <= limit_bytes

    # Up

    def promote(self) -> None:
        """Copy the hottest blocks up, each to the fastest tier where budget and heat allow it."""
        for block in self._candidates():
            if self.is_full:
                return
            source = _replica_among(block, self.online)
            if source is not None:
                self._promote(block, source)

    def _candidates(self) -> Iterator[BlockView]:
        lists = (self.snapshot.hottest[tier] for tier in self.online)
        for block in heapq.merge(*lists, key=lambda block: -block.tau):
            if block.tau == never or self._heat(block) < self.settings.promote_heat:
                return
            if block.inode not in self.taken and _may_move(block):
                yield block

    def _promote(self, block: BlockView, source: int) -> None:
        self.taken.add(block.inode)  # so that what makes room for it leaves its own replicas alone
        for target in self._above(source):
            view = self.tiers[target]
            if not view.accepts:
                self.notes[f"{view.name} takes nothing new now"] = None
                continue
            if block.size_bytes > self.budget_bytes[target]:
                self.notes[f"the promotion budget of {view.name} is used up"] = None
                continue
            if block.tau - self.hottest_left[target] < self.margin_s:
                continue
            mark = self.mark()
            why = f"{view.name} makes room for a hotter block"
            room = self._make_room(target, block, _Cause(why, (self.watermark,), block.tau))
            if room and not self.is_full:
                self.budget_bytes[target] -= block.size_bytes
                reason = self._why_promote(block, target, mark)
                move = Move("promote", block.inode, block.size_bytes, source, target, reason)
                self.add(block, move)
                return
            self.undo(mark)
        self.taken.discard(block.inode)

    def _why_promote(self, block: BlockView, target: int, mark: _Mark) -> str:
        name, above = self.tiers[target].name, self._above(target)
        why = f"heat {self._heat(block):.1f} >= {self.settings.promote_heat:g}"
        displaced = [
            other.tau
            for move, other in zip(self.moves[mark.moves :], self.moved[mark.moves :], strict=True)
            if move.source == target and _replica_among(other, above) is None
        ]
        if not displaced:
            return f"{why} and room on {name}"
        ratio = heat_at(block.tau, max(displaced), self.snapshot.half_life_s)
        return f"{why} and {_times(ratio)} the coldest on {name}"

    def _heat(self, block: BlockView) -> float:
        return heat_at(block.tau, self.snapshot.now, self.snapshot.half_life_s)


def _may_move(block: BlockView) -> bool:
    return block.movable and not block.pinned and block.size_bytes > 0


def _replica_among(block: BlockView, tiers: Iterable[int]) -> int | None:
    return next((tier for tier in tiers if tier in block.tiers), None)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "100 %"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio < 1000 else "over 1000x"
