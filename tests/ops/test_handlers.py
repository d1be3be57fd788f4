"""What each handler answers, and what the kernel is owed: lookup counts, ESTALE, no exceptions."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyfuse3
import pytest

from kvfs.catalog.rows import ROOT_INODE
from kvfs.errors import TierOffline
from kvfs.mount.control_dir import CONTROL_INODE
from kvfs.mount.handles import AHEAD_FROM_BYTES
from kvfs.mount.operations import Operations

MIB = 1 << 20
Context = pyfuse3.RequestContext


async def errno_from(answer: Awaitable[Any]) -> int:
    """The errno of a handler that must refuse."""
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await answer
    return int(caught.value.errno)


async def write_block(
    operations: Operations, context: Context, name: bytes, data: bytes, parent: int = ROOT_INODE
) -> int:
    """A closed block; its inode. The kernel holds it once."""
    info, entry = await operations.create(parent, name, 0o644, os.O_WRONLY, context)
    assert await operations.write(info.fh, 0, data) == len(data)
    await operations.release(info.fh)
    return int(entry.st_ino)


async def write_sealed(
    operations: Operations, context: Context, name: bytes, data: bytes, parent: int = ROOT_INODE
) -> int:
    inode = await write_block(operations, context, name, data, parent)
    assert not await operations.store.sealer.seal_pending()
    return inode


# --- lookup counts


async def test_lookups_are_counted_and_forgotten(operations: Operations, context: Context) -> None:
    inode = await write_block(operations, context, b"block", b"x")
    assert inode in operations.inodes
    await operations.lookup(ROOT_INODE, b"block", context)
    await operations.lookup(ROOT_INODE, b"block", context)
    await operations.forget([(inode, 2)])
    assert inode in operations.inodes
    await operations.forget([(inode, 1), (12345, 7)])
    assert len(operations.inodes) == 0
    await operations.forget([(inode, 1)])


async def test_negative_dot_and_control_lookups_are_not_counted(
    operations: Operations, context: Context
) -> None:
    assert (await operations.lookup(ROOT_INODE, b"missing", context)).st_ino == 0
    assert (await operations.lookup(ROOT_INODE, b".kvfs", context)).st_ino == CONTROL_INODE
    assert await operations.lookup(CONTROL_INODE, b"stats", context)
    assert len(operations.inodes) == 0


async def test_mkdir_and_mknod_count_one_lookup_each(
    operations: Operations, context: Context
) -> None:
    made = await operations.mkdir(ROOT_INODE, b"d", 0o755, context)
    node = await operations.mknod(ROOT_INODE, b"n", 0o100644, 0, context)
    await operations.forget([(made.st_ino, 1), (node.st_ino, 1)])
    assert len(operations.inodes) == 0


# --- negative entries


@pytest.mark.semantics("S-names-6")
async def test_a_missing_name_is_remembered_as_missing(
    operations: Operations, context: Context
) -> None:
    entry = await operations.lookup(ROOT_INODE, b"missing", context)
    assert entry.st_ino == 0
    assert entry.entry_timeout == 3600.0
    await write_block(operations, context, b"missing", b"x")
    assert (await operations.lookup(ROOT_INODE, b"missing", context)).st_ino > 0


@pytest.mark.semantics("S-crash-5")
async def test_while_the_tiers_are_walked_a_miss_is_looked_up_there_and_not_remembered(
    operations: Operations, context: Context
) -> None:
    inode = await write_sealed(operations, context, b"block", b"survivor")
    catalog = operations.store.volume.catalog
    with catalog.transaction("test"):
        catalog.delete(inode)
    account = operations.store.volume.space[0]
    account.used_bytes, account.blocks = 0, 0
    operations.store.volume.blocks = 0
    operations.store.volume.walking = True
    answer = operations.lookup(ROOT_INODE, b"missing", context)
    assert await errno_from(answer) == errno.ENOENT
    found = await operations.lookup(ROOT_INODE, b"block", context)
    assert (found.st_ino, found.st_size) == (inode, 8)


@pytest.mark.semantics("S-names-2")
async def test_names_that_are_too_long(operations: Operations, context: Context) -> None:
    long = b"n" * 256
    assert await errno_from(operations.lookup(ROOT_INODE, long, context)) == errno.ENAMETOOLONG
    answer = operations.mkdir(ROOT_INODE, long, 0o755, context)
    assert await errno_from(answer) == errno.ENAMETOOLONG


# --- errors


@pytest.mark.semantics("S-refused-5")
async def test_a_bug_becomes_eio_and_a_traceback_in_the_log(
    operations: Operations, context: Context, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, expect_log: list[str],
) -> None:  # fmt: skip
    def broken(*args: object) -> None:
        raise ValueError("a bug")

    expect_log.append("lookup failed")
    monkeypatch.setattr(operations.store.namespace, "lookup", broken)
    assert await errno_from(operations.lookup(ROOT_INODE, b"x", context)) == errno.EIO
    record = next(r for r in caplog.records if r.levelno == logging.ERROR)
    assert record.exc_info is not None
    assert "a bug" in str(record.exc_info[1])
    assert operations.store.volume.counters.events["handler_failures"] == 1


@pytest.mark.semantics("S-refused-5")
async def test_an_error_of_a_tier_is_logged_in_one_line(
    operations: Operations, context: Context, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, expect_log: list[str],
) -> None:  # fmt: skip
    async def away(inode: int) -> None:
        raise TierOffline("every tier with a replica is offline")

    expect_log.append("every tier with a replica is offline")
    monkeypatch.setattr(operations.store.blocks, "open_reader", away)
    inode = await write_block(operations, context, b"block", b"x")
    assert await errno_from(operations.open(inode, os.O_RDONLY, context)) == errno.EIO
    record = next(r for r in caplog.records if r.levelno == logging.ERROR)
    assert record.exc_info is None


async def test_every_handler_that_pyfuse3_calls_is_wrapped() -> None:
    unguarded = {"forget", "releasedir", "init", "stacktrace"}
    handlers = [
        name for name, value in vars(pyfuse3.Operations).items()
        if callable(value) and not name.startswith("_") and name not in unguarded
    ]  # fmt: skip
    own = [name for name in handlers if name in vars(Operations)]
    assert len(own) > 20
    assert [name for name in own if not hasattr(getattr(Operations, name), "__wrapped__")] == []


@pytest.mark.semantics("S-evict-1")
async def test_an_open_by_a_stale_name_answers_estale(
    operations: Operations, context: Context
) -> None:
    inode = await write_sealed(operations, context, b"block", b"x")
    operations.store.replicas.evict(inode, reason="asked")
    assert await errno_from(operations.open(inode, os.O_RDONLY, context)) == errno.ESTALE
    assert await errno_from(operations.open(inode, os.O_RDWR, context)) == errno.ESTALE
    assert await errno_from(operations.getattr(inode, context)) == errno.ESTALE
    assert await errno_from(operations.opendir(inode, context)) == errno.ESTALE
    fields = SimpleNamespace(
        update_size=False, update_mode=True, update_uid=False, update_gid=False,
        update_atime=False, update_mtime=False,
    )  # fmt: skip
    attributes = pyfuse3.EntryAttributes()
    # pyfuse3 lets nobody set the fields of its own kind.
    answer = operations.setattr(inode, attributes, cast("Any", fields), None, context)
    assert await errno_from(answer) == errno.ESTALE
    assert (await operations.lookup(ROOT_INODE, b"block", context)).st_ino == 0
    again = await write_block(operations, context, b"block", b"y")
    assert again > inode


@pytest.mark.semantics("S-read-4")
async def test_a_block_whose_last_file_is_gone_becomes_a_miss(
    operations: Operations, context: Context, nvme: Path, expect_log: list[str]
) -> None:
    expect_log.append("tier nvme lost")
    inode = await write_sealed(operations, context, b"block", b"x")
    (nvme / "block").unlink()
    assert await errno_from(operations.open(inode, os.O_RDONLY, context)) == errno.ESTALE
    assert (await operations.lookup(ROOT_INODE, b"block", context)).st_ino == 0


async def test_an_unlinked_inode_answers_until_its_last_close(
    operations: Operations, context: Context
) -> None:
    inode = await write_block(operations, context, b"block", b"12345")
    info = await operations.open(inode, os.O_RDONLY, context)
    await operations.unlink(ROOT_INODE, b"block", context)
    assert (await operations.getattr(inode, context)).st_size == 5
    assert await operations.read(info.fh, 0, 100) == b"12345"
    await operations.release(info.fh)
    assert await errno_from(operations.getattr(inode, context)) == errno.ESTALE


# --- creating and opening


@pytest.mark.semantics("S-publish-2")
async def test_create_accepts_a_file_that_the_kernel_thought_missing(
    operations: Operations, context: Context
) -> None:
    inode = await write_block(operations, context, b"block", b"old")
    info, entry = await operations.create(ROOT_INODE, b"block", 0o600, os.O_WRONLY, context)
    assert (entry.st_ino, entry.st_size) == (inode, 3)
    await operations.release(info.fh)
    flags = os.O_WRONLY | os.O_TRUNC
    info, entry = await operations.create(ROOT_INODE, b"block", 0o600, flags, context)
    assert (entry.st_ino, entry.st_size) == (inode, 0)
    await operations.release(info.fh)
    flags = os.O_WRONLY | os.O_EXCL
    answer = operations.create(ROOT_INODE, b"block", 0o600, flags, context)
    assert await errno_from(answer) == errno.EEXIST
    await operations.mkdir(ROOT_INODE, b"d", 0o755, context)
    answer = operations.create(ROOT_INODE, b"d", 0o600, os.O_WRONLY, context)
    assert await errno_from(answer) == errno.EISDIR


async def test_a_reader_beside_a_writer_starts_without_cached_pages(
    operations: Operations, context: Context
) -> None:
    inode = await write_block(operations, context, b"block", b"x")
    reader = await operations.open(inode, os.O_RDONLY, context)
    assert reader.keep_cache
    writer = await operations.open(inode, os.O_WRONLY, context)
    second = await operations.open(inode, os.O_RDONLY, context)
    assert not second.keep_cache
    for info in (reader, writer, second):
        await operations.release(info.fh)
    assert operations.store.replicas.open_blocks == {}
    assert len(operations.handles) == 0


@pytest.mark.semantics("S-read-1")
async def test_an_error_in_a_later_piece_fails_the_first(
    operations: Operations, context: Context, monkeypatch: pytest.MonkeyPatch,
    expect_log: list[str],
) -> None:  # fmt: skip
    data = os.urandom(3 * MIB)
    inode = await write_sealed(operations, context, b"block", data)
    blocks = operations.store.blocks
    read = blocks.read

    async def failing(block: Any, offset: int, size: int) -> bytes:
        if offset + size > 2 * MIB:
            raise OSError(errno.EIO, "the medium failed")
        return await read(block, offset, size)

    info = await operations.open(inode, os.O_RDONLY, context)
    assert await operations.read(info.fh, 0, MIB) == data[:MIB]
    assert await operations.read(info.fh, MIB, MIB) == data[MIB : 2 * MIB]
    monkeypatch.setattr(blocks, "read", failing)
    other = await operations.open(inode, os.O_RDONLY, context)
    expect_log.append("the medium failed")
    assert await errno_from(operations.read(other.fh, 0, MIB)) == errno.EIO
    monkeypatch.undo()
    assert await operations.read(other.fh, 0, MIB) == data[:MIB]
    for handle in (info, other):
        await operations.release(handle.fh)


async def test_flush_is_declined_once_and_for_all(operations: Operations, context: Context) -> None:
    info, _ = await operations.create(ROOT_INODE, b"block", 0o644, os.O_WRONLY, context)
    assert await errno_from(operations.flush(info.fh)) == errno.ENOSYS
    await operations.release(info.fh)


@pytest.mark.semantics("S-refused-1", "S-refused-2")
async def test_refusals_without_a_kernel(operations: Operations, context: Context) -> None:
    inode = await write_block(operations, context, b"a", b"x")
    await write_block(operations, context, b"b", b"y")
    assert await errno_from(operations.link(inode, ROOT_INODE, b"l", context)) == errno.EPERM
    answer = operations.symlink(ROOT_INODE, b"s", b"a", context)
    assert await errno_from(answer) == errno.EPERM
    answer = operations.mknod(ROOT_INODE, b"p", 0o010644, 0, context)
    assert await errno_from(answer) == errno.EPERM
    for flags, expected in (
        (pyfuse3.RENAME_EXCHANGE, errno.EINVAL), (pyfuse3.RENAME_NOREPLACE, errno.EEXIST),
    ):  # fmt: skip
        answer = operations.rename(ROOT_INODE, b"a", ROOT_INODE, b"b", flags, context)
        assert await errno_from(answer) == expected


# --- the control directory


@pytest.mark.semantics("S-control-1", "S-control-2", "S-control-3")
async def test_control_files(operations: Operations, context: Context) -> None:
    stats = await operations.lookup(CONTROL_INODE, b"stats", context)
    assert stats.st_size == 0
    assert (await operations.getattr(stats.st_ino, context)).st_mode & 0o222 == 0
    info = await operations.open(stats.st_ino, os.O_RDONLY, context)
    assert info.direct_io
    assert await operations.read(info.fh, 0, 100) == b"{}"
    assert await operations.read(info.fh, 1, 100) == b"}"
    await operations.release(info.fh)
    number, root = stats.st_ino, ROOT_INODE
    refusals = [
        operations.open(number, os.O_RDWR, context),
        operations.unlink(CONTROL_INODE, b"stats", context),
        operations.rmdir(CONTROL_INODE, b"stats", context),
        operations.mkdir(CONTROL_INODE, b"new", 0o755, context),
        operations.mknod(CONTROL_INODE, b"new", 0o100644, 0, context),
        operations.create(CONTROL_INODE, b"new", 0o644, os.O_WRONLY, context),
        operations.rename(CONTROL_INODE, b"stats", root, b"stats", 0, context),
        operations.rename(root, b"stats", CONTROL_INODE, b"x", 0, context),
        operations.setxattr(number, b"user.x", b"1", context),
        operations.removexattr(number, b"user.x", context),
        operations.mkdir(root, b".kvfs", 0o755, context),
        operations.rmdir(root, b".kvfs", context),
    ]
    for refusal in refusals:
        assert await errno_from(refusal) == errno.EPERM
    answer = operations.lookup(CONTROL_INODE, b"nothing", context)
    assert await errno_from(answer) == errno.ENOENT
    assert await operations.listxattr(number, context) == ()
    answer = operations.getxattr(number, b"security.capability", context)
    assert await errno_from(answer) == errno.ENODATA


async def test_xattrs_that_the_kernel_asks_for_are_absent(
    operations: Operations, context: Context
) -> None:
    inode = await write_block(operations, context, b"block", b"x")
    for name in (b"security.capability", b"system.posix_acl_access", b"user.none"):
        assert await errno_from(operations.getxattr(inode, name, context)) == errno.ENODATA


# --- reading ahead


class SetSize:
    """A setattr of the size alone."""

    update_size = True

    def __getattr__(self, name: str) -> bool:
        return False


async def read_first(operations: Operations, context: Context, data: bytes) -> tuple[int, int]:
    """A sealed block of which a reader has got the first part: its inode, and the handle."""
    inode = await write_sealed(operations, context, b"block", data)
    reader = await operations.open(inode, os.O_RDONLY, context)
    assert await operations.read(reader.fh, 0, AHEAD_FROM_BYTES) == data[:AHEAD_FROM_BYTES]
    return inode, reader.fh


async def test_a_block_that_is_read_from_its_start_is_read_as_a_whole(
    operations: Operations, context: Context
) -> None:
    data = os.urandom(4 * AHEAD_FROM_BYTES)
    _inode, reader = await read_first(operations, context, data)
    file = Path(os.fsdecode(operations.store.volume.tiers[0].locate(b"block")))
    os.truncate(file, AHEAD_FROM_BYTES)
    found = [await operations.read(reader, at, 1000) for at in (AHEAD_FROM_BYTES, len(data) - 1000)]
    assert found == [data[AHEAD_FROM_BYTES:][:1000], data[-1000:]]


@pytest.mark.parametrize("change", ["write", "append", "cut", "grow"])
async def test_what_was_read_ahead_is_forgotten_when_a_writer_changes_the_block(
    operations: Operations, context: Context, change: str
) -> None:
    data = os.urandom(4 * AHEAD_FROM_BYTES)
    inode, reader = await read_first(operations, context, data)
    writer = await operations.open(inode, os.O_RDWR, context)
    now = bytearray(data)
    if change in ("cut", "grow"):
        size = len(data) + (5000 if change == "grow" else -5000)
        # pyfuse3's own cannot be set from Python.
        fields = cast(pyfuse3.SetattrFields, SetSize())
        attributes = pyfuse3.EntryAttributes()
        attributes.st_size = size
        await operations.setattr(inode, attributes, fields, writer.fh, context)
        now = bytearray(size)
        now[: len(data)] = data[:size]
    else:
        offset = len(data) - 2000 if change == "write" else len(data)
        now[offset : offset + 1000] = b"x" * 1000
        await operations.write(writer.fh, offset, b"x" * 1000)
    await operations.release(writer.fh)
    at = len(data) - 10_000
    assert await operations.read(reader, at, 1 << 20) == bytes(now[at:])
    await operations.release(reader)
