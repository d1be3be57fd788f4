"""Which of the blocks that are loaded are checked against the checksum of their seal. Pure.

The daemon checks what it seals, copies and scrubs. A check here covers the rest of the way as well:
the medium, the transfer and the memory that the block was loaded into.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvfs.errors import UsageError

SMALL_BYTES = 256 << 10
ONE_IN = 32


@dataclass(frozen=True, slots=True)
class Verification:
    """Check every block up to `small_bytes`, and one in `one_in` of the larger ones.

    Larger blocks are counted over all calls, so every place in a prompt has its turn. `one_in` 1
    checks all, 0 none of the larger ones.
    """

    small_bytes: int = SMALL_BYTES
    one_in: int = ONE_IN

    def __post_init__(self) -> None:
        if self.small_bytes < 0 or self.one_in < 0:
            raise UsageError("a verification policy has no negative numbers")

    def wants(self, size_bytes: int, number: int) -> bool:
        """Whether to check the block that is the `number`-th of those loaded."""
        if size_bytes <= self.small_bytes:
            return True
        return self.one_in > 0 and number % self.one_in == 0


VERIFY_ALL = Verification(one_in=1)
TRUST_SEAL = Verification(small_bytes=0, one_in=0)
