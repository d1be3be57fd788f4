"""A tier fails under the store: another one stands in, and nothing is lost or forgotten.

Faults are real where a directory can show them; where it cannot, the one call fails that a failing
medium would fail. tests/mount/test_fault_matrix.py does the same on a filesystem that fails.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvfs.blocks import blocks
from kvfs.errors import TierFull, TierOffline
from kvfs.mount import services
from kvfs.store import Store
from kvfs.tiers import backing, copying, forms
from kvfs.tiers.tier import Tier
from kvfs.upkeep import mover
from tests.store.helpers import (
    Workbench,
    assert_consistent,
    assert_no_litter,
    create,
    file_on,
    move,
    put,
    put_on,
    read,
    rename,
    row_at,
    seal_all,
    settle_all,
    take_away,
    tiers_of,
    unlink,
)

Failing = Callable[..., Any]


@pytest.fixture(autouse=True)
def announced(expect_log: list[str]) -> None:
    expect_log += ["tier (nvme|hdd|remote)", "fetching: "]


def failing_on(number: int, name: str, real: Failing) -> Failing:
    """A function whose first argument is the tier, and which fails on this one."""

    def call(tier: Tier, *arguments: Any) -> Any:
        if tier.name == name:
            raise OSError(number, os.strerror(number))
        return real(tier, *arguments)

    return call


def unmount(tier: Tier) -> Path:
    """An empty directory is in the place of the tier, and what was open of it finds nothing."""
    aside = Path(os.fsdecode(tier.root) + ".aside")
    root = Path(os.fsdecode(tier.root))
    aside.mkdir()
    for entry in list(root.iterdir()):
        entry.rename(aside / entry.name)
    return aside


def mount_again(tier: Tier, aside: Path) -> None:
    root = Path(os.fsdecode(tier.root))
    for entry in list(aside.iterdir()):
        entry.rename(root / entry.name)
    aside.rmdir()


def events(store: Store, event: str) -> dict[tuple[str, str], int]:
    """(reason, tier) -> count."""
    reasons = store.volume.counters.reasons
    return {(reason, tier): n for (name, reason, tier), n in reasons.items() if name == event}


# --- new files


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (errno.EIO, "failing"), (errno.ENOTCONN, "failing"), (errno.EROFS, "read-only"),
        (errno.ENOSPC, "full"), (errno.EDQUOT, "full"),
    ],
)  # fmt: skip
async def test_a_new_file_goes_to_the_next_tier_where_one_fails(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, number: int, shown: str
) -> None:
    store = await bench.start()
    monkeypatch.setattr(blocks, "create_file", failing_on(number, "nvme", backing.create_file))
    for path in (b"a", b"b"):
        block = await create(store, path, b"data")
        await store.blocks.close(block, writer=True)
        assert tiers_of(store, path) == ["hdd"]
    nvme = store.volume.tiers[0]
    assert nvme.health.shown == shown or (shown == "failing" and nvme.state == "degraded")
    tried_again = nvme.accepts
    assert not tried_again
    reason = errno.errorcode[number]
    assert events(store, "creates_redirected") == {(reason, "nvme"): 1}
    monkeypatch.undo()
    await nvme.examine()
    assert nvme.accepts
    await seal_all(store)
    assert await read(store, b"a") == b"data"
    await assert_consistent(store)


async def test_where_every_tier_fails_the_first_error_is_the_answer(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "it fails")

    monkeypatch.setattr(blocks, "create_file", fail)
    with pytest.raises(OSError, match="it fails"):
        await create(store, b"a")
    assert store.volume.catalog.resolve(b"a") is None
    await assert_consistent(store)


async def test_a_file_that_cannot_be_made_for_a_reason_of_its_own_goes_nowhere_else(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    monkeypatch.setattr(
        blocks, "create_file", failing_on(errno.EACCES, "nvme", backing.create_file)
    )
    with pytest.raises(PermissionError):
        await create(store, b"a")
    assert events(store, "creates_redirected") == {}


async def test_a_directory_is_made_although_the_tier_fails(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    nvme = store.volume.tiers[0]

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as failing:
        failing.setattr(nvme.files, "make_directories", fail)
        await store.namespace.mkdir(1, b"d", 0o755, os.getuid(), os.getgid())
    assert events(store, "mirrors_failed") == {("EIO", "nvme"): 1}
    await put(store, b"d/a", b"data")
    assert await read(store, b"d/a") == b"data"


# --- reads


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOTCONN, errno.ESTALE])
async def test_another_replica_is_read_where_a_tier_fails(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store = await bench.start()
    await put_on(store, b"a", b"data", "nvme", "hdd")
    monkeypatch.setattr(blocks, "open_file", failing_on(number, "nvme", backing.open_file))
    store.blocks.idle.forget(row_at(store, b"a").id)
    assert await read(store, b"a") == b"data"
    assert events(store, "opens_redirected") == {(errno.errorcode[number], "nvme"): 1}
    assert tiers_of(store, b"a") == ["nvme", "hdd"], "it is not lost for that"


async def test_where_all_replicas_fail_the_open_fails(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    await put_on(store, b"a", b"data", "nvme", "hdd")

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "it fails")

    monkeypatch.setattr(blocks, "open_file", fail)
    store.blocks.idle.forget(row_at(store, b"a").id)
    with pytest.raises(OSError, match="it fails"):
        await read(store, b"a")
    assert not store.replicas.open_blocks


async def test_a_remote_block_is_read_where_it_lies_when_staging_fails(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    await put_on(store, b"a", b"data", "remote")

    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as failing:
        failing.setattr(backing, "nameless_file", fail)
        assert await read(store, b"a") == b"data"
    assert events(store, "fetches_unstaged") == {("staging", "nvme"): 1}
    assert store.volume.tier_named("remote").health.shown == "online", "it is not to blame"
    await assert_consistent(store)


async def test_a_fetch_that_the_remote_tier_fails_is_its_error(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    await put_on(store, b"a", b"data", "remote")

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "it fails")

    monkeypatch.setattr(forms, "copy_file", fail)
    monkeypatch.setattr(backing, "is_readable", lambda *_: False)
    with pytest.raises(OSError, match="it fails"):
        await read(store, b"a")
    assert store.volume.tier_named("remote").state == "degraded"
    assert_no_litter(store)


async def test_a_fetch_that_ends_before_its_length_is_an_error(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a short read: a file that got shorter while it was copied."""
    source, target = bench.config.tier[0].path / "source", bench.config.tier[0].path / "target"
    source.write_bytes(bytes(100))
    monkeypatch.setattr(copying, "_copy_range", lambda *_: 0)
    with (
        source.open("rb") as read_from,
        target.open("wb") as write_to,
        pytest.raises(OSError, match="ends before its length") as refused,
    ):
        copying.copy_file(read_from.fileno(), write_to.fileno())
    assert refused.value.errno == errno.EIO


# --- a tier that is not there: what is missing on it is not lost


@pytest.mark.semantics("S-failing-6")
@pytest.mark.parametrize("place", ["nvme", "hdd", "remote"])
async def test_blocks_of_a_tier_that_is_gone_are_not_lost(bench: Workbench, place: str) -> None:
    store = await bench.start()
    await put_on(store, b"d/a", b"data", place)
    store.blocks.idle.forget(row_at(store, b"d/a").id)
    tier = store.volume.tier_named(place)
    aside = unmount(tier)
    with pytest.raises(TierOffline, match="not mounted"):
        await read(store, b"d/a")
    assert tier.state == "offline"
    assert tiers_of(store, b"d/a") == [place]
    mount_again(tier, aside)
    await tier.examine()
    assert await read(store, b"d/a") == b"data"
    await assert_consistent(store)


@pytest.mark.semantics("S-failing-6")
async def test_nothing_is_written_where_a_tier_was_mounted(bench: Workbench) -> None:
    store = await bench.start()
    store.volume.tiers[0].draining = True
    tier = store.volume.tier_named("hdd")
    aside = unmount(tier)
    block = await create(store, b"new/a", b"data")
    await store.blocks.close(block, writer=True)
    assert tiers_of(store, b"new/a") == ["remote"]
    assert list(Path(os.fsdecode(tier.root)).iterdir()) == []
    mount_again(tier, aside)


@pytest.mark.parametrize("place", ["nvme", "hdd", "remote"])
async def test_an_unlink_on_a_tier_that_is_gone_is_done_when_it_is_back(
    bench: Workbench, place: str
) -> None:
    store = await bench.start()
    await put_on(store, b"d/a", b"data", place)
    tier = store.volume.tier_named(place)
    aside = unmount(tier)
    await unlink(store, b"d/a")
    with pytest.raises(OSError, match="not mounted"):
        await store.replicas.settle(tier)
    mount_again(tier, aside)
    await tier.examine()
    await settle_all(store)
    assert not file_on(store, place, b"d/a").exists()
    await assert_consistent(store)


@pytest.mark.parametrize("place", ["nvme", "hdd", "remote"])
async def test_a_rename_on_a_tier_that_is_gone_is_done_when_it_is_back(
    bench: Workbench, place: str
) -> None:
    store = await bench.start()
    await put_on(store, b"d/a", b"data", place)
    tier = store.volume.tier_named(place)
    aside = unmount(tier)
    await rename(store, b"d/a", b"d/b")
    mount_again(tier, aside)
    await tier.examine()
    await settle_all(store)
    assert file_on(store, place, b"d/b").read_bytes() == b"data"
    assert await read(store, b"d/b") == b"data"
    await assert_consistent(store)


async def test_a_tier_that_was_away_after_a_crash_is_walked_when_it_is_back(
    bench: Workbench,
) -> None:
    store = await bench.start()
    number = await put_on(store, b"d/a", b"data", "remote")
    path = store.volume.tier_named("remote").config.path
    with store.volume.catalog.transaction("test"):
        store.volume.catalog.delete(number)
    aside = path.with_name("aside")
    path.rename(aside)
    store = await bench.restart_after_crash(store)
    await store.recovery.reconcile()
    assert store.volume.catalog.resolve(b"d/a") is None
    aside.rename(path)
    remote = store.volume.tier_named("remote")
    await remote.examine()
    await services._catch_up(store, remote)
    assert await read(store, b"d/a") == b"data"
    assert store.recovery.unwalked == set()
    await assert_consistent(store)


# --- removals


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS])
async def test_an_unlink_that_the_fastest_tier_fails_is_promised(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store = await bench.start()
    await put(store, b"a", b"data")
    nvme = store.volume.tiers[0]

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as failing:
        failing.setattr(nvme, "remove", fail)
        await unlink(store, b"a")
    assert store.volume.catalog.resolve(b"a") is None
    assert nvme.health.shown != "online"
    assert store.volume.space[0].held_bytes > 0, "its bytes are still there"
    await nvme.examine()
    await settle_all(store)
    assert not file_on(store, "nvme", b"a").exists()
    await assert_consistent(store)


async def test_a_promise_that_cannot_be_kept_holds_up_no_other(
    bench: Workbench, expect_log: list[str]
) -> None:
    expect_log.append("unlink of 'd/stuck' is still promised")
    store = await bench.start()
    hdd = store.volume.tier_named("hdd")
    for path in (b"d/stuck", b"d/other", b"e/third"):
        await put_on(store, path, b"data", "hdd")
        await unlink(store, path)
    stuck = file_on(store, "hdd", b"d/stuck")
    stuck.unlink()
    stuck.mkdir()
    await store.replicas.settle(hdd)
    assert [i.path for i in store.volume.catalog.intents.left(hdd.number)] == [b"d/stuck"]
    assert events(store, "promises_stuck") == {("EISDIR", "hdd"): 1}
    assert hdd.health.shown == "online"
    stuck.rmdir()
    await settle_all(store)
    await assert_consistent(store)


async def test_what_comes_after_a_stuck_promise_for_the_same_path_waits(bench: Workbench) -> None:
    store = await bench.start()
    hdd = store.volume.tier_named("hdd")
    await put_on(store, b"d/a", b"data", "hdd")
    take_away(hdd)
    await rename(store, b"d/a", b"d/b")
    await rename(store, b"d/b", b"d/c")
    hdd.health.probed("")
    in_the_way = file_on(store, "hdd", b"d/b")
    in_the_way.mkdir()
    (in_the_way / "x").write_bytes(b"")
    await store.replicas.settle(hdd)
    assert len(store.volume.catalog.intents.left(hdd.number)) == 2
    (in_the_way / "x").unlink()
    in_the_way.rmdir()
    await settle_all(store)
    assert await read(store, b"d/c") == b"data"
    await assert_consistent(store)


# --- moves: who is to blame


@pytest.mark.parametrize(
    ("source", "target"), [("nvme", "hdd"), ("hdd", "nvme"), ("hdd", "remote")]
)
@pytest.mark.parametrize("fault", ["source", "target"])
async def test_a_copy_blames_the_tier_that_failed(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, source: str, target: str, fault: str
) -> None:
    store = await bench.start()
    await put_on(store, b"a", b"data", source)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "it fails")

    with monkeypatch.context() as failing:
        failing.setattr(forms, "copy_file", fail)
        failing.setattr(mover, "is_readable", lambda *_: fault == "target")
        with pytest.raises(OSError, match="it fails"):
            await move(store, "demote", b"a", source, target)
    bad = source if fault == "source" else target
    shown = {tier.name: tier.state for tier in store.volume.tiers}
    assert shown == {name: "degraded" if name == bad else "online" for name in shown}
    assert_no_litter(store)
    assert tiers_of(store, b"a") == [source]


async def test_a_target_without_quota_takes_nothing_more(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    await put(store, b"a", b"data")

    def fail(*_: object) -> int:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as failing:
        failing.setattr(forms, "copy_file", fail)
        with pytest.raises(TierFull, match="quota"):
            await move(store, "demote", b"a", "nvme", "hdd")
    hdd = store.volume.tier_named("hdd")
    assert (hdd.health.shown, hdd.accepts) == ("full", False)
    await hdd.examine()
    assert await move(store, "demote", b"a", "nvme", "hdd")
    await assert_consistent(store)
