"""What goes on while the process is killed: serving, or putting right what an earlier crash left.

`play` runs in a process of its own. `mess` leaves, all at once, what crashes at different moments
leave, so that one start has everything to repair.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import trio

from kvfs import failpoints, layout
from kvfs.catalog.rows import Kind
from kvfs.config import Config
from kvfs.fsck import check_online
from kvfs.mount import services
from kvfs.store import Store
from kvfs.tiers.identity import init_tier, write_identity
from kvfs.tiers.seal import SEAL_XATTR
from kvfs.upkeep.sealer import seal_files
from kvfs.volume.catalog_file import catalog_path
from kvfs.volume.volume import open_volume
from tests.crash.driver import Driver
from tests.crash.ledger import NOWHERE, Ledger, Outcome, bytes_of
from tests.mount.live import config_in
from tests.store.helpers import create, row_at, take_away

CAPACITIES_MIB = {"nvme": 16, "hdd": 128, "remote": 128}
COMPRESS = {"nvme": "none", "hdd": "zstd", "remote": "zstd-planes"}
LEDGER = "ledger"
# A copy that nobody finished, of the block with this number.
LITTER = layout.STAGING_DIR + b"/4711.1"


@dataclass(frozen=True)
class Job:
    """What one process does below `base`, and where it is killed: at the nth pass of `point`.

    Without a point the passes are counted into `base/census`.
    """

    base: Path
    scene: str
    point: str = ""
    nth: int = 1


def config_at(base: Path) -> Config:
    """The slower tiers compress, each in its way."""
    config = config_in(base, CAPACITIES_MIB)
    tiers = tuple(
        msgspec.structs.replace(tier, compress=COMPRESS[tier.name]) for tier in config.tier
    )
    return msgspec.structs.replace(config, tier=tiers)


def play(job: Job) -> None:
    """Entry of the process."""
    passes: Counter[str] = Counter()
    if job.point:
        failpoints.arm(f"{job.point}:{job.nth}")
    else:
        failpoints.on(failpoints.EVERY, lambda name: passes.update([name]))
    trio.run(SCENES.get(job.scene, mess), job.base)
    (job.base / "census").write_text(json.dumps(passes))


async def start(base: Path, forget: tuple[str, ...] = ()) -> Store:
    """A store that could serve, as the daemon starts it."""
    store = Store(open_volume(config_at(base), forget))
    await store.recovery.before_serving()
    return store


async def stop(store: Store) -> None:
    """As the daemon ends."""
    await store.sealer.seal_pending()
    await services.flush_once(store)
    for tier in store.volume.tiers:
        await store.replicas.settle(tier)
    store.volume.close(clean=True)


# --- scenes


async def serve(base: Path) -> None:
    """From empty directories to an orderly end. One tier has no xattrs."""
    remote = base / "remote"
    remote.mkdir(exist_ok=True)
    _without_xattrs(remote)
    store = await start(base)
    driver = Driver(store, Ledger(base / LEDGER), base.name)
    async with driver.load():
        await driver.everything()
    await stop(store)


async def restart(base: Path) -> None:
    """The start after a crash, with the walk and what fsck finds."""
    store = await start(base)
    await look_everywhere(store)
    await store.recovery.reconcile()
    await store.sealer.seal_pending()
    await stop(store)


async def repair(base: Path) -> None:
    """A start, and `kvfs fsck --repair` instead of the walk."""

    async def progress(done: int, total: int) -> None:
        await trio.lowlevel.checkpoint()

    store = await start(base)
    await store.sealer.seal_pending()
    await check_online(store, repair=True, progress=progress)
    # A row without a name: the next start after a crash takes it for damage.
    store.volume.catalog.insert_inode(Kind.DIRECTORY, 0o755, 0, 0, 1)
    await check_online(store, repair=True, progress=progress)
    await stop(store)


async def forget(base: Path) -> None:
    """A tier leaves the configuration for good."""
    config = config_at(base)
    left = Config(config.tier[:2], config.tiering, config.mount)
    store = Store(open_volume(left, ("remote",)))
    await store.recovery.before_serving()
    await stop(store)


async def look_everywhere(store: Store) -> None:
    """Ask for names as the kernel does before the walk has ended."""
    store.volume.walking = True
    for tier in store.volume.tiers:
        for directory, _, names in os.walk(tier.root):
            below = os.path.relpath(directory, tier.root)
            if layout.is_within(below, layout.PRIVATE_DIR):
                continue
            parent = store.volume.catalog.resolve(b"" if below == b"." else below)
            if parent is not None:
                for name in names:
                    await store.find_on_tiers(parent.id, name)


SCENES: dict[str, Callable[[Path], Awaitable[None]]] = {
    "serve": serve,
    "restart": restart,
    "reboot": restart,
    "rebuild": restart,
    "corrupt": restart,
    "adopt": restart,
    "repair": repair,
    "forget": forget,
}
MESS = "mess"
# Where what was not sealed may be gone, and what was removed may be back.
POWER_LOST = frozenset({"reboot", "rebuild", "corrupt", "adopt"})


def prepare(scene: str, base: Path, messy: Path) -> None:
    """Make what the scene begins with; `messy` is what `mess` left."""
    if scene == "serve":
        base.mkdir()
        return
    shutil.copytree(messy, base, symlinks=True)
    catalog = catalog_path(config_at(base))
    if scene == "reboot":
        _in_catalog(catalog, "UPDATE meta SET value = 'an earlier boot' WHERE key = 'boot_id'")
        # Its pages never reached the medium.
        published = base / "nvme/war/published.bin"
        published.write_bytes(bytes(published.stat().st_size))
    if scene in ("restart", "reboot", "repair"):
        os.removexattr(base / "nvme/war/record.bin", SEAL_XATTR)
    if scene == "rebuild":
        _remove_catalog(catalog)
    elif scene == "corrupt":
        _in_catalog(catalog, "PRAGMA wal_checkpoint(TRUNCATE)")
        with catalog.open("r+b") as file:
            file.write(os.urandom(4096))
    elif scene == "adopt":
        _remove_catalog(catalog)
        for tier in config_at(base).tier:
            shutil.rmtree(tier.path / os.fsdecode(layout.PRIVATE_DIR))
            shutil.rmtree(tier.path / "war")
            init_tier(tier.path, adopt=True)
        lines = (messy / LEDGER).read_text().splitlines(keepends=True)
        (base / LEDGER).write_text("".join(line for line in lines if "war/" not in line))


def _remove_catalog(catalog: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        Path(f"{catalog}{suffix}").unlink(missing_ok=True)


def _in_catalog(catalog: Path, statement: str) -> None:
    with sqlite3.connect(catalog) as database:
        database.execute(statement)
    database.close()


def _without_xattrs(path: Path) -> None:
    identity = init_tier(path)
    probe = msgspec.structs.replace(identity.probe, xattrs=False)
    write_identity(path, msgspec.structs.replace(identity, probe=probe))


# --- what crashes leave


async def mess(base: Path) -> None:
    """Blocks on all tiers, then something of every kind to repair, then SIGKILL."""
    store = await start(base)
    ledger = Ledger(base / LEDGER)
    driver = Driver(store, ledger, base.name)
    async with trio.open_nursery() as nursery:
        driver.start_services(nursery)
        await _peace(driver)
        await _to_be_damaged(driver)
        nursery.cancel_scope.cancel()
    await store.sealer.seal_pending()
    await _unfinished(driver)
    await _damage(driver)
    os.kill(os.getpid(), signal.SIGKILL)


async def _peace(driver: Driver) -> None:
    """Blocks that nothing happens to."""
    await driver.mkdir("peace")
    for number in range(6):
        key = await driver.put_everywhere(f"peace/quiet{number}.bin")
        for tier in ("nvme", "hdd", "remote")[: number % 3]:
            await driver.move("drop", key, tier)
    await driver.attributes_of("peace/marked.bin")


async def _to_be_damaged(driver: Driver) -> None:
    for name in ("same", "copied", "unlinked", "both", "half", "newer"):
        await driver.put_everywhere(f"war/{name}.bin")
    for name in ("alone", "row", "record", "stale", "lost", "later"):
        await driver.put(f"war/{name}.bin")
    key = await driver.put("war/away.bin")
    await driver.move("demote", key, "nvme", "remote")


async def _unfinished(driver: Driver) -> None:
    """What a killed daemon was at. Nothing is sealed or settled any more."""
    store, ledger = driver.store, driver.ledger
    for name in ("published", "recorded", "closed", "created"):
        path, key = f"war/{name}.bin", name
        version = driver.next_version(key)
        temporary = f"{path}_{version}.tmp" if name in ("published", "recorded") else path
        block = await create(store, temporary.encode(), bytes_of(key, version))
        await store.blocks.close(block, writer=True)
        if temporary == path:
            ledger.maybe(key, Outcome(path, version))
        else:
            with ledger.change(Outcome(path, version)):
                await driver.rename(temporary, path)
    for name in ("recorded", "closed"):
        found = store.sealer._job(row_at(store, f"war/{name}.bin".encode()).id)
        assert found is not None
        seal_files(found[0], [found[1]])
    driver.file("nvme", "war/created.bin").unlink()
    await driver.unlink("unlinked")
    tier = store.volume.tier_named("remote")
    take_away(tier)
    for name in ("away", "both"):
        goal = driver.here(name)._replace(path=f"war/moved/{name}.1.bin")
        with ledger.change(goal):
            await driver.rename(driver.here(name).path, goal.path)
    tier.health.probed("")
    for name in ("same", "copied", "alone"):
        block = await store.blocks.open_writer(row_at(store, driver.path(name)).id)
        if name != "same":
            ledger.maybe(name, NOWHERE)
            await store.blocks.write(block, 0, b"new bytes that nobody was promised")


async def _damage(driver: Driver) -> None:
    """What a catalog that lost its last transactions, and people, leave. Not for the store's eyes:
    it is killed now."""
    store, ledger = driver.store, driver.ledger
    catalog, tiers = store.volume.catalog, store.volume.tiers
    for tier in tiers:
        litter = Path(os.fsdecode(tier.root + b"/" + LITTER))
        litter.write_bytes(b"half a copy")
        expired = layout.QUARANTINE_DIR + b"/" + layout.quarantine_name(1, "unknown", b"war/old")
        Path(os.fsdecode(tier.root + b"/" + expired)).touch()
    # Rows are lost: of a block, of a replica, the replicas of a file being written, a name.
    catalog.delete(row_at(store, driver.path("row")).id)
    catalog.drop_replica(row_at(store, driver.path("half")).id, tiers[1].number)
    catalog.update(row_at(store, driver.path("later")).id, generation=1)
    number = row_at(store, b"war/created.bin").id
    catalog.drop_replica(number, tiers[0].number)
    # Files: gone, gone beside others, torn, at another's name, of an older content.
    ledger.maybe("lost", NOWHERE)
    driver.file("nvme", "war/lost.bin").unlink()
    driver.file("remote", driver.here("newer").path).unlink()
    driver.file("hdd", "war/torn.bin").write_bytes(b"nobody knows me")
    shutil.copy2(driver.file("hdd", driver.here("newer").path), driver.file("hdd", "war/stale.bin"))
    with ledger.change(Outcome("stray", mode=0o755)):
        driver.file("nvme", "stray").mkdir(mode=0o755)
