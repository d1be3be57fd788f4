"""A store on real directories without a mount, and what must hold of it at any quiet moment."""

from __future__ import annotations

import os
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import xxhash

from kvfs import layout
from kvfs.catalog import scans
from kvfs.catalog.rows import RAW, ROOT_INODE, BlockState, Inode, Kind
from kvfs.config import Config
from kvfs.policy.plan import Move, MoveKind
from kvfs.store import Store
from kvfs.tiers.codec import open_compressed
from kvfs.tiers.identity import init_tier, write_identity
from kvfs.tiers.seal import Seal
from kvfs.tiers.space import PAGE_BYTES
from kvfs.tiers.tier import Tier
from kvfs.upkeep import mover
from kvfs.volume.catalog_file import catalog_path
from kvfs.volume.open_block import OpenBlock
from kvfs.volume.volume import open_volume

# A file's xattrs may take a page of their own, which the filesystem counts as the file's.


class Workbench:
    """Tiers that are opened and closed as a daemon opens and closes them."""

    def __init__(self, make_config: Callable[..., Config]) -> None:
        self.make_config = make_config
        self.config = make_config()
        self._opened: list[Store] = []

    def configure(self, **settings: object) -> None:
        """Keywords of the `make_config` fixture."""
        self.config = self.make_config(**settings)

    def without_xattrs(self, *names: str) -> None:
        """Prepare these tiers as if their filesystem had no xattrs."""
        for tier in self.config.tier:
            if tier.name in names:
                identity = init_tier(tier.path)
                probe = msgspec.structs.replace(identity.probe, xattrs=False)
                write_identity(tier.path, msgspec.structs.replace(identity, probe=probe))

    def open(self, *forget: str) -> Store:
        """A store before recovery."""
        store = Store(open_volume(self.config, forget))
        self._opened.append(store)
        return store

    async def start(self, *forget: str) -> Store:
        """A store that could serve."""
        store = self.open(*forget)
        await store.recovery.before_serving()
        return store

    def stop(self, store: Store, *, clean: bool = True) -> None:
        """Close; without `clean` it is left as a killed daemon leaves it."""
        self._opened.remove(store)
        for block in store.replicas.open_blocks.values():
            block.close_descriptors()
        store.volume.close(clean=clean)

    def crash(self, store: Store, *, reboot: bool = False) -> None:
        """The daemon is killed; with `reboot` the machine's page cache is gone too."""
        if reboot:
            store.volume.catalog.set_meta("boot_id", "an earlier boot")
        self.stop(store, clean=False)

    async def restart_after_crash(self, store: Store, *, reboot: bool = False) -> Store:
        self.crash(store, reboot=reboot)
        return await self.start()

    def lose_catalog(self) -> None:
        """Delete the catalog of a store that is closed."""
        path = catalog_path(self.config)
        for suffix in ("", "-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)

    def close_all(self) -> None:
        for store in list(self._opened):
            self.stop(store, clean=False)


# --- doing what the mount does


async def make_directory(store: Store, path: bytes, mode: int = 0o755) -> int:
    """The inode of a directory, made with all above it."""
    directory = ROOT_INODE
    for name in path.split(b"/") if path else ():
        known = store.namespace.lookup(directory, name)
        if known is None:
            known = await store.namespace.mkdir(directory, name, mode, os.getuid(), os.getgid())
        directory = known.id
    return directory


async def create(store: Store, path: bytes, data: bytes = b"", mode: int = 0o644) -> OpenBlock:
    """A new block that is still open for writing."""
    head, name = layout.split(path)
    parent = await make_directory(store, head)
    _, block = await store.blocks.create(parent, name, mode, os.getuid(), os.getgid())
    if data:
        await store.blocks.write(block, 0, data)
    return block


async def put(store: Store, path: bytes, data: bytes, mode: int = 0o644) -> int:
    """A sealed block; its inode."""
    block = await create(store, path, data, mode)
    await store.blocks.close(block, writer=True)
    await seal_all(store)
    return block.inode


async def put_on(store: Store, path: bytes, data: bytes, *tiers: str) -> int:
    """A sealed block on exactly these tiers, nvme first if it is among them."""
    inode = await put(store, path, data)
    for lower in tiers:
        if lower != "nvme":
            await store.mover.copy(
                inode, store.volume.tiers[0], store.volume.tier_named(lower), "demote"
            )
    if "nvme" not in tiers:
        await move(store, "drop", path, "nvme", None)
    return inode


async def read(store: Store, path: bytes) -> bytes:
    """The bytes a reader gets."""
    row = row_at(store, path)
    block = await store.blocks.open_reader(row.id)
    try:
        return await store.blocks.read(block, 0, row.size_bytes + 1)
    finally:
        await store.blocks.close(block, writer=False)


async def rewrite(store: Store, path: bytes, data: bytes, offset: int = 0) -> None:
    """Open for writing, write, close."""
    block = await store.blocks.open_writer(row_at(store, path).id)
    await store.blocks.write(block, offset, data)
    await store.blocks.close(block, writer=True)


def first_record(seal: Seal) -> bytes:
    """A seal record of the first version."""
    body = struct.pack(
        "<4sBBHQQQ16sIIIq", b"KVFS", 1, seal.codec, 0, seal.inode, seal.generation,
        seal.length_bytes, seal.checksum, seal.mode, seal.uid, seal.gid, seal.mtime_ns,
    )  # fmt: skip
    return body + struct.pack("<I", xxhash.xxh32_intdigest(body))


async def unlink(store: Store, path: bytes) -> Inode:
    head, name = layout.split(path)
    return await store.namespace.unlink(row_at(store, head).id, name)


async def rename(store: Store, old: bytes, new: bytes) -> None:
    (old_head, old_name), (new_head, new_name) = layout.split(old), layout.split(new)
    parent = await make_directory(store, new_head)
    await store.namespace.rename(row_at(store, old_head).id, old_name, parent, new_name)


async def move(store: Store, kind: MoveKind, path: bytes, source: str, target: str | None) -> int:
    """One move by the mover."""
    row = row_at(store, path)
    to = None if target is None else store.volume.tier_named(target).index
    start = store.volume.tier_named(source).index
    return await store.mover.execute(Move(kind, row.id, row.size_bytes, start, to, "a test"))


async def seal_all(store: Store) -> None:
    again = await store.sealer.seal_pending()
    assert not again, f"could not be sealed: {again}"


async def settle_all(store: Store) -> None:
    """Carry out everything that was promised."""
    for tier in store.volume.tiers:
        if tier.online:
            await store.replicas.settle(tier)


def during_copy(monkeypatch: pytest.MonkeyPatch, change: Callable[[], Awaitable[object]]) -> None:
    """Run `change` on the loop when the copy is complete and not yet in place."""
    real = mover.copy_verified

    def copy_then_change(*arguments: Any) -> Any:
        copied = real(*arguments)
        monkeypatch.undo()

        async def call() -> None:
            await change()

        trio.from_thread.run(call)
        return copied

    monkeypatch.setattr(mover, "copy_verified", copy_then_change)


def take_away(tier: Tier) -> None:
    """The tier is offline, as after errors of its medium."""
    tier.health.state, tier.health.behind = "offline", True


async def until(condition: Callable[[], object], what: str) -> None:
    """Poll until true."""
    for _ in range(2000):
        if condition():
            return
        await trio.sleep(0.01)
    raise AssertionError(f"not within 20 s: {what}")


# --- looking


def row_at(store: Store, path: bytes) -> Inode:
    row = store.volume.catalog.resolve(path)
    assert row is not None, f"no such name: {path!r}"
    return row


def tiers_of(store: Store, path: bytes) -> list[str]:
    """Where the catalog says a block is, fastest first."""
    return store.attributes.replica_names(row_at(store, path).id)


def file_on(store: Store, tier: str, path: bytes, *, fanned: bool = False) -> Path:
    """The backing file of a block on a tier."""
    return Path(os.fsdecode(store.volume.tier_named(tier).locate(path, fanned)))


def content_of_file(file: Path, codec: int) -> bytes:
    """The block in a backing file."""
    if codec == RAW:
        return file.read_bytes()
    with file.open("rb") as compressed:
        block = open_compressed(compressed.fileno())
        return block.read(0, block.size_bytes)


def writable(file: Path) -> Path:
    """A backing file, to be damaged: sealed ones are read-only for a user that is not root."""
    file.chmod(0o600)
    return file


def files_on(tier: Tier) -> set[bytes]:
    """Stored paths of all files on a tier, kvfs' own left out."""
    found = set()
    for directory, _, names in os.walk(tier.root):
        below = os.path.relpath(directory, tier.root)
        if below == layout.PRIVATE_DIR or below.startswith(layout.PRIVATE_DIR + b"/"):
            continue
        found |= {name if below == b"." else layout.join(below, name) for name in names}
    return found


def private_files(tier: Tier, directory: bytes) -> list[bytes]:
    return sorted(os.listdir(tier.root + b"/" + directory))


def assert_no_litter(store: Store) -> None:
    for tier in store.volume.tiers:
        assert private_files(tier, layout.STAGING_DIR) == []
        assert store.volume.space[tier.index].reserved_bytes == 0
    assert not store.mover.running


async def assert_consistent(store: Store, *, copied: bool = False) -> None:
    """Tiers, catalog and accounts say the same, and nothing is left over. Nothing may be open.

    `copied`: the tiers' files are copies, which may lie in more or fewer extents than the files
    that were counted, and so have a page for them more or less.
    """
    await settle_all(store)
    volume, catalog = store.volume, store.volume.catalog
    assert not store.replicas.open_blocks
    assert not store.mover.running
    for tier in volume.tiers:
        if tier.online:
            _assert_tier_consistent(store, tier, slack_bytes=PAGE_BYTES if copied else 0)
    usage = scans.usage(catalog.connection)
    saved = scans.saved_bytes(catalog.connection)
    for tier in volume.tiers:
        account = volume.space[tier.index]
        assert (account.blocks, account.used_bytes) == usage.get(tier.number, (0, 0)), tier.name
        assert account.saved_bytes == saved.get(tier.number, 0), tier.name
        assert (account.reserved_bytes, account.held_bytes) == (0, 0), tier.name
    assert volume.space.duplicate_bytes == scans.duplicate_bytes(catalog.connection)
    assert (volume.blocks, volume.directories) == scans.totals(catalog.connection)
    assert catalog.orphans() == []


def _assert_tier_consistent(store: Store, tier: Tier, *, slack_bytes: int) -> None:
    catalog = store.volume.catalog
    assert catalog.intents.left(tier.number) == []
    assert private_files(tier, layout.STAGING_DIR) == []
    rows = catalog.connection.execute(
        "SELECT inode, fanned, allocated_bytes, codec FROM replica WHERE tier = ?", (tier.number,)
    ).fetchall()
    expected = set()
    for number, fanned, allocated_bytes, codec in rows:
        path = catalog.path_of(number)
        row = catalog.get(number)
        assert path is not None
        assert row is not None
        expected.add(layout.stored_path(path, bool(fanned)))
        if row.state == BlockState.SEALED:
            absolute = tier.locate(path, bool(fanned))
            _assert_file_is_sealed(tier, absolute, row, codec)
            found_bytes = os.stat(absolute).st_blocks * 512
            assert abs(found_bytes - allocated_bytes) <= slack_bytes, absolute
    assert files_on(tier) == expected, tier.name
    if tier.index > 0:
        for directory, directories, names in os.walk(tier.root):
            below = directory[len(tier.root) + 1 :]
            if below and not layout.is_within(below, layout.PRIVATE_DIR):
                assert directories or names, f"empty directory left on {tier.name}: {below!r}"


def _assert_file_is_sealed(tier: Tier, absolute: bytes, row: Inode, codec: int) -> None:
    content = content_of_file(Path(os.fsdecode(absolute)), codec)
    assert len(content) == row.size_bytes, absolute
    assert xxhash.xxh3_128_digest(content) == row.checksum
    seal = tier.read_seal(absolute)
    assert seal is not None, f"no seal record: {absolute!r}"
    assert (seal.inode, seal.generation, seal.length_bytes, seal.checksum, seal.codec) == (
        row.id, row.generation, row.size_bytes, row.checksum, codec,
    )  # fmt: skip
    assert row.kind == Kind.BLOCK
