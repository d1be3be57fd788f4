"""The verbs of the client library: look up, lease, prefetch and put blocks."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

import msgspec
import trio
from msgspec import Meta

from kvfs.blocks.attributes import CODEC_NAMES
from kvfs.catalog.rows import Kind
from kvfs.config import LeaseWait
from kvfs.errors import UsageError
from kvfs.leasing.credentials import READ
from kvfs.leasing.leases import Lease, Loans
from kvfs.leasing.lending import Loan, Terms
from kvfs.leasing.lookup import BATCH_NAMES
from kvfs.leasing.puts import Order, Stored
from kvfs.mount.peers import Answer, Peer, Report
from kvfs.store import Store

Verb = Callable[[Peer, dict[str, Any], Report], Awaitable[dict[str, Any] | Answer]]
T = TypeVar("T", bound=msgspec.Struct)

MOST_PATHS = 65_536
MOST_WAIT_S = 600.0
PREFETCH_S = 60.0


_Paths = Annotated[list[bytes], Meta(max_length=MOST_PATHS)]
_Numbers = Annotated[list[int], Meta(max_length=MOST_PATHS)]
_Seconds = Annotated[float, Meta(ge=0)]
_Checksum = Annotated[bytes, Meta(min_length=16, max_length=16)]


class LookupArgs(msgspec.Struct, forbid_unknown_fields=True):
    paths: _Paths


class LeaseArgs(msgspec.Struct, forbid_unknown_fields=True):
    paths: _Paths
    direct: bool = False
    wait: LeaseWait | None = None
    deadline_s: _Seconds | None = None
    sparse: bool = False


class NumbersArgs(msgspec.Struct, forbid_unknown_fields=True):
    leases: _Numbers


class PrefetchArgs(msgspec.Struct, forbid_unknown_fields=True):
    paths: _Paths
    deadline_s: _Seconds = PREFETCH_S


class PutArgs(msgspec.Struct, forbid_unknown_fields=True):
    path: bytes
    size_bytes: Annotated[int, Meta(ge=0, le=1 << 40)]
    checksum: _Checksum | None = None
    mode: Annotated[int, Meta(ge=0, le=0o777)] = 0o644
    replace: bool = False
    direct: bool = False


class CommitArgs(msgspec.Struct, forbid_unknown_fields=True):
    put: int
    checksum: _Checksum | None = None


class AbortArgs(msgspec.Struct, forbid_unknown_fields=True):
    put: int


class LeaseVerbs:
    """Owned by the trio loop."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.verbs: dict[str, Verb] = {
            "lookup": self.lookup, "lease": self.lease, "renew": self.renew,
            "release": self.release, "prefetch": self.prefetch, "put_begin": self.put_begin,
            "put_commit": self.put_commit, "put_abort": self.put_abort,
        }  # fmt: skip

    def _tiers(self) -> list[str]:
        return [tier.name for tier in self.store.volume.tiers]

    async def lookup(self, peer: Peer, args: dict[str, Any], report: Report) -> dict[str, Any]:
        """How many paths from the first one on are blocks, and on which tiers."""
        asked = _convert(args, LookupArgs)
        hits = await self.store.lookup.leading(asked.paths, peer.who)
        return {
            "found": len(hits.tiers), "stopped": hits.stopped.name.lower(),
            "tiers": self._tiers(), "at": bytes(hits.tiers),
        }  # fmt: skip

    async def lease(self, peer: Peer, args: dict[str, Any], report: Report) -> Answer:
        """Descriptors of blocks, and the claim that they stay."""
        asked = _convert(args, LeaseArgs)
        config = self.store.volume.config.leases
        wait_s = config.deadline_s if asked.deadline_s is None else asked.deadline_s
        until_s = trio.current_time() + min(wait_s, MOST_WAIT_S)
        terms = Terms(peer.who, asked.direct, asked.wait or config.wait, until_s)

        async def deliver(lease: Lease, loans: Loans) -> None:
            part = _part(lease, loans)
            await report(part.result, part.descriptors)

        lease, statuses, rest = await self.store.leases.grant(
            peer.holder, asked.paths, terms, deliver, sparse=asked.sparse
        )
        part = _part(lease, rest)
        result = {
            **part.result, "statuses": statuses, "tiers": self._tiers(),
            "codecs": list(CODEC_NAMES.values()), "max_lease_s": config.max_lease_s,
        }  # fmt: skip
        return Answer(result, part.descriptors)

    async def renew(self, peer: Peer, args: dict[str, Any], report: Report) -> dict[str, Any]:
        """Let leases last anew."""
        renewed = self.store.leases.renew(peer.holder, _convert(args, NumbersArgs).leases)
        return {"renewed": renewed, "max_lease_s": self.store.volume.config.leases.max_lease_s}

    async def release(self, peer: Peer, args: dict[str, Any], report: Report) -> dict[str, Any]:
        """End leases. Those that ended before are fine."""
        numbers = _convert(args, NumbersArgs).leases
        return {"released": self.store.leases.release(peer.holder, numbers)}

    async def prefetch(self, peer: Peer, args: dict[str, Any], report: Report) -> dict[str, Any]:
        """Have blocks on the fastest tier soon."""
        asked = _convert(args, PrefetchArgs)
        until_s = trio.current_time() + min(asked.deadline_s, MOST_WAIT_S)
        lookup, get = self.store.lookup, self.store.volume.catalog.get
        directories, answers = lookup.directories(peer.who), Counter[str]()
        for start in range(0, len(asked.paths), BATCH_NAMES):
            names = await lookup.names(asked.paths[start : start + BATCH_NAMES], directories)
            rows = [get(name.inode) for name in names if name.inode]
            wanted = [
                row.id for row in rows
                if row is not None and row.kind == Kind.BLOCK and peer.who.may(row, READ)
            ]  # fmt: skip
            answers.update(self.store.prefetcher.ask(wanted, until_s)._asdict())
            answers["missing"] += len(names) - len(wanted)
            await trio.lowlevel.checkpoint()
        return {key: answers[key] for key in ("accepted", "there", "refused", "missing")}

    async def put_begin(self, peer: Peer, args: dict[str, Any], report: Report) -> dict[str, Any]:
        """A descriptor to write a new block to."""
        asked = _convert(args, PutArgs)
        begun = await self.store.puts.begin(peer.holder, Order(**msgspec.structs.asdict(asked)))
        if isinstance(begun, Stored):
            return {"put": 0, **self._stored(begun)}
        put, descriptor = begun
        try:
            await report({"put": put.number}, [descriptor])
        finally:
            os.close(descriptor)
        return {"put": put.number}

    async def put_commit(self, peer: Peer, args: dict[str, Any], report: Report) -> dict[str, Any]:
        """Give what was written its name."""
        asked = _convert(args, CommitArgs)
        return self._stored(await self.store.puts.commit(peer.holder, asked.put, asked.checksum))

    async def put_abort(self, peer: Peer, args: dict[str, Any], report: Report) -> dict[str, Any]:
        """Forget what was written."""
        await self.store.puts.abort(peer.holder, _convert(args, AbortArgs).put)
        return {}

    def _stored(self, stored: Stored) -> dict[str, Any]:
        row = stored.row
        there = self.store.attributes.replica_names(row.id)
        return {
            "created": stored.created, "size_bytes": row.size_bytes, "checksum": row.checksum,
            "generation": row.generation, "tier": there[0] if there else "",
        }  # fmt: skip

    async def farewell(self, peer: Peer) -> None:
        """The connection is closed: nothing of it stays."""
        self.store.leases.leave(peer.holder)
        with trio.CancelScope(shield=True):
            await self.store.puts.leave(peer.holder)


def _convert(args: dict[str, Any], kind: type[T]) -> T:
    """Arguments of a verb, checked. Raises UsageError."""
    try:
        return msgspec.convert(args, kind)
    except msgspec.ValidationError as error:
        raise UsageError(f"bad arguments: {error}") from None


def _part(lease: Lease | None, loans: Loans) -> Answer:
    """Some blocks of a lease."""
    rows = [_row(place, loan) for place, loan in loans.items()]
    descriptors = [loan.descriptor for loan in loans.values()]
    return Answer({"lease": lease.number if lease else 0, "blocks": rows}, descriptors)


def _row(place: int, loan: Loan) -> tuple[int, int, bytes | None, int, int, int, bool]:
    """(position, size, checksum, generation, tier, codec, direct) of a block."""
    row = loan.row
    return (
        place, row.size_bytes, row.checksum, row.generation, loan.block.tier.index, loan.codec,
        loan.direct,
    )  # fmt: skip
