"""Where the control socket may lie, who may connect to it, and what orders wait for."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from kvfs.control import ControlClient
from kvfs.errors import KvfsError, TierFull
from kvfs.mount.server import prepare_directory
from kvfs.mount.verbs import SEAL_WAIT_S
from tests.conftest import MIB
from tests.ops.serving import Served
from tests.store.helpers import create


def of_another_user(directory: Path) -> None:
    directory.mkdir()
    os.chown(directory, 12345, 12345)


def open_to_all(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o777)


def like_tmp(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o1777)


def a_link(directory: Path) -> None:
    (directory.parent / "elsewhere").mkdir()
    directory.symlink_to("elsewhere")


def a_file(directory: Path) -> None:
    directory.write_bytes(b"")


def test_missing_directories_are_made_for_the_daemon_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        prepare_directory(tmp_path / "kvfs-1000/kvfs")
        prepare_directory(tmp_path / "kvfs-1000/kvfs")
    finally:
        os.umask(old)
    for made in (tmp_path / "kvfs-1000", tmp_path / "kvfs-1000/kvfs"):
        assert not stat.S_IMODE(made.stat().st_mode) & 0o022


@pytest.mark.parametrize("plant", [of_another_user, open_to_all, like_tmp, a_link, a_file])
def test_a_directory_where_another_socket_could_lie_is_refused(
    tmp_path: Path, plant: Callable[[Path], None]
) -> None:
    if plant is of_another_user and os.geteuid() != 0:
        pytest.skip("gives a directory to another user: not root")
    plant(tmp_path / "kvfs")
    with pytest.raises(KvfsError, match="others may put something there"):
        prepare_directory(tmp_path / "kvfs")


@pytest.mark.parametrize("plant", [of_another_user, open_to_all])
def test_so_is_one_above(tmp_path: Path, plant: Callable[[Path], None]) -> None:
    if plant is of_another_user and os.geteuid() != 0:
        pytest.skip("gives a directory to another user: not root")
    plant(tmp_path / "kvfs-1000")
    with pytest.raises(KvfsError, match="others may put something there"):
        prepare_directory(tmp_path / "kvfs-1000/kvfs")


def test_one_like_tmp_will_do_above(tmp_path: Path) -> None:
    like_tmp(tmp_path / "tmp")
    prepare_directory(tmp_path / "tmp/kvfs")
    assert (tmp_path / "tmp/kvfs").is_dir()


@pytest.mark.semantics("S-write-7")
def test_an_order_does_not_wait_for_blocks_that_will_not_be_sealed(served: Served) -> None:
    capacity_bytes = max(tier.capacity_bytes for tier in served.config.tier)

    async def leave(path: bytes, *, closed: bool) -> None:
        blocks = served.store.blocks
        block = await create(served.store, path, bytes(MIB))
        with pytest.raises(TierFull):
            await blocks.write(block, 2 * capacity_bytes, b"more")
        if closed:
            await blocks.close(block, writer=True)

    for number in range(5):
        served.run(partial(leave, closed=number > 0), b"%d" % number)
    served.put(b"sound", b"123")
    with ControlClient(served.socket_path) as client:
        answer = client.call("evict", {"paths": [b""]}, timeout_s=SEAL_WAIT_S / 2)
    assert answer["evicted"] == 1
    assert sorted(skip["reason"] for skip in answer["skipped"]) == ["it is open"] + 4 * [
        "its last write was refused; remove it or write it again"
    ]
