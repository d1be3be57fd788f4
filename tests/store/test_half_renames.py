"""A rename that cannot be carried out at this moment, or not to its end: nothing is lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

from kvfs.fsck import Finding, check_online
from kvfs.store import Store
from tests.store.helpers import (
    Workbench,
    assert_consistent,
    put_on,
    read,
    rename,
    row_at,
    settle_all,
    tiers_of,
)


def fail_with(number: int) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


async def findings(store: Store) -> list[Finding]:
    async def progress(done: int, total: int) -> None:
        pass

    return list((await check_online(store, repair=False, progress=progress)).findings)


@pytest.mark.parametrize("tiers", [("nvme",), ("hdd",), ("nvme", "hdd")])
@pytest.mark.parametrize(
    ("step", "number"),
    [
        ("rename_into_place", errno.EMFILE),
        ("_raise_generation", errno.EMFILE),
        ("_raise_generation", errno.ENOSPC),
    ],
)
async def test_a_rename_that_fails_half_way_loses_neither_block(
    bench: Workbench,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    number: int,
    tiers: tuple[str, ...],
) -> None:
    """It is done later, or refused; a block is never given up for it."""
    store = await bench.start()
    await put_on(store, b"d/old", b"old", "nvme")
    await put_on(store, b"d/new", b"new", *tiers)
    monkeypatch.setattr(f"kvfs.volume.replicas.{step}", fail_with(number))
    try:
        await rename(store, b"d/new", b"d/old")
        expected = {b"d/old": b"new"}
    except OSError:
        expected = {b"d/old": b"old", b"d/new": b"new"}
    monkeypatch.undo()
    for path, data in expected.items():
        assert await read(store, path) == data
    await settle_all(store)
    assert tiers_of(store, b"d/new" if b"d/new" in expected else b"d/old") == list(tiers)
    await assert_consistent(store)
    assert await findings(store) == []


@pytest.mark.parametrize("tiers", [("nvme",), ("hdd",), ("nvme", "hdd")])
async def test_a_refused_rename_leaves_the_seal_records_right(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, tiers: tuple[str, ...]
) -> None:
    store = await bench.start()
    await put_on(store, b"d/a", b"data", *tiers)
    before = row_at(store, b"d/a").generation
    monkeypatch.setattr("kvfs.volume.replicas.rename_into_place", fail_with(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        await rename(store, b"d/a", b"d/b")
    monkeypatch.undo()
    assert row_at(store, b"d/a").generation == before
    assert await read(store, b"d/a") == b"data"
    await assert_consistent(store)
    assert await findings(store) == []
