"""The handlers of the mount on a store in temporary directories, without a kernel."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pyfuse3
import pytest

from kvfs.config import Config
from kvfs.mount.control_dir import ControlDirectory
from kvfs.mount.operations import Operations
from kvfs.mount.passthrough import Passthrough
from kvfs.store import Store
from kvfs.volume.volume import open_volume
from tests.ops.serving import Served


@pytest.fixture
async def operations(make_config: Callable[..., Config]) -> AsyncIterator[Operations]:
    """Handlers over three empty tiers; no service runs beside them."""
    volume = open_volume(make_config())
    store = Store(volume)
    await store.recovery.before_serving()
    control = ControlDirectory({b"stats": lambda: b"{}", b"tiers": lambda: b"[]"})
    made = Operations(store, control, Passthrough())
    yield made
    await made.close_all()
    volume.close(clean=True)


@pytest.fixture
def context() -> pyfuse3.RequestContext:
    """A request of root."""
    return pyfuse3.RequestContext()


@pytest.fixture
def nvme(tier_directories: dict[str, Path]) -> Path:
    """The directory of the fastest tier."""
    return tier_directories["nvme"]


@pytest.fixture
def served(make_config: Callable[..., Config], tmp_path: Path) -> Iterator[Served]:
    """A daemon without a mount over three empty tiers, in a thread."""
    daemon = Served(make_config(), tmp_path / "run" / "kvfs.sock")
    daemon.start()
    yield daemon
    daemon.stop()
