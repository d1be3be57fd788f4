"""Queries over many rows, on the catalog of a real store."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

import pytest

from kvfs.catalog import scans
from kvfs.catalog.rows import ROOT_INODE
from kvfs.policy.plan import plan
from kvfs.store import Store
from kvfs.views import Views
from tests.store.helpers import Workbench, create, make_directory, move, put, row_at, seal_all

HOUR_NS = 3600 * 10**9


@pytest.fixture
def readers() -> Iterator[list[sqlite3.Connection]]:
    """Connections that are closed after the test."""
    opened: list[sqlite3.Connection] = []
    yield opened
    for connection in opened:
        connection.close()


def reader(store: Store, readers: list[sqlite3.Connection]) -> sqlite3.Connection:
    readers.append(store.volume.catalog.reader())
    return readers[-1]


def set_heat(store: Store, path: bytes, tau: float) -> int:
    inode = row_at(store, path).id
    store.volume.catalog.set_tau(inode, tau, 0)
    return inode


async def test_a_snapshot_has_residents_coldest_first_and_candidates_hottest_first(
    bench: Workbench, readers: list[sqlite3.Connection]
) -> None:
    store = await bench.start()
    now_s = store.volume.clock.now_s()
    inodes = {}
    for number, name in enumerate((b"a", b"b", b"c", b"d")):
        await put(store, name, name * 1000)
        if name in (b"c", b"d"):
            await move(store, "demote", name, "nvme", "hdd")
        inodes[name] = set_heat(store, name, now_s + 1000 - number)
    survey = Views(store, "/mnt", "/sock").survey()
    made = scans.snapshot(reader(store, readers), survey)
    assert [block.inode for block in made.coldest[0]] == [inodes[b"b"], inodes[b"a"]]
    assert [block.inode for block in made.coldest[1]] == [inodes[b"d"], inodes[b"c"]]
    assert made.hottest[0] == ()
    assert [block.inode for block in made.hottest[1]] == [inodes[b"c"], inodes[b"d"]]
    assert made.hottest[2] == ()
    assert [tier.used_bytes for tier in made.tiers] == [
        account.taken_bytes for account in store.volume.space.tiers
    ]
    moves = plan(made, survey.settings).moves
    assert [(move.kind, move.inode) for move in moves] == [
        ("promote", inodes[b"c"]),
        ("promote", inodes[b"d"]),
    ]


async def test_a_block_above_is_no_candidate_for_promotion(
    bench: Workbench, readers: list[sqlite3.Connection]
) -> None:
    store = await bench.start()
    await put(store, b"a", b"data")
    await move(store, "demote", b"a", "nvme", "hdd")
    await move(store, "promote", b"a", "hdd", "nvme")
    set_heat(store, b"a", store.volume.clock.now_s() + 1000)
    made = scans.snapshot(reader(store, readers), Views(store, "", "").survey())
    assert made.hottest == ((), (), ())
    assert made.coldest[0][0].tiers == (0, 1)
    assert made.coldest[1][0].tiers == (0, 1)


async def test_a_view_knows_pins_keep_open_unsealed_and_temporary(
    bench: Workbench, readers: list[sqlite3.Connection]
) -> None:
    store = await bench.start()
    for name in (b"plain", b"config.json", b"x.tmp", b"open", b"d/below", b"pinned"):
        await put(store, name, b"data")
    await store.attributes.set_xattr(row_at(store, b"d").id, b"user.kvfs.pin", b"1")
    await store.attributes.set_xattr(row_at(store, b"pinned").id, b"user.kvfs.pin", b"hdd")
    opened = await store.blocks.open_reader(row_at(store, b"open").id)
    writing = await create(store, b"writing", b"data")
    survey = Views(store, "", "").survey()
    made = scans.snapshot(reader(store, readers), survey)
    catalog = store.volume.catalog
    seen = {catalog.path_of(block.inode): block for block in made.coldest[0]}
    assert {path for path, block in seen.items() if block.pinned} == {b"d/below", b"pinned"}
    assert {path for path, block in seen.items() if block.keep} == {b"config.json"}
    assert {path for path, block in seen.items() if not block.movable} == {
        b"x.tmp", b"open", b"writing",
    }  # fmt: skip
    await store.blocks.close(opened, writer=False)
    await store.blocks.close(writing, writer=True)
    await seal_all(store)


async def test_pending_accesses_count_in_a_view(
    bench: Workbench, readers: list[sqlite3.Connection]
) -> None:
    store = await bench.start()
    inode = await put(store, b"a", b"data")
    now_s = store.volume.clock.now_s()
    tau = store.volume.catalog.tau_of(inode)
    assert tau is not None
    store.volume.accesses.touch(inode, now_s + 5)
    made = scans.snapshot(reader(store, readers), Views(store, "", "").survey())
    assert made.coldest[0][0].tau > now_s + 5 > tau


async def test_a_full_tier_is_surveyed_as_far_as_it_must_be_relieved(
    bench: Workbench, readers: list[sqlite3.Connection]
) -> None:
    bench.configure(nvme_mib=1)
    store = await bench.start()
    for number in range(17):
        await put(store, b"%02d" % number, bytes(60_000))
    survey = Views(store, "", "").survey()
    made = scans.snapshot(reader(store, readers), survey)
    moves = plan(made, survey.settings).moves
    tier = made.tiers[0]
    assert tier.used_bytes > tier.high_bytes
    assert {move.kind for move in moves} == {"demote"}
    assert tier.used_bytes - sum(move.size_bytes for move in moves) <= tier.low_bytes
    coldest = [store.volume.catalog.path_of(move.inode) for move in moves]
    assert coldest == [b"%02d" % number for number in range(len(moves))]


async def test_blocks_below_a_directory_are_found_at_any_depth(
    bench: Workbench, readers: list[sqlite3.Connection]
) -> None:
    store = await bench.start()
    inodes = {path: await put(store, path, b"") for path in (b"a/1", b"a/b/2", b"a/b/c/3", b"x/4")}
    await make_directory(store, b"empty/too")
    db = reader(store, readers)
    below = scans.blocks_below(db, row_at(store, b"a").id)
    assert below == [inodes[b"a/1"], inodes[b"a/b/2"], inodes[b"a/b/c/3"]]
    assert scans.blocks_below(db, ROOT_INODE) == list(inodes.values())
    assert scans.blocks_below(db, row_at(store, b"empty").id) == []
    assert scans.blocks_below(db, inodes[b"x/4"]) == [inodes[b"x/4"]]


async def test_blocks_are_ordered_by_heat_over_tiers(
    bench: Workbench, readers: list[sqlite3.Connection]
) -> None:
    store = await bench.start()
    paths = [b"d/0", b"d/1", b"e/2", b"e/3"]
    for path in paths:
        await put(store, path, b"data")
    await move(store, "demote", b"d/0", "nvme", "hdd")
    await move(store, "demote", b"e/3", "nvme", "remote")
    await move(store, "promote", b"e/3", "remote", "nvme")
    inodes = [set_heat(store, path, 1000.0 + number) for number, path in enumerate(paths)]
    db = reader(store, readers)
    numbers = [tier.number for tier in store.volume.tiers]
    assert scans.by_heat(db, numbers, coldest=True, limit=10) == inodes
    assert scans.by_heat(db, numbers, coldest=False, limit=2) == [inodes[3], inodes[2]]
    below = row_at(store, b"d").id
    assert scans.below_by_heat(db, below, coldest=False, limit=10) == [inodes[1], inodes[0]]
    assert scans.below_by_heat(db, ROOT_INODE, coldest=True, limit=3) == inodes[:3]
    assert scans.below_by_heat(db, inodes[2], coldest=True, limit=3) == [inodes[2]]


async def test_ttl_of_a_block_and_of_a_directory(
    bench: Workbench, readers: list[sqlite3.Connection]
) -> None:
    store = await bench.start()
    inodes = {
        path: await put(store, path, b"")
        for path in (b"own", b"none", b"d/below", b"d/deep/er", b"d/longer/kept")
    }
    for path, ttl in ((b"own", b"60s"), (b"d", b"60s"), (b"d/longer", b"10h")):
        await store.attributes.set_xattr(row_at(store, path).id, b"user.kvfs.ttl", ttl)
    db = reader(store, readers)
    now_ns = int(store.volume.clock.now_s() * 1e9)
    assert scans.expired(db, now_ns, 100) == []
    later = scans.expired(db, now_ns + HOUR_NS, 100)
    assert set(later) == {inodes[b"own"], inodes[b"d/below"], inodes[b"d/deep/er"]}
    much_later = scans.expired(db, now_ns + 11 * HOUR_NS, 100)
    assert set(much_later) == set(inodes.values()) - {inodes[b"none"]}
    assert 1 <= len(scans.expired(db, now_ns + HOUR_NS, 1)) <= 2


async def test_temporary_files_are_forgotten_after_their_time(
    bench: Workbench, readers: list[sqlite3.Connection]
) -> None:
    store = await bench.start()
    old = await put(store, b"d/x.tmp", b"")
    await put(store, b"d/tmp", b"")
    await make_directory(store, b"dir.tmp")
    db = reader(store, readers)
    now_ns = int(store.volume.clock.now_s() * 1e9)
    assert scans.forgotten_temporaries(db, now_ns - HOUR_NS, 10) == []
    assert scans.forgotten_temporaries(db, now_ns + HOUR_NS, 10) == [old]


async def test_one_resident_and_its_pins(
    bench: Workbench, readers: list[sqlite3.Connection]
) -> None:
    store = await bench.start()
    inode = await put(store, b"a/b/c", b"data")
    await move(store, "demote", b"a/b/c", "nvme", "hdd")
    await move(store, "promote", b"a/b/c", "hdd", "nvme")
    db = reader(store, readers)
    found = scans.resident(db, inode)
    assert found is not None
    assert (found.name, found.parent) == (b"c", row_at(store, b"a/b").id)
    assert len(found.tiers.split(",")) == 2
    assert scans.resident(db, row_at(store, b"a").id) is None
    assert not scans.is_pinned(db, scans.pinned_directories(db), found.parent)
    await store.attributes.set_xattr(row_at(store, b"a").id, b"user.kvfs.pin", b"1")
    known = scans.pinned_directories(db)
    assert scans.is_pinned(db, known, found.parent)
    assert known[found.parent], "the answer is remembered"
    assert not scans.is_pinned(db, known, ROOT_INODE)


@pytest.mark.parametrize(
    ("name", "kept"),
    [(b"config.json", True), (b"a.metadata", True), (b"README.md", True), (b"x.bin", False),
     (b"CONFIG.JSON", False), (b"\xff.json", True)],
)  # fmt: skip
def test_names_that_are_kept(name: bytes, kept: bool) -> None:
    patterns = ("config.json", "*.metadata", "*.json", "README*")
    assert scans.is_kept(name, patterns) is kept
