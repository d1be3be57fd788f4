"""Full: every tier at once, the disk below by the fault of others, its inodes, the catalog's disk.

Caps hold, blocks are evicted or writers refused as configured, nothing is torn, and the mount goes
on when there is room again. Each time with writes past the daemon and through it.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from io import RawIOBase
from pathlib import Path
from typing import Any, Literal

import pytest

from kvfs.tools.watch_capacity import allocated_bytes
from tests.mount.disks import disk, fill, free_bytes
from tests.mount.live import (
    KIB,
    MIB,
    call,
    config_in,
    live,
    replicas,
    scratch,
    wait_sealed,
)
from tests.mounting import MountedKvfs, check_accounts, run_kvfs, wait_until

Way = Literal["auto", "off"]
BLOCK_BYTES = 256 * KIB
# With the page that its seal record may take.
STORED_BYTES = BLOCK_BYTES + 4 * KIB
WRITERS = 30
HELD_S = 60.0
FULL_LOG = ["No space left", "full", "refused", "disk I/O error", "tier nvme is"]


@pytest.fixture(params=["auto", "off"], ids=["passthrough", "served"])
def way(request: pytest.FixtureRequest) -> Way:
    return request.param  # type: ignore[no-any-return] # one of the two


@contextmanager
def mounted(
    base: Path, way: Way, capacities_mib: dict[str, int], catalog: Path | None = None,
    **tiering: Any,
) -> Iterator[MountedKvfs]:  # fmt: skip
    """Tiers below `base`; the catalog beside them, where nobody counts it."""
    config = config_in(base, capacities_mib, passthrough=way, **tiering)
    mount = MountedKvfs(base, config)
    with mount.config_file.open("a") as file:
        file.write(f'catalog = "{catalog or base / "catalog.sqlite"}"\n')
    with live(mount, FULL_LOG):
        yield mount


def content(name: str) -> bytes:
    """A block of its own for each name."""
    return name.encode().ljust(32, b".") * (BLOCK_BYTES // 32)


def put(mount: MountedKvfs, name: str, size: int = BLOCK_BYTES) -> bool:
    """Store a block as engines do; False when there is no room for it, and nothing is left."""
    temporary = mount.path / f"{name}.tmp"
    data = content(name)[:size]
    try:
        with temporary.open("wb", buffering=0) as file:
            for start in range(0, len(data), 64 * KIB):
                file.write(data[start : start + 64 * KIB])
        temporary.rename(mount.path / name)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        remove(temporary)
        return False
    return True


def remove(path: Path) -> None:
    """Unless the catalog has no room for that either."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def try_to_write(file: RawIOBase, data: bytes) -> int:
    """How much was written: 0 when there is no room."""
    try:
        return file.write(data) or 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return 0


def check_blocks(mount: MountedKvfs) -> list[str]:
    """Every name has all the bytes that were put under it; the names. Some may go meanwhile."""
    names = []
    for name in sorted(os.listdir(mount.path)):
        data = content(name)
        try:
            found = (mount.path / name).read_bytes()
        except FileNotFoundError:
            continue
        assert found in (data, data[: 4 * KIB]), f"{name} is torn"
        names.append(name)
    return names


def stored_bytes(mount: MountedKvfs, tier: str) -> int:
    """What blocks allocate on a tier, by looking."""
    root = mount.tiers[tier]
    return allocated_bytes(str(root)) - allocated_bytes(str(root / ".kvfs"))


@contextmanager
def watched(mount: MountedKvfs) -> Iterator[dict[str, int]]:
    """The most that each tier held meanwhile."""
    most = dict.fromkeys(mount.tiers, 0)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            for tier in most:
                most[tier] = max(most[tier], stored_bytes(mount, tier))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def race(work: Callable[[int], bool]) -> list[bool]:
    """Let all writers begin at once; what each came to."""
    gate = threading.Barrier(WRITERS)
    outcomes: dict[int, bool] = {}
    failures: list[BaseException] = []

    def run(number: int) -> None:
        gate.wait()
        try:
            outcomes[number] = work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [outcomes[number] for number in range(WRITERS)]


def is_clean(mount: MountedKvfs) -> None:
    mount.wait_sealed()
    check_accounts(mount)
    found = run_kvfs("fsck", mount.path, check=False)
    assert found.returncode == 0, found.stdout


def events(mount: MountedKvfs) -> dict[str, Any]:
    return dict(call(mount, "status")["counters"])


# --- every tier at once


@pytest.mark.semantics("S-evict-5", "S-space-5")
def test_every_tier_is_full_and_nothing_may_go(way: Way) -> None:
    capacities = {"nvme": 8, "hdd": 8, "remote": 8}
    with scratch() as base, mounted(base, way, capacities, on_full="refuse") as mount:
        with watched(mount) as most:
            names: list[str] = []
            while put(mount, f"block-{len(names)}"):
                names.append(f"block-{len(names)}")
            # Sealed blocks need no page for their record any more.
            mount.wait_sealed()
            while put(mount, f"block-{len(names)}"):
                names.append(f"block-{len(names)}")
        assert len(names) * BLOCK_BYTES > 0.9 * sum(capacities.values()) * MIB
        for tier, capacity_mib in capacities.items():
            assert most[tier] <= capacity_mib * MIB + STORED_BYTES, tier
        assert check_blocks(mount) == sorted(names)
        assert events(mount)["refused_full"] > 0
        mount.remount()
        # A daemon that does not know yet how large blocks are finds the last gaps.
        while put(mount, f"block-{len(names)}"):
            names.append(f"block-{len(names)}")
        for tier, capacity_mib in capacities.items():
            assert stored_bytes(mount, tier) <= capacity_mib * MIB + STORED_BYTES, tier
        for name in names[:2]:
            (mount.path / name).unlink()
        wait_until(lambda: put(mount, "one-more"), "room again")
        assert check_blocks(mount) == sorted([*names[2:], "one-more"])
        is_clean(mount)


@pytest.mark.semantics("S-evict-3", "S-space-5")
def test_thirty_writers_find_every_tier_full_and_blocks_go_for_them(way: Way) -> None:
    capacities = {"nvme": 12, "hdd": 12}
    with scratch() as base, mounted(base, way, capacities, interval_s=0.1) as mount:
        with watched(mount) as most:
            done = race(lambda n: all(put(mount, f"block-{n}-{i}") for i in range(8)))
        assert all(done), "with on_full = evict nobody is refused"
        in_flight = (WRITERS + 2) * STORED_BYTES
        for tier, capacity_mib in capacities.items():
            assert most[tier] <= capacity_mib * MIB + in_flight, tier
        names = check_blocks(mount)
        assert len(names) < WRITERS * 8
        assert max(stored_bytes(mount, tier) for tier in capacities) > 6 * MIB
        is_clean(mount)


@pytest.mark.semantics("S-evict-5", "S-space-5")
def test_thirty_writers_race_for_the_last_block(way: Way) -> None:
    with scratch() as base, mounted(base, way, {"nvme": 8}, on_full="refuse") as mount:
        names: list[str] = []
        while put(mount, f"block-{len(names)}"):
            names.append(f"block-{len(names)}")
        mount.wait_sealed()
        # Room for one, and half of another.
        (mount.path / names.pop()).unlink()
        with watched(mount) as most:
            done = race(lambda n: put(mount, f"race-{n}"))
        assert done.count(True) == 1
        assert most["nvme"] <= 8 * MIB + STORED_BYTES
        winner = f"race-{done.index(True)}"
        assert check_blocks(mount) == sorted([*names, winner])
        is_clean(mount)


@pytest.mark.semantics("S-space-5")
def test_writers_that_nobody_expected_to_write_so_much(way: Way) -> None:
    """Files that are larger than those before are what a cap cannot foresee."""
    with scratch() as base, mounted(base, way, {"nvme": 16}, on_full="refuse") as mount:
        for number in range(40):
            assert put(mount, f"small-{number}", 4 * KIB)
        mount.wait_sealed()
        held = threading.Barrier(WRITERS + 1, timeout=HELD_S)

        def write(number: int) -> bool:
            temporary = mount.path / f"large-{number}.tmp"
            written = 0
            try:
                file = temporary.open("wb", buffering=0)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                held.wait()
                return False
            with file:
                while written < MIB and (taken := try_to_write(file, bytes(64 * KIB))):
                    written += taken
                held.wait()
            temporary.unlink()
            return written == MIB

        results: list[list[bool]] = []
        with watched(mount) as most:
            racing = threading.Thread(target=lambda: results.append(race(write)))
            racing.start()
            held.wait()
            racing.join()
        (done,) = results
        if call(mount, "status")["data_path"]["passthrough"]:
            # What is under way past the daemon is over the cap, and no more.
            assert most["nvme"] <= 16 * MIB + WRITERS * (MIB + 4 * KIB)
        else:
            assert most["nvme"] <= 16 * MIB + STORED_BYTES
            assert not all(done)
        wait_until(lambda: stored_bytes(mount, "nvme") < MIB, "what they wrote is gone")
        assert put(mount, "later")
        assert len(check_blocks(mount)) == 41
        is_clean(mount)


# --- the disk below


@contextmanager
def on_disk(
    way: Way, size_mib: int, *mkfs_options: str, capacities_mib: dict[str, int], **tiering: Any
) -> Iterator[tuple[MountedKvfs, Path]]:
    """The first tier on a disk of its own."""
    with ExitStack() as stack:
        base = stack.enter_context(scratch())
        below = stack.enter_context(disk(base, "disk", size_mib, *mkfs_options))
        (below / "nvme").mkdir()
        (base / "nvme").symlink_to(below / "nvme")
        yield stack.enter_context(mounted(base, way, capacities_mib, **tiering)), below


@pytest.mark.semantics("S-space-4")
def test_blocks_go_when_others_fill_the_disk(way: Way) -> None:
    with on_disk(way, 64, capacities_mib={"nvme": 32}, interval_s=0.2) as (mount, below):
        for number in range(80):
            assert put(mount, f"before-{number}")
        mount.wait_sealed()
        foreign = fill(below)
        full_bytes = free_bytes(below)
        assert full_bytes < BLOCK_BYTES
        # The first may meet the full disk before the daemon does.
        for number in range(10):
            wait_until(lambda: put(mount, f"meanwhile-{number}"), "a put on a full disk")  # noqa: B023
        wait_until(lambda: free_bytes(below) > full_bytes, "room that kvfs made")
        room = call(mount, "status")["tiers"][0]["room_bytes"]
        assert room < 24 * MIB
        # By name: reading makes a block hot, and what was not read yet would go before it.
        kept = os.listdir(mount.path)
        assert 60 < len(kept) <= 90, "the coldest went, and only as many as had to"
        assert "before-0" not in kept
        assert "before-79" in kept
        check_blocks(mount)
        foreign.unlink()
        wait_until(
            lambda: call(mount, "status")["tiers"][0]["room_bytes"] == 32 * MIB, "all of it again"
        )
        wait_until(lambda: not any(call(mount, "status")["moves"].values()), "no moves")
        kept = check_blocks(mount)
        for number in range(20):
            assert put(mount, f"after-{number}")
        assert set(kept) <= set(check_blocks(mount)), "nothing had to go"
        is_clean(mount)


@pytest.mark.semantics("S-space-4")
def test_blocks_leave_for_the_next_tier_when_others_fill_the_disk(way: Way) -> None:
    capacities = {"nvme": 32, "hdd": 64}
    with on_disk(way, 64, capacities_mib=capacities, interval_s=0.2) as (mount, below):
        names = [f"before-{number}" for number in range(80)]
        for name in names:
            assert put(mount, name)
        mount.wait_sealed()
        foreign = fill(below)
        wait_until(lambda: replicas(mount.path / "before-0") == ["hdd"], "room that kvfs made")
        for number in range(20):
            wait_until(lambda: put(mount, f"meanwhile-{number}"), "a put")  # noqa: B023
        assert set(names) <= set(check_blocks(mount)), "nothing is evicted while hdd has room"
        foreign.unlink()
        is_clean(mount)


@pytest.mark.semantics("S-space-4")
@pytest.mark.parametrize("on_full", ["evict", "refuse"])
def test_no_inode_is_left(way: Way, on_full: str) -> None:
    with on_disk(
        way, 64, "-N", "160", capacities_mib={"nvme": 48}, on_full=on_full, interval_s=0.2
    ) as (mount, below):
        inodes = os.statvfs(below).f_files
        names: list[str] = []
        while os.statvfs(below).f_favail > 1 and put(mount, f"block-{len(names)}", 4 * KIB):
            names.append(f"block-{len(names)}")
            assert len(names) < 2 * inodes
        mount.wait_sealed()
        assert free_bytes(below) > 40 * MIB
        if on_full == "refuse":
            while put(mount, f"block-{len(names)}", 4 * KIB):
                names.append(f"block-{len(names)}")
            assert check_blocks(mount) == sorted(names)
            for name in names[:10]:
                (mount.path / name).unlink()
        for number in range(20 if on_full == "evict" else 5):
            wait_until(lambda: put(mount, f"later-{number}", 4 * KIB), "a put")  # noqa: B023
        # By name: reading makes a block hot, and what was not read yet would go before it.
        left = os.listdir(mount.path)
        assert {"later-0", "later-4"} <= set(left)
        assert len(left) > 0.6 * inodes, "no more went than down to the low watermark, and again"
        check_blocks(mount)
        is_clean(mount)


def test_new_blocks_go_to_the_next_tier_when_no_inode_is_left(way: Way) -> None:
    capacities = {"nvme": 48, "hdd": 48}
    with on_disk(way, 64, "-N", "96", capacities_mib=capacities, on_full="refuse") as (mount, _):
        names = [f"block-{number}" for number in range(120)]
        for name in names:
            wait_until(lambda: put(mount, name, 4 * KIB), "a put")  # noqa: B023
        assert check_blocks(mount) == sorted(names)
        assert replicas(mount.path / names[-1]) == ["hdd"]
        is_clean(mount)


# --- the catalog's disk


def test_the_disk_of_the_catalog_is_full(way: Way) -> None:
    with ExitStack() as stack:
        base = stack.enter_context(scratch())
        below = stack.enter_context(disk(base, "catalogs", 24))
        catalog = below / "catalog.sqlite"
        mount = stack.enter_context(mounted(base, way, {"nvme": 48}, catalog))
        names = []
        for number in range(20):
            assert put(mount, f"before-{number}")
            names.append(f"before-{number}")
        mount.wait_sealed()
        foreign = fill(below)
        # What SQLite has room for already it still takes.
        while len(names) < 5000 and put(mount, f"meanwhile-{len(names)}", 4 * KIB):
            names.append(f"meanwhile-{len(names)}")
        assert len(names) < 5000
        assert not put(mount, "refused")
        there = {name for name in os.listdir(mount.path) if not name.endswith(".tmp")}
        assert there == set(names), "listing goes on"
        for name in names:
            assert (mount.path / name).read_bytes() in (content(name), content(name)[: 4 * KIB])
        assert call(mount, "status")["state"] in ("ok", "degraded")
        foreign.unlink()
        wait_until(lambda: put(mount, "after"), "a put once there is room")
        for left in mount.path.glob("*.tmp"):
            left.unlink()
        wait_sealed(mount.path / "after")
        assert check_blocks(mount) == sorted([*names, "after"])
        is_clean(mount)
        mount.remount()
        assert check_blocks(mount) == sorted([*names, "after"])


def test_a_mount_on_a_full_disk_serves_what_is_there(way: Way) -> None:
    with on_disk(way, 64, capacities_mib={"nvme": 48}, on_full="refuse") as (mount, below):
        names = [f"block-{number}" for number in range(20)]
        for name in names:
            assert put(mount, name)
        mount.wait_sealed()
        mount.stop()
        foreign = fill(below)
        mount.start()
        assert check_blocks(mount) == sorted(names)
        assert not put(mount, "refused")
        (mount.path / names.pop()).unlink()
        foreign.unlink()
        wait_until(lambda: put(mount, "after"), "a put once there is room")
        assert check_blocks(mount) == sorted([*names, "after"])
        is_clean(mount)


def test_the_statistics_say_what_room_there_is(way: Way) -> None:
    with on_disk(way, 64, capacities_mib={"nvme": 48}) as (mount, below):
        fill(below, 16 * MIB)
        wait_until(
            lambda: call(mount, "status")["tiers"][0]["room_bytes"] <= 16 * MIB, "it is seen"
        )
        shown = os.statvfs(mount.path)
        assert shown.f_blocks * shown.f_frsize == 48 * MIB
        assert shown.f_bavail * shown.f_frsize <= 16 * MIB
        document = json.loads((mount.path / ".kvfs/stats").read_bytes())
        assert document["tiers"][0]["capacity_bytes"] == 48 * MIB
