"""One mount for each module, and a directory of its own in it for each test."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.live import config_in, live, scratch
from tests.mounting import MountedKvfs


@pytest.fixture(scope="module")
def shared_log() -> list[str]:
    """Patterns of warnings that tests of the module provoke in the daemon's log."""
    return []


@pytest.fixture(scope="module", params=["auto", "off"], ids=["passthrough", "served"])
def shared(shared_log: list[str], request: pytest.FixtureRequest) -> Iterator[MountedKvfs]:
    """Three tiers of 64, 128 and 256 MiB, on which nothing is promoted by heat.

    Once with reads that go past the daemon, where the machine can, and once without.
    """
    with scratch() as base:
        mount = MountedKvfs(base, config_in(base, passthrough=request.param))
        with live(mount, shared_log):
            yield mount


@pytest.fixture
def there(shared: MountedKvfs, request: pytest.FixtureRequest) -> Path:
    """An empty directory in the shared mount."""
    prefix = re.sub(r"\W+", "-", request.node.name)[:60] + "-"
    directory = Path(tempfile.mkdtemp(prefix=prefix, dir=shared.path))
    directory.chmod(0o755)
    return directory
