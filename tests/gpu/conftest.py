"""The device under test: the host always, a GPU where there is one.

`KVFS_TEST_MACHINE=stub` puts the stub driver in their place; test_contract_stubdriver.py does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from kvfs.gpu.probe import probe
from tests.gpu.machines import Machine, machine_of

CHOSEN = os.environ.get("KVFS_TEST_MACHINE")
KINDS: list[object] = [CHOSEN or "host"]
if not CHOSEN and probe().usable:
    KINDS.append(pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(scope="session", params=KINDS)
def machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    machine = machine_of(request.param, tmp_path_factory.mktemp("driver"))
    yield machine
    machine.close()
