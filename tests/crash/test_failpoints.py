"""SIGKILL at every failpoint there is, also while an earlier crash is being repaired.

The points are read from the source, so a new one is tested without being listed here, and one that
no scene passes fails. Each time afterwards: nothing torn is visible from the first request on, what
was acknowledged is there byte for byte, tiers, catalog and accounts agree, and fsck finds nothing.
"""

from __future__ import annotations

import fnmatch
import json
import multiprocessing
import os
import re
import shutil
import signal
import zlib
from pathlib import Path

import pytest
import trio

from kvfs.catalog.rows import ROOT_INODE, Kind
from kvfs.config import Config
from kvfs.errors import BlockStale
from kvfs.fsck import Finding, check_offline, check_online
from kvfs.store import Store
from kvfs.volume.volume import open_volume
from tests.crash import scenes
from tests.crash.ledger import Found, Promise, bytes_of, judge, key_of, read_ledger
from tests.crash.points import all_points
from tests.crash.scenes import LEDGER, MESS, POWER_LOST, SCENES, Job, config_at, prepare
from tests.soak import SOAKING
from tests.sources import ROOT
from tests.store.helpers import assert_consistent, read, seal_all, settle_all

END_S = 60.0
# What recovery says of what the scenes leave.
EXPECTED_LOG = [
    "was being (re)?written when kvfs stopped: quarantined",
    "was not sealed before the machine stopped: quarantined",
    "is not sealed and not known: quarantined",
    "is bad .*: quarantined",
    r"tier \w+ lost '",
    "the catalog was corrupt; set aside",
    # One that was begun anew and is not complete.
    "the catalog is older than its tiers; set aside",
    r"tier remote \(.*\) is forgotten",
]


class Stage:
    """Plays scenes, each in a process of its own, and knows which points each passes how often."""

    def __init__(self, base: Path) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([scenes.__name__])
        self.messy = base / MESS
        self.messy.mkdir()
        assert self.play(Job(self.messy, MESS)) == -signal.SIGKILL
        self.passes = {scene: self._count(scene, base / scene) for scene in SCENES}

    def play(self, job: Job) -> int:
        """The exit code."""
        process = self._context.Process(target=scenes.play, args=(job,))
        process.start()
        process.join(END_S)
        if process.exitcode is None:
            process.kill()
            raise AssertionError(f"{job}: has not ended")
        return process.exitcode

    def _count(self, scene: str, base: Path) -> dict[str, int]:
        prepare(scene, base, self.messy)
        assert self.play(Job(base, scene)) == 0, f"the scene {scene} fails by itself"
        passes: dict[str, int] = json.loads((base / "census").read_text())
        return passes

    def scenes_of(self, point: str) -> list[str]:
        """Where a point is tested: the first scene that passes it and one more, or all."""
        found = [scene for scene in SCENES if point in self.passes[scene]]
        if SOAKING or len(found) < 3:
            return found
        return [found[0], found[1 + zlib.crc32(point.encode()) % (len(found) - 1)]]

    def nth(self, scene: str, point: str) -> int:
        """A pass in the first half: how many there are depends on timing."""
        return 1 + zlib.crc32(f"{scene} {point}".encode()) % -(-self.passes[scene][point] // 2)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))


@pytest.mark.soak
@pytest.mark.parametrize("point", all_points())
def test_a_kill_there(point: str, stage: Stage, tmp_path: Path, expect_log: list[str]) -> None:
    expect_log += EXPECTED_LOG
    places = stage.scenes_of(point)
    assert places, f"no scene passes {point}"
    for scene in places:
        base = tmp_path / scene
        for nth in (stage.nth(scene, point), 1):
            shutil.rmtree(base, ignore_errors=True)
            prepare(scene, base, stage.messy)
            code = stage.play(Job(base, scene, point, nth))
            if code == -signal.SIGKILL:
                break
        assert code == -signal.SIGKILL, f"{point} was not passed in {scene}"
        # Every second state is one for fsck, unless there is time for both.
        if scene != "forget" and (SOAKING or scene != places[0]):
            mended = tmp_path / f"{scene}-mended"
            shutil.copytree(base, mended, symlinks=True)
            repair_offline(mended)
            trio.run(check, scene, mended)
            shutil.rmtree(mended)
        if SOAKING or scene == places[0]:
            trio.run(check, scene, base)
        shutil.rmtree(base)


def test_the_crash_table_names_every_point() -> None:
    page = (ROOT / "docs/ARCHITECTURE.md").read_text()
    table = page.split("| failpoints |", 1)[1].split("\n\n", 1)[0]
    patterns = re.findall(r"`(\w+\.(?:\w+|\*))`", table)
    assert [pattern for pattern in patterns if not fnmatch.filter(all_points(), pattern)] == []
    assert [p for p in all_points() if not any(fnmatch.fnmatch(p, q) for q in patterns)] == []


def test_the_kills_are_where_the_names_say(stage: Stage) -> None:
    assert all_points() != []
    unknown = set().union(*stage.passes.values()) - set(all_points())
    assert unknown == set()


# --- after the crash


async def check(scene: str, base: Path) -> None:
    """What must hold from the first request on, and once the walk has ended."""
    promises = read_ledger(base / LEDGER)
    remove_obstacles(base)
    store = open_again(scene, base)
    try:
        await store.recovery.before_serving()
        if scene == "forget":
            _give_up_what_only_remote_had(promises, base)
        await check_while_walking(store, promises)
        await store.recovery.reconcile()
        await seal_all(store)
        await settle_all(store)
        if scene == "repair":
            await fsck(store, repair=True)
        judge(promises, await everything(store), power_lost=scene in POWER_LOST)
        await assert_consistent(store, copied=True)
        assert await fsck(store, repair=False) == []
    finally:
        store.volume.close(clean=True)


def repair_offline(base: Path) -> None:
    """`kvfs fsck --repair --config`, after which it finds nothing."""
    remove_obstacles(base)
    for repair in (True, False):
        report = check_offline(
            config_at(base), repair=repair, rebuild=False, progress=lambda done, total: None
        )
    assert report.findings == []


def remove_obstacles(base: Path) -> None:
    """What the driver put into the way of names."""
    for obstacle in base.glob("nvme/fore/refused/*.x"):
        if obstacle.is_dir():
            shutil.rmtree(obstacle)
    (base / "nvme/fore/refused/file.x").unlink(missing_ok=True)


def open_again(scene: str, base: Path) -> Store:
    config = config_at(base)
    if scene != "forget":
        return Store(open_volume(config))
    left = Config(config.tier[:2], config.tiering, config.mount)
    return Store(open_volume(left, ("remote",)))


def _give_up_what_only_remote_had(promises: dict[str, Promise], base: Path) -> None:
    """It left with its blocks."""
    kept = {
        key_of(name)
        for tier in ("nvme", "hdd") for _, _, names in os.walk(base / tier) for name in names
    }  # fmt: skip
    for key, promise in promises.items():
        if key not in kept and any(outcome.version for outcome in promise.possible):
            promise.possible |= promise.ever


async def check_while_walking(store: Store, promises: dict[str, Promise]) -> None:
    """Before the walk has ended a name is a whole version of its block, or not there."""
    store.volume.walking = True
    for key, promise in promises.items():
        for path in {outcome.path for outcome in promise.ever} - {""}:
            directory, _, name = path.rpartition("/")
            parent = store.volume.catalog.resolve(directory.encode())
            row = await store.find_on_tiers(parent.id, name.encode()) if parent else None
            if row is None or row.kind == Kind.DIRECTORY:
                continue
            try:
                data = await read(store, path.encode())
            except BlockStale:
                continue  # a row whose file is gone; the walk would have dropped it
            versions = {outcome.version for outcome in promise.ever if outcome.path == path}
            assert data in [bytes_of(key, version) for version in versions], f"{path}: torn"


async def everything(store: Store) -> list[Found]:
    """All names there are."""
    found: list[Found] = []
    pending: list[tuple[int, bytes]] = [(ROOT_INODE, b"")]
    while pending:
        directory, above = pending.pop()
        for name, inode in store.namespace.children(directory, 0, 10_000):
            path = above + name
            data = None
            if inode.kind == Kind.DIRECTORY:
                pending.append((inode.id, path + b"/"))
            else:
                data = await read(store, path)
            mark = store.volume.catalog.xattr(inode.id, b"user.mark") or b""
            found.append(Found(os.fsdecode(path), data, mark.decode(), inode.mode))
    return found


async def fsck(store: Store, *, repair: bool) -> list[Finding]:
    async def progress(done: int, total: int) -> None:
        assert done <= total

    return (await check_online(store, repair=repair, progress=progress)).findings
