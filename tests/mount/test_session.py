"""Mounting, unmounting, signals, and what a crash of the daemon or the machine leaves."""

from __future__ import annotations

import errno
import json
import os
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from functools import partial

import pytest

from kvfs.mount.session import is_dead
from tests.mount.live import (
    KIB,
    call,
    config_in,
    live,
    promote,
    publish,
    put_on,
    refusal_of,
    scratch,
    state,
    wait_sealed,
)
from tests.mounting import MountedKvfs, has_ended, run_kvfs, wait_until


@pytest.fixture(scope="module")
def session_log() -> list[str]:
    """What may be in the log: the daemon also notes there why it refused to start."""
    return ["background: ended: tier (hdd|remote)", "background: ended: the configuration lacks"]


@pytest.fixture(scope="module")
def one_mount(session_log: list[str]) -> Iterator[MountedKvfs]:
    with scratch() as base, live(MountedKvfs(base, config_in(base)), session_log) as mount:
        yield mount


@pytest.fixture
def session(one_mount: MountedKvfs) -> Iterator[MountedKvfs]:
    """A mount that every test ends and starts again as it likes; it is mounted between them."""
    text = one_mount.config_file.read_text()
    yield one_mount
    one_mount.config_file.write_text(text)
    if not one_mount.is_mounted() or is_dead(one_mount.path):
        one_mount.start()


def mount_again(mount: MountedKvfs, *options: object) -> subprocess.CompletedProcess[str]:
    """`kvfs mount`, which may fail."""
    return run_kvfs(
        "mount", mount.path, "--config", mount.config_file, "--log-file", mount.log_file,
        *options, check=False,
    )  # fmt: skip


@pytest.mark.semantics("S-mount-1")
def test_a_mountpoint_that_is_no_empty_directory_is_refused(session: MountedKvfs) -> None:
    base = session.path.parent
    tiers = [
        f"nvme={base / 'new-nvme'},capacity=10MiB",
    ]
    (base / "new-nvme").mkdir()
    full, file = base / "full", base / "file"
    full.mkdir()
    (full / "precious").write_bytes(b"x")
    file.write_bytes(b"x")
    for target, words in (
        (full, "not empty"), (file, "not a directory"), (base / "missing", "no such directory"),
        (session.path, "kvfs is mounted there"),
    ):  # fmt: skip
        refused = run_kvfs("mount", target, "--tier", tiers[0], check=False)
        assert refused.returncode == 5
        assert words in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    assert (full / "precious").read_bytes() == b"x"
    assert os.listdir(base / "new-nvme") == []


@pytest.mark.semantics("S-mount-2")
def test_a_second_mount_of_the_same_tiers_is_refused(session: MountedKvfs) -> None:
    path = publish(session.path / "before", b"x")
    other = session.path.parent / "other"
    other.mkdir(exist_ok=True)
    refused = run_kvfs("mount", other, "--config", session.config_file, check=False)
    assert refused.returncode == 4
    assert "another kvfs daemon uses" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert path.read_bytes() == b"x"
    publish(session.path / "after", b"y")


@pytest.mark.semantics("S-mount-3")
def test_umount_refuses_while_a_file_is_open_and_then_works(session: MountedKvfs) -> None:
    path = publish(session.path / "open", b"x")
    pid = int(call(session, "status")["pid"])
    with path.open("rb") as reader:
        refused = run_kvfs("umount", session.path, check=False)
        assert refused.returncode == 5
        assert "busy" in refused.stderr
        assert reader.read() == b"x"
        publish(session.path / "still", b"served")
    run_kvfs("umount", session.path)
    assert not session.is_mounted()
    assert os.listdir(session.path) == []
    assert has_ended(pid)
    again = run_kvfs("umount", session.path, check=False)
    assert again.returncode == 5
    session.start()
    assert (session.path / "still").read_bytes() == b"served"


@pytest.mark.semantics("S-mount-4")
@pytest.mark.parametrize("busy", [False, True])
def test_sigterm_ends_the_mount_in_order(session: MountedKvfs, busy: bool) -> None:
    path = publish(session.path / "block", b"x" * 1000)
    pid = int(call(session, "status")["pid"])
    reader = path.open("rb") if busy else None
    try:
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not session.is_mounted(), "unmounted")
        wait_until(lambda: has_ended(pid), "the daemon gone")
    finally:
        if reader is not None:
            reader.close()
    assert session.log_file.read_text().splitlines()[-1].endswith("stopped")
    session.start()
    assert path.read_bytes() == b"x" * 1000
    assert state(path) == "sealed"


@pytest.mark.semantics("S-mount-8")
def test_sighup_says_what_needs_a_remount(session: MountedKvfs, session_log: list[str]) -> None:
    text = session.config_file.read_text()
    session_log.append("these need a remount: mount.fsname")
    changed = text.replace('half_life = "120s"', 'half_life = "60s"')
    session.config_file.write_text(f'{changed}fsname = "other"\n')
    os.kill(int(call(session, "status")["pid"]), signal.SIGHUP)
    wait_until(lambda: "need a remount" in session.log_file.read_text(), "reloaded")
    shown = json.loads(run_kvfs("config", "show", session.path, "--json").stdout)
    assert shown["tiering"]["half_life"] == 60.0
    assert shown["mount"]["fsname"] == "kvfs"
    session_log.append("not reloaded: .*half_life")
    session.config_file.write_text(text.replace("half_life", "half_lief"))
    session_log.append("not reloaded: .*half_lief")
    os.kill(int(call(session, "status")["pid"]), signal.SIGHUP)
    wait_until(lambda: "not reloaded" in session.log_file.read_text(), "refused")
    session.config_file.write_text(text)
    assert call(session, "reload")["applied"] == ["tiering.half_life"]


# --- crashes


@pytest.mark.semantics("S-crash-1", "S-crash-2", "S-crash-3")
def test_a_killed_daemon_keeps_what_was_published(session: MountedKvfs) -> None:
    sealed = publish(session.path / "sealed", os.urandom(64 * KIB))
    put_on(session, sealed, "hdd")
    data = sealed.read_bytes()
    writing = (session.path / "writing").open("wb", buffering=0)
    writing.write(b"half")
    published = (session.path / "published.tmp").open("wb", buffering=0)
    published.write(b"whole")
    (session.path / "published.tmp").rename(session.path / "published")
    past = bool(call(session, "status")["data_path"]["passthrough"])
    session.kill()
    refusal = refusal_of(lambda: os.listdir(session.path))
    assert refusal in (errno.ENOTCONN, errno.ECONNABORTED)
    for file in (writing, published):
        if past:
            # The kernel needs no daemon for what it writes itself.
            assert file.write(b"more") == 4
        else:
            refusal = refusal_of(partial(file.write, b"more"))
            assert refusal in (errno.ENOTCONN, errno.ECONNABORTED)
        file.close()
    session.start()
    assert sealed.read_bytes() == data
    assert (session.path / "published").read_bytes() == (b"wholemore" if past else b"whole")
    assert not (session.path / "writing").exists()
    assert not (session.tiers["nvme"] / "writing").exists()
    wait_sealed(session.path / "published")


@pytest.mark.semantics("S-crash-1")
def test_a_dead_mount_can_also_be_unmounted(session: MountedKvfs) -> None:
    session.kill()
    assert session.is_mounted()
    asked = run_kvfs("status", session.path, check=False)
    assert asked.returncode == 6
    assert "dead" in asked.stderr
    run_kvfs("umount", session.path)
    assert not session.is_mounted()
    session.start()


@pytest.mark.semantics("S-crash-4", "S-weak-2")
def test_published_but_unsealed_is_set_aside_when_the_machine_stopped(
    session: MountedKvfs, session_log: list[str]
) -> None:
    session_log.append("was not sealed before the machine stopped: quarantined")
    session_log.append("is bad .*quarantined")
    sealed = publish(session.path / "was-sealed", b"sealed")
    wait_sealed(sealed)
    writer = (session.path / "torn.tmp").open("wb", buffering=0)
    writer.write(b"perhaps")
    (session.path / "torn.tmp").rename(session.path / "torn")
    session.kill()
    writer.close()
    backing = session.tiers["nvme"] / "was-sealed"
    times = backing.stat()
    backing.write_bytes(bytes(6))
    os.utime(backing, ns=(times.st_atime_ns, times.st_mtime_ns))
    catalog = sqlite3.connect(session.tiers["nvme"] / ".kvfs" / "catalog.sqlite")
    with catalog:
        catalog.execute("UPDATE meta SET value = 'another boot' WHERE key = 'boot_id'")
    catalog.close()
    session.start()
    with pytest.raises(FileNotFoundError):
        sealed.open("rb")
    assert not (session.path / "torn").exists()
    aside = list((session.tiers["nvme"] / ".kvfs" / "quarantine").iterdir())
    assert sorted(file.read_bytes() for file in aside) == [bytes(6), b"perhaps"]


@pytest.mark.semantics("S-mount-5")
def test_an_unmounted_disk_is_refused_and_nothing_is_lost(session: MountedKvfs) -> None:
    path = publish(session.path / "on-hdd", b"x")
    put_on(session, path, "hdd")
    session.stop()
    hdd = session.tiers["hdd"]
    hdd.rename(hdd.with_name("away"))
    for empty in (False, True):
        if empty:
            hdd.mkdir()
        refused = mount_again(session)
        assert refused.returncode == 4
        assert "tier hdd" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    hdd.rmdir()
    hdd.with_name("away").rename(hdd)
    session.start()
    assert path.read_bytes() == b"x"


@pytest.mark.semantics("S-read-3")
def test_a_remote_tier_that_is_away_costs_only_its_blocks(
    session: MountedKvfs, session_log: list[str]
) -> None:
    session_log.append("tier remote is offline: .* is not mounted")
    away = [publish(session.path / f"remote-{n}", b"away") for n in range(3)]
    here = publish(session.path / "here", b"here")
    for path in away:
        put_on(session, path, "remote")
    session.stop()
    remote = session.tiers["remote"]
    remote.rename(remote.with_name("gone"))
    session_log.append("every tier with a replica is offline")
    session.start()
    assert session.tier("remote")["state"] == "offline"
    assert here.read_bytes() == b"here"
    assert {path.name for path in away} <= set(os.listdir(session.path))
    assert away[0].stat().st_size == 4
    assert refusal_of(lambda: away[0].open("rb")) == errno.EIO
    away[1].unlink()
    assert not away[1].exists()
    away[2].rename(session.path / "renamed")
    remote.with_name("gone").rename(remote)
    wait_until(lambda: session.tier("remote")["state"] == "online", "remote is back")
    assert away[0].read_bytes() == b"away"
    wait_until(lambda: not (remote / "remote-1").exists(), "the removal carried out")
    wait_until(lambda: (remote / "renamed").exists(), "the rename carried out")
    assert (session.path / "renamed").read_bytes() == b"away"


# --- leaving and joining tiers; last, because they change the configuration


@pytest.mark.semantics("S-mount-7")
def test_a_drained_tier_can_leave_and_a_full_one_only_by_force(
    session: MountedKvfs, session_log: list[str]
) -> None:
    on_hdd = publish(session.path / "drained", b"drained")
    on_remote = publish(session.path / "given-up", b"given up")
    put_on(session, on_hdd, "hdd")
    put_on(session, on_remote, "remote")
    drained = run_kvfs("tier", "drain", "hdd", session.path, "--json")
    assert json.loads(drained.stdout)["remaining"] == 0
    assert on_hdd.read_bytes() == b"drained"
    assert session.tier("hdd")["blocks"] == 0
    assert session.tier("hdd")["state"] == "draining"
    on_both = publish(session.path / "on-both", b"on both")
    put_on(session, on_both, "remote")
    promote(session, on_both, "hdd")
    put_on(session, on_hdd, "remote")
    promote(session, on_hdd)
    session.stop()
    full = session.config_file.read_text()
    parts = full.split("[[tier]]\n")
    tiering = parts[3][parts[3].index("[tiering]") :]
    session.config_file.write_text(f"[[tier]]\n{parts[1]}{tiering}")
    for options, named in (((), "hdd"), (("--forget-tier", "hdd"), "remote")):
        refused = mount_again(session, *options)
        assert refused.returncode == 4
        assert f"--forget-tier {named}" in refused.stderr
    session.config_file.write_text(full)
    session.start()
    assert session.info("on-both")["replicas"] == ["hdd", "remote"]
    session.stop()
    session.config_file.write_text(f"[[tier]]\n{parts[1]}{tiering}")
    session.start("--forget-tier", "remote", "--forget-tier", "hdd")
    assert not on_remote.exists()
    assert not on_both.exists()
    session_log.append("tier (hdd|remote) .* is forgotten")
    assert on_hdd.read_bytes() == b"drained"
    assert (session.tiers["remote"] / "given-up").read_bytes() == b"given up"
