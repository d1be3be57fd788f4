"""How long a block stays: heat, full tiers, evictions, TTLs and forgotten temporary files."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.mount.live import (
    KIB,
    MIB,
    below,
    call,
    config_in,
    heat,
    info,
    live,
    publish,
    put_on,
    refusal_of,
    replicas,
    scratch,
    wait_gone,
    wait_sealed,
)
from tests.mounting import MountedKvfs, toml_of, wait_until

CAPACITIES_MIB = {"nvme": 16, "hdd": 24, "remote": 32}
QUIET_UID = 54321


@pytest.fixture(scope="module")
def small() -> Iterator[MountedKvfs]:
    """Tiers that a test can fill, forgotten temporary files and backup users."""
    with scratch() as base:
        config = config_in(
            base, CAPACITIES_MIB, interval_s=0.1, tmp_ttl_s=1.0, quiet_uids=(QUIET_UID,)
        )
        with live(MountedKvfs(base, config)) as mount:
            yield mount


@contextmanager
def reloaded(mount: MountedKvfs, **tiering: object) -> Iterator[None]:
    """Other settings for a while."""
    reload(mount, **tiering)
    try:
        yield
    finally:
        reload(mount, on_full="evict", promote_heat=1000.0)


def empty(mount: MountedKvfs) -> None:
    """Evict everything, and wait until the tiers have their space back."""
    call(mount, "evict", paths=[b""])

    def taken() -> int:
        tiers = call(mount, "status")["tiers"]
        return sum(t["used_bytes"] + t["reserved_bytes"] + t["held_bytes"] for t in tiers)

    wait_until(lambda: taken() < 4 * MIB, "room")


def reload(mount: MountedKvfs, **tiering: Any) -> None:
    """Change the configuration file and have the daemon read it, by SIGHUP."""
    config = config_in(mount.path.parent, CAPACITIES_MIB, interval_s=0.1, **tiering)
    mount.config_file.write_text(toml_of(config))
    os.kill(int(call(mount, "status")["pid"]), signal.SIGHUP)

    def applied() -> bool:
        shown = json.loads((mount.path / ".kvfs" / "config").read_bytes())["tiering"]
        return all(shown[key.removesuffix("_s")] == value for key, value in tiering.items())

    wait_until(applied, "the configuration reloaded")


# --- heat


@pytest.mark.semantics("S-heat-1")
def test_only_opens_for_reading_heat_a_block(small: MountedKvfs) -> None:
    path = publish(small.path / "warm", b"x" * 1000)
    path.chmod(0o644)
    wait_sealed(path)

    def accesses() -> float:
        return float(info(small, path)["last_access"])

    def heated_by(command: list[object], user: int | None = None) -> bool:
        before = heat(path)
        subprocess.run([*map(str, command)], check=True, capture_output=True, user=user)
        return heat(path) > before + 0.5

    assert not heated_by(["stat", path])
    assert not heated_by(["ls", "-l", path])
    assert not heated_by(["getfattr", "-d", path])
    assert not heated_by(["cat", path], user=QUIET_UID)
    descriptor = os.open(path, os.O_RDONLY | os.O_NOATIME)
    os.close(descriptor)
    assert not heated_by(["true"])
    assert heated_by(["cat", path])
    assert not heated_by(["cat", path])
    wait_until(lambda: heated_by(["cat", path]), "a second later it counts again")
    now = path.stat().st_mtime
    wait_until(lambda: accesses() >= now, "the access recorded")


# --- leaving


@pytest.mark.semantics("S-evict-1")
def test_an_evicted_name_is_gone_for_open_at_once_and_for_access_soon(small: MountedKvfs) -> None:
    for number in range(5):
        path = publish(small.path / f"evicted-{number}", os.urandom(4 * KIB))
        wait_sealed(path)
        assert os.access(path, os.F_OK)
        assert call(small, "evict", paths=[below(small, path)])["evicted"] == 1
        with pytest.raises(FileNotFoundError):
            path.open("rb")
        assert not path.exists()
        other = publish(small.path / f"stated-{number}", b"x")
        wait_sealed(other)
        assert other.exists()
        call(small, "evict", paths=[below(small, other)])
        wait_gone(other)
        publish(path, b"again")
        assert path.read_bytes() == b"again"
        path.unlink()


@pytest.mark.semantics("S-evict-2")
def test_what_is_open_pinned_or_unsealed_is_not_evicted(small: MountedKvfs) -> None:
    def reason(path: Path) -> list[str]:
        outcome = call(small, "evict", paths=[below(small, path)])
        return [skip["reason"] for skip in outcome["skipped"]]

    path = publish(small.path / "wanted", b"x")
    wait_sealed(path)
    with path.open("rb"):
        assert reason(path) == ["it is open"]
    os.setxattr(path, "user.kvfs.pin", b"1")
    wait_until(lambda: reason(path) == ["it is pinned"], "closed")
    os.removexattr(path, "user.kvfs.pin")
    directory = small.path / "pinned"
    directory.mkdir()
    os.setxattr(directory, "user.kvfs.pin", b"1")
    path = path.rename(directory / "wanted")
    assert reason(path) == ["it is pinned"]
    os.removexattr(directory, "user.kvfs.pin")
    assert reason(path) == []
    assert not path.exists()


@pytest.mark.semantics("S-ttl-1")
def test_a_ttl_removes_a_block_and_one_of_a_directory_all_below(small: MountedKvfs) -> None:
    lonely = publish(small.path / "lonely", b"x")
    directory = small.path / "old"
    (directory / "deep").mkdir(parents=True)
    below_it = publish(directory / "deep" / "block", b"x")
    spared = publish(directory / "deep" / "spared", b"x")
    held = publish(directory / "held", b"x")
    for path in (lonely, below_it, spared, held):
        wait_sealed(path)
    os.setxattr(spared, "user.kvfs.ttl", b"1h")
    with held.open("rb") as reader:
        os.setxattr(lonely, "user.kvfs.ttl", b"0.2")
        os.setxattr(directory, "user.kvfs.ttl", b"0.2")
        wait_until(lambda: not lonely.exists(), "the block expired")
        wait_until(lambda: not below_it.exists(), "the directory's block expired")
        assert reader.read() == b"x"
        assert held.exists()
    wait_until(lambda: not held.exists(), "expired after its close")
    assert spared.exists()
    assert (directory / "deep").is_dir()


@pytest.mark.semantics("S-ttl-2")
def test_a_forgotten_temporary_file_is_removed_and_one_in_use_is_not(small: MountedKvfs) -> None:
    forgotten = small.path / "a.tmp"
    forgotten.write_bytes(b"x" * 1000)
    plain = small.path / "tmp.a"
    plain.write_bytes(b"x")
    with (small.path / "b.tmp").open("wb") as writer:
        wait_until(lambda: not forgotten.exists(), "the forgotten one removed")
        writer.write(b"late")
        assert (small.path / "b.tmp").exists()
    assert plain.exists()
    assert not (small.tiers["nvme"] / "a.tmp").exists()
    assert call(small, "status")["counters"]["tmp_expired"] >= 1


# --- full tiers


@pytest.mark.semantics("S-write-6")
def test_a_file_that_outgrows_its_tier_moves_on_while_it_is_written() -> None:
    data = os.urandom(20 * MIB)
    with scratch() as base:
        config = config_in(base, CAPACITIES_MIB, passthrough="off")
        with live(MountedKvfs(base, config)) as mount:
            path = written_in_pieces(mount.path / "large.tmp", data)
            path = path.rename(mount.path / "large")
            assert path.read_bytes() == data
            assert replicas(path) == ["hdd"]
            assert not (mount.tiers["nvme"] / "large").exists()


@pytest.mark.semantics("S-write-6")
def test_a_file_that_outgrows_its_tier_past_the_daemon_is_counted_and_moved_later(
    small: MountedKvfs,
) -> None:
    data = os.urandom(20 * MIB)
    path = written_in_pieces(small.path / "large.tmp", data)
    path = path.rename(small.path / "large")
    assert path.read_bytes() == data
    wait_until(lambda: replicas(path) == ["hdd"], "moved to where it fits")
    assert path.read_bytes() == data
    path.unlink()


def written_in_pieces(path: Path, data: bytes) -> Path:
    with path.open("w+b", buffering=0) as writer:
        for start in range(0, len(data), MIB):
            writer.write(data[start : start + MIB])
        assert os.fstat(writer.fileno()).st_size == len(data)
        writer.seek(0)
        assert writer.read(len(data)) == data
    return path


@pytest.mark.semantics("S-evict-3", "S-evict-4")
def test_old_blocks_go_when_everything_is_full(small: MountedKvfs) -> None:
    directory = small.path / "cache"
    directory.mkdir()
    kept = publish(directory / "config.json", b"{}")
    pinned = publish(directory / "pinned", os.urandom(MIB))
    os.setxattr(pinned, "user.kvfs.pin", b"1")
    blocks = {}
    total = sum(CAPACITIES_MIB.values())
    for number in range(2 * total):
        data = os.urandom(64) * (MIB // 64)
        blocks[publish(directory / f"{number:04d}", data)] = data
        if number % 20 == 0:
            for tier in call(small, "status")["tiers"]:
                taken = tier["used_bytes"] + tier["reserved_bytes"] + tier["held_bytes"]
                assert taken <= tier["capacity_bytes"]
    left = [path for path in blocks if path.exists()]
    assert kept.read_bytes() == b"{}"
    assert pinned.exists()
    assert 0 < len(left) < len(blocks)
    assert list(blocks)[-1] in left
    read = 0
    for path in left:
        try:
            assert path.read_bytes() == blocks[path]
            read += 1
        except FileNotFoundError:
            continue
    assert read > 0
    empty(small)


@pytest.mark.semantics("S-evict-5", "S-mount-8")
def test_with_on_full_refuse_the_writer_gets_enospc_and_nothing_goes(small: MountedKvfs) -> None:
    directory = small.path / "kept"
    directory.mkdir()
    blocks = {}

    def fill() -> None:
        for number in range(2 * sum(CAPACITIES_MIB.values())):
            data = os.urandom(64) * (MIB // 64)
            blocks[publish(directory / f"{number:04d}", data)] = data

    with reloaded(small, on_full="refuse"):
        assert refusal_of(fill) == errno.ENOSPC
        assert len(blocks) > CAPACITIES_MIB["remote"]
        for path, data in blocks.items():
            assert path.read_bytes() == data
    publish(directory / "more", os.urandom(MIB))
    empty(small)


@pytest.mark.semantics("S-heat-2")
def test_a_block_that_is_read_again_and_again_comes_up(small: MountedKvfs) -> None:
    path = publish(small.path / "popular", os.urandom(MIB))
    put_on(small, path, "hdd")

    def promoted() -> bool:
        path.read_bytes()
        return replicas(path)[0] == "nvme"

    with reloaded(small, promote_heat=1.5):
        wait_until(promoted, "promoted by heat")
    assert replicas(path) == ["nvme", "hdd"]
