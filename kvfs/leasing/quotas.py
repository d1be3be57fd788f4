"""What one user may hold at one time: leases, their bytes, and requests that wait.

A user is a uid: all his processes and connections count together, because the kernel vouches for
nothing smaller.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from dataclasses import dataclass

from kvfs.config import LeasesConfig
from kvfs.errors import QuotaExceeded
from kvfs.leasing.lingering import Lingering
from kvfs.units import format_size
from kvfs.volume.volume import Volume

# Descriptors of the daemon that leases may take: the mount needs the others.
DESCRIPTORS_PART = 4


@dataclass(slots=True)
class Account:
    """What all connections of one user hold."""

    leases: int = 0
    size_bytes: int = 0
    waiting: int = 0

    @property
    def empty(self) -> bool:
        return not (self.leases or self.size_bytes or self.waiting)


class Quotas:
    """Owned by the trio loop."""

    def __init__(self, volume: Volume, lingering: Lingering) -> None:
        self.volume = volume
        self.lingering = lingering
        self.total = Account()
        self._accounts: dict[int, Account] = {}
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most_leases = descriptors // DESCRIPTORS_PART

    @property
    def _config(self) -> LeasesConfig:
        return self.volume.config.leases

    def account(self, uid: int) -> Account:
        """A user's account; one that holds nothing is not kept."""
        return self._accounts.get(uid) or Account()

    def charge(self, uid: int, size_bytes: int, blocks: int = 1) -> None:
        """More blocks, of so many bytes together. Raises QuotaExceeded, and none of them counts."""
        account, total = self._accounts.get(uid) or Account(), self.total
        self._check(uid, account, size_bytes, blocks)
        self._accounts[uid] = account
        account.leases += blocks
        account.size_bytes += size_bytes
        total.leases += blocks
        total.size_bytes += size_bytes

    def _check(self, uid: int, account: Account, size_bytes: int, blocks: int) -> None:
        config, open_still = self._config, self.lingering.of_user[uid]
        leased = account.leases + blocks
        if leased > config.max_leases:
            why = f"{leased} blocks would be leased, of at most {config.max_leases}: release some"
            raise self._refusal(why, reason="leases")
        if leased + open_still > 2 * config.max_leases:
            why = f"{open_still} files are open after their lease: close them"
            raise self._refusal(why, reason="open")
        if account.size_bytes + size_bytes > config.max_bytes:
            held, most = format_size(account.size_bytes + size_bytes), format_size(config.max_bytes)
            why = f"{held} would be leased, of at most {most}: release some"
            raise self._refusal(why, reason="bytes")
        if self.total.leases + self.lingering.total + blocks > self._most_leases:
            why = "too many blocks are leased with those of others: the daemon needs descriptors"
            raise self._refusal(why, reason="descriptors")

    def refund(self, uid: int, size_bytes: int, blocks: int = 1) -> None:
        """Fewer blocks."""
        for counted in (self._accounts[uid], self.total):
            counted.leases -= blocks
            counted.size_bytes -= size_bytes
        self._tidy(uid)

    @contextlib.contextmanager
    def waiting(self, uid: int) -> Iterator[None]:
        """Around a request that waits. Raises QuotaExceeded."""
        account = self._accounts.setdefault(uid, Account())
        if account.waiting >= self._config.max_waiting:
            raise self._refusal(f"{account.waiting} requests wait already", reason="waiting")
        account.waiting += 1
        try:
            yield
        finally:
            account.waiting -= 1
            self._tidy(uid)

    def _tidy(self, uid: int) -> None:
        if self._accounts[uid].empty:
            del self._accounts[uid]

    def _refusal(self, why: str, *, reason: str) -> QuotaExceeded:
        self.volume.counters.count("leases_refused", reason=reason)
        return QuotaExceeded(f"of this user {why}")
