"""Quarantine: what it keeps, how long, how much, and what it costs the tier."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs import layout
from kvfs.blocks import quarantine
from kvfs.blocks.quarantine import Quarantined, look
from kvfs.store import Store
from kvfs.tiers.tier import Tier
from tests.store.helpers import (
    Workbench,
    assert_consistent,
    private_files,
    put,
)

KIB = 1 << 10
reasons = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=20)
names = st.binary(min_size=1, max_size=255).filter(lambda name: b"/" not in name)


@given(st.integers(0, 2**63), reasons, names)
def test_a_name_says_when_and_why(time_ns: int, reason: str, name: bytes) -> None:
    made = layout.quarantine_name(time_ns, reason, b"some/where/" + name)
    assert len(made) <= layout.NAME_MAX_BYTES
    assert layout.parse_quarantine_name(made) == (time_ns, reason, name[-180:])


@pytest.mark.parametrize(
    "name",
    [b"", b"a", b"12", b"12.", b"12.reason", b".reason.a", b"x.reason.a", b"12..a", b"1.2.3"],
)
def test_another_name_is_not_of_kvfs(name: bytes) -> None:
    assert layout.parse_quarantine_name(name) is None


def directory(tier: Tier) -> Path:
    return Path(os.fsdecode(tier.root + b"/" + layout.QUARANTINE_DIR))


async def set_aside(store: Store, name: bytes, size: int = 8 * KIB, tier: str = "nvme") -> None:
    """An unknown file of a tier goes to quarantine."""
    place = store.volume.tier_named(tier)
    file = Path(os.fsdecode(place.locate(name)))
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(os.urandom(size))
    await store.quarantine.put(place, name, False, reason="test", message="is for a test")


def account(store: Store, tier: str = "nvme") -> tuple[int, int]:
    space = store.volume.space[store.volume.tier_named(tier).index]
    return space.quarantine_files, space.quarantine_bytes


@pytest.fixture
def expected(expect_log: list[str]) -> None:
    expect_log.append("is for a test: quarantined")


@pytest.mark.usefixtures("expected")
@pytest.mark.parametrize("xattrs", [True, False])
async def test_a_file_keeps_its_bytes_and_says_where_it_lay(bench: Workbench, xattrs: bool) -> None:
    if not xattrs:
        bench.without_xattrs("hdd")
    store = await bench.start()
    hdd = store.volume.tier_named("hdd")
    path = b"ns/" + b"n" * 255
    (Path(os.fsdecode(hdd.root)) / "ns").mkdir()
    Path(os.fsdecode(hdd.locate(path))).write_bytes(b"evidence")
    await store.quarantine.put(hdd, path, False, reason="test", message="is for a test")
    (file,) = look(hdd, with_paths=True)
    assert (file.reason, file.path) == ("test", path if xattrs else b"n" * 180)
    assert abs(file.moment_s - time.time()) < 60
    assert (directory(hdd) / os.fsdecode(file.name)).read_bytes() == b"evidence"
    assert not os.path.exists(hdd.root + b"/ns"), "an empty directory is not left"
    await assert_consistent(store)


@pytest.mark.usefixtures("expected")
async def test_it_counts_against_the_capacity(bench: Workbench) -> None:
    store = await bench.start()
    free = store.volume.space[0].free_bytes
    available = store.room().available_bytes
    await set_aside(store, b"a")
    files, size = account(store)
    assert files == 1
    assert size >= 8 * KIB
    assert store.volume.space[0].free_bytes == free - size
    assert store.room().available_bytes == available - size, "it cannot be evicted"
    bench.stop(store)
    store = await bench.start()
    assert account(store) == (1, size), "the next mount counts it"
    assert [file.name for file in await store.quarantine.purge(store.volume.tiers[0])]
    assert account(store) == (0, 0)
    assert private_files(store.volume.tiers[0], layout.QUARANTINE_DIR) == []
    assert store.volume.counters.events["quarantine_removed"] == 1
    await assert_consistent(store)


@pytest.mark.semantics("S-verify-7")
@pytest.mark.usefixtures("expected")
async def test_the_oldest_go_when_it_is_too_much(bench: Workbench) -> None:
    bench.configure(quarantine_max=100 * KIB)
    store = await bench.start()
    for number in range(30):
        await set_aside(store, b"%02d" % number)
    assert account(store)[1] <= 100 * KIB
    left = [file.path for file in look(store.volume.tiers[0])]
    assert left == [b"%02d" % number for number in range(30 - len(left), 30)]
    assert len(left) > 5
    await assert_consistent(store)


@pytest.mark.usefixtures("expected")
async def test_a_small_tier_gives_a_tenth_at_most(bench: Workbench) -> None:
    bench.configure(nvme_mib=1)
    store = await bench.start()
    for number in range(20):
        await set_aside(store, b"%02d" % number)
    assert account(store)[1] <= (1 << 20) // 10
    await assert_consistent(store)


@pytest.mark.usefixtures("expected")
async def test_the_newest_stays_whatever_its_size(bench: Workbench) -> None:
    bench.configure(quarantine_max=100 * KIB)
    store = await bench.start()
    await set_aside(store, b"small")
    await set_aside(store, b"large", 500 * KIB)
    assert [file.path for file in look(store.volume.tiers[0])] == [b"large"]
    await assert_consistent(store)


@pytest.mark.usefixtures("expected")
async def test_there_are_never_many_files(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "MAX_FILES", 10)
    store = await bench.start()
    for number in range(25):
        await set_aside(store, b"%02d" % number, 0)
    assert account(store)[0] == len(look(store.volume.tiers[0])) <= 10
    assert look(store.volume.tiers[0])[-1].path == b"24"
    await assert_consistent(store)


@pytest.mark.semantics("S-verify-7")
@pytest.mark.usefixtures("expected")
async def test_what_is_too_old_goes_by_itself(bench: Workbench) -> None:
    bench.configure(quarantine_ttl_s=3600.0)
    store = await bench.start()
    await set_aside(store, b"new")
    place = directory(store.volume.tiers[0])
    old_ns = int((time.time() - 7200) * 1e9)
    old = place / os.fsdecode(layout.quarantine_name(old_ns, "test", b"old"))
    old.write_bytes(b"old")
    await store.quarantine.run_once()
    assert [file.path for file in look(store.volume.tiers[0])] == [b"new"]
    assert account(store)[0] == 1
    await assert_consistent(store)


@pytest.mark.usefixtures("expected")
async def test_what_an_admin_removes_is_noticed(bench: Workbench) -> None:
    store = await bench.start()
    await set_aside(store, b"a")
    await set_aside(store, b"b")
    first = look(store.volume.tiers[0])[0]
    (directory(store.volume.tiers[0]) / os.fsdecode(first.name)).unlink()
    await store.quarantine.run_once()
    assert account(store)[0] == 1
    await assert_consistent(store)


async def test_a_foreign_file_is_shown_as_such(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"a", b"data")
    (directory(store.volume.tiers[0]) / "notes.txt").write_bytes(b"mine")
    (found,) = look(store.volume.tiers[0])
    assert isinstance(found, Quarantined)
    assert (found.name, found.reason, found.path) == (b"notes.txt", "", b"notes.txt")
    await assert_consistent(store)
