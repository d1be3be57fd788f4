"""Fault x operation on a real mount: what an engine sees, what is lost (nothing), what comes back.

One row a test: blocks are put on a tier that can fail, it fails, an engine goes on working, the
fault goes. What was seen is held against the table of docs/RELIABILITY.md, which `make reliability`
makes from the same run. Reads go through the daemon, so that a row is the same on every machine.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvfs.config import Config, TierConfig
from tests.faulty import matrix
from tests.faulty.faults import (
    BIT_FLIPS,
    DISK_HANGS,
    GONE,
    NO_QUOTA,
    NO_SPACE,
    READ_ONLY,
    SHORT_WRITES,
    Fault,
    failing,
    hanging,
    slow,
)
from tests.faulty.matrix import Row
from tests.faulty.tier import FaultyTier, faulty_tier
from tests.mount.live import (
    call,
    config_in,
    demote,
    live,
    promote,
    publish,
    replicas,
    scratch,
    state,
)
from tests.mounting import MountedKvfs, check_accounts, wait_until

DEADLINE_S = 1.0
# Long enough for a loaded machine, short enough to tell what hangs: many deadlines.
OPERATION_TIMEOUT_S = 20.0
SEALING_S = 0.8

FAULTS: dict[str, tuple[Fault, ...]] = {
    "every call fails (EIO)": failing(errno.EIO),
    "reads fail (EIO)": failing(errno.EIO, "read"),
    "writes fail (EIO)": failing(errno.EIO, "create", "write", "fsync", "mkdir"),
    "ENOSPC": NO_SPACE,
    "EDQUOT": NO_QUOTA,
    "short writes": SHORT_WRITES,
    "10 ms more each call": slow(0.01),
    "hangs": hanging(),
    "read-only": READ_ONLY,
    "gone (ENOTCONN)": GONE,
    "unmounted": (),
    "an empty directory in its place": failing(errno.ENOENT, "lookup", "create"),
    "bits flip when read": BIT_FLIPS,
}
ORDER = list(FAULTS)
LOCAL = [name for name in ORDER if name != "hangs"]
# An hdd is a remote tier without staging in front of it: the rows in which that could show.
OF_HDD = ["every call fails (EIO)", "reads fail (EIO)", "hangs", "read-only", "bits flip when read"]
ROWS = [
    *(("nvme", fault) for fault in LOCAL),
    *(("hdd", fault) for fault in OF_HDD),
    *(("remote", fault) for fault in ORDER),
]
# Degraded is a tier between an error and the next answer: that passes too soon to be a cell.
WORST_FIRST = ("offline", "failing", "read-only", "full", "online", "degraded")
EXPECTED_LOG = [
    "tier (nvme|hdd|remote)", "requests_failed", "tier_changes", "tolerated_failures",
    "seals_failed", "closes_failed", "promises_stuck", "moves_failed", "quarantined",
    "open: ", "read: ", "write: ", "setattr: ", "fsync: ", "release: ", "close of inode",
]  # fmt: skip


@dataclass
class Scene:
    """A mount with one tier that can fail, and the blocks of one row."""

    mount: MountedKvfs
    faulty: FaultyTier
    place: str
    directory: Path = Path()
    data: dict[str, bytes] = field(default_factory=dict)
    incidents_before: dict[tuple[str, str, str], int] = field(default_factory=dict)
    worst: str = "online"

    @property
    def elsewhere(self) -> str:
        """The other tier of the mount."""
        return "hdd" if self.place == "nvme" else "nvme"

    def path(self, name: str) -> Path:
        return self.directory / name

    def tier(self) -> dict[str, Any]:
        return next(dict(t) for t in call(self.mount, "status")["tiers"] if t["name"] == self.place)

    def look(self) -> str:
        """The worst state that the tier was seen in."""
        self.worst = min(self.worst, str(self.tier()["state"]), key=WORST_FIRST.index)
        return self.worst

    def incidents(self) -> dict[tuple[str, str, str], int]:
        rows = call(self.mount, "status")["incidents"]
        return {(row["event"], row["reason"], row["tier"]): row["count"] for row in rows}

    def counted(self) -> set[str]:
        """The reasons that were counted against the tier in this row."""
        return {
            reason
            for (event, reason, tier), count in self.incidents().items()
            if tier == self.place and event in ("tier_errors", "quarantined")
            and count > self.incidents_before.get((event, reason, tier), 0)
        }  # fmt: skip


@pytest.fixture(scope="module", params=["nvme", "hdd", "remote"])
def faulty_mount(request: pytest.FixtureRequest) -> Iterator[tuple[MountedKvfs, FaultyTier, str]]:
    """One mount for all rows of a tier: what a fault leaves behind shows in the next row."""
    place = request.param
    with scratch() as base, faulty_tier(base, "faulty") as faulty:
        mount = MountedKvfs(base, _config(base, faulty, place))
        with live(mount, EXPECTED_LOG):
            try:
                yield mount, faulty, place
            finally:
                faulty.start_again()


def _config(base: Path, faulty: FaultyTier, place: str) -> Config:
    """Two tiers; the catalog lies on neither."""
    other = "hdd" if place == "nvme" else "nvme"
    order: dict[str, int] = {n: 64 for n in ("nvme", "hdd", "remote") if n in (place, other)}
    config = config_in(base, order, passthrough="off")
    tiers = tuple(_with_deadline(tier, faulty, place) for tier in config.tier)
    mount = msgspec.structs.replace(config.mount, catalog=base / "catalog.sqlite")
    return msgspec.structs.replace(config, tier=tiers, mount=mount)


def _with_deadline(tier: TierConfig, faulty: FaultyTier, place: str) -> TierConfig:
    path = faulty.path if tier.name == place else tier.path
    return msgspec.structs.replace(tier, path=path, deadline_s=DEADLINE_S)


@pytest.fixture
def scene(faulty_mount: tuple[MountedKvfs, FaultyTier, str], tmp_path: Path) -> Scene:
    """Sealed blocks: on the tier only, on both, on the other only."""
    mount, faulty, place = faulty_mount
    scene = Scene(mount, faulty, place)
    scene.directory = mount.path / tmp_path.name
    scene.directory.mkdir()
    for name in ("kept", "both", "away", "renamed", "unlinked", "read", "written", "moved"):
        scene.data[name] = name.encode() + os.urandom(200_000)
        publish(scene.path(name), scene.data[name])
    wait_until(lambda: call(mount, "status")["unsealed"] == 0, "everything sealed")
    lower = "hdd" if place == "nvme" else place
    below = ("away", "both") if place == "nvme" else set(scene.data) - {"away"}
    paths = [os.fsencode(scene.path(name).relative_to(mount.path)) for name in below]
    assert call(mount, "demote", paths=paths, to=lower)["skipped"] == []
    assert promote(mount, scene.path("both"), "nvme")["skipped"] == []
    assert replicas(scene.path("both")) == ["nvme", lower]
    assert replicas(scene.path("kept")) == [place]
    return scene


def attempt(operation: Callable[[], str | None]) -> str:
    """ "ok", what the operation says, or the name of its errno. It may not hang."""
    outcome: list[str | BaseException] = []

    def run() -> None:
        try:
            outcome.append(operation() or "ok")
        except OSError as error:
            outcome.append(errno.errorcode[error.errno or 0])
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(OPERATION_TIMEOUT_S)
    assert outcome, f"it hangs: {operation}"
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


class Engine:
    """The operations of a row, with handles from before the fault."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.reader = os.open(scene.path("read"), os.O_RDONLY)
        self.writer = os.open(scene.path("written"), os.O_RDWR)

    def close(self) -> None:
        for handle in (self.reader, self.writer):
            attempt(lambda handle=handle: os.close(handle))  # type: ignore[misc] # bound at once

    def operations(self) -> dict[str, Callable[[], str | None]]:
        """Column -> what is done."""
        scene = self.scene
        return {
            "store a block": self.store,
            "`fsync`": self.sync,
            "read, only there": lambda: self.read("kept"),
            "read, also elsewhere": lambda: self.read("both"),
            "read, only elsewhere": lambda: self.read("away"),
            "`stat`, list, `statfs`": self.list,
            "open handle reads": self.read_handle,
            "open handle writes": self.write_handle,
            "rename": lambda: os.rename(scene.path("renamed"), scene.path("new name")),
            "unlink": lambda: os.unlink(scene.path("unlinked")),
            "`mkdir`": lambda: scene.path("directory").mkdir(),
            "`chmod`, xattr": self.change,
            "move to it": lambda: self.move("away", scene.place),
            "move off it": lambda: self.move("moved", scene.elsewhere),
            "close and seal": self.seal,
        }

    def store(self) -> str:
        publish(self.scene.path("stored"), b"n" * 200_000)
        return f"ok, on {','.join(replicas(self.scene.path('stored')))}"

    def sync(self) -> str:
        with self.scene.path("synced").open("wb") as file:
            file.write(b"s" * 100_000)
            file.flush()
            os.fsync(file.fileno())
        return f"ok, on {','.join(replicas(self.scene.path('synced')))}"

    def read(self, name: str) -> None:
        assert self.scene.path(name).read_bytes() == self.scene.data[name], "wrong bytes"

    def list(self) -> None:
        scene = self.scene
        assert len(os.listdir(scene.directory)) >= len(scene.data)
        for name in ("both", "away", "read"):
            assert scene.path(name).stat().st_size == len(scene.data[name])
        assert os.statvfs(scene.directory).f_blocks > 0

    def read_handle(self) -> None:
        assert os.pread(self.reader, 100, 0) == self.scene.data["read"][:100], "wrong bytes"

    def write_handle(self) -> None:
        # The same bytes: the block is what it was, whether or not they arrive.
        assert os.pwrite(self.writer, self.scene.data["written"][:10], 0) == 10

    def change(self) -> None:
        self.scene.path("both").chmod(0o640)
        os.setxattr(self.scene.path("both"), "user.note", b"1")

    def move(self, name: str, to: str) -> str:
        up = to == "nvme"
        order = promote if up else demote
        return "stays" if order(self.scene.mount, self.scene.path(name), to)["skipped"] else "ok"

    def seal(self) -> str:
        os.close(self.writer)
        self.writer = -1
        written = self.scene.path("written")
        try:
            wait_until(lambda: state(written) == "sealed", "sealed", timeout_s=SEALING_S)
        except AssertionError:
            return "later"
        return "ok"


def begin(scene: Scene, fault: str) -> None:
    if fault == "unmounted":
        scene.faulty.stop()
    elif fault == "hangs" and scene.place == "hdd":
        scene.faulty.set(*DISK_HANGS)
    else:
        scene.faulty.set(*FAULTS[fault])


def run_row(scene: Scene, fault: str) -> Row:
    """The cells of a row; the fault is over afterwards."""
    if fault == "bits flip when read":
        # A replica that this mount has read before is not verified again (S-weak-1).
        scene.mount.remount()
    engine = Engine(scene)
    scene.incidents_before = scene.incidents()
    row: Row = {}
    begin(scene, fault)
    try:
        for column, operation in engine.operations().items():
            row[column] = attempt(operation)
            scene.look()
        row["state shown"] = _settled_state(scene, fault)
        row["counted as"] = ", ".join(sorted(scene.counted())) or "-"
        _check_metrics(scene, row)
    finally:
        scene.faulty.start_again()
        engine.close()
    return row


def _settled_state(scene: Scene, fault: str) -> str:
    """The worst state, once it is what the page says; when that is being written, after a while."""
    expected = matrix.documented(scene.place, fault).get("state shown", "offline")
    try:
        wait_until(lambda: scene.look() == expected, "the state", timeout_s=5 * DEADLINE_S)
    except AssertionError:
        pass  # the comparison with the page says it
    return scene.worst


def _check_metrics(scene: Scene, row: Row) -> None:
    text = (scene.mount.path / ".kvfs/metrics").read_text()
    tier = f'tier="{scene.place}"'
    if row["state shown"] == "offline" and scene.tier()["state"] == "offline":
        assert f"kvfs_tier_online{{{tier}}} 0.0" in text
        assert f"kvfs_tier_accepts{{{tier}}} 0.0" in text
    for (event, reason, name), count in scene.incidents().items():
        if name == scene.place and event == "tier_errors":
            shown = f'kvfs_incidents_total{{event="{event}",reason="{reason}",{tier}}} '
            assert shown in text, f"{count} of {event} are not in the metrics"


def recover(scene: Scene) -> None:
    """By itself: nothing is told that the fault is gone."""
    wait_until(lambda: scene.tier()["state"] == "online", "online again")
    wait_until(lambda: call(scene.mount, "status")["unsealed"] == 0, "everything sealed")
    left = scene.faulty.files / scene.directory.name / "unlinked"
    wait_until(lambda: not left.exists(), "the unlink done")
    if scene.path("new name").exists():
        renamed = scene.faulty.files / scene.directory.name / "new name"
        wait_until(renamed.exists, "the rename done")


def check_nothing_lost(scene: Scene, row: Row) -> None:
    """Every block is there, byte for byte, but for those whose bytes could not be trusted."""
    flipped = row["counted as"] == "checksum"
    for name, data in scene.data.items():
        here = scene.path("new name" if name == "renamed" and row["rename"] == "ok" else name)
        if name == "unlinked":
            assert not here.exists()
        elif flipped and not _is_served(here):
            quarantine = os.listdir(scene.faulty.files / ".kvfs/quarantine")
            assert any(name in entry for entry in quarantine), f"{name} is gone for good"
        else:
            assert here.read_bytes() == data, name
    for name, size in (("stored", 200_000), ("synced", 100_000)):
        assert len(scene.path(name).read_bytes()) == size
    check_accounts(scene.mount)
    assert call(scene.mount, "fsck", repair=False)["findings"] == []


def _is_served(path: Path) -> bool:
    try:
        path.read_bytes()
    except FileNotFoundError:
        return False
    return True


@pytest.mark.semantics("S-failing-1", "S-failing-2", "S-failing-3")
@pytest.mark.parametrize(("faulty_mount", "fault"), ROWS, indirect=["faulty_mount"])
def test_row(scene: Scene, fault: str) -> None:
    row = run_row(scene, fault)
    recover(scene)
    check_nothing_lost(scene, row)
    matrix.record(scene.place, fault, row, ORDER)


def test_the_page_has_these_rows_and_no_others() -> None:
    page = matrix.PAGE.read_text()
    for place in ("nvme", "hdd", "remote"):
        tabled = list(matrix.table_of(place, page))
        assert tabled == [fault for tier, fault in ROWS if tier == place]
