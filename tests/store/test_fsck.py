"""Each finding: seen, left alone without --repair, repaired with it, and clean afterwards."""

from __future__ import annotations

import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from kvfs import fsck, layout
from kvfs.catalog.rows import Kind
from kvfs.errors import TierError
from kvfs.fsck import FsckReport, check_offline, check_online
from kvfs.store import Store
from tests.store.helpers import (
    Workbench,
    assert_consistent,
    create,
    during_copy,
    file_on,
    files_on,
    move,
    private_files,
    put,
    read,
    rename,
    row_at,
    seal_all,
    settle_all,
    take_away,
    tiers_of,
    writable,
)

Damage = Callable[[Store], Awaitable[None]]


async def check(store: Store, *, repair: bool) -> FsckReport:
    async def progress(done: int, total: int) -> None:
        assert 0 <= done <= total

    return await check_online(store, repair=repair, progress=progress)


def kinds(report: FsckReport) -> list[str]:
    return sorted(finding.kind for finding in report.findings)


async def populate(store: Store) -> None:
    """Blocks on one, two and other tiers."""
    for name in (b"d/fast", b"d/both", b"d/slow", b"e/remote"):
        await put(store, name, name * 1000)
    await move(store, "demote", b"d/both", "nvme", "hdd")
    await move(store, "promote", b"d/both", "hdd", "nvme")
    await move(store, "demote", b"d/slow", "nvme", "hdd")
    await move(store, "demote", b"e/remote", "nvme", "remote")


async def lose_sole_file(store: Store) -> None:
    file_on(store, "hdd", b"d/slow").unlink()


async def lose_one_of_two(store: Store) -> None:
    file_on(store, "hdd", b"d/both").unlink()


async def cut_a_file(store: Store) -> None:
    os.truncate(writable(file_on(store, "nvme", b"d/both")), 10)


async def lose_a_row(store: Store) -> None:
    store.volume.catalog.delete(row_at(store, b"d/fast").id)
    store.volume.load_usage()


async def lose_a_replica_row(store: Store) -> None:
    hdd = store.volume.tier_named("hdd")
    store.volume.catalog.drop_replica(row_at(store, b"d/both").id, hdd.number)
    store.volume.load_usage()


async def leave_a_torn_file(store: Store) -> None:
    file_on(store, "nvme", b"d/torn").write_bytes(b"torn")


async def leave_an_older_generation(store: Store) -> None:
    hdd = store.volume.tier_named("hdd")
    seal = hdd.read_seal(hdd.locate(b"d/slow"))
    assert seal is not None
    stale = file_on(store, "remote", b"d/slow")
    stale.parent.mkdir()
    stale.write_bytes(b"d/slow" * 1000)
    store.volume.tier_named("remote").write_seal(os.fsencode(stale), seal.at_generation(0))


async def clear_a_seal(store: Store) -> None:
    nvme = store.volume.tiers[0]
    nvme.clear_seal(nvme.locate(b"d/fast"))


async def age_a_seal(store: Store) -> None:
    nvme = store.volume.tiers[0]
    seal = nvme.read_seal(nvme.locate(b"d/fast"))
    assert seal is not None
    nvme.write_seal(nvme.locate(b"d/fast"), seal.at_generation(0))


async def leave_an_orphan_row(store: Store) -> None:
    store.volume.catalog.insert_inode(Kind.BLOCK, 0o644, 0, 0, 0)


async def miscount(store: Store) -> None:
    store.volume.space[1].used_bytes += 4096


async def miscount_the_whole(store: Store) -> None:
    store.volume.space.duplicate_bytes += 4096
    store.volume.blocks += 1


async def miscount_a_replica(store: Store) -> None:
    nvme = store.volume.tiers[0]
    store.volume.catalog.update_replica(
        row_at(store, b"d/fast").id, nvme.number, allocated_bytes=1 << 20
    )
    store.volume.load_usage()


async def copy_a_file(store: Store) -> None:
    """With its seal record, as `cp -a` does."""
    source, copy = file_on(store, "nvme", b"d/fast"), file_on(store, "nvme", b"d/copy")
    shutil.copy2(source, copy)


async def leave_a_fanned_copy(store: Store) -> None:
    source, copy = (file_on(store, "nvme", b"d/fast", fanned=fanned) for fanned in (False, True))
    copy.parent.mkdir(parents=True)
    shutil.copy2(source, copy)


async def leave_litter(store: Store) -> None:
    staging = Path(os.fsdecode(store.volume.tiers[1].root + b"/" + layout.STAGING_DIR))
    (staging / "12.3").write_bytes(b"half a copy")


async def leave_something_in_quarantine(store: Store) -> None:
    private = Path(os.fsdecode(store.volume.tiers[1].root + b"/" + layout.QUARANTINE_DIR))
    (private / "notes.txt").write_bytes(b"mine")


async def rot_without_a_seal(store: Store) -> None:
    await clear_a_seal(store)
    with writable(file_on(store, "nvme", b"d/fast")).open("r+b") as file:
        file.write(b"rotten")


DAMAGES: list[tuple[Damage, list[str], list[str]]] = [
    (lose_sole_file, ["missing-file"], ["tier hdd lost"]),
    (lose_one_of_two, ["missing-file"], ["tier hdd lost"]),
    (cut_a_file, ["wrong-size"], ["'d/both' is bad .10 bytes, sealed with 6000.*quarantined"]),
    (lose_a_row, ["unknown-file"], []),
    (lose_a_replica_row, ["unknown-file"], []),
    (leave_a_torn_file, ["unknown-file"], ["not sealed and not known"]),
    (leave_an_older_generation, ["unknown-file"], []),
    (clear_a_seal, ["seal-record"], []),
    (age_a_seal, ["seal-record"], []),
    (leave_an_orphan_row, ["orphan-row"], []),
    (miscount, ["account"], []),
    (miscount_the_whole, ["account"], []),
    (miscount_a_replica, ["account"], []),
    (copy_a_file, ["duplicate"], ["knows elsewhere on the tier: quarantined"]),
    (leave_a_fanned_copy, ["duplicate"], ["knows elsewhere on the tier: quarantined"]),
    (leave_litter, ["staging"], []),
    (leave_something_in_quarantine, ["quarantine"], []),
    (rot_without_a_seal, ["seal-record"], ["'d/fast' is bad .* checksum .*: quarantined"]),
]


async def test_a_sound_store_has_no_findings(bench: Workbench) -> None:
    store = await bench.start()
    await populate(store)
    opened = await store.blocks.open_reader(row_at(store, b"d/fast").id)
    writing = await create(store, b"d/writing", b"data")
    for repair in (False, True):
        report = await check(store, repair=repair)
        assert kinds(report) == []
        assert report.checked >= 6 + 5
    await store.blocks.close(opened, writer=False)
    await store.blocks.close(writing, writer=True)
    await seal_all(store)
    await assert_consistent(store)


@pytest.mark.parametrize(("damage", "expected", "logged"), DAMAGES, ids=lambda d: getattr(
    d, "__name__", ""))  # fmt: skip
async def test_damage_is_found_repaired_and_gone(
    bench: Workbench, expect_log: list[str], damage: Damage, expected: list[str],
    logged: list[str],
) -> None:  # fmt: skip
    expect_log += logged
    store = await bench.start()
    await populate(store)
    await damage(store)
    files = [files_on(tier) for tier in store.volume.tiers]
    report = await check(store, repair=False)
    assert kinds(report) == expected
    assert not any(finding.repaired for finding in report.findings)
    assert [files_on(tier) for tier in store.volume.tiers] == files, "looking changed something"
    assert kinds(await check(store, repair=False)) == expected
    report = await check(store, repair=True)
    assert set(kinds(report)) == set(expected)
    assert all(finding.repaired for finding in report.findings)
    await settle_all(store)
    await check(store, repair=True)
    assert kinds(await check(store, repair=False)) == []
    for path in (b"d/both", b"e/remote"):
        assert await read(store, path) == path * 1000
    await assert_consistent(store)


async def test_a_copy_that_is_being_made_is_no_litter(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    await populate(store)
    during_copy(monkeypatch, lambda: check_clean(store))
    await move(store, "demote", b"d/fast", "nvme", "hdd")
    await assert_consistent(store)


async def test_a_file_that_is_in_staging_for_a_moment_is_no_litter(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    staging = Path(os.fsdecode(store.volume.tiers[0].root + b"/" + layout.STAGING_DIR))
    (staging / "probe").write_bytes(b"of a moment")
    await check_clean(store)
    monkeypatch.setattr(fsck, "MOMENT_S", -1.0)
    assert kinds(await check(store, repair=True)) == ["staging"]
    await assert_consistent(store)


async def check_clean(store: Store) -> None:
    assert kinds(await check(store, repair=True)) == []


async def test_a_finding_is_a_document(bench: Workbench) -> None:
    store = await bench.start()
    await populate(store)
    await clear_a_seal(store)
    (finding,) = (await check(store, repair=True)).findings
    assert finding.as_document() == {
        "kind": "seal-record", "path": b"d/fast", "tier": "nvme",
        "detail": "missing or old", "repaired": True,
    }  # fmt: skip


async def test_a_tier_that_is_away_is_said_not_to_be_checked(bench: Workbench) -> None:
    store = await bench.start()
    await populate(store)
    take_away(store.volume.tier_named("remote"))
    (finding,) = (await check(store, repair=True)).findings
    assert (finding.kind, finding.tier, finding.repaired) == ("tier-offline", "remote", False)
    assert tiers_of(store, b"e/remote") == ["remote"], "its blocks are not given up"


# --- offline


def offline(bench: Workbench, *, repair: bool = False, rebuild: bool = False) -> FsckReport:
    return check_offline(
        bench.config, repair=repair, rebuild=rebuild, progress=lambda done, total: None
    )


def test_an_offline_check_refuses_tiers_in_use(bench: Workbench) -> None:
    trio.run(bench.start)
    with pytest.raises(TierError, match="another kvfs daemon uses"):
        offline(bench)
    with pytest.raises(TierError, match="another kvfs daemon uses"):
        offline(bench, rebuild=True)


def test_an_offline_check_repairs_and_leaves_a_clean_catalog(
    bench: Workbench, expect_log: list[str]
) -> None:
    expect_log.append("tier hdd lost")

    async def prepare() -> None:
        store = await bench.start()
        await populate(store)
        await lose_sole_file(store)
        staged = store.volume.tiers[1].root + b"/" + layout.staging_path(9, 9)
        Path(os.fsdecode(staged)).write_bytes(b"half")
        bench.crash(store)

    async def look() -> None:
        store = await bench.start()
        assert not store.volume.unclean
        assert store.volume.catalog.resolve(b"d/slow") is None
        await assert_consistent(store)

    trio.run(prepare)
    assert kinds(offline(bench, repair=True)) == ["missing-file", "staging"]
    assert kinds(offline(bench)) == []
    trio.run(look)


@pytest.mark.semantics("S-verify-9")
def test_without_repair_an_offline_check_changes_nothing(
    bench: Workbench, expect_log: list[str]
) -> None:
    expect_log += ["not sealed before the machine stopped: quarantined"]

    async def prepare() -> None:
        store = await bench.start()
        await populate(store)
        writing = await create(store, b"d/writing", b"half")
        published = await create(store, b"d/published.tmp", b"whole")
        await rename(store, b"d/published.tmp", b"d/published")
        assert {writing.inode, published.inode} <= set(store.replicas.open_blocks)
        hdd = store.volume.tier_named("hdd")
        staged = hdd.root + b"/" + layout.staging_path(9, 9)
        Path(os.fsdecode(staged)).write_bytes(b"half")
        with store.volume.catalog.transaction("test"):
            store.volume.catalog.intents.add(hdd.number, "unlink", 77, b"d/gone")
        file_on(store, "hdd", b"d/gone").write_bytes(b"to be removed")
        bench.crash(store, reboot=True)

    def everything() -> dict[str, bytes]:
        return {
            str(file): file.read_bytes()
            for tier in bench.config.tier
            for file in sorted(tier.path.rglob("*"))
            if file.is_file() and "/catalog.sqlite" not in str(file) and file.name != "tier.json"
        }

    trio.run(prepare)
    before = everything()
    for _ in range(2):
        report = offline(bench)
        assert kinds(report) == ["staging", "unfinished", "unfinished", "unfinished"]
        assert not any(finding.repaired for finding in report.findings)
        assert everything() == before
    # The next mount still knows that the machine stopped, and decides.
    assert kinds(offline(bench, repair=True)) == ["staging"]
    after = everything()
    assert not any(name.endswith(("d/writing", "d/published", "d/gone")) for name in after)
    assert any(".unsealed.published" in name for name in after)
    assert kinds(offline(bench)) == []


def test_a_rebuild_loses_only_heat(bench: Workbench) -> None:
    names = (b"d/fast", b"d/both", b"d/slow", b"e/remote")

    def describe(store: Store) -> list[object]:
        return [
            (row_at(store, name)._replace(atime_ns=0, ctime_ns=0), tiers_of(store, name))
            for name in names
        ]

    async def prepare() -> list[object]:
        store = await bench.start()
        await populate(store)
        store.volume.catalog.set_tau(row_at(store, b"d/fast").id, 1e10, 0)
        described = describe(store)
        bench.stop(store)
        return described

    async def look() -> list[object]:
        store = await bench.start()
        for name in names:
            assert await read(store, name) == name * 1000
        assert store.volume.catalog.tau_of(row_at(store, b"d/fast").id) != 1e10
        described = describe(store)
        await assert_consistent(store)
        return described

    before = trio.run(prepare)
    report = offline(bench, rebuild=True)
    assert kinds(report) == []
    nvme = bench.config.tier[0].path
    assert (nvme / ".kvfs/catalog.sqlite.before-rebuild").exists()
    assert trio.run(look) == before


async def test_repair_puts_a_torn_file_where_it_is_never_served(
    bench: Workbench, expect_log: list[str]
) -> None:
    expect_log.append("not sealed and not known")
    store = await bench.start()
    await populate(store)
    await leave_a_torn_file(store)
    await check(store, repair=True)
    assert store.volume.catalog.resolve(b"d/torn") is None
    assert len(private_files(store.volume.tiers[0], layout.QUARANTINE_DIR)) == 1
    await assert_consistent(store)
