"""A catalog whose disk is full: what fails is said, nothing is forgotten, and it goes on."""

from __future__ import annotations

import contextlib
import errno
import sqlite3
from collections.abc import Iterator

import pytest
import trio

from kvfs.catalog.catalog import Catalog
from kvfs.errors import errno_of, is_expected
from kvfs.mount import services
from kvfs.store import Store
from tests.store.helpers import Workbench, assert_consistent, create, put, read, row_at, seal_all


def disk_full() -> sqlite3.OperationalError:
    """The error that SQLite raises, with its code."""
    database = sqlite3.connect(":memory:")
    database.execute("PRAGMA max_page_count = 2")
    database.execute("CREATE TABLE t (data BLOB)")
    with pytest.raises(sqlite3.OperationalError) as raised:
        database.execute("INSERT INTO t VALUES (zeroblob(1000000))")
    database.close()
    return raised.value


def fail(error: Exception) -> None:
    raise error


@contextlib.contextmanager
def full(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No transaction can be committed."""

    real = store.volume.catalog.transaction

    @contextlib.contextmanager
    def transaction(name: str) -> Iterator[None]:
        with real(name):
            yield
            raise disk_full()

    with monkeypatch.context() as patch:
        patch.setattr(store.volume.catalog, "transaction", transaction)
        yield


def test_a_full_disk_is_an_answer_and_a_bad_statement_a_fault() -> None:
    assert is_expected(disk_full())
    assert errno_of(disk_full()) == errno.ENOSPC
    with pytest.raises(sqlite3.OperationalError) as raised:
        sqlite3.connect(":memory:").execute("SELECT nothing")
    assert not is_expected(raised.value)
    assert errno_of(raised.value) == errno.EIO


async def test_what_fails_again_and_again_is_said_once(
    bench: Workbench, caplog: pytest.LogCaptureFixture, expect_log: list[str]
) -> None:
    expect_log.append("a service: database or disk is full")
    volume = (await bench.start()).volume
    for _ in range(3):
        with volume.tolerate("a service"):
            fail(disk_full())
    with volume.tolerate("a service"):
        pass
    assert len(caplog.records) == 1
    assert volume.counters.reasons == {("tolerated_failures", "catalog", ""): 3}
    with pytest.raises(AssertionError), volume.tolerate("a service"):
        fail(AssertionError())


async def test_a_seal_that_cannot_be_recorded_is_tried_again(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, expect_log: list[str]
) -> None:
    expect_log.append("recording seals: database or disk is full")
    store = await bench.start()
    block = await create(store, b"a", b"x" * 5000)
    await store.blocks.close(block, writer=True)
    with full(store, monkeypatch):
        assert await store.sealer.seal_pending() == {block.inode}
    store.volume.request_seal(block.inode)
    await seal_all(store)
    await assert_consistent(store)


async def test_a_file_that_is_closed_meanwhile_is_not_left_open(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, expect_log: list[str]
) -> None:
    expect_log.append("recording a closed file: database or disk is full")
    store = await bench.start()
    block = await create(store, b"a", b"x" * 5000)
    with full(store, monkeypatch):
        await store.blocks.close(block, writer=True)
    assert not store.replicas.open_blocks
    await seal_all(store)
    assert row_at(store, b"a").size_bytes == 5000
    assert await read(store, b"a") == b"x" * 5000
    await assert_consistent(store)


async def test_the_log_begins_anew_although_it_is_written_all_the_time(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = (await bench.start()).volume.catalog
    real = services._checkpoint

    def write() -> None:
        with catalog.transaction("test"):
            catalog.set_meta("a test", "x" * 10_000)

    def checkpoint_beside_a_writer(beside: Catalog) -> int:
        log_bytes = real(beside)
        trio.from_thread.run_sync(write)
        return log_bytes

    monkeypatch.setattr(services, "_checkpoint", checkpoint_beside_a_writer)
    monkeypatch.setattr(services, "LOG_BYTES", 100_000)
    for _ in range(30):
        write()
    before = Catalog.checkpoint(catalog.connection)
    write()
    await services.checkpoint_once(catalog)
    write()
    assert Catalog.checkpoint(catalog.connection) < before / 2


async def test_heat_and_times_that_cannot_be_flushed_are_kept(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    inode = await put(store, b"d/a", b"data")
    store.volume.accesses.touch(inode, store.volume.clock.now_s())
    times = store.namespace.directory_times(10)
    with full(store, monkeypatch), pytest.raises(sqlite3.OperationalError):
        await services.flush_once(store)
    assert store.namespace.directory_times(10) == times != []
    await services.flush_once(store)
    assert store.namespace.directory_times(10) == []
    assert len(store.volume.accesses) == 0
    assert store.attributes.heat(inode) > 0.9


async def test_accesses_that_cannot_be_flushed_are_pending_still(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    inode = await put(store, b"a", b"data")
    await services.flush_once(store)
    store.volume.accesses.touch(inode, store.volume.clock.now_s())
    with full(store, monkeypatch), pytest.raises(sqlite3.OperationalError):
        await services.flush_once(store)
    assert len(store.volume.accesses) == 1


async def test_a_temporary_file_that_cannot_be_removed_ends_nothing(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, expect_log: list[str]
) -> None:
    expect_log.append("removal of temporary files: .*Permission denied")
    bench.configure(tmp_ttl_s=0.0)
    store = await bench.start()
    await put(store, b"a.tmp", b"data")

    def refuse(path: bytes, fanned: bool) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(store.volume.tiers[0], "remove", refuse)
        await services.expire_once(store)
    assert await read(store, b"a.tmp") == b"data"
    await services.expire_once(store)
    assert store.namespace.lookup(1, b"a.tmp") is None
    await assert_consistent(store)
