"""Listing with a kernel that takes as many entries as its buffer holds."""

from __future__ import annotations

import os
from collections.abc import Callable

import pyfuse3
import pytest

from kvfs.catalog.rows import ROOT_INODE
from kvfs.mount.control_dir import CONTROL_INODE
from kvfs.mount.operations import Operations

NAMES = 600


class Buffer:
    """Stands in for the kernel's buffer: takes `room` entries, then is full."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.entries: list[tuple[bytes, int, int]] = []

    def reply(
        self, token: object, name: bytes, attributes: pyfuse3.EntryAttributes, cookie: int
    ) -> bool:
        if len(self.entries) >= self.room:
            return False
        self.entries.append((name, attributes.st_ino, cookie))
        return True


async def listing(
    operations: Operations, directory: int, monkeypatch: pytest.MonkeyPatch, *,
    room: int, between: Callable[[int], object] = lambda cookie: None,
) -> list[tuple[bytes, int]]:  # fmt: skip
    """Names and inodes of a whole directory, in as many requests as it takes."""
    found: list[tuple[bytes, int]] = []
    cookie = 0
    while True:
        buffer = Buffer(room)
        monkeypatch.setattr(pyfuse3, "readdir_reply", buffer.reply)
        await operations.readdir(directory, cookie, pyfuse3.ReaddirToken())
        if not buffer.entries:
            return found
        found += [(name, inode) for name, inode, _ in buffer.entries]
        cookie = buffer.entries[-1][2]
        between(cookie)


async def make(operations: Operations, parent: int, name: bytes) -> None:
    entry = await operations.mknod(parent, name, 0o100644, 0, pyfuse3.RequestContext())
    await operations.forget([(entry.st_ino, 1)])


@pytest.mark.semantics("S-list-1")
@pytest.mark.parametrize("room", [1, 7, 256, 10_000])
async def test_every_name_once_whatever_the_buffer(
    operations: Operations, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    expected = [b"%04d" % number for number in range(NAMES if room > 1 else 20)]
    for name in expected:
        await make(operations, ROOT_INODE, name)
    found = await listing(operations, ROOT_INODE, monkeypatch, room=room)
    assert [name for name, _ in found] == [b".", b"..", *expected]
    # The kernel counts each entry but the dots.
    assert len(operations.inodes) == len(expected)
    await operations.forget([(inode, 1) for name, inode in found if name not in (b".", b"..")])
    assert len(operations.inodes) == 0


@pytest.mark.semantics("S-list-1", "S-list-3")
async def test_names_that_go_and_come_meanwhile_cost_no_other(
    operations: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = pyfuse3.RequestContext()
    names = [b"%04d" % number for number in range(100)]
    for name in names:
        await make(operations, ROOT_INODE, name)
    found: list[bytes] = []
    cookie = 0
    round_ = 0
    while True:
        buffer = Buffer(10)
        monkeypatch.setattr(pyfuse3, "readdir_reply", buffer.reply)
        await operations.readdir(ROOT_INODE, cookie, pyfuse3.ReaddirToken())
        if not buffer.entries or round_ > 30:
            break
        found += [name for name, _, _ in buffer.entries]
        cookie = buffer.entries[-1][2]
        if round_ < 5:
            await operations.unlink(ROOT_INODE, buffer.entries[-1][0], context)
            await operations.unlink(ROOT_INODE, names[99 - round_], context)
            await operations.rename(
                ROOT_INODE, names[50 + round_], ROOT_INODE, b"renamed-%d" % round_, 0, context
            )
            await make(operations, ROOT_INODE, b"new-%d" % round_)
        round_ += 1
    assert len(found) == len(set(found))
    assert set(names[:50]) <= set(found)
    assert {b"renamed-%d" % n for n in range(5)} <= set(found)
    assert {b"new-%d" % n for n in range(5)} <= set(found)


async def test_the_control_directory_lists_its_files(
    operations: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = await listing(operations, CONTROL_INODE, monkeypatch, room=1)
    assert [name for name, _ in found] == [b"stats", b"tiers"]
    assert len(operations.inodes) == 0


async def test_dots_name_the_directory_and_its_parent(
    operations: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = pyfuse3.RequestContext()
    outer = await operations.mkdir(ROOT_INODE, b"outer", 0o755, context)
    inner = await operations.mkdir(outer.st_ino, b"inner", 0o755, context)
    assert await listing(operations, inner.st_ino, monkeypatch, room=5) == [
        (b".", inner.st_ino),
        (b"..", outer.st_ino),
    ]
    assert (await operations.lookup(inner.st_ino, b"..", context)).st_ino == outer.st_ino
    assert await operations.opendir(outer.st_ino, context) == outer.st_ino
    await operations.fsyncdir(outer.st_ino, False)
    assert os.path.isdir(operations.store.volume.tiers[0].locate(b"outer/inner"))
