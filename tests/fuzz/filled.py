"""Tiers as a killed daemon leaves them, with every kind of row in their catalog, to be damaged."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from kvfs.catalog.rows import ROOT_INODE, Kind
from kvfs.config import Config, MountConfig, TierConfig, TieringConfig
from kvfs.errors import FilesystemError, errno_of, is_expected
from kvfs.store import Store
from kvfs.volume.catalog_file import catalog_path
from kvfs.volume.volume import open_volume
from tests.store.helpers import Workbench, create, put, put_on, unlink

MIB = 1 << 20
TIERS = ("nvme", "hdd")
CONTENTS = {
    b"d/both": b"both" * 100, b"d/fast": b"fast" * 200, b"d/slow": b"slow" * 300,
    b"e/f/deep": b"deep" * 400, b"top": b"", b"pinned": b"pinned", b"config.json": b"{}",
    b"published": b"published" * 50, b"reopened": b"reopened" * 60,
    b"d/packed": b"packed" * 20_000,
}  # fmt: skip
ON_HDD = (b"d/slow", b"d/packed")


def config_at(base: Path) -> Config:
    """What is large enough is compressed on hdd."""
    tiers = (
        TierConfig("nvme", base / "nvme", "nvme", 64 * MIB),
        TierConfig("hdd", base / "hdd", "hdd", 64 * MIB, compress="zstd"),
    )
    return Config(tiers, TieringConfig(), MountConfig())


def catalog_of(base: Path) -> Path:
    return catalog_path(config_at(base))


async def _fill(base: Path) -> None:
    bench = Workbench(lambda: config_at(base))
    store = await bench.start()
    for path, data in CONTENTS.items():
        if path == b"d/both":
            await put_on(store, path, data, "nvme", "hdd")
        elif path in ON_HDD:
            await put_on(store, path, data, "hdd")
        elif path != b"published":
            await put(store, path, data)
    pinned = store.volume.catalog.resolve(b"pinned")
    directory = store.volume.catalog.resolve(b"d")
    assert pinned is not None
    assert directory is not None
    await store.attributes.set_xattr(pinned.id, b"user.kvfs.pin", b"hdd")
    await store.attributes.set_xattr(directory.id, b"user.kvfs.ttl", b"2h")
    await store.attributes.set_xattr(pinned.id, b"user.foreign", b"\0value\xff")
    await put_on(store, b"promised", b"gone" * 100, "nvme", "hdd")
    await unlink(store, b"promised")
    await put(store, b"ghost", b"ghost")
    ghost = store.volume.catalog.resolve(b"ghost")
    assert ghost is not None
    store.replicas.evict(ghost.id, reason="asked")
    await create(store, b"writing", b"half")
    block = await create(store, b"published", CONTENTS[b"published"])
    await store.blocks.fsync(block, data_only=False)
    reopened = store.volume.catalog.resolve(b"reopened")
    assert reopened is not None
    await store.blocks.open_writer(reopened.id)
    bench.crash(store)


def fill(base: Path) -> None:
    """Two tiers below `base`."""
    for name in TIERS:
        (base / name).mkdir(parents=True)
    trio.run(_fill, base)


class Copies:
    """Copies of a filled directory, each to be damaged in another way."""

    def __init__(self, base: Path) -> None:
        self._base = base
        fill(base / "filled")

    @contextmanager
    def copy(self) -> Iterator[Path]:
        """One, for as long as the block lasts; the time of a file and its xattrs are kept."""
        base = self._base / "damaged"
        shutil.copytree(self._base / "filled", base)
        try:
            yield base
        finally:
            shutil.rmtree(base)


@contextmanager
def opened(base: Path) -> Iterator[Store]:
    """The store as a daemon opens it; the recovery is the caller's. Raises KvfsError."""
    volume = open_volume(config_at(base))
    store = Store(volume)
    try:
        yield store
    finally:
        for block in store.replicas.open_blocks.values():
            block.close_descriptors()
        store.blocks.idle.clear()
        volume.close(clean=False)


async def try_everything(
    store: Store, unexpected: Callable[[Exception], None]
) -> dict[bytes, bytes]:
    """Do to every name what a mount may be asked for; what could be read, by path.

    An error that is no answer goes to `unexpected`.
    """
    found: dict[bytes, bytes] = {}
    todo = [(ROOT_INODE, b"")]
    seen = set()
    while todo:
        directory, above = todo.pop()
        if directory in seen:
            continue
        seen.add(directory)
        try:
            entries = store.namespace.children(directory, 0, 1000)
        except Exception as error:
            _judge(error, unexpected)
            continue
        for name, row in entries:
            try:
                if row.kind == Kind.DIRECTORY:
                    todo.append((row.id, above + name + b"/"))
                else:
                    found[above + name] = await _look_at(store, directory, name, row.id)
            except Exception as error:
                _judge(error, unexpected)
    for act in (_use, _make_room, _remove):
        try:
            await act(store)
        except Exception as error:
            _judge(error, unexpected)
    return found


async def _look_at(store: Store, directory: int, name: bytes, inode: int) -> bytes:
    store.namespace.lookup(directory, name)
    store.attributes.list_xattrs(inode)
    for shown in (b"tier", b"heat", b"state", b"checksum", b"replicas", b"pin", b"ttl"):
        with contextlib.suppress(FilesystemError):
            store.attributes.get_xattr(inode, b"user.kvfs." + shown)
    block = await store.blocks.open_reader(inode)
    try:
        return await store.blocks.read(block, 0, 1 << 20)
    finally:
        await store.blocks.close(block, writer=False)


def _judge(error: Exception, unexpected: Callable[[Exception], None]) -> None:
    assert errno_of(error) > 0
    if not is_expected(error):
        unexpected(error)


async def _use(store: Store) -> None:
    """A new block, sealed and read."""
    block = await create(store, b"afterwards", b"new")
    await store.blocks.close(block, writer=True)
    await store.sealer.seal_pending()
    reader = await store.blocks.open_reader(block.inode)
    assert await store.blocks.read(reader, 0, 10) == b"new"
    await store.blocks.close(reader, writer=False)


async def _make_room(store: Store) -> None:
    for tier in store.volume.tiers:
        await store.replicas.make_room(tier, 1 << 20)


async def _remove(store: Store) -> None:
    for name, row in store.namespace.children(ROOT_INODE, 0, 1000):
        if row.kind == Kind.BLOCK:
            await store.namespace.unlink(ROOT_INODE, name)
