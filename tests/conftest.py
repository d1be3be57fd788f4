"""What all levels share: the Hypothesis profile, tier directories, and the log as a witness.

A test fails on any WARNING or worse in the log that it did not announce with `expect_log`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from kvfs.config import Config, MountConfig, TierConfig, TieringConfig
from kvfs.tiers.seal import ignore_lease_breaks
from tests.mounting import MountedKvfs
from tests.soak import FACTOR, SOAKING, version

settings.register_profile(
    "kvfs",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("kvfs")
# As every daemon does: one that a test runs in threads of its own shares the process's signals.
ignore_lease_breaks()

MIB = 1 << 20


@pytest.fixture(scope="session", autouse=True)
def about_the_soak(record_testsuite_property: Callable[[str, object], None]) -> None:
    """For the report of a soak: of what it was, and how long."""
    if SOAKING:
        record_testsuite_property("version", version())
        record_testsuite_property("factor", FACTOR)


@pytest.fixture
def expect_log() -> list[str]:
    """Patterns of warnings that the test provokes: `expect_log.append("tier hdd lost")`."""
    return []


@pytest.fixture(autouse=True)
def no_surprise_in_log(caplog: pytest.LogCaptureFixture, expect_log: list[str]) -> Iterator[None]:
    """Fail on a warning that nobody expected."""
    yield
    surprises = [
        record.getMessage()
        for when in ("setup", "call")
        for record in caplog.get_records(when)
        if record.levelno >= logging.WARNING and record.name.startswith("kvfs")
    ]
    surprises = [line for line in surprises if not any(re.search(p, line) for p in expect_log)]
    assert not surprises, surprises


TierDirectories = dict[str, Path]


@pytest.fixture
def tier_directories(tmp_path: Path) -> TierDirectories:
    """Three empty directories to be tiers."""
    directories = {name: tmp_path / name for name in ("nvme", "hdd", "remote")}
    for directory in directories.values():
        directory.mkdir()
    return directories


@pytest.fixture
def make_config(tier_directories: TierDirectories) -> Callable[..., Config]:
    """A configuration of the three tiers; capacities in MiB, keywords are of `[tiering]`."""

    def make(
        nvme_mib: int = 64, hdd_mib: int = 128, remote_mib: int = 256, **tiering: object
    ) -> Config:
        sizes = {"nvme": nvme_mib, "hdd": hdd_mib, "remote": remote_mib}
        tiers = tuple(
            TierConfig(name=name, path=path, medium=name, capacity_bytes=sizes[name] * MIB)  # type: ignore[arg-type] # the names are media
            for name, path in tier_directories.items()
        )
        return Config(tier=tiers, tiering=TieringConfig(**tiering), mount=MountConfig())  # type: ignore[arg-type] # keywords of the caller

    return make


@pytest.fixture
def mounted(
    tmp_path: Path, make_config: Callable[..., Config], expect_log: list[str]
) -> Iterator[MountedKvfs]:
    """A real mount of three tiers by the installed command, unmounted after the test."""
    mount = MountedKvfs(tmp_path, make_config())
    mount.start()
    yield mount
    mount.stop()
    mount.check_log(expect_log)
