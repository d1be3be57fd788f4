"""What the client library gives out: leased blocks, hits, and what became of a put."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import msgspec

PathLike = str | bytes | os.PathLike[str]
Wait = Literal["staging", "promote", "none"]
# Why a path was not leased, or is no hit; "found" is the other one.
Outcome = Literal["found", "missing", "denied", "busy", "offline"]
OUTCOMES: tuple[Outcome, ...] = ("found", "missing", "denied", "busy", "offline")


class LeasedBlock(msgspec.Struct, frozen=True):
    """One block that may be read by its descriptor until the lease ends.

    `size_bytes` and `checksum` (XXH3-128) are those of the block's bytes; None where nobody can
    say. With `codec` "raw" the file holds just those. `direct`: the descriptor has O_DIRECT.
    """

    path: bytes
    fd: int
    size_bytes: int
    checksum: bytes | None
    generation: int
    tier: str | None
    codec: str = "raw"
    direct: bool = False

    def fileno(self) -> int:
        """The descriptor, for what takes files."""
        return self.fd


@dataclass(slots=True, eq=False)
class Leased:
    """A lease: as a sequence it has the leading blocks, of which the first that is not there ends
    the prefix. `blocks` has one place for each path, None where the block was not leased."""

    blocks: tuple[LeasedBlock | None, ...]
    outcomes: tuple[Outcome, ...]
    # The daemon's numbers of it, and the connection on which they mean something.
    numbers: tuple[int, ...] = ()
    connection: int = 0
    prefix: int = field(init=False)

    def __post_init__(self) -> None:
        blocks = self.blocks
        self.prefix = blocks.index(None) if None in blocks else len(blocks)

    def __len__(self) -> int:
        return self.prefix

    def __iter__(self) -> Iterator[LeasedBlock]:
        return iter(self._leading)

    def __getitem__(self, place: int) -> LeasedBlock:
        return self._leading[place]

    @property
    def _leading(self) -> tuple[LeasedBlock, ...]:
        return tuple(block for block in self.blocks[: self.prefix] if block is not None)

    @property
    def stopped(self) -> Outcome:
        """Why the prefix is not longer; "found" when it is all there is."""
        return self.outcomes[self.prefix] if self.prefix < len(self.outcomes) else "found"

    def close_descriptors(self) -> None:
        """Close what is open of it; repeating is harmless."""
        blocks, self.blocks = self.blocks, (None,) * len(self.blocks)
        self.prefix = 0
        for block in blocks:
            if block is not None:
                os.close(block.fd)


@dataclass(frozen=True, slots=True)
class Hits:
    """The leading paths that are blocks: the fastest tier of each, None where nobody can say.

    `stopped` is why there are no more; "found" when all are.
    """

    tiers: tuple[str | None, ...]
    stopped: Outcome = "found"

    def __len__(self) -> int:
        return len(self.tiers)


@dataclass(frozen=True, slots=True)
class Match:
    """The longest cached prefix of a prompt: the paths of its blocks, and their tiers."""

    paths: tuple[bytes, ...]
    tiers: tuple[str | None, ...]
    tokens: int

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True, slots=True)
class Stored:
    """The block that has the name now; `created` unless it was there with the same content."""

    created: bool
    size_bytes: int
    checksum: bytes | None
    tier: str | None


@dataclass(frozen=True, slots=True)
class Prefetched:
    """What became of the paths of a prefetch: `accepted` are on their way, `there` on the fastest
    tier already, `refused` for want of room in the queue, `missing` are none."""

    accepted: int = 0
    there: int = 0
    refused: int = 0
    missing: int = 0
