"""What every kind of tier must do, with seal records in xattrs and in sidecars."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import msgspec
import pytest

from kvfs import layout
from kvfs.config import Medium, TierConfig
from kvfs.errors import TierError, TierOffline, exit_code_of
from kvfs.tiers.identity import FORMAT_VERSION, init_tier, read_identity, write_identity
from kvfs.tiers.seal import SEAL_XATTR, Seal
from kvfs.tiers.tier import Tier
from tests.store.helpers import take_away, until, writable

KINDS: list[tuple[int, Medium]] = [(0, "nvme"), (1, "nvme"), (1, "hdd"), (2, "remote")]


def make_tier(path: Path, index: int, medium: Medium, *, xattrs: bool = True) -> Tier:
    path.mkdir(exist_ok=True)
    identity = init_tier(path)
    probe = msgspec.structs.replace(identity.probe, xattrs=identity.probe.xattrs and xattrs)
    identity = msgspec.structs.replace(identity, probe=probe)
    write_identity(path, identity)
    config = TierConfig(
        name="tier", path=path, medium=medium, capacity_bytes=1 << 20, deadline_s=30
    )
    return Tier(index, 1, config, identity)


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[1]}{kind[0]}")
def kind(request: pytest.FixtureRequest) -> tuple[int, Medium]:
    """Place in the order of tiers, and medium."""
    chosen: tuple[int, Medium] = request.param
    return chosen


@pytest.fixture(params=[True, False], ids=["xattr", "sidecar"])
def tier(request: pytest.FixtureRequest, kind: tuple[int, Medium], tmp_path: Path) -> Tier:
    """Each kind of tier, with and without xattrs."""
    return make_tier(tmp_path / "tier", *kind, xattrs=request.param)


def write_file(tier: Tier, path: bytes, data: bytes = b"data", *, fanned: bool = False) -> Path:
    file = Path(os.fsdecode(tier.locate(path, fanned)))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file


def seal_for(file: Path, generation: int = 1) -> Seal:
    length = file.stat().st_size
    return Seal(7, generation, length, b"c" * 16, 0o640, 1, 2, 1_700_000_000_123_456_789)


# --- identity


def test_init_makes_an_identity_that_is_read_back(tmp_path: Path) -> None:
    identity = init_tier(tmp_path)
    assert read_identity(tmp_path) == identity
    assert identity.format_version == FORMAT_VERSION
    assert identity.probe.name_max == 255
    for directory in (layout.STAGING_DIR, layout.QUARANTINE_DIR, layout.META_DIR):
        assert (tmp_path / os.fsdecode(directory)).is_dir()
    assert list((tmp_path / ".kvfs/staging").iterdir()) == [], "the probe left something"


def test_two_tiers_have_different_uuids(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert init_tier(tmp_path / "a").uuid != init_tier(tmp_path / "b").uuid


def test_init_refuses_what_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(TierError, match="no such directory") as refused:
        init_tier(tmp_path / "missing")
    assert exit_code_of(refused.value) == 4
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TierError, match="no such directory"):
        init_tier(tmp_path / "file")


def test_init_refuses_a_tier(tmp_path: Path) -> None:
    first = init_tier(tmp_path)
    for adopt in (False, True):
        with pytest.raises(TierError, match="is a kvfs tier already"):
            init_tier(tmp_path, adopt=adopt)
    assert read_identity(tmp_path) == first


def test_init_refuses_files_unless_they_are_adopted(tmp_path: Path) -> None:
    (tmp_path / "block").write_bytes(b"somebody's")
    with pytest.raises(TierError, match=f"kvfs tier init {tmp_path} --adopt"):
        init_tier(tmp_path)
    assert not (tmp_path / ".kvfs").exists()
    assert init_tier(tmp_path, adopt=True).adopt
    assert (tmp_path / "block").read_bytes() == b"somebody's"


def test_init_takes_what_mkfs_leaves_for_empty(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    assert not init_tier(tmp_path).adopt


@pytest.mark.parametrize("content", [b"", b"{", b'{"uuid": 3}', b"\xff"])
def test_an_identity_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    init_tier(tmp_path)
    (tmp_path / ".kvfs/tier.json").write_bytes(content)
    with pytest.raises(TierError, match="not a kvfs tier identity"):
        read_identity(tmp_path)


def test_an_identity_of_a_newer_kvfs_is_refused(tmp_path: Path) -> None:
    identity = init_tier(tmp_path)
    newer = msgspec.structs.replace(identity, format_version=FORMAT_VERSION + 1)
    write_identity(tmp_path, newer)
    with pytest.raises(TierError, match="newer kvfs"):
        read_identity(tmp_path)


# --- seal records


def test_a_seal_is_read_back_and_gives_the_file_its_time(tier: Tier) -> None:
    file = write_file(tier, b"ns/block")
    seal = seal_for(file)
    tier.write_seal(os.fsencode(file), seal)
    assert tier.read_seal(os.fsencode(file)) == seal
    assert file.stat().st_mtime_ns == seal.mtime_ns


def test_a_seal_follows_a_rename(tier: Tier) -> None:
    file = write_file(tier, b"ns/block")
    seal = seal_for(file)
    tier.write_seal(os.fsencode(file), seal)
    moved = file.rename(file.with_name("renamed"))
    assert tier.read_seal(os.fsencode(moved)) == seal


def test_a_seal_is_replaced_and_cleared(tier: Tier) -> None:
    file = write_file(tier, b"block")
    tier.write_seal(os.fsencode(file), seal_for(file))
    tier.write_seal(os.fsencode(file), seal_for(file, generation=2))
    found = tier.read_seal(os.fsencode(file))
    assert found is not None
    assert found.generation == 2
    tier.clear_seal(os.fsencode(file))
    assert tier.read_seal(os.fsencode(file)) is None
    tier.clear_seal(os.fsencode(file))


def test_an_unsealed_file_has_no_seal_and_a_missing_one_neither(tier: Tier) -> None:
    assert tier.read_seal(os.fsencode(write_file(tier, b"block"))) is None
    assert tier.read_seal(tier.locate(b"missing")) is None


def test_a_torn_record_is_no_seal(tier: Tier) -> None:
    file = write_file(tier, b"block")
    seal = seal_for(file)
    tier.write_seal(os.fsencode(file), seal)
    torn = seal.encode()[:-9]
    if tier.identity.probe.xattrs:
        os.setxattr(writable(file), SEAL_XATTR, torn)
    else:
        for sidecar in Path(os.fsdecode(tier.root), ".kvfs/meta").rglob("*.seal"):
            sidecar.write_bytes(torn)
    assert tier.read_seal(os.fsencode(file)) is None


def test_a_sidecar_is_not_of_a_file_that_got_the_number_later(tmp_path: Path) -> None:
    tier = make_tier(tmp_path / "tier", 1, "hdd", xattrs=False)
    file = write_file(tier, b"block", b"old content")
    tier.write_seal(os.fsencode(file), seal_for(file))
    writable(file).write_bytes(b"new content")
    assert tier.read_seal(os.fsencode(file)) is None


# --- files


@pytest.mark.parametrize("fanned", [False, True])
def test_remove_takes_the_file_and_on_lower_tiers_empty_directories(
    tier: Tier, fanned: bool
) -> None:
    file = write_file(tier, b"ns/deep/er/block", fanned=fanned)
    neighbour = write_file(tier, b"ns/neighbour")
    tier.write_seal(os.fsencode(file), seal_for(file))
    tier.remove(b"ns/deep/er/block", fanned)
    assert not file.exists()
    assert neighbour.exists()
    root = Path(os.fsdecode(tier.root))
    assert (root / "ns/deep").exists() == (tier.index == 0), "directories live on the first tier"
    assert not list((root / ".kvfs/meta").rglob("*.seal"))
    tier.remove(b"ns/neighbour", False)
    assert root.is_dir()
    assert read_identity(root) == tier.identity


def test_removing_what_is_not_there_is_fine(tier: Tier) -> None:
    tier.remove(b"never/was", False)


def test_a_directory_goes_with_its_fan_out(tier: Tier) -> None:
    file = write_file(tier, b"crowd/block", fanned=True)
    tier.remove(b"crowd/block", True)
    tier.remove_directory(b"crowd")
    assert not file.parent.parent.parent.exists()
    tier.remove_directory(b"crowd")


def test_staging_is_swept(tier: Tier) -> None:
    for number in range(3):
        write_file(tier, layout.staging_path(number, 1))
    assert tier.sweep_staging() == 3
    assert tier.sweep_staging() == 0


def test_a_second_opener_is_refused_until_the_first_has_gone(tier: Tier) -> None:
    second = Tier(tier.index, tier.number, tier.config, tier.identity)
    tier.lock()
    with pytest.raises(TierError, match="another kvfs daemon uses") as refused:
        second.lock()
    assert exit_code_of(refused.value) == 4
    tier.unlock()
    second.lock()
    second.unlock()
    second.unlock()


# --- run and state


async def test_run_answers_what_the_function_answers(tier: Tier) -> None:
    file = write_file(tier, b"block", b"12345")
    assert (await tier.run(os.stat, file)).st_size == 5
    descriptor = await tier.run_open(os.open, os.fsencode(file), os.O_RDONLY)
    assert os.pread(descriptor, 5, 0) == b"12345"
    os.close(descriptor)
    with pytest.raises(FileNotFoundError):
        await tier.run(os.stat, tier.locate(b"missing"))
    assert tier.state == "online", "a missing file says nothing about the medium"


async def test_errors_of_the_medium_degrade_it_and_a_probe_brings_it_back(
    tier: Tier, expect_log: list[str]
) -> None:
    expect_log.append("tier tier is (degraded|offline): .*Input/output error")
    tier.lock()

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    states = []
    for _ in range(3):
        with pytest.raises(OSError, match="Input/output error"):
            await tier.run(fail)
        states.append(tier.state)
    assert states == ["degraded", "degraded", "offline"]
    assert not tier.online
    assert not tier.accepts
    with pytest.raises(TierOffline, match="is offline"):
        await tier.run(os.getpid)
    tier.probe()
    tier.health.probed("")
    assert await tier.run(os.getpid) == os.getpid()
    assert tier.state == "online"
    tier.unlock()


async def test_one_success_ends_being_degraded(tier: Tier, expect_log: list[str]) -> None:
    expect_log.append("tier tier is degraded")
    tier.health.failed(OSError(errno.EIO, "once"))
    assert (tier.state, tier.accepts) == ("degraded", False)
    await tier.run(os.getpid)
    assert (tier.state, tier.accepts) == ("online", True)


async def test_a_full_medium_is_not_a_broken_one(tier: Tier) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for _ in range(5):
        with pytest.raises(OSError, match="No space"):
            await tier.run(fail)
    assert tier.state == "online"


def test_a_probe_fails_without_identity_or_with_another(tier: Tier, tmp_path: Path) -> None:
    file = Path(os.fsdecode(tier.root), ".kvfs/tier.json")
    file.rename(tmp_path / "aside")
    with pytest.raises(OSError, match="not mounted at its path"):
        tier.probe()
    write_identity(tier.config.path, msgspec.structs.replace(tier.identity, uuid="another"))
    with pytest.raises(OSError, match="another tier"):
        tier.probe()


def test_a_tier_that_comes_later_is_locked_by_the_probe(tier: Tier) -> None:
    take_away(tier)
    tier.probe()
    second = Tier(tier.index, tier.number, tier.config, tier.identity)
    with pytest.raises(TierError, match="another kvfs daemon"):
        second.probe()
    tier.unlock()


async def test_a_remote_tier_that_hangs_is_given_up(tmp_path: Path, expect_log: list[str]) -> None:
    expect_log.append("no answer within 0.05 s")
    tier = make_tier(tmp_path / "tier", 2, "remote")
    tier.reconfigure(msgspec.structs.replace(tier.config, deadline_s=0.05))
    answer = threading.Event()
    for expected in ("degraded", "degraded", "offline"):
        with pytest.raises(TierOffline, match="no answer within"):
            await tier.run(answer.wait)
        assert tier.state == expected
    answer.set()


async def test_a_descriptor_that_comes_too_late_is_closed(
    tmp_path: Path, expect_log: list[str]
) -> None:
    expect_log.append("no answer within 0.05 s")
    tier = make_tier(tmp_path / "tier", 2, "remote")
    tier.reconfigure(msgspec.structs.replace(tier.config, deadline_s=0.05))
    answer = threading.Event()
    late: list[int] = []

    def hang() -> int:
        answer.wait()
        late.append(os.open(tmp_path, os.O_RDONLY))
        return late[0]

    with pytest.raises(TierOffline):
        await tier.run_open(hang)
    answer.set()
    await until(
        lambda: late and not Path(f"/proc/self/fd/{late[0]}").exists(), "the descriptor is closed"
    )


def test_limits_change_while_mounted(tier: Tier) -> None:
    tier.reconfigure(msgspec.structs.replace(tier.config, concurrency=3))
    assert tier.limiter.total_tokens == 3
