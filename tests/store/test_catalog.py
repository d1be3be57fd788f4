"""The catalog alone: schema, names, counts, intents, ghosts."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs.catalog import scans, schema
from kvfs.catalog.catalog import Catalog
from kvfs.catalog.rows import GOOD, ROOT_INODE, SUSPECT, ZSTD, BlockState, Kind, Replica
from kvfs.errors import CatalogError, exit_code_of
from kvfs.volume.catalog_file import open_catalog


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    """A new catalog with a root."""
    made = Catalog(tmp_path / "catalog.sqlite")
    made.insert_inode(Kind.DIRECTORY, 0o755, 0, 0, 0, inode=ROOT_INODE)
    yield made
    made.close()


def add(catalog: Catalog, parent: int, name: bytes, kind: Kind = Kind.BLOCK) -> int:
    with catalog.transaction("test"):
        inode = catalog.insert_inode(kind, 0o644, 0, 0, 0)
        catalog.link(parent, name, inode)
    return inode


def test_a_new_file_gets_the_schema_and_an_old_one_keeps_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    first = Catalog(path)
    assert first.created
    first.set_meta("clean", "1")
    first.close()
    second = Catalog(path)
    assert not second.created
    assert second.meta("clean") == "1"
    (version,) = second.connection.execute("PRAGMA user_version").fetchone()
    assert version == schema.SCHEMA_VERSION
    second.close()


def test_an_older_schema_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    catalog = Catalog(path)
    catalog.insert_inode(Kind.DIRECTORY, 0o755, 0, 0, 0, inode=ROOT_INODE)
    inode = add(catalog, ROOT_INODE, b"a")
    number = catalog.tier_number("uuid", "nvme", "/nvme")
    catalog.add_replica(inode, number, 4096, 5.0)
    catalog.close()
    with sqlite3.connect(path) as db:
        db.execute("DROP INDEX replica_compressed")
        for column in ("verified", "mtime_ns", "codec", "saved_bytes"):
            db.execute(f"ALTER TABLE replica DROP COLUMN {column}")
        db.execute("PRAGMA user_version = 1")
    db.close()
    catalog = Catalog(path)
    assert list(catalog.replicas(inode)) == [Replica(inode, number, 4096, GOOD, 0, 5.0, 0, 0)]
    (version,) = catalog.connection.execute("PRAGMA user_version").fetchone()
    assert version == schema.SCHEMA_VERSION
    catalog.close()


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    Catalog(path).close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {schema.SCHEMA_VERSION + 1}")
    db.close()
    with pytest.raises(CatalogError, match="upgrade kvfs") as refused:
        open_catalog(path)
    assert exit_code_of(refused.value) == 7
    assert path.exists()


def test_a_corrupt_catalog_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    path.write_bytes(b"this was a database once" * 1000)
    catalog, aside = open_catalog(path)
    assert catalog.created
    assert aside == tmp_path / "catalog.corrupt"
    assert aside.read_bytes().startswith(b"this was a database once")
    catalog.close()


def test_a_failed_transaction_changes_nothing(catalog: Catalog) -> None:
    def name_two_alike() -> None:
        with catalog.transaction("test"):
            inode = catalog.insert_inode(Kind.BLOCK, 0o644, 0, 0, 0)
            catalog.link(ROOT_INODE, b"a", inode)
            catalog.link(ROOT_INODE, b"a", inode + 1)

    with pytest.raises(sqlite3.IntegrityError):
        name_two_alike()
    assert catalog.lookup(ROOT_INODE, b"a") is None
    assert scans.totals(catalog.connection) == (0, 1)


@given(removed=st.sets(st.integers(0, 29)), page=st.integers(1, 7))
def test_cookies_of_children_are_stable_under_removals(removed: set[int], page: int) -> None:
    catalog = Catalog(Path(":memory:"))
    catalog.insert_inode(Kind.DIRECTORY, 0o755, 0, 0, 0, inode=ROOT_INODE)
    inodes = [add(catalog, ROOT_INODE, b"%d" % number) for number in range(30)]
    doomed = [inodes[number] for number in removed]
    listed: list[int] = []
    cookie = 0
    while entries := catalog.children(ROOT_INODE, cookie, page):
        listed += [row.id for _, row in entries]
        cookie = entries[-1][1].id
        if doomed:
            catalog.delete(doomed.pop())
    assert listed == sorted(set(listed)), "a name came twice or out of order"
    kept = {inode for number, inode in enumerate(inodes) if number not in removed}
    assert kept <= set(listed), "a name that stayed was missed"
    catalog.close()


def test_numbers_are_never_given_again(catalog: Catalog) -> None:
    first = add(catalog, ROOT_INODE, b"a")
    catalog.delete(first)
    assert add(catalog, ROOT_INODE, b"a") > first


def test_skipped_numbers_are_not_given(catalog: Catalog) -> None:
    catalog.skip_numbers(1000)
    assert add(catalog, ROOT_INODE, b"a") == 1001
    catalog.skip_numbers(5)
    assert add(catalog, ROOT_INODE, b"b") == 1002


def test_paths_follow_a_renamed_directory(catalog: Catalog) -> None:
    outer = add(catalog, ROOT_INODE, b"outer", Kind.DIRECTORY)
    inner = add(catalog, outer, b"inner", Kind.DIRECTORY)
    block = add(catalog, inner, b"block")
    assert catalog.path_of(block) == b"outer/inner/block"
    catalog.relink(outer, ROOT_INODE, b"elsewhere")
    catalog.forget_paths()
    assert catalog.path_of(block) == b"elsewhere/inner/block"
    found = catalog.resolve(b"elsewhere/inner/block")
    assert found is not None
    assert found.id == block
    assert catalog.resolve(b"outer/inner/block") is None


def test_a_path_may_be_as_deep_as_it_can_be_long(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "deep.sqlite")
    catalog.insert_inode(Kind.DIRECTORY, 0o755, 0, 0, 0, inode=ROOT_INODE)
    inode = ROOT_INODE
    for _ in range(1999):
        inode = add(catalog, inode, b"d", Kind.DIRECTORY)
    inode = add(catalog, inode, b"f")
    catalog.close()
    catalog = Catalog(tmp_path / "deep.sqlite")
    assert catalog.path_of(inode) == b"/".join([b"d"] * 1999 + [b"f"])
    catalog.close()


def test_names_that_lead_in_a_circle_have_no_path(catalog: Catalog) -> None:
    above = add(catalog, ROOT_INODE, b"above", Kind.DIRECTORY)
    below = add(catalog, above, b"below", Kind.DIRECTORY)
    block = add(catalog, below, b"block")
    catalog.relink(above, below, b"above")
    catalog.forget_paths()
    assert catalog.path_of(block) is None


def test_names_are_bytes_of_any_kind(catalog: Catalog) -> None:
    for name in (b"\xff\xfe", b"a\nb", b"." * 3, b"x" * 255, "ü".encode()):
        inode = add(catalog, ROOT_INODE, name)
        found = catalog.lookup(ROOT_INODE, name)
        assert found is not None
        assert found.id == inode
        assert catalog.path_of(inode) == name


def test_the_count_of_names_follows_every_change(catalog: Catalog) -> None:
    catalog.fan_out_names = 3
    directory = add(catalog, ROOT_INODE, b"crowd", Kind.DIRECTORY)
    other = add(catalog, ROOT_INODE, b"other", Kind.DIRECTORY)
    assert not catalog.is_crowded(directory)
    assert not catalog.is_crowded(other)
    blocks = [add(catalog, directory, b"%d" % number) for number in range(3)]
    assert catalog.is_crowded(directory)
    catalog.relink(blocks[0], other, b"moved")
    assert not catalog.is_crowded(directory)
    catalog.relink(blocks[0], directory, b"back")
    assert catalog.is_crowded(directory)
    catalog.delete(blocks[1])
    assert not catalog.is_crowded(directory)
    assert not catalog.is_crowded(other)


def test_deleting_an_inode_leaves_no_row_of_it(catalog: Catalog) -> None:
    inode = add(catalog, ROOT_INODE, b"a")
    catalog.add_replica(inode, 1, 4096, 1.0)
    catalog.set_xattr(inode, b"user.x", b"1")
    catalog.delete(inode)
    assert catalog.get(inode) is None
    assert catalog.replicas(inode) == []
    assert catalog.xattrs(inode) == []
    assert catalog.orphans() == []


def test_usage_and_duplicates_are_sums_over_replicas(catalog: Catalog) -> None:
    fast = catalog.tier_number("uuid-a", "nvme", "/a")
    slow = catalog.tier_number("uuid-b", "hdd", "/b")
    both, one = add(catalog, ROOT_INODE, b"both"), add(catalog, ROOT_INODE, b"one")
    catalog.add_replica(both, fast, 4096, 1.0)
    catalog.add_replica(both, slow, 8192, 1.0)
    catalog.add_replica(one, slow, 8192, 1.0)
    assert scans.usage(catalog.connection) == {fast: (1, 4096), slow: (2, 16384)}
    assert scans.duplicate_bytes(catalog.connection) == 4096
    assert scans.saved_bytes(catalog.connection) == {}
    catalog.add_replica(both, slow, 8192, 1.0, codec=ZSTD, saved_bytes=4000)
    catalog.add_replica(one, slow, 8192, 1.0, codec=ZSTD, saved_bytes=96)
    assert scans.saved_bytes(catalog.connection) == {slow: 4096}
    assert catalog.sole_replicas(slow) == 1
    assert catalog.sole_replicas(fast) == 0


def test_forgetting_a_tier_drops_what_was_only_there(catalog: Catalog) -> None:
    fast = catalog.tier_number("uuid-a", "nvme", "/a")
    slow = catalog.tier_number("uuid-b", "hdd", "/b")
    both, alone = add(catalog, ROOT_INODE, b"both"), add(catalog, ROOT_INODE, b"alone")
    for tier in (fast, slow):
        catalog.add_replica(both, tier, 4096, 1.0)
    catalog.add_replica(alone, slow, 4096, 1.0)
    catalog.forget_tier(slow)
    assert catalog.lookup(ROOT_INODE, b"alone") is None
    assert [replica.tier for replica in catalog.replicas(both)] == [fast]
    assert [uuid for _, uuid, _, _ in catalog.known_tiers()] == ["uuid-a"]


def test_a_tier_keeps_its_number_when_renamed(catalog: Catalog) -> None:
    number = catalog.tier_number("uuid-a", "nvme", "/a")
    assert catalog.tier_number("uuid-a", "fast", "/elsewhere") == number
    assert catalog.known_tiers() == [(number, "uuid-a", "fast", "/elsewhere")]


def test_unsealed_blocks_are_found_by_state(catalog: Catalog) -> None:
    states = (BlockState.WRITING, BlockState.PUBLISHED, BlockState.SEALED, BlockState.REOPENED)
    inodes = {state: add(catalog, ROOT_INODE, b"%d" % state) for state in states}
    for state, inode in inodes.items():
        catalog.update(inode, state=int(state))
    assert catalog.unsealed([BlockState.WRITING]) == [inodes[BlockState.WRITING]]
    assert set(catalog.unsealed(states)) == set(inodes.values()) - {inodes[BlockState.SEALED]}


def test_suspect_replicas_are_all_but_one(catalog: Catalog) -> None:
    inode = add(catalog, ROOT_INODE, b"a")
    for tier in (1, 2, 3):
        catalog.add_replica(inode, tier, 4096, 1.0)
    catalog.set_replica_states(inode, SUSPECT, besides=2)
    assert {r.tier for r in catalog.replicas(inode) if r.state == SUSPECT} == {1, 3}


def test_a_finished_intent_is_gone_at_once_and_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    catalog = Catalog(path)
    with catalog.transaction("test"):
        done = catalog.intents.add(1, "unlink", 7, b"a")
        left = catalog.intents.add(1, "rename", 8, b"b", b"c")
    catalog.intents.done(done.id)
    assert catalog.intents.left(1) == [left]
    catalog.intents.flush()
    catalog.close()
    again = Catalog(path)
    assert again.intents.left(1) == [left]
    assert again.intents.left(2) == []
    again.close()


def test_ghosts_are_taken_once_and_the_coldest_forgotten_first(catalog: Catalog) -> None:
    for number in range(10):
        catalog.ghosts.add(b"%d" % number, float(number))
    catalog.ghosts.trim(3)
    assert catalog.ghosts.take(b"6") is None
    assert catalog.ghosts.take(b"9") == 9.0
    assert catalog.ghosts.take(b"9") is None


def test_heat_from_the_future_is_clamped(catalog: Catalog) -> None:
    inode = add(catalog, ROOT_INODE, b"a")
    catalog.add_replica(inode, 1, 4096, 1e12)
    catalog.ghosts.add(b"key", 1e12)
    catalog.clamp_heat(100.0)
    assert catalog.tau_of(inode) == 100.0
    assert catalog.ghosts.take(b"key") == 100.0


def test_a_reader_sees_committed_rows_and_cannot_write(catalog: Catalog) -> None:
    add(catalog, ROOT_INODE, b"a")
    reader = catalog.reader()
    try:
        assert reader.execute("SELECT count(*) FROM dirent").fetchone() == (1,)
        with pytest.raises(sqlite3.OperationalError):
            reader.execute("DELETE FROM dirent")
    finally:
        reader.close()
