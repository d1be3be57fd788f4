"""What users of a mount, and what lies on its tiers, can reach: and what not."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mount.live import (
    below,
    call,
    config_in,
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
from tests.mounting import MountedKvfs, run_kvfs, wait_until

STRANGER = 54321
SECRET = b"secret" * 100

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="acts as another user: not root")


@pytest.fixture(scope="module")
def shared_log() -> list[str]:
    return [
        "tier (nvme|hdd)( lost|: ).*(symbolic link|regular file|quarantined)",
        "a symbolic link was in place of the directory",
    ]


def mount_options(mount: MountedKvfs) -> set[str]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[4] == str(mount.path):
            return set(fields[5].split(",")) | set(fields[-1].split(","))
    raise AssertionError("not mounted")


def as_stranger(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)], check=False, capture_output=True, text=True,
        user=STRANGER, group=STRANGER, extra_groups=[],
    )  # fmt: skip


# --- the mount


@pytest.mark.semantics("S-tier-1")
def test_the_kernel_checks_permissions(shared: MountedKvfs) -> None:
    assert {"default_permissions", "allow_other", "nosuid", "nodev"} <= mount_options(shared)
    for root in shared.tiers.values():
        assert stat.S_IMODE(root.stat().st_mode) == 0o700
        assert as_stranger("ls", root).returncode != 0


@pytest.fixture(params=["auto", "off"], ids=["passthrough", "served"])
def alone(request: pytest.FixtureRequest) -> Iterator[MountedKvfs]:
    """A mount for root only."""
    with scratch() as base:
        mount = MountedKvfs(base, config_in(base, passthrough=request.param))
        with mount.config_file.open("a") as file:
            file.write("allow_other = false\n")
        with live(mount):
            yield mount


def test_a_mount_for_one_user_is_closed_to_others(alone: MountedKvfs) -> None:
    options = mount_options(alone)
    assert "default_permissions" in options
    assert "allow_other" not in options
    path = publish(alone.path / "block", b"x")
    path.chmod(0o666)
    assert "Permission denied" in as_stranger("cat", path).stderr
    control = Path(call(alone, "status")["socket"])
    assert stat.S_IMODE(control.stat().st_mode) == 0o600
    script = (
        "import sys; from pathlib import Path; from kvfs.control import ControlClient\n"
        "from kvfs.errors import NotPermitted\n"
        "import os; os.setgroups([]); os.setgid(54321); os.setuid(54321)\n"
        "try: ControlClient(Path(sys.argv[1])).connect()\n"
        "except NotPermitted: print('refused')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, control], check=False, capture_output=True, text=True
    )
    assert done.stdout == "refused\n", done.stderr


# --- the control socket

ASK = """
import json, os, sys
from pathlib import Path
from kvfs.control import ControlClient
from kvfs.errors import KvfsError
os.setgroups([]); os.setgid(54321); os.setuid(54321)
with ControlClient(Path(sys.argv[1])) as client:
    for verb, args in json.loads(sys.argv[2]):
        try:
            answer = client.call(verb, args)
        except KvfsError as error:
            answer = {"refused": error.exit_code}
        print(json.dumps(answer, default=os.fsdecode))
"""


def ask_as_stranger(mount: MountedKvfs, *requests: tuple[str, dict[str, Any]]) -> list[Any]:
    command = [sys.executable, "-c", ASK, call(mount, "status")["socket"], json.dumps(requests)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.semantics("S-command-3")
def test_a_stranger_is_not_told_of_what_he_could_not_find(shared: MountedKvfs, there: Path) -> None:
    private = there / "private"
    private.mkdir(0o700)
    path = publish(private / "block", b"x")
    path.chmod(0o666)
    listed = there / "unlisted"
    listed.mkdir(0o711)
    wait_sealed(path)
    block, directory = (os.fsdecode(below(shared, each)) for each in (path, private))
    refused = {"refused": 9}
    answers = ask_as_stranger(
        shared,
        ("info", {"path": block}), ("ls", {"path": directory}), ("touch", {"paths": [block]}),
        ("evict", {"paths": [block]}), ("ls", {"path": os.fsdecode(below(shared, listed))}),
        ("heat", {"path": directory}), ("heat", {"limit": 5000}),
        ("info", {"path": directory}),
    )  # fmt: skip
    assert answers[:5] == [refused] * 5
    assert answers[5] == {"blocks": []}
    assert block not in [found["path"] for found in answers[6]["blocks"]]
    assert answers[7]["kind"] == "directory", "its name is seen in the directory above"
    assert path.read_bytes() == b"x"


@pytest.mark.semantics("S-command-3")
def test_an_order_for_a_directory_is_for_what_one_may_write(
    shared: MountedKvfs, there: Path
) -> None:
    there.chmod(0o777)
    ours, theirs = publish(there / "ours", b"x"), publish(there / "theirs", b"x")
    os.chown(theirs, STRANGER, STRANGER)
    wait_sealed(ours)
    wait_sealed(theirs)
    (answer,) = ask_as_stranger(shared, ("evict", {"paths": [os.fsdecode(below(shared, there))]}))
    assert answer["evicted"] == 1
    assert [skip["reason"] for skip in answer["skipped"]] == ["you may not write it"]
    assert ours.read_bytes() == b"x"
    wait_gone(theirs)


# --- backing files


@pytest.mark.semantics("S-tier-2")
@pytest.mark.parametrize("tier", ["nvme", "hdd", "remote"])
def test_a_sealed_file_has_the_writers_owner_and_no_writer(
    shared: MountedKvfs, there: Path, tier: str
) -> None:
    there.chmod(0o777)
    path = there / tier
    assert as_stranger("sh", "-c", f"umask 027; echo data > {path}").returncode == 0
    put_on(shared, path, tier)
    backing = shared.tiers[tier] / path.relative_to(shared.path)
    status = backing.stat()
    assert (status.st_uid, status.st_gid) == (STRANGER, STRANGER)
    assert stat.S_IMODE(status.st_mode) == 0o440
    assert stat.S_IMODE(path.stat().st_mode) == 0o640, "the mount shows the block's mode"
    assert as_stranger("sh", "-c", f"echo more >> {path}").returncode == 0, "and lets it be written"
    wait_sealed(path)
    assert path.read_bytes() == b"data\nmore\n"
    backing = shared.tiers[replicas(path)[0]] / path.relative_to(shared.path)
    assert stat.S_IMODE(backing.stat().st_mode) == 0o440


@pytest.mark.semantics("S-tier-2")
def test_what_the_backing_file_says_is_not_believed(shared: MountedKvfs, there: Path) -> None:
    path = publish(there / "block", b"data")
    path.chmod(0o600)
    wait_sealed(path)
    backing = shared.tiers["nvme"] / path.relative_to(shared.path)
    backing.chmod(0o666)
    os.chown(backing, STRANGER, STRANGER)
    status = path.stat()
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (0, 0o600)
    there.chmod(0o755)
    assert "Permission denied" in as_stranger("cat", path).stderr


# --- what somebody plants on a tier


@pytest.fixture(scope="module")
def settled(shared_log: list[str]) -> Iterator[MountedKvfs]:
    """A mount whose tests unmount and mount again."""
    with scratch() as base, live(MountedKvfs(base, config_in(base)), shared_log) as mount:
        yield mount


def by_a_link(backing: Path, secret: Path) -> None:
    backing.symlink_to(secret)


def by_a_relative_link(backing: Path, secret: Path) -> None:
    backing.symlink_to(os.path.relpath(secret, backing.parent))


def by_a_fifo(backing: Path, secret: Path) -> None:
    os.mkfifo(backing)


def by_a_directory(backing: Path, secret: Path) -> None:
    backing.mkdir()


def by_a_device(backing: Path, secret: Path) -> None:
    os.mknod(backing, stat.S_IFCHR | 0o666, os.makedev(1, 5))


PLANTS = [by_a_link, by_a_relative_link, by_a_fifo, by_a_directory, by_a_device]


@pytest.mark.semantics("S-tier-3")
@pytest.mark.parametrize("tier", ["nvme", "hdd"])
def test_a_block_whose_file_was_replaced_is_gone(
    shared: MountedKvfs, there: Path, tier: str
) -> None:
    secret = shared.path.parent / "secret"
    secret.write_bytes(SECRET)
    backing = shared.tiers[tier] / there.relative_to(shared.path)
    for plant in PLANTS:
        publish(there / plant.__name__, SECRET)
    for plant in PLANTS:
        put_on(shared, there / plant.__name__, tier)
    # What keeps a block open between two uses would serve the file that was there.
    run_kvfs("umount", shared.path)
    for plant in PLANTS:
        (backing / plant.__name__).unlink()
        plant(backing / plant.__name__, secret)
    shared.start()
    for plant in PLANTS:
        path = there / plant.__name__
        assert refusal_of(path.read_bytes) == errno.ENOENT, path
        path.write_bytes(b"new")
        assert path.read_bytes() == b"new"
    assert secret.read_bytes() == SECRET


@pytest.mark.semantics("S-tier-3")
def test_nothing_is_written_read_or_removed_through_a_planted_directory(
    settled: MountedKvfs,
) -> None:
    outside = settled.path.parent / "outside"
    outside.mkdir()
    (outside / "old").write_bytes(SECRET)
    there = settled.path / "planted"
    there.mkdir()
    publish(there / "old", SECRET)
    wait_sealed(there / "old")
    backing = settled.tiers["nvme"] / there.relative_to(settled.path)
    run_kvfs("umount", settled.path)
    (backing / "old").unlink()
    backing.rmdir()
    backing.symlink_to(outside)
    settled.start()
    assert refusal_of((there / "old").read_bytes) == errno.ENOENT
    publish(there / "new", b"new")
    wait_sealed(there / "new")
    assert (there / "new").read_bytes() == b"new"
    (there / "new").unlink()
    there.rmdir()
    assert os.listdir(outside) == ["old"]
    assert (outside / "old").read_bytes() == SECRET


def test_a_staging_directory_that_leads_elsewhere_is_not_swept(settled: MountedKvfs) -> None:
    precious = settled.path.parent / "precious"
    precious.mkdir(exist_ok=True)
    (precious / "file").write_bytes(SECRET)
    staging = settled.tiers["hdd"] / ".kvfs/staging"
    run_kvfs("umount", settled.path)
    staging.rmdir()
    staging.symlink_to(precious)
    settled.start()
    assert (precious / "file").read_bytes() == SECRET
    assert not staging.is_symlink()
    path = publish(settled.path / "moved", b"data")
    put_on(settled, path, "hdd")
    assert path.read_bytes() == b"data"


def test_a_private_directory_that_leads_elsewhere_is_refused(settled: MountedKvfs) -> None:
    private = settled.tiers["nvme"] / ".kvfs"
    run_kvfs("umount", settled.path)
    private.rename(settled.path.parent / "taken")
    private.symlink_to(settled.path.parent / "taken")
    try:
        refused = run_kvfs("mount", settled.path, "--config", settled.config_file, check=False)
        assert refused.returncode == 4
        assert len(refused.stderr.splitlines()) == 1
    finally:
        private.unlink()
        (settled.path.parent / "taken").rename(private)
        settled.start()


# --- bounds


def test_times_beyond_what_can_be_stored_are_the_last_that_can(there: Path) -> None:
    path = publish(there / "block", b"x")
    wait_sealed(path)
    os.utime(path, (10**12, 10**12))
    assert path.stat().st_mtime_ns == (1 << 63) - 1
    assert path.read_bytes() == b"x"


def test_a_time_to_live_is_bounded(there: Path) -> None:
    path = publish(there / "block", b"x")
    assert refusal_of(lambda: os.setxattr(path, "user.kvfs.ttl", b"9999999999999d")) == errno.EINVAL
    assert refusal_of(lambda: os.getxattr(path, "user.kvfs.ttl")) == errno.ENODATA


@pytest.mark.semantics("S-names-3")
def test_a_path_may_be_deep(shared: MountedKvfs, there: Path) -> None:
    # shutil.rmtree cannot remove a deeper one.
    wanted = 700
    here = os.open(there, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(wanted):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    file = os.open("block", os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=here)
    os.write(file, b"deep")
    os.close(file)
    os.close(here)
    shared.remount()
    path = there / "/".join(["d"] * wanted) / "block"
    assert path.read_bytes() == b"deep"
    assert info(shared, path)["size_bytes"] == 4
    wait_until(lambda: info(shared, path)["state"] == "sealed", "sealed")
