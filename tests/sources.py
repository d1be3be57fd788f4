"""The modules of kvfs, for tests that read its source."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]


def modules_below(*folders: str) -> list[Path]:
    """All of these folders of the tree and of the folders in them, but not behind links."""
    found = [
        Path(directory) / name
        for folder in folders
        for directory, _, names in os.walk(ROOT / folder)
        for name in names
        if name.endswith(".py")
    ]
    assert found, "a folder was renamed"
    return sorted(found)
