"""Verification at open: what is read before anybody gets a byte, and what a bad replica becomes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from kvfs import failpoints, layout
from kvfs.blocks.verify import Verifier
from kvfs.catalog.rows import BlockState, Replica
from kvfs.errors import BlockStale
from kvfs.store import Store
from tests.store.helpers import (
    Workbench,
    assert_consistent,
    create,
    file_on,
    move,
    private_files,
    put,
    put_on,
    read,
    rename,
    rewrite,
    row_at,
    seal_all,
    settle_all,
    tiers_of,
)

BAD = "is bad .*: quarantined"
SIZE = 100_000


# --- damage behind kvfs


def change(file: Path, damage: Callable[[bytearray], None], *, keep_time: bool) -> None:
    """Write to a backing file; `keep_time` hides it, as rot of the medium does."""
    status = file.stat()
    data = bytearray(file.read_bytes())
    damage(data)
    file.chmod(0o600)
    file.write_bytes(data)
    if keep_time:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def flip(data: bytearray) -> None:
    data[len(data) // 2] ^= 0x10


def zero(data: bytearray) -> None:
    data[:] = bytes(len(data))


def cut(data: bytearray) -> None:
    del data[-1:]


def rot(store: Store, tier: str, path: bytes) -> None:
    change(file_on(store, tier, path), flip, keep_time=True)


def quarantined(store: Store, tier: str = "nvme") -> list[bytes]:
    return private_files(store.volume.tier_named(tier), layout.QUARANTINE_DIR)


def verified(store: Store) -> int:
    return store.volume.counters.events["verified"]


def replica_on(store: Store, tier: str, path: bytes) -> Replica:
    number = store.volume.tier_named(tier).number
    found = store.volume.catalog.replicas(row_at(store, path).id)
    return next(replica for replica in found if replica.tier == number)


async def remount(bench: Workbench, store: Store, **settings: object) -> Store:
    """The next mount, in which nothing has been read yet."""
    bench.stop(store)
    if settings:
        bench.configure(**settings)
    return await bench.start()


async def read_as_the_kernel(store: Store, path: bytes) -> bytes:
    """By name, which is looked up again when the inode is stale; once."""
    try:
        return await read(store, path)
    except BlockStale:
        return await read(store, path)


async def is_a_miss(store: Store, inode: int) -> bool:
    """What the kernel hears when it opens an inode that it knows."""
    try:
        block = await store.blocks.open_reader(inode)
    except BlockStale:
        return True
    await store.blocks.close(block, writer=False)
    return False


# --- first open


@pytest.mark.parametrize("lost", [True, False], ids=["no record", "record"])
async def test_the_next_replica_gets_a_record_of_the_new_number_which_is_counted(
    bench: Workbench, expect_log: list[str], lost: bool
) -> None:
    expect_log.append(BAD)
    data = os.urandom(SIZE)
    store = await bench.start()
    await put_on(store, b"a", data, "nvme", "hdd")
    rot(store, "nvme", b"a")
    if lost:
        # As a power loss leaves it: the page of the record is not allocated either.
        os.removexattr(file_on(store, "hdd", b"a"), "user.kvfs.seal")
        status = file_on(store, "hdd", b"a").stat()
        hdd = store.volume.tier_named("hdd")
        store.replicas.measured(row_at(store, b"a").id, hdd, status.st_blocks * 512)
    inode = row_at(store, b"a").id
    # The kernel may have read the bad one: it was verified in this mount.
    assert await store.verifier.condemn(inode, store.volume.tier_named("nvme"))
    assert row_at(store, b"a").id != inode
    assert await read(store, b"a") == data
    await assert_consistent(store)


async def test_the_first_open_of_a_mount_reads_and_the_next_ones_do_not(bench: Workbench) -> None:
    store = await bench.start()
    await put(store, b"a", os.urandom(SIZE))
    await read(store, b"a")
    assert verified(store) == 0, "it was hashed by this mount when it was sealed"
    store = await remount(bench, store)
    for _ in range(3):
        await read(store, b"a")
    assert verified(store) == 1
    assert replica_on(store, "nvme", b"a").verified == store.volume.mounts
    await assert_consistent(store)


@pytest.mark.semantics("S-verify-1", "S-verify-2", "S-read-4")
@pytest.mark.parametrize("damage", [flip, zero, cut], ids=lambda f: f.__name__)
@pytest.mark.parametrize("tier", ["nvme", "hdd", "remote"])
async def test_a_bad_replica_is_a_miss_when_it_is_the_only_one(
    bench: Workbench, expect_log: list[str], damage: Callable[[bytearray], None], tier: str
) -> None:
    expect_log.append(f"tier {tier}: 'd/a' {BAD}")
    store = await bench.start()
    inode = await put_on(store, b"d/a", os.urandom(SIZE), tier)
    store = await remount(bench, store)
    change(file_on(store, tier, b"d/a"), damage, keep_time=True)
    gone: list[tuple[int, bytes]] = []
    store.volume.name_changed = lambda parent, name: gone.append((parent, name))
    assert await is_a_miss(store, inode)
    assert store.volume.catalog.resolve(b"d/a") is None
    assert gone == [(row_at(store, b"d").id, b"a")], "the kernel is told to forget the name"
    (aside,) = quarantined(store, tier)
    assert aside.endswith(b".size.a" if damage is cut else b".checksum.a")
    assert store.volume.counters.events["quarantined"] == 1
    await assert_consistent(store)


@pytest.mark.semantics("S-verify-2")
@pytest.mark.parametrize("damage", [flip, cut], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("bad", "good"), [("nvme", "hdd"), ("nvme", "remote"), ("hdd", "remote")])
async def test_another_replica_takes_the_place_of_a_bad_one(
    bench: Workbench, expect_log: list[str], damage: Callable[[bytearray], None],
    bad: str, good: str,
) -> None:  # fmt: skip
    expect_log.append(f"tier {bad}: 'a' {BAD}")
    data = os.urandom(SIZE)
    store = await bench.start()
    await put_on(store, b"a", data, "nvme", bad, good)
    if bad != "nvme":
        await move(store, "drop", b"a", "nvme", None)
    store = await remount(bench, store)
    change(file_on(store, bad, b"a"), damage, keep_time=True)
    assert await read(store, b"a") == data
    assert tiers_of(store, b"a") == [good]
    assert len(quarantined(store, bad)) == 1
    await assert_consistent(store)


async def test_openers_that_come_together_share_one_verification(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    inode = await put(store, b"a", os.urandom(SIZE))
    store = await remount(bench, store)
    reads: list[int] = []
    real = Verifier.read

    async def count(self: Verifier, *arguments: object, **options: object) -> None:
        reads.append(1)
        await trio.sleep(0.02)
        await real(self, *arguments, **options)  # type: ignore[arg-type] # passed on

    monkeypatch.setattr(Verifier, "read", count)
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(is_a_miss, store, inode)
    assert len(reads) == 1
    await assert_consistent(store)


async def test_no_opener_of_many_gets_a_bad_block(bench: Workbench, expect_log: list[str]) -> None:
    expect_log.append(BAD)
    store = await bench.start()
    inode = await put(store, b"a", os.urandom(SIZE))
    store = await remount(bench, store)
    rot(store, "nvme", b"a")
    misses: list[bool] = []

    async def open_it() -> None:
        misses.append(await is_a_miss(store, inode))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(open_it)
    assert misses == [True] * 5
    await assert_consistent(store)


async def test_a_copy_is_verified_when_it_was_made(bench: Workbench) -> None:
    store = await bench.start()
    await put_on(store, b"a", os.urandom(SIZE), "hdd")
    await read(store, b"a")
    assert verified(store) == 0
    await assert_consistent(store)


async def test_what_lies_on_a_remote_tier_is_checked_at_each_open(
    bench: Workbench, expect_log: list[str]
) -> None:
    expect_log.append(BAD)
    store = await bench.start()
    inode = await put_on(store, b"a", os.urandom(SIZE), "remote")
    await read(store, b"a")
    rot(store, "remote", b"a")
    assert await is_a_miss(store, inode)
    assert len(quarantined(store, "remote")) == 1
    await assert_consistent(store)


async def test_a_remote_block_that_is_read_where_it_lies_is_verified_too(
    bench: Workbench, expect_log: list[str]
) -> None:
    expect_log.append(BAD)
    bench.configure(nvme_mib=1)
    store = await bench.start()
    inode = await put_on(store, b"a", os.urandom(SIZE), "remote")
    other = await put_on(store, b"b", os.urandom(SIZE), "remote")
    store = await remount(bench, store)
    full = store.volume.space.reserve(0, store.volume.space[0].free_bytes)
    assert full is not None
    block = await store.blocks.open_reader(inode)
    assert not block.fetched
    await store.blocks.close(block, writer=False)
    assert verified(store) == 1
    rot(store, "remote", b"b")
    assert await is_a_miss(store, other)
    full.release()
    await assert_consistent(store)


async def test_unsealed_blocks_are_not_verified(bench: Workbench) -> None:
    store = await bench.start()
    block = await create(store, b"a", b"data")
    file_on(store, "nvme", b"a").write_bytes(b"DATA and more")
    assert await store.blocks.open_reader(block.inode) is block
    await store.blocks.close(block, writer=False)
    await store.blocks.close(block, writer=True)
    await seal_all(store)
    assert await read(store, b"a") == b"DATA and more"
    await assert_consistent(store)


# --- policies


@pytest.mark.semantics("S-verify-4")
@pytest.mark.parametrize(
    ("policy", "end", "expected"),
    [
        ("first-open", "unmount", [1, 0]),
        ("first-open", "crash", [1, 0]),
        ("after-crash", "unmount", [0, 0]),
        ("after-crash", "crash", [1, 0]),
        ("after-crash", "reboot", [1, 0]),
        ("after-crash", "crash, unmount", [1, 0]),
        ("always", "unmount", [1, 1]),
        ("always", "none", [1, 1]),
        ("never", "crash", [0, 0]),
    ],
)
async def test_when_a_replica_is_read_before_it_is_opened(
    bench: Workbench, policy: str, end: str, expected: list[int]
) -> None:
    bench.configure(verify=policy)
    store = await bench.start()
    await put(store, b"a", os.urandom(SIZE))
    for step in end.split(", "):
        if step == "unmount":
            store = await remount(bench, store)
        elif step == "reboot":
            store.volume.catalog.set_meta("boot_id", "an earlier boot")
            store = await remount(bench, store)
        elif step == "crash":
            store = await bench.restart_after_crash(store)
    counts = []
    for _ in expected:
        before = verified(store)
        await read(store, b"a")
        counts.append(verified(store) - before)
    assert counts == expected
    await assert_consistent(store)


async def test_what_was_sealed_after_the_crash_is_not_suspect(bench: Workbench) -> None:
    bench.configure(verify="after-crash")
    store = await bench.start()
    store = await bench.restart_after_crash(store)
    await put(store, b"a", b"data")
    store = await remount(bench, store)
    await read(store, b"a")
    assert verified(store) == 0
    await assert_consistent(store)


async def test_a_replica_that_a_walk_found_is_verified_after_crashes_too(
    bench: Workbench, expect_log: list[str]
) -> None:
    expect_log.append(BAD)
    bench.configure(verify="after-crash")
    store = await bench.start()
    inode = await put(store, b"a", os.urandom(SIZE))
    bench.stop(store)
    bench.lose_catalog()
    store = await bench.start()
    rot(store, "nvme", b"a")
    assert await is_a_miss(store, inode)
    await assert_consistent(store)


# --- touched files


@pytest.mark.semantics("S-verify-3")
@pytest.mark.parametrize("policy", ["first-open", "after-crash", "never"])
@pytest.mark.parametrize("damage", [flip, zero, cut], ids=lambda f: f.__name__)
async def test_a_file_that_was_touched_is_read_under_every_policy(
    bench: Workbench, expect_log: list[str], policy: str, damage: Callable[[bytearray], None]
) -> None:
    expect_log.append(BAD)
    bench.configure(verify=policy)
    store = await bench.start()
    inode = await put(store, b"a", os.urandom(SIZE))
    await read(store, b"a")
    change(file_on(store, "nvme", b"a"), damage, keep_time=False)
    assert await is_a_miss(store, inode)
    await assert_consistent(store)


async def test_another_time_alone_costs_one_verification(bench: Workbench) -> None:
    bench.configure(verify="never")
    store = await bench.start()
    data = os.urandom(SIZE)
    await put(store, b"a", data)
    os.utime(file_on(store, "nvme", b"a"), ns=(5, 5))
    held = await store.blocks.open_reader(row_at(store, b"a").id)
    for _ in range(2):
        assert await read(store, b"a") == data
    await store.blocks.close(held, writer=False)
    assert await read(store, b"a") == data
    assert verified(store) == 1
    await assert_consistent(store)


@pytest.mark.semantics("S-verify-5")
async def test_times_that_are_set_through_the_mount_are_no_difference(bench: Workbench) -> None:
    store = await bench.start()
    inode = await put_on(store, b"a", os.urandom(SIZE), "nvme", "hdd")
    for mtime_ns in (0, 1_000_000_007, -5_000_000_000):
        await store.attributes.set(inode, mtime_ns=mtime_ns)
        await read(store, b"a")
        assert os.stat(file_on(store, "nvme", b"a")).st_mtime_ns == mtime_ns
    opened = await store.blocks.open_reader(inode)
    await store.attributes.set(inode, mtime_ns=77)
    joined = await store.blocks.open_reader(inode)
    assert joined is opened
    for block in (opened, joined):
        await store.blocks.close(block, writer=False)
    await move(store, "drop", b"a", "nvme", None)
    await read(store, b"a")
    assert verified(store) == 0
    await assert_consistent(store)


@pytest.mark.parametrize("hide", ["utime", "chmod", "rename"])
async def test_what_kvfs_writes_to_a_touched_file_does_not_hide_it(
    bench: Workbench, expect_log: list[str], hide: str
) -> None:
    expect_log.append(BAD)
    store = await bench.start()
    inode = await put(store, b"a", os.urandom(SIZE))
    before_ns = file_on(store, "nvme", b"a").stat().st_mtime_ns
    change(file_on(store, "nvme", b"a"), flip, keep_time=False)
    if hide == "utime":
        await store.attributes.set(inode, mtime_ns=before_ns)
    elif hide == "chmod":
        await store.attributes.set(inode, mode=0o600)
    else:
        await rename(store, b"a", b"b")
        await settle_all(store)
    assert await is_a_miss(store, inode)
    await assert_consistent(store)


@pytest.mark.parametrize("others", [True, False])
async def test_nobody_joins_handles_of_a_file_that_went_bad(
    bench: Workbench, expect_log: list[str], others: bool
) -> None:
    expect_log.append(BAD)
    data = os.urandom(SIZE)
    store = await bench.start()
    inode = await put_on(store, b"a", data, "nvme", *(["hdd"] if others else []))
    held = await store.blocks.open_reader(inode)
    change(file_on(store, "nvme", b"a"), flip, keep_time=False)
    gone: list[tuple[int, bytes]] = []
    store.volume.name_changed = lambda parent, name: gone.append((parent, name))
    assert await is_a_miss(store, inode), "the kernel looks the name up again"
    assert gone == [(1, b"a")]
    if others:
        assert row_at(store, b"a").id > inode, "it has nothing of what the kernel has"
        assert await read(store, b"a") == data
        await move(store, "promote", b"a", "hdd", "nvme")
    assert len(await store.blocks.read(held, 0, SIZE)) == SIZE, "its own handle goes on"
    await store.blocks.close(held, writer=False)
    await assert_consistent(store)


async def test_a_block_under_a_new_number_is_the_same_in_all_else(
    bench: Workbench, expect_log: list[str]
) -> None:
    expect_log.append(BAD)
    store = await bench.start()
    inode = await put_on(store, b"d/a", os.urandom(SIZE), "nvme", "hdd", "remote")
    await store.attributes.set(inode, mode=0o640, mtime_ns=12_345)
    await store.attributes.set_xattr(inode, b"user.mine", b"value")
    await store.attributes.set_xattr(inode, b"user.kvfs.pin", b"hdd")
    before = row_at(store, b"d/a")
    change(file_on(store, "nvme", b"d/a"), flip, keep_time=False)
    assert await is_a_miss(store, inode)
    after = row_at(store, b"d/a")
    assert after._replace(id=before.id) == before
    assert store.attributes.get_xattr(after.id, b"user.mine") == b"value"
    assert tiers_of(store, b"d/a") == ["hdd", "remote"]
    store = await remount(bench, store)
    await read(store, b"d/a")
    await assert_consistent(store)


async def test_of_several_bad_replicas_none_is_served(
    bench: Workbench, expect_log: list[str]
) -> None:
    """And the opener hears of it once: the kernel looks a name up again only once."""
    expect_log.append(BAD)
    data = os.urandom(SIZE)
    store = await bench.start()
    await put_on(store, b"a", data, "nvme", "hdd", "remote")
    store = await remount(bench, store)
    await read(store, b"a")
    rot(store, "hdd", b"a")
    change(file_on(store, "nvme", b"a"), flip, keep_time=False)
    assert await read_as_the_kernel(store, b"a") == data
    assert tiers_of(store, b"a") == ["remote"]
    await assert_consistent(store)


async def test_a_touched_file_that_is_sound_is_joined(bench: Workbench) -> None:
    store = await bench.start()
    inode = await put(store, b"a", os.urandom(SIZE))
    held = await store.blocks.open_reader(inode)
    os.utime(file_on(store, "nvme", b"a"), ns=(5, 5))
    for _ in range(2):
        assert await store.blocks.open_reader(inode) is held
    assert verified(store) == 1
    for _ in range(3):
        await store.blocks.close(held, writer=False)
    await assert_consistent(store)


# --- writers


@pytest.mark.semantics("S-verify-6")
async def test_a_bad_replica_is_not_sealed_once_more_by_a_writer(
    bench: Workbench, expect_log: list[str]
) -> None:
    expect_log.append(BAD)
    data = bytearray(os.urandom(SIZE))
    store = await bench.start()
    await put_on(store, b"both", bytes(data), "nvme", "hdd")
    alone = await put(store, b"alone", bytes(data))
    store = await remount(bench, store)
    rot(store, "nvme", b"both")
    rot(store, "nvme", b"alone")
    await rewrite(store, b"both", b"new")
    await seal_all(store)
    data[:3] = b"new"
    assert await read(store, b"both") == data
    with pytest.raises(BlockStale):
        await store.blocks.open_writer(alone)
    await assert_consistent(store)


async def test_who_truncates_a_bad_block_does_not_care(bench: Workbench) -> None:
    store = await bench.start()
    inode = await put(store, b"a", os.urandom(SIZE))
    store = await remount(bench, store)
    change(file_on(store, "nvme", b"a"), cut, keep_time=True)
    block = await store.blocks.open_writer(inode, truncate=True)
    await store.blocks.write(block, 0, b"fresh")
    await store.blocks.close(block, writer=True)
    await seal_all(store)
    assert await read(store, b"a") == b"fresh"
    assert verified(store) == 0
    await assert_consistent(store)


# --- the second look


async def test_a_block_that_only_looked_bad_stays(bench: Workbench) -> None:
    """A rename that came between finding a path and reading what lies there, say."""
    store = await bench.start()
    data = os.urandom(SIZE)
    inode = await put(store, b"a", data)
    assert not await store.verifier.condemn(inode, store.volume.tiers[0])
    assert await read(store, b"a") == data
    assert quarantined(store) == []
    await assert_consistent(store)


async def test_what_is_being_rewritten_is_not_condemned(bench: Workbench) -> None:
    store = await bench.start()
    inode = await put(store, b"a", os.urandom(SIZE))
    block = await store.blocks.open_writer(inode)
    await store.blocks.write(block, 0, b"new")
    assert not await store.verifier.condemn(inode, store.volume.tiers[0])
    await store.blocks.close(block, writer=True)
    await seal_all(store)
    assert row_at(store, b"a").state == BlockState.SEALED
    await assert_consistent(store)


async def test_a_file_that_is_gone_by_then_is_lost(bench: Workbench, expect_log: list[str]) -> None:
    expect_log.append("tier nvme lost")
    store = await bench.start()
    inode = await put(store, b"a", os.urandom(SIZE))
    file_on(store, "nvme", b"a").unlink()
    assert await store.verifier.condemn(inode, store.volume.tiers[0])
    assert store.volume.catalog.resolve(b"a") is None
    await assert_consistent(store)


async def test_a_bad_replica_that_cannot_be_moved_is_not_served_either(
    bench: Workbench, expect_log: list[str]
) -> None:
    expect_log += ["is bad .* but stays"]
    data = os.urandom(SIZE)
    store = await bench.start()
    await put_on(store, b"a", data, "nvme", "hdd")
    store = await remount(bench, store)
    rot(store, "nvme", b"a")
    quarantine = Path(os.fsdecode(store.volume.tiers[0].root + b"/" + layout.QUARANTINE_DIR))
    quarantine.rmdir()
    assert await read(store, b"a") == data
    assert tiers_of(store, b"a") == ["hdd"]
    assert store.volume.counters.events["quarantine_failures"] == 1
    quarantine.mkdir(mode=0o700)
    file_on(store, "nvme", b"a").unlink()
    await assert_consistent(store)


async def test_a_crash_between_file_and_row_leaves_a_row_that_goes(
    bench: Workbench, expect_log: list[str]
) -> None:
    expect_log += [BAD, "tier nvme lost"]
    data = os.urandom(SIZE)
    store = await bench.start()
    inode = await put_on(store, b"a", data, "nvme", "hdd")
    rot(store, "nvme", b"a")

    class Killed(BaseException):
        """Ends the daemon where it stands."""

    def kill(name: str) -> None:
        raise Killed

    failpoints.on("quarantine.moved", kill)
    try:
        with pytest.raises(Killed):
            await store.verifier.condemn(inode, store.volume.tiers[0])
    finally:
        failpoints.disarm()
    store = await bench.restart_after_crash(store)
    assert await read(store, b"a") == data
    assert tiers_of(store, b"a") == ["hdd"]
    await assert_consistent(store)


async def test_a_catalog_that_takes_nothing_costs_only_another_verification(
    bench: Workbench, expect_log: list[str]
) -> None:
    expect_log.append("recording a verification")
    store = await bench.start()
    data = os.urandom(SIZE)
    await put(store, b"a", data)
    store = await remount(bench, store)
    connection = store.volume.catalog.connection
    connection.execute("PRAGMA query_only = 1")
    assert await read(store, b"a") == data
    connection.execute("PRAGMA query_only = 0")
    store.blocks.idle.clear()
    assert await read(store, b"a") == data
    assert verified(store) == 2
    await assert_consistent(store)
