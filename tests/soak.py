"""How long the long-running tests run: short in `make test`, many times longer in `make soak`.

Such a test carries `@pytest.mark.soak`, takes its length from `longer`, and says with pytest's
`record_property` how much it did, for docs/RELIABILITY.md. `make soak` sets KVFS_SOAK to how many
times as long they shall run, and runs only these, without a time limit for each.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from kvfs import __version__

FACTOR = int(os.environ.get("KVFS_SOAK") or 0)
SOAKING = FACTOR > 0
Did = Callable[[str, object], None]
"""The type of `record_property`."""


def longer(short: int) -> int:
    """A count: as given, or in a soak so many times as much."""
    return short * FACTOR if SOAKING else short


def version() -> str:
    """Of what is tested: the version, and the commit where there is one."""
    root = Path(__file__).parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    commit = found.stdout.strip()
    return f"{__version__} ({commit})" if commit else __version__
