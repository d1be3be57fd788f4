"""Leases: the table of what clients have been lent, and when a lease ends.

A lease is what one request was given. It ends when it is released, when its connection closes,
whatever closes it, or when it was not renewed in time. Who is over a limit is refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import trio

from kvfs.errors import KvfsError, QuotaExceeded
from kvfs.leasing.credentials import Credentials
from kvfs.leasing.lending import Lender, Loan, Terms
from kvfs.leasing.lookup import BATCH_NAMES, Lookup, Name, Status
from kvfs.leasing.quotas import Quotas
from kvfs.volume.volume import Volume

EXPIRY_S = 1.0
# Blocks of one request that wait at one time.
PARALLEL_WAITS = 8

Result = Loan | Status | None


@dataclass(slots=True, eq=False)
class Holder:
    """One connection: what it holds ends with it. `hung_up` returns when its client is gone."""

    who: Credentials
    hung_up: Callable[[], Awaitable[None]] = trio.sleep_forever
    leases: set[int] = field(default_factory=set)
    puts: set[int] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class Lease:
    """What one request was lent, until a time by trio's clock."""

    number: int
    holder: Holder
    until_s: float
    loans: list[Loan] = field(default_factory=list)


Loans = dict[int, Loan]
"""Blocks of a lease by the place of their path in the request."""
Deliver = Callable[[Lease, Loans], Awaitable[None]]


class Grant(NamedTuple):
    """The answer to a request: the lease, None when no block could be lent; a status for each path
    up to the last that was tried; and what was lent since the last delivery."""

    lease: Lease | None
    statuses: bytes
    rest: Loans


class Leases:
    """Owned by the trio loop."""

    def __init__(self, volume: Volume, lookup: Lookup, lender: Lender, quotas: Quotas) -> None:
        self.volume = volume
        self.lookup = lookup
        self.lender = lender
        self.quotas = quotas
        # In the order in which they end.
        self._leases: OrderedDict[int, Lease] = OrderedDict()
        self._last = 0

    def __len__(self) -> int:
        return len(self._leases)

    # --- granting

    async def grant(
        self,
        holder: Holder,
        paths: Sequence[bytes],
        terms: Terms,
        deliver: Deliver,
        *,
        sparse: bool,
    ) -> Grant:
        """Lend the leading blocks of some paths, or with `sparse` all that can be had. What does
        not fit one message is delivered before.

        Raises QuotaExceeded, BrokenPipeError (nobody waits any more) and what `deliver` raises;
        nothing is lent then.
        """
        self._last += 1
        lease = Lease(self._last, holder, self._end_s())
        self._leases[lease.number] = lease
        holder.leases.add(lease.number)
        try:
            statuses, rest = await self._lend(lease, paths, terms, deliver, sparse=sparse)
        except BaseException:
            self.end(lease)
            raise
        if not lease.loans:
            self.end(lease)
            return Grant(None, statuses, rest)
        return Grant(lease, statuses, rest)

    def _end_s(self) -> float:
        return trio.current_time() + self.volume.config.leases.max_lease_s

    async def _lend(
        self, lease: Lease, paths: Sequence[bytes], terms: Terms, deliver: Deliver, *, sparse: bool
    ) -> tuple[bytes, Loans]:
        directories = self.lookup.directories(terms.who)
        statuses, loans = bytearray(), Loans()
        for start in range(0, len(paths), BATCH_NAMES):
            names = await self.lookup.names(paths[start : start + BATCH_NAMES], directories)
            results = self._at_once(lease, names, terms, sparse=sparse)
            if None in results:
                await self._with_waiting(lease, names, results, terms)
            complete = self._cut(lease, results, sparse=sparse) and len(results) == len(names)
            statuses += bytes(_status_of(result) for result in results)
            loans = {
                start + place: result
                for place, result in enumerate(results) if isinstance(result, Loan)
            }  # fmt: skip
            if start + BATCH_NAMES >= len(paths) or not (complete or sparse):
                break
            if loans:
                await deliver(lease, loans)
            await trio.lowlevel.checkpoint()
        return bytes(statuses), loans

    def _at_once(
        self, lease: Lease, names: list[Name], terms: Terms, *, sparse: bool
    ) -> list[Result]:
        """What can be lent without waiting; None for what cannot. Unless `sparse` it ends at the
        first name that is none: a miss is known at once."""
        results: list[Result] = []
        loans: list[Loan] = []
        for result in self.lender.at_once(names, terms):
            results.append(result)
            if isinstance(result, Loan):
                loans.append(result)
            elif result is not None and not sparse:
                break
        if loans:
            self.volume.counters.tier(loans[0].block.tier.index).opens += len(loans)
            self._enter(lease, loans)
        return results

    def _enter(self, lease: Lease, loans: list[Loan]) -> None:
        """Count loans. Raises QuotaExceeded, with the blocks given back."""
        uid = lease.holder.who.uid
        try:
            if lease.number not in self._leases:
                raise QuotaExceeded("the lease ended before it was complete")
            self.quotas.charge(uid, sum(loan.row.size_bytes for loan in loans), len(loans))
        except QuotaExceeded:
            for loan in loans:
                self.lender.take_back(loan)
            raise
        lease.loans += loans
        if uid not in self.volume.config.tiering.quiet_uids:
            now_s = self.volume.clock.now_s()
            for loan in loans:
                self.volume.accesses.touch(loan.row.id, now_s)

    async def _with_waiting(
        self, lease: Lease, names: list[Name], results: list[Result], terms: Terms
    ) -> None:
        """Fill in what has to be waited for, a few at a time, as long as the client is there."""
        places = iter([place for place, result in enumerate(results) if result is None])
        failures: list[Exception] = []

        async def work() -> None:
            for place in places:
                result = await self.lender.in_time(names[place], terms)
                if isinstance(result, Loan):
                    try:
                        self._enter(lease, [result])
                    except KvfsError as error:
                        failures.append(error)
                        nursery.cancel_scope.cancel()
                        return
                results[place] = result

        async def watch() -> None:
            await lease.holder.hung_up()
            failures.append(BrokenPipeError("the client is gone"))
            nursery.cancel_scope.cancel()

        with self.quotas.waiting(terms.who.uid):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch)
                async with trio.open_nursery() as workers:
                    for _ in range(PARALLEL_WAITS):
                        workers.start_soon(work)
                nursery.cancel_scope.cancel()
        if failures:
            raise failures[0]

    def _cut(self, lease: Lease, results: list[Result], *, sparse: bool) -> bool:
        """Give back what was lent after the first path that was not, unless `sparse`; whether
        there was none."""
        misses = (place for place, result in enumerate(results) if not isinstance(result, Loan))
        first = next(misses, None)
        if first is None:
            return True
        if not sparse:
            for result in results[first + 1 :]:
                if isinstance(result, Loan):
                    lease.loans.remove(result)
                    self.quotas.refund(lease.holder.who.uid, result.row.size_bytes)
                    self.lender.take_back(result)
            del results[first + 1 :]
        return False

    # --- ending

    def renew(self, holder: Holder, numbers: Sequence[int]) -> int:
        """Let leases of this connection last anew; how many of them there are."""
        found = holder.leases.intersection(numbers)
        for number in found:
            self._leases[number].until_s = self._end_s()
            self._leases.move_to_end(number)
        return len(found)

    def release(self, holder: Holder, numbers: Sequence[int]) -> int:
        """End leases of this connection; how many of them there were."""
        found = holder.leases.intersection(numbers)
        for number in found:
            self.end(self._leases[number])
        return len(found)

    def leave(self, holder: Holder) -> None:
        """The connection is closed."""
        for number in list(holder.leases):
            self.end(self._leases[number])

    def end(self, lease: Lease) -> None:
        """Whatever the reason, and however often."""
        self._leases.pop(lease.number, None)
        lease.holder.leases.discard(lease.number)
        uid, loans = lease.holder.who.uid, lease.loans
        if loans:
            lease.loans = []
            self.quotas.refund(uid, sum(loan.row.size_bytes for loan in loans), len(loans))
            for loan in loans:
                self.lender.end(loan, uid)

    async def run(self) -> None:
        """End what was not renewed."""
        while True:
            await trio.sleep(EXPIRY_S)
            self.expire()

    def expire(self) -> None:
        """Those whose time is up."""
        now_s = trio.current_time()
        while self._leases:
            lease = next(iter(self._leases.values()))
            if lease.until_s > now_s:
                return
            self.volume.counters.count("leases_expired")
            self.end(lease)


def _status_of(result: Result) -> Status:
    if isinstance(result, Loan):
        return Status.FOUND
    return Status.BUSY if result is None else result
