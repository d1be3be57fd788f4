"""How long the long-running tests run: short in `make test`, many times longer in `make soak`.

Such a test carries `@pytest.mark.soak` and takes its length from `longer`. `make soak` sets
KVFS_SOAK and runs only these, without a time limit for each.
"""

from __future__ import annotations

import os

SOAKING = os.environ.get("KVFS_SOAK", "0") not in ("", "0")
FACTOR = 100


def longer(short: int) -> int:
    """A count: as given, or in a soak a hundred times as much."""
    return short * FACTOR if SOAKING else short
