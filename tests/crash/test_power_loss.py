"""The machine stops: what the tiers' disks have by then is all that is left.

Two tiers are ext4 filesystems in image files. While a load runs, everything that could write is
stopped for a moment and the images are copied: the copies have what was written to the disks, and
nothing of what was only in the page cache. kvfs is then mounted on the copies.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from kvfs.mount.session import detach
from tests.crash.mounted import SEED, check_integrity, in_background, pid_of
from tests.mount.live import call, config_in, live, state
from tests.mounting import MountedKvfs, has_ended, wait_until
from tests.soak import Did, longer

Durability = Literal["none", "seal"]
CYCLES = longer(1)
TIERS = {"nvme": 96, "hdd": 96}
IMAGE_BYTES = 160 << 20
# As a filesystem is by default, and one that lets a file have its length before its bytes.
OPTIONS = {"ordered": "loop", "unordered": "loop,data=writeback,nodelalloc"}
MAKE_AT_ONCE = "lazy_itable_init=0,lazy_journal_init=0"
WRITERS = 3

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/loop-control").exists() or not shutil.which("mkfs.ext4"),
    reason="needs root, loop devices and mkfs.ext4: POWER LOSS IS NOT TESTED HERE",
)


@dataclass
class Disk:
    """An ext4 filesystem in an image file, mounted where a tier is."""

    image: Path
    place: Path
    options: str

    def make(self) -> None:
        with self.image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        run("mkfs.ext4", "-q", "-b", "4096", "-E", MAKE_AT_ONCE, self.image)

    def mount(self) -> None:
        run("mount", "-t", "ext4", "-o", self.options, self.image, self.place)

    def unmount(self) -> None:
        if os.path.ismount(self.place):
            run("umount", "-l", self.place)

    def writes(self) -> str:
        """How much was ever written to the device; changes with every write."""
        device = os.stat(self.place).st_dev
        counters = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text()
        return " ".join(counters.split()[4:9])


def run(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True, timeout=60)


@dataclass
class Version:
    """A block under a name, with what it then held."""

    name: str
    data: bytes


@dataclass
class Block:
    """What a writer did to one block, and which version of it kvfs called sealed (-1: none)."""

    path: Path
    versions: list[Version] = field(default_factory=list)
    sealed: int = -1
    busy: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def change(self, name: str, data: bytes, *, keeps_seal: bool = False) -> Iterator[None]:
        """Around calls that make another version. Until that is sealed there is no promise."""
        with self.lock:
            self.busy = True
            keeps_seal &= self.sealed == len(self.versions) - 1
            self.versions.append(Version(name, data))
            if not keeps_seal:
                self.sealed = -1
        yield
        with self.lock:
            self.busy = False
            if keeps_seal:
                self.sealed = len(self.versions) - 1

    def note_sealed(self, version: int) -> None:
        """Unless another version was begun meanwhile."""
        with self.lock:
            if version == len(self.versions) - 1 and not self.busy:
                self.sealed = version


class PowerLoad:
    """Publishes, replaces, renames and rewrites blocks, and renames directories, until the daemon
    is killed. Each writer has a directory of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blocks: list[Block] = []
        self._stop = threading.Event()

    def start(self) -> list[threading.Thread]:
        threads = [in_background(lambda n=number: self._write(n)) for number in range(WRITERS)]  # type: ignore[misc] # mypy infers no lambda with defaults
        return [*threads, in_background(self._watch)]

    def stop(self, threads: list[threading.Thread]) -> None:
        self._stop.set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a client of the killed daemon hangs"

    def sealed(self) -> dict[int, int]:
        """Blocks and their versions that were sealed by now."""
        return {
            number: block.sealed for number, block in enumerate(self.blocks) if block.sealed >= 0
        }

    def _write(self, number: int) -> None:
        rng = random.Random(f"{SEED}/{number}")
        directory = self.root / str(number)
        directory.mkdir()
        mine: list[Block] = []
        for turn in range(1_000_000):
            if self._stop.is_set():
                return
            act = rng.random()
            if not mine or act < 0.6:
                block = Block(directory / f"{turn}.bin")
                self.blocks.append(block)
                mine.append(block)
                self._publish(block, rng)
            elif act < 0.75:
                self._publish(rng.choice(mine), rng)
            elif act < 0.9:
                self._rename(rng.choice(mine), turn)
            elif act < 0.97:
                self._rewrite(rng.choice(mine), rng)
            else:
                goal = self.root / f"{number}.{turn}"
                directory.rename(goal)
                directory = goal
                for block in mine:
                    block.path = directory / block.path.name

    def _publish(self, block: Block, rng: random.Random) -> None:
        data = rng.randbytes(rng.randrange(1, 100_000))
        temporary = block.path.with_suffix(".tmp")
        temporary.write_bytes(data)
        with block.change(block.path.name, data):
            temporary.rename(block.path)

    def _rename(self, block: Block, turn: int) -> None:
        goal = block.path.with_name(f"{turn}.renamed")
        with block.change(goal.name, block.versions[-1].data, keeps_seal=True):
            block.path.rename(goal)
            block.path = goal

    def _rewrite(self, block: Block, rng: random.Random) -> None:
        data = rng.randbytes(len(block.versions[-1].data))
        with block.change(block.path.name, data), block.path.open("r+b", buffering=0) as file:
            file.write(data)

    def _watch(self) -> None:
        """Note what `user.kvfs.state` says is sealed."""
        while not self._stop.is_set():
            for block in list(self.blocks):
                last = len(block.versions) - 1
                if block.sealed == last or block.busy:
                    continue
                try:
                    is_sealed = state(block.path) == "sealed"
                except FileNotFoundError:
                    continue  # it is renamed just now
                if is_sealed:
                    block.note_sealed(last)


@contextmanager
def disks(base: Path, kind: str) -> Iterator[list[Disk]]:
    made = []
    with ExitStack() as stack:
        for name in TIERS:
            (base / name).mkdir()
            disk = Disk(base / f"{name}.img", base / name, OPTIONS[kind])
            disk.make()
            disk.mount()
            stack.callback(disk.unmount)
            made.append(disk)
        yield made


def lose_power(mount: MountedKvfs, made: list[Disk], load: PowerLoad) -> dict[int, int]:
    """Stop the machine; which versions were sealed by then. The disks are those that it leaves."""
    pid = pid_of(mount)
    sealed = load.sealed()
    os.kill(pid, signal.SIGSTOP)
    for _ in range(100):
        before = [disk.writes() for disk in made]
        for disk in made:
            run("cp", "--sparse=always", disk.image, disk.image.with_suffix(".left"))
        # The kernel may have written by itself.
        if before == [disk.writes() for disk in made]:
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the disks are never quiet")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: has_ended(pid), "the daemon is gone")
    # Without those that somebody began to change just before the end.
    return {number: old for number, old in sealed.items() if load.blocks[number].sealed >= old}


def boot(mount: MountedKvfs, made: list[Disk]) -> None:
    """The machine starts again, with the disks it had when it stopped."""
    detach(mount.path)
    for disk in made:
        disk.unmount()
        disk.image.with_suffix(".left").rename(disk.image)
        disk.mount()
    with sqlite3.connect(made[0].place / ".kvfs/catalog.sqlite") as catalog:
        catalog.execute("UPDATE meta SET value = 'an earlier boot' WHERE key = 'boot_id'")
    catalog.close()
    mount.start()


@pytest.mark.soak
@pytest.mark.timeout(60 + 60 * CYCLES)
@pytest.mark.parametrize("kind", sorted(OPTIONS))
@pytest.mark.parametrize("durability", ["none", "seal"])
@pytest.mark.semantics("S-power-1", "S-power-2", "S-power-3")
def test_power_loss(
    durability: Durability, kind: str, tmp_path: Path, expect_log: list[str], record_property: Did
) -> None:
    # Whatever a disk did not get is a miss, and said to be.
    expect_log += ["tier (nvme|hdd) lost 'load", "(nvme|hdd): 'load.*: quarantined"]
    rng = random.Random(f"{SEED}/{durability}/{kind}")
    for cycle in range(CYCLES):
        base = tmp_path / str(cycle)
        base.mkdir()
        with disks(base, kind) as made:
            config = config_in(base, TIERS)
            tiers = [msgspec.structs.replace(t, durability=durability) for t in config.tier]
            mount = MountedKvfs(base, msgspec.structs.replace(config, tier=tuple(tiers)))
            with live(mount, expect_log):
                check_after_power_loss(mount, made, durability, rng)
    record_property("power losses", CYCLES)


def check_after_power_loss(
    mount: MountedKvfs, made: list[Disk], durability: Durability, rng: random.Random
) -> None:
    # What says that the last end was in order is on the disk.
    mount.remount()
    root = mount.path / "load"
    root.mkdir()
    load = PowerLoad(root)
    threads = load.start()
    for wanted in (rng.randrange(10, 40), rng.randrange(40, 120)):
        wait_until(lambda most=wanted: len(load.sealed()) > most, "blocks are sealed")  # type: ignore[misc] # mypy infers no lambda with defaults
        # What is replaced while it is moved is skipped.
        call(mount, "demote", paths=[b"load"], to="hdd")
        sync_catalog(made)
    time.sleep(rng.uniform(0.0, 0.5))  # the moment of the power loss is the point
    sealed = lose_power(mount, made, load)
    load.stop(threads)
    boot(mount, made)
    known = {version.data for block in load.blocks for version in block.versions}
    early = read_all(root)
    wait_until(lambda: call(mount, "status")["state"] == "ok", "recovered")
    found = read_all(root)
    assert [path for path, data in (*early.items(), *found.items()) if data not in known] == []
    if durability == "seal":
        assert sealed
        for number, version in sealed.items():
            check_kept(load.blocks[number], version, found)
    check_integrity(mount)


def sync_catalog(made: list[Disk]) -> None:
    """Its log reaches the disk now and then; afterwards it is behind what the tiers have."""
    with (made[0].place / ".kvfs/catalog.sqlite-wal").open("rb") as log:
        os.fsync(log.fileno())


def read_all(root: Path) -> dict[Path, bytes]:
    """Every block that can be opened."""
    found = {}
    for directory, _, names in os.walk(root):
        for path in (Path(directory, name) for name in names):
            try:
                found[path] = path.read_bytes()
            except OSError as error:
                # Its bytes were not what was sealed, or the walk gave the name to another block.
                assert error.errno in (errno.ENOENT, errno.ESTALE), path  # noqa: PT017 - most can be read
    return found


def check_kept(block: Block, sealed: int, found: dict[Path, bytes]) -> None:
    """A sealed block is there, once, as it was or as it was made later."""
    names = {(version.name, version.data) for version in block.versions[sealed:]}
    there = [path for path, data in found.items() if (path.name, data) in names]
    history = [(version.name, len(version.data)) for version in block.versions]
    assert len(there) == 1, f"{block.path}: {history}, of which {sealed} was sealed; found {there}"
