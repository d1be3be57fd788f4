"""A tier that hangs: the mount starts, serves the others, and ends all the same."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kvfs.tiers.tier import MOST_WAITING
from tests.faulty.faults import DISK_HANGS, Fault, failing, hanging
from tests.faulty.tier import FaultyTier, faulty_tier
from tests.mount.live import call, config_in, live, promote, publish, put_on, refusal_of, scratch
from tests.mounting import MountedKvfs, has_ended, run_kvfs, wait_until

DEADLINE_S = 1.0


@pytest.fixture(params=["remote", "hdd"])
def place(request: pytest.FixtureRequest) -> str:
    """The tier that can fail, below an nvme tier that does not."""
    chosen: str = request.param
    return chosen


@pytest.fixture
def faulty_mount(place: str, expect_log: list[str]) -> Iterator[tuple[MountedKvfs, FaultyTier]]:
    """A mount that is not started, and ended by the test or afterwards."""
    expect_log += ["tier (hdd|remote)", "requests_failed", "open: ", "read: ", "tolerated_failures"]
    with scratch() as base, faulty_tier(base, "faulty") as faulty:
        config = config_in(base, {"nvme": 64, place: 64}, passthrough="off")
        tiers = [
            msgspec.structs.replace(
                tier, deadline_s=DEADLINE_S, path=faulty.path if tier.name == place else tier.path
            )
            for tier in config.tier
        ]
        mount = MountedKvfs(base, msgspec.structs.replace(config, tier=tuple(tiers)))
        with live(mount, expect_log):
            try:
                yield mount, faulty
            finally:
                faulty.start_again()


def hang(place: str) -> tuple[Fault, ...]:
    """A disk answers from memory what a server does not."""
    return hanging() if place == "remote" else DISK_HANGS


def state_of(mount: MountedKvfs, place: str) -> str:
    return next(str(t["state"]) for t in call(mount, "status")["tiers"] if t["name"] == place)


def block_on(mount: MountedKvfs, name: str, tier: str) -> Path:
    path = publish(mount.path / name, name.encode() * 1000)
    put_on(mount, path, tier)
    return path


@pytest.mark.semantics("S-failing-4")
def test_the_mount_ends_while_a_tier_hangs(
    faulty_mount: tuple[MountedKvfs, FaultyTier], place: str
) -> None:
    mount, faulty = faulty_mount
    there, here = block_on(mount, "there", place), block_on(mount, "here", "nvme")
    pid = int(mount.status()["pid"])
    faulty.set(*hang(place))
    refused: list[int] = []
    waiting = threading.Thread(target=lambda: refused.append(refusal_of(there.read_bytes)))
    waiting.start()
    faulty.wait_hanging()
    run_kvfs("umount", mount.path, "--force", "--timeout", "30s")
    assert has_ended(pid)
    waiting.join()
    # Answered by the deadline, or because the mount went.
    assert refused[0] in (errno.EIO, errno.ECONNABORTED, errno.ENOTCONN)
    faulty.clear()
    mount.start()
    for path in (there, here):
        assert path.read_bytes() == path.name.encode() * 1000


@pytest.mark.semantics("S-failing-8")
@pytest.mark.parametrize("place", ["remote"], indirect=True)
@pytest.mark.parametrize("clearing", ["umount", "mount"])
def test_a_daemon_that_was_killed_while_a_tier_hangs_is_in_nobodys_way(
    faulty_mount: tuple[MountedKvfs, FaultyTier], clearing: str
) -> None:
    """Its thread waits in the kernel, and with it everything that it had open."""
    mount, faulty = faulty_mount
    there, here = block_on(mount, "there", "remote"), block_on(mount, "here", "nvme")
    pid = int(mount.status()["pid"])
    faulty.set(*hanging())
    refused: list[int] = []
    waiting = threading.Thread(target=lambda: refused.append(refusal_of(there.read_bytes)))
    waiting.start()
    faulty.wait_hanging()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: has_ended(pid), "the daemon gone")
    assert Path(f"/proc/{pid}").exists(), "a thread of it is left"
    if clearing == "umount":
        run_kvfs("umount", mount.path)
        assert not mount.is_mounted()
    mount.start()
    waiting.join()
    assert refused[0] in (errno.ECONNABORTED, errno.ENOTCONN)
    assert here.read_bytes() == b"here" * 1000
    faulty.clear()
    wait_until(lambda: state_of(mount, "remote") == "online", "the remote tier is back")
    assert there.read_bytes() == b"there" * 1000


@pytest.mark.semantics("S-failing-7")
@pytest.mark.parametrize("place", ["remote"], indirect=True)
@pytest.mark.parametrize("fault", [hanging(), failing(errno.EIO)], ids=["hangs", "fails"])
def test_a_remote_tier_that_does_not_answer_keeps_nobody_from_mounting(
    faulty_mount: tuple[MountedKvfs, FaultyTier], fault: tuple[Fault, ...]
) -> None:
    mount, faulty = faulty_mount
    there, here = block_on(mount, "there", "remote"), block_on(mount, "here", "nvme")
    mount.stop()
    faulty.set(*fault)
    mount.start()
    assert state_of(mount, "remote") == "offline"
    assert here.read_bytes() == b"here" * 1000
    assert sorted(os.listdir(mount.path)) == ["here", "there"]
    assert refusal_of(there.read_bytes) == errno.EIO
    faulty.clear()
    wait_until(lambda: state_of(mount, "remote") == "online", "the remote tier is back")
    assert there.read_bytes() == b"there" * 1000


@pytest.mark.parametrize("place", ["hdd"], indirect=True)
def test_a_required_tier_that_hangs_is_refused_and_not_waited_for(
    faulty_mount: tuple[MountedKvfs, FaultyTier],
) -> None:
    mount, faulty = faulty_mount
    mount.stop()
    faulty.set(*DISK_HANGS)
    done = run_kvfs("mount", mount.path, "--config", mount.config_file, check=False)
    assert done.returncode == 4
    assert "does not answer within 1 s" in done.stderr
    assert not mount.is_mounted()
    faulty.clear()
    wait_until(lambda: _mounts(mount), "its lock is given back")


def _mounts(mount: MountedKvfs) -> bool:
    done = run_kvfs(
        "mount", mount.path, "--config", mount.config_file, "--log-file", mount.log_file,
        check=False,
    )  # fmt: skip
    return done.returncode == 0


@pytest.mark.semantics("S-failing-4", "S-failing-5")
def test_requests_for_other_tiers_find_a_free_task(
    faulty_mount: tuple[MountedKvfs, FaultyTier], place: str
) -> None:
    """More openers than may wait for a tier that hangs, and the fastest one serves meanwhile."""
    mount, faulty = faulty_mount
    count = MOST_WAITING + 40
    directory = mount.path / "many"
    directory.mkdir()
    for number in range(count):
        (directory / str(number)).write_bytes(b"x" * 100)
    here = block_on(mount, "here", "nvme")
    wait_until(lambda: call(mount, "status")["unsealed"] == 0, "everything sealed")
    assert call(mount, "demote", paths=[b"many"], to=place)["skipped"] == []
    faulty.set(*hang(place))
    answers: list[int] = []

    def read(number: int) -> None:
        answers.append(refusal_of((directory / str(number)).read_bytes))

    readers = [threading.Thread(target=read, args=(number,)) for number in range(count)]
    for reader in readers:
        reader.start()
    served = 0
    while any(reader.is_alive() for reader in readers):
        assert here.read_bytes() == b"here" * 1000
        served += 1
    assert answers == [errno.EIO] * count
    assert served > 0
    reasons = {(r["event"], r["reason"]): r["count"] for r in call(mount, "status")["incidents"]}
    assert reasons["requests_failed", "waiting"] >= count - MOST_WAITING


@pytest.mark.parametrize("place", ["remote"], indirect=True)
def test_a_remote_tier_that_fails_is_noticed_before_anybody_needs_it(
    faulty_mount: tuple[MountedKvfs, FaultyTier],
) -> None:
    mount, faulty = faulty_mount
    with faulty.failing(*failing(errno.ENOTCONN)):
        wait_until(lambda: state_of(mount, "remote") == "offline", "it is noticed")
    wait_until(lambda: state_of(mount, "remote") == "online", "it is back")


@pytest.mark.parametrize("place", ["nvme"], indirect=True)
def test_a_first_tier_that_hangs_stops_the_mount_until_it_answers(
    faulty_mount: tuple[MountedKvfs, FaultyTier],
) -> None:
    mount, faulty = faulty_mount
    path = block_on(mount, "here", "nvme")
    faulty.set(*DISK_HANGS)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()))
    reader.start()
    faulty.wait_hanging()
    assert read == []
    faulty.clear()
    reader.join()
    assert read == [b"here" * 1000]
    assert state_of(mount, "nvme") == "online"


@pytest.mark.semantics("S-failing-2")
def test_a_block_with_another_replica_is_served_while_its_tier_hangs(
    faulty_mount: tuple[MountedKvfs, FaultyTier], place: str
) -> None:
    mount, faulty = faulty_mount
    path = block_on(mount, "both", place)
    assert promote(mount, path, "nvme")["skipped"] == []
    faulty.set(*hang(place))
    assert path.read_bytes() == b"both" * 1000
    faulty.clear()
