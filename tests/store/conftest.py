"""Fixtures of the store's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from kvfs.config import Config
from tests.store.helpers import Workbench


@pytest.fixture
def bench(make_config: Callable[..., Config]) -> Iterator[Workbench]:
    """Three empty tiers; what a test leaves open is closed."""
    workbench = Workbench(make_config)
    yield workbench
    workbench.close_all()
