"""A client of the lease table in the test's own process: it gets duplicates, as by a socket."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import trio

from kvfs.config import LeaseWait
from kvfs.leasing.credentials import Credentials
from kvfs.leasing.leases import Holder, Lease
from kvfs.leasing.lending import Loan, Terms
from kvfs.leasing.lookup import Status
from kvfs.store import Store

ROOT = Credentials(0, 0)
STRANGER = Credentials(4711, 4711)


@dataclass
class Borrowed:
    """What one request got."""

    lease: Lease | None
    statuses: list[str]
    descriptors: dict[int, int]

    @property
    def number(self) -> int:
        assert self.lease is not None, "nothing was leased"
        return self.lease.number

    def read(self, place: int = 0) -> bytes:
        """All of a block, which may be open with O_DIRECT."""
        path = f"/proc/self/fd/{self.descriptors[place]}"
        with open(path, "rb") as file:
            return file.read()

    def close(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.popitem()[1])


@dataclass
class Borrower:
    """One connection."""

    store: Store
    who: Credentials = ROOT
    holder: Holder = field(init=False)
    loans: list[Loan] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.holder = Holder(self.who)

    async def lease(
        self, *paths: bytes, direct: bool = False, wait: LeaseWait = "staging",
        deadline_s: float = 10.0, sparse: bool = False,
    ) -> Borrowed:  # fmt: skip
        descriptors: dict[int, int] = {}

        async def deliver(lease: Lease, loans: dict[int, Loan]) -> None:
            for place, loan in loans.items():
                descriptors[place] = os.dup(loan.descriptor)
                self.loans.append(loan)

        terms = Terms(self.who, direct, wait, trio.current_time() + deadline_s)
        try:
            lease, statuses, rest = await self.store.leases.grant(
                self.holder, paths, terms, deliver, sparse=sparse
            )
            if lease is not None:
                await deliver(lease, rest)
        except BaseException:
            Borrowed(None, [], descriptors).close()
            raise
        return Borrowed(lease, [Status(status).name for status in statuses], descriptors)

    async def give_back(self, borrowed: Borrowed) -> None:
        """As a client does that closes first; returns when the daemon has noticed."""
        borrowed.close()
        if borrowed.lease is not None:
            self.store.leases.release(self.holder, [borrowed.number])
        await self.store.lingering.settle()
