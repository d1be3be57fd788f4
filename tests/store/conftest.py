"""Fixtures of the store's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from kvfs.config import Config
from tests.store.helpers import Workbench
from tests.store.packing import compressing


@pytest.fixture
def bench(make_config: Callable[..., Config]) -> Iterator[Workbench]:
    """Three empty tiers; what a test leaves open is closed."""
    workbench = Workbench(make_config)
    yield workbench
    workbench.close_all()


@pytest.fixture
def packing(bench: Workbench) -> Workbench:
    """hdd and remote compress."""
    bench.config = compressing(bench.config, hdd="zstd", remote="zstd")
    return bench
