"""The tiering loop joins policy and mover: survey, plan in a worker thread, carry the moves out."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import trio

from kvfs.catalog.scans import Survey, snapshot
from kvfs.errors import BlockBusy, BlockNotFound, TierFull, is_expected, reason_of
from kvfs.policy.budget import Budget, DailyBudget, available_bytes
from kvfs.policy.plan import Move, Plan, plan
from kvfs.store import Store
from kvfs.views import Views

log = logging.getLogger(__name__)

# Between two plans, also when somebody asks for one all the time.
MIN_INTERVAL_S = 0.05
BURST_S = 1.0
MIN_BURST_BYTES = 64 << 20
# A block whose move failed (its bytes are not what was sealed, say) is left alone for a while.
RETRY_FAILED_S = 300.0
FAILED_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan and how long it took to make."""

    plan: Plan
    planning_s: float


class Tiering:
    """Owned by the trio loop."""

    def __init__(self, store: Store, views: Views) -> None:
        self.store = store
        self.views = views
        self._budgets: dict[int, Budget] = {}
        self._daily: dict[int, DailyBudget] = {}
        self._failed_at_s: dict[int, float] = {}
        self.reconfigure()

    def reconfigure(self) -> None:
        """Take budgets from the configuration (again)."""
        config = self.store.volume.config
        self._daily.clear()
        for tier in self.store.volume.tiers:
            rate = config.tiering.promote_bandwidth_of(tier.config)
            burst = max(int(rate * BURST_S), MIN_BURST_BYTES)
            self._budgets[tier.index] = Budget(rate, burst)
            per_day = tier.config.write_budget_per_day
            if per_day is not None:
                self._daily[tier.index] = DailyBudget(per_day)

    async def run(self) -> None:
        """Plan every interval, or when a tier is above its watermark, and carry the plan out."""
        volume = self.store.volume
        while True:
            with trio.move_on_after(volume.config.tiering.interval_s):
                await volume.tiering_due.wait()
            volume.tiering_due = trio.Event()
            with volume.tolerate("planning"):
                await self.run_once()
            await trio.sleep(MIN_INTERVAL_S)

    async def run_once(self) -> None:
        """One plan, carried out by the workers."""
        planned = await self.plan()
        self.store.volume.counters.count("tiering_passes")
        self.views.queued_moves = len(planned.plan.moves)
        send, receive = trio.open_memory_channel[Move](0)
        async with trio.open_nursery() as nursery, send:
            for _ in range(self.store.volume.config.tiering.workers):
                nursery.start_soon(self._work, receive.clone())
            for move in planned.plan.moves:
                await send.send(move)
                self.views.queued_moves -= 1

    async def plan(self) -> Planned:
        """What should move now. Changes nothing."""
        now_s = self.store.volume.clock.now_s()
        budgets = {
            index: available_bytes(now_s, budget, self._daily.get(index))
            for index, budget in self._budgets.items()
        }
        survey = self.views.survey(budgets)
        start_s = trio.current_time()
        made = await trio.to_thread.run_sync(self._plan_in_thread, survey)
        return Planned(made, trio.current_time() - start_s)

    def _plan_in_thread(self, survey: Survey) -> Plan:
        reader = self.store.volume.catalog.reader()
        try:
            return plan(snapshot(reader, survey), survey.settings)
        finally:
            reader.close()

    async def _work(self, receive: trio.MemoryReceiveChannel[Move]) -> None:
        async with receive:
            async for move in receive:
                await self._execute(move)

    async def _execute(self, move: Move) -> None:
        counters = self.store.volume.counters
        try:
            if not self._still_wanted(move):
                counters.count("moves_unwanted")
                return
            moved = await self.store.mover.execute(move, lambda: self._still_wanted(move))
        except (BlockBusy, BlockNotFound, TierFull, FileNotFoundError) as error:
            counters.count("moves_overtaken", reason=reason_of(error), tier=self._name(move))
        except Exception as error:
            if not is_expected(error):
                raise
            self._remember_failed(move.inode)
            path = self.store.volume.catalog.path_of(move.inode)
            self.store.volume.incidents.note(
                "moves_failed", f"{move.kind} of {os.fsdecode(path or b'?')!r} failed: {error}",
                reason=reason_of(error), tier=self._name(move),
            )  # fmt: skip
        else:
            if move.kind == "promote" and move.target is not None:
                self._spend(move.target, moved)

    def _name(self, move: Move) -> str:
        """The tier that a move goes to, or that it is on."""
        index = move.source if move.target is None else move.target
        return self.store.volume.tiers[index].name

    def _remember_failed(self, inode: int) -> None:
        if len(self._failed_at_s) >= FAILED_REMEMBERED:
            del self._failed_at_s[next(iter(self._failed_at_s))]
        self._failed_at_s[inode] = trio.current_time()

    def _spend(self, index: int, moved_bytes: int) -> None:
        now_s = self.store.volume.clock.now_s()
        self._budgets[index] = self._budgets[index].spend(now_s, moved_bytes)
        if index in self._daily:
            self._daily[index] = self._daily[index].spend(now_s, moved_bytes)

    def _still_wanted(self, move: Move) -> bool:
        """Heat, pins and handles at the moment of the move, not only when it was planned."""
        store, volume = self.store, self.store.volume
        inode = volume.catalog.get(move.inode)
        entry = volume.catalog.entry(move.inode)
        if inode is None or entry is None or inode.pin is not None:
            return False
        failed_at_s = self._failed_at_s.get(move.inode)
        if failed_at_s is not None and trio.current_time() - failed_at_s < RETRY_FAILED_S:
            return False
        if store.replicas.pinned_by_directory(entry[0]):
            return False
        hot = store.attributes.heat(move.inode) >= volume.config.tiering.promote_heat
        if move.kind == "promote":
            return hot
        if move.inode in store.replicas.open_blocks:
            return False
        # A plan displaces hot blocks only by hotter ones; one that became hot since stays.
        account = volume.space[move.source]
        low, _ = volume.config.tiering.watermarks(volume.tiers[move.source].config)
        return not hot or account.taken_bytes > low * account.planned_bytes

    def as_documents(self, made: Plan) -> list[dict[str, Any]]:
        """The moves of a plan for people."""
        volume = self.store.volume
        names = [tier.name for tier in volume.tiers]
        return [
            {
                "kind": move.kind,
                "path": volume.catalog.path_of(move.inode) or b"",
                "size_bytes": move.size_bytes,
                "source": names[move.source],
                "target": None if move.target is None else names[move.target],
                "reason": move.reason,
            }
            for move in made.moves
        ]
