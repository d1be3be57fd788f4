"""SIGKILL of the daemon at any moment: what was promised is there after the next mount.

The machine does not stop in these tests, so the page cache outlives the daemon: what a writer was
told is complete must be there byte for byte, and nothing else may pass for a block.
"""

from __future__ import annotations

import os
import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kvfs.control import ControlClient, find_mount
from kvfs.errors import CatalogError
from tests.crash.load import Load
from tests.crash.mounted import (
    SEED,
    blocks_in,
    bytes_on,
    check_blocks,
    check_integrity,
    in_background,
    kill,
    move_at_random,
    order,
    pid_of,
    recover,
    spread_blocks,
    wait_sealed,
)
from tests.mount.live import call, config_in, live
from tests.mounting import MountedKvfs, run_kvfs, wait_until
from tests.soak import FACTOR, SOAKING, Did

CYCLES = int(os.environ.get("KVFS_CRASH_CYCLES") or (10 * FACTOR if SOAKING else 20))
CATALOG = ".kvfs/catalog.sqlite"


@pytest.fixture
def mount(tmp_path: Path, expect_log: list[str]) -> Iterator[MountedKvfs]:
    """Three tiers with room for everything; only orders move blocks."""
    with live(MountedKvfs(tmp_path, config_in(tmp_path)), expect_log) as mounted:
        yield mounted


# --- under load


@pytest.mark.soak
@pytest.mark.timeout(60 + 30 * CYCLES)
def test_what_a_rename_promised_survives_every_kill(
    mount: MountedKvfs, expect_log: list[str], record_property: Did
) -> None:
    # An unlink that was cut off: on the first tier the file goes before its row.
    expect_log.append("tier nvme lost 'load/")
    print(f"make crash N={CYCLES} SEED={SEED}")  # what a failure shows
    rng = random.Random(SEED)
    root = mount.path / "load"
    root.mkdir()
    load = Load(root, seed=rng.randrange(1 << 30))
    checked = 0
    for cycle in range(CYCLES):
        pid = pid_of(mount)
        mover_rng = random.Random(rng.randrange(1 << 30))
        load.start(cycle)
        mover = in_background(lambda moves=mover_rng: move_at_random(mount, moves))  # type: ignore[misc] # mypy infers no lambda with defaults
        time.sleep(rng.uniform(0.2, 1.2))  # the moment of the kill is the point
        kill(pid)
        load.join()
        mover.join(60)
        recover(mount)
        checked += load.verify()
        check_integrity(mount)
    assert checked > 0
    assert load.cut_off > 0
    record_property("kills", CYCLES)
    record_property("blocks checked", checked)


def test_files_written_under_their_final_names_are_whole_or_gone(mount: MountedKvfs) -> None:
    directory = mount.path / "direct"
    directory.mkdir()
    closed: dict[Path, bytes] = {}
    opened: list[Path] = []

    def write(number: int) -> None:
        rng = random.Random(f"{SEED}/{number}")
        while True:
            path = directory / f"{number}-{rng.randrange(1 << 40)}.bin"
            pieces = [rng.randbytes(30_000) for _ in range(5)]
            opened.append(path)
            with path.open("wb", buffering=0) as file:
                for piece in pieces:
                    file.write(piece)
            closed[path] = b"".join(pieces)

    pid = pid_of(mount)
    writers = [in_background(lambda n=number: write(n)) for number in range(3)]  # type: ignore[misc] # mypy infers no lambda with defaults
    wait_until(lambda: len(closed) > 40, "some files are closed")
    kill(pid)
    for writer in writers:
        writer.join(60)
    recover(mount)
    assert len(opened) > len(closed)
    for path in opened:
        if path.exists():
            assert path in closed, f"{path} was never closed"
            assert path.read_bytes() == closed[path]
    check_integrity(mount)


def test_a_block_that_was_being_rewritten_is_what_its_copy_has(
    mount: MountedKvfs, expect_log: list[str]
) -> None:
    blocks = spread_blocks(mount)
    with_copy, alone = mount.path / "ns/both/3.bin", mount.path / "ns/second/3.bin"
    expect_log.append("'ns/second/3.bin' was being rewritten when kvfs stopped: removed")
    files = [path.open("r+b", buffering=0) for path in (with_copy, alone)]
    for file in files:
        file.write(b"new bytes that nobody was promised")
    kill(pid_of(mount))
    for file in files:
        for act in (partial(file.write, b"more"), file.close):
            try:
                act()
            except OSError:
                pass  # the daemon was killed; where writes go past it they still work
    recover(mount)
    assert not alone.exists()
    del blocks[alone]
    check_blocks(blocks)
    check_integrity(mount)


def test_a_kill_while_directories_are_renamed(mount: MountedKvfs) -> None:
    rng = random.Random(SEED)
    parent = mount.path / "ns"
    contents = {name: blocks_in(parent / name, 3) for name in ("a", "b", "c")}
    order(mount, "demote", "ns", "hdd")
    order(mount, "promote", "ns", "nvme")
    names = {name: name for name in contents}

    def rename() -> None:
        for version in range(1, 1_000_000):
            for original in contents:
                new = f"{original}{version}"
                pending[original] = new
                (parent / names[original]).rename(parent / new)
                names[original] = new

    for _ in range(3):
        pending: dict[str, str] = {}
        pid = pid_of(mount)
        before = dict(names)
        renamer = in_background(rename)
        wait_until(lambda start=before: names != start, "a directory is renamed")  # type: ignore[misc] # mypy infers no lambda with defaults
        time.sleep(rng.uniform(0, 0.1))  # the moment of the kill is the point
        kill(pid)
        renamer.join(60)
        recover(mount)
        left = set(os.listdir(parent))
        assert len(left) == len(contents)
        for original, blocks in contents.items():
            (name,) = left & {names[original], pending[original]}
            names[original] = name
            check_blocks({parent / name / path.name: data for path, data in blocks.items()})
            for tier in ("nvme", "hdd"):
                assert len(os.listdir(mount.tiers[tier] / "ns" / name)) == len(blocks)
        check_integrity(mount)


@pytest.mark.parametrize("after_blocks", [1, 17])
def test_a_kill_during_many_demotions(mount: MountedKvfs, after_blocks: int) -> None:
    blocks = blocks_in(mount.path / "ns", 40, size=200_000)
    wait_sealed(mount)
    pid = pid_of(mount)
    reached = threading.Event()

    def progress(report: dict[str, Any]) -> None:
        if report["done"] >= after_blocks:
            reached.set()

    def demote() -> None:
        with ControlClient(find_mount(mount.path).socket_path) as client:
            client.call("demote", {"paths": [b"ns"], "to": "hdd"}, progress, timeout_s=60)

    mover = in_background(demote)
    assert reached.wait(60)
    kill(pid)
    mover.join(60)
    recover(mount)
    check_blocks(blocks)
    check_integrity(mount)
    order(mount, "demote", "ns", "hdd")
    assert bytes_on(mount.tiers["nvme"]) == 0
    check_blocks(blocks)


# --- the catalog


def remove_catalog(catalog: Path) -> None:
    for file in catalog.parent.glob(catalog.name + "*"):
        file.unlink()


def settle_catalog(catalog: Path) -> None:
    """Put what is in the log into the file, so that damage to the file is damage."""
    with sqlite3.connect(catalog) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()


def overwrite(catalog: Path, start: int, count: int) -> None:
    with catalog.open("r+b") as file:
        file.seek(start)
        file.write(random.Random(SEED).randbytes(count))


def test_a_catalog_that_vanished_is_rebuilt(mount: MountedKvfs) -> None:
    blocks = spread_blocks(mount)
    os.setxattr(mount.path / "ns/third/2.bin", "user.vllm.kv_crc32c", b"1234")
    kill(pid_of(mount))
    remove_catalog(mount.tiers["nvme"] / CATALOG)
    recover(mount)
    check_blocks(blocks)
    assert call(mount, "status")["blocks"] == len(blocks)
    assert os.getxattr(mount.path / "ns/third/2.bin", "user.vllm.kv_crc32c") == b"1234"
    assert call(mount, "info", path=b"ns/both/0.bin")["replicas"] == ["nvme", "hdd"]
    check_integrity(mount)


@pytest.mark.parametrize(("where", "stopped_by"), [("header", "umount"), ("middle", "kill")])
def test_a_corrupt_catalog_is_set_aside_and_rebuilt(
    mount: MountedKvfs, expect_log: list[str], where: str, stopped_by: str
) -> None:
    expect_log.append("the catalog was corrupt; set aside as .*catalog.corrupt")
    blocks = spread_blocks(mount)
    catalog = mount.tiers["nvme"] / CATALOG
    if stopped_by == "kill":
        kill(pid_of(mount))
    else:
        mount.stop()
    settle_catalog(catalog)
    size = catalog.stat().st_size
    if where == "header":
        overwrite(catalog, 0, 4096)
    else:
        overwrite(catalog, 4096, size - 4096)
    recover(mount)
    assert list(catalog.parent.glob("catalog.corrupt*"))
    check_blocks(blocks)
    assert call(mount, "status")["blocks"] == len(blocks)
    check_integrity(mount)


def test_a_catalog_of_a_newer_schema_is_refused(mount: MountedKvfs, expect_log: list[str]) -> None:
    expect_log.append("ended: the catalog has schema .*: upgrade kvfs")
    blocks = spread_blocks(mount)
    catalog = mount.tiers["nvme"] / CATALOG
    mount.stop()
    with sqlite3.connect(catalog) as database:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        database.execute(f"PRAGMA user_version = {version + 1}")
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    before = snapshot(mount.tiers)
    options = ("--config", mount.config_file, "--log-file", mount.log_file)
    refused = run_kvfs("mount", mount.path, *options, check=False)
    assert refused.returncode == CatalogError.exit_code == 7
    assert "upgrade kvfs" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert not mount.is_mounted()
    assert snapshot(mount.tiers) == before
    with sqlite3.connect(catalog) as database:
        database.execute(f"PRAGMA user_version = {version}")
    database.close()
    mount.start()
    check_blocks(blocks)


def snapshot(tiers: dict[str, Path]) -> dict[str, bytes]:
    """Every file of the tiers but SQLite's own scratch files."""
    return {
        str(path): path.read_bytes()
        for tier in tiers.values()
        for path in sorted(tier.rglob("*"))
        if path.is_file() and not path.name.endswith(("-wal", "-shm"))
    }
