"""Every operation of a store, one after the other, beside writers, readers and moves.

Runs in a process of its own that is killed on the way; the ledger says what it was promised.
Without a mount: a mount takes a second to make, and what a crash leaves is the store's matter.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from kvfs import failpoints, layout
from kvfs.catalog.rows import BlockState
from kvfs.errors import BlockStale, KvfsError
from kvfs.mount import services
from kvfs.policy.plan import Move, MoveKind
from kvfs.store import Store
from kvfs.volume.open_block import OpenBlock
from tests.crash.ledger import NOWHERE, Ledger, Outcome, bytes_of, key_of
from tests.store.helpers import create, make_directory, read, row_at, until

WRITERS, READERS, MOVERS = 3, 2, 1
KEYS_PER_WRITER = 5
PIECES = 3
PAUSE_S = 0.04
TIERS = ("nvme", "hdd", "remote")


class Driver:
    """Does one thing at a time in the foreground; `load` runs beside it."""

    def __init__(self, store: Store, ledger: Ledger, seed: str) -> None:
        self.store = store
        self.ledger = ledger
        self.seed = seed
        self._versions: Counter[str] = Counter()

    # --- doing what a client does

    def here(self, key: str) -> Outcome:
        return self.ledger.now.get(key, NOWHERE)

    def next_version(self, key: str) -> int:
        self._versions[key] += 1
        return self._versions[key]

    def path(self, key: str) -> bytes:
        return self.here(key).path.encode()

    async def write_pieces(self, block: OpenBlock, data: bytes) -> None:
        step = len(data) // PIECES + 1
        for start in range(0, len(data), step):
            await self.store.blocks.write(block, start, data[start : start + step])

    async def put(self, path: str, *, by: str = "rename") -> str:
        """The next version of the block at a path, sealed; by `rename`, `fsync` or just `close`."""
        key = key_of(path)
        version = self.next_version(key)
        data, goal = bytes_of(key, version), Outcome(path, version)
        temporary = f"{path}_{version}.tmp" if by == "rename" else path
        block = await create(self.store, temporary.encode())
        if by == "close":
            self.ledger.maybe(key, goal)
        await self.write_pieces(block, data)
        if by == "fsync":
            with self.ledger.change(goal):
                await self.store.blocks.fsync(block, data_only=False)
        await self.store.blocks.close(block, writer=True)
        if by == "rename":
            with self.ledger.change(goal):
                await self.rename(temporary, path)
        await self.sealed(path)
        if by == "close":
            with self.ledger.change(goal):
                pass
        self.ledger.sealed(key)
        return key

    async def rename(self, old: str, new: str) -> None:
        (old_head, old_name), (new_head, new_name) = (
            layout.split(path.encode()) for path in (old, new)
        )
        parent = await make_directory(self.store, new_head)
        source = row_at(self.store, old_head).id
        await self.store.namespace.rename(source, old_name, parent, new_name)

    async def sealed(self, path: str) -> None:
        def is_sealed() -> bool:
            row = self.store.volume.catalog.resolve(path.encode())
            assert row is not None, f"{path} is gone"
            return row.state == BlockState.SEALED

        await until(is_sealed, f"{path} sealed")

    async def copy(self, key: str, source: str, target: str) -> None:
        tier = self.store.volume.tier_named
        number = row_at(self.store, self.path(key)).id
        kind: MoveKind = "promote" if TIERS.index(target) < TIERS.index(source) else "demote"
        await self.store.mover.copy(number, tier(source), tier(target), kind)

    async def move(self, kind: MoveKind, key: str, source: str, target: str | None = None) -> None:
        row, tier = row_at(self.store, self.path(key)), self.store.volume.tier_named
        goal = tier(target).index if target else None
        move = Move(kind, row.id, row.size_bytes, tier(source).index, goal, "a test")
        await self.store.mover.execute(move)

    async def put_everywhere(self, path: str) -> str:
        """A sealed block on all three tiers."""
        key = await self.put(path)
        await self.copy(key, "nvme", "hdd")
        await self.copy(key, "nvme", "remote")
        return key

    async def unlink(self, key: str) -> None:
        head, name = layout.split(self.path(key))
        with self.ledger.gone(key):
            await self.store.namespace.unlink(row_at(self.store, head).id, name)

    async def mkdir(self, path: str) -> str:
        head, name = layout.split(path.encode())
        parent = row_at(self.store, head).id
        with self.ledger.change(Outcome(path, mode=0o755)):
            await self.store.namespace.mkdir(parent, name, 0o755, os.getuid(), os.getgid())
        return key_of(path)

    def file(self, tier: str, path: str) -> Path:
        """Where a tier keeps a block, for what happens behind the store's back."""
        return Path(os.fsdecode(self.store.volume.tier_named(tier).locate(path.encode())))

    # --- the foreground

    async def everything(self) -> None:
        """Each kind of operation. What it makes lies below `fore`."""
        await self.mkdir("fore")
        for step in (
            self.directories, self.publishing, self.replacing, self.renaming, self.unlinking,
            self.attributes, self.rewriting, self.unpacking, self.truncating, self.moving,
            self.losing, self.rotting, self.refusals, self.heat, self.spilling,
        ):  # fmt: skip
            await step()

    async def directories(self) -> None:
        await self.mkdir("fore/kept")
        key = await self.mkdir("fore/gone")
        with self.ledger.gone(key):
            await self.store.namespace.rmdir(row_at(self.store, b"fore").id, b"gone")

    async def publishing(self) -> None:
        for by in ("rename", "fsync", "close"):
            for number in range(2):
                await self.put(f"fore/published/{by}{number}.bin", by=by)

    async def replacing(self) -> None:
        await self.put_everywhere("fore/replaced.bin")
        await self.put("fore/replaced.bin")

    async def renaming(self) -> None:
        key = await self.put_everywhere("fore/renamed.bin")
        goal = self.here(key)._replace(path="fore/elsewhere/renamed.1.bin")
        with self.ledger.change(goal):
            await self.rename("fore/renamed.bin", goal.path)
        await self.mkdir("fore/tree")
        inside = [await self.put(f"fore/tree/leaf{number}.bin") for number in range(3)]
        await self.move("demote", inside[0], "nvme", "hdd")
        await self.copy(inside[1], "nvme", "remote")
        goals = [
            self.here(name)._replace(path=self.here(name).path.replace("fore/tree", "fore/tree.1"))
            for name in ("tree", *inside)
        ]
        with self.ledger.change(*goals):
            await self.rename("fore/tree", "fore/tree.1")

    async def unlinking(self) -> None:
        await self.unlink(await self.put_everywhere("fore/unlinked.bin"))
        key = await self.put("fore/open.bin")
        block = await self.store.blocks.open_reader(row_at(self.store, self.path(key)).id)
        await self.unlink(key)
        await self.store.blocks.close(block, writer=False)

    async def attributes(self) -> None:
        await self.attributes_of("fore/attributes.bin")
        await self.store.attributes.set(row_at(self.store, b"fore/kept").id, mode=0o755)

    async def attributes_of(self, path: str) -> None:
        key = await self.put_everywhere(path)
        number = row_at(self.store, self.path(key)).id
        attributes = self.store.attributes
        with self.ledger.change(self.here(key)._replace(mode=0o600)):
            await attributes.set(number, mode=0o600)
        for mark in ("one", "two"):
            with self.ledger.change(self.here(key)._replace(mark=mark)):
                await attributes.set_xattr(number, b"user.mark", mark.encode())
        with self.ledger.change(self.here(key)._replace(mark="")):
            await attributes.remove_xattr(number, b"user.mark")
        await attributes.set_xattr(number, b"user.kvfs.ttl", b"30d")

    async def rewriting(self) -> None:
        """Reopened and changed, with and without other replicas; reopened and left alone."""
        for place in ("everywhere", "alone", "same"):
            put = self.put if place == "alone" else self.put_everywhere
            key = await put(f"fore/rewritten-{place}.bin")
            before = self.here(key)
            after = before if place == "same" else before._replace(version=self.next_version(key))
            with self.ledger.change(after, beside=[NOWHERE]):
                block = await self.store.blocks.open_writer(row_at(self.store, self.path(key)).id)
                if after is not before:
                    await self.store.blocks.truncate(block, 0)
                    await self.write_pieces(block, bytes_of(key, after.version))
                await self.store.blocks.close(block, writer=True)
                await self.sealed(after.path)
            self.ledger.sealed(key)

    async def unpacking(self) -> None:
        """A compressed replica is opened for writing: made raw above it, or in its place."""
        account = self.store.volume.space[0]
        for place, tier in (("above", "hdd"), ("hdd", "hdd"), ("remote", "remote")):
            key = await self.put(f"fore/unpacked-{place}.bin")
            await self.move("demote", key, "nvme", tier)
            before = self.here(key)
            room_bytes = 0 if place == "above" else account.free_bytes
            taken = self.store.volume.space.reserve(0, room_bytes)
            after = before._replace(version=self.next_version(key))
            with self.ledger.change(after, beside=[NOWHERE]):
                block = await self.store.blocks.open_writer(row_at(self.store, self.path(key)).id)
                if taken is not None:
                    taken.release()
                await self.store.blocks.truncate(block, 0)
                await self.write_pieces(block, bytes_of(key, after.version))
                await self.store.blocks.close(block, writer=True)
                await self.sealed(after.path)
            self.ledger.sealed(key)

    async def truncating(self) -> None:
        key = await self.put("fore/cut.bin")
        before = self.here(key)
        half = len(bytes_of(key, -before.version))
        with self.ledger.change(before._replace(version=-before.version), beside=[NOWHERE]):
            number = row_at(self.store, self.path(key)).id
            await self.store.attributes.set(number, size=half)
            await self.sealed(before.path)
        self.ledger.sealed(key)

    async def moving(self) -> None:
        key = await self.put("fore/moved.bin")
        await self.move("demote", key, "nvme", "hdd")
        await self.move("demote", key, "hdd", "remote")
        assert await read(self.store, self.path(key)) == bytes_of(key, self.here(key).version)
        await self.move("promote", key, "remote", "nvme")
        await self.move("drop", key, "nvme")
        evicted = await self.put("fore/evicted.bin")
        await self.copy(evicted, "nvme", "hdd")
        with self.ledger.gone(evicted):
            await self.move("evict", evicted, "nvme")

    async def losing(self) -> None:
        """Files that somebody removed from a tier."""
        with_copy = await self.put_everywhere("fore/half-lost.bin")
        self.file("nvme", self.here(with_copy).path).unlink()
        await read(self.store, self.path(with_copy))
        alone = await self.put("fore/lost.bin")
        number = row_at(self.store, self.path(alone)).id
        with self.ledger.gone(alone):
            self.file("nvme", self.here(alone).path).unlink()
            with suppress(BlockStale):
                await self.store.blocks.open_reader(number)

    async def rotting(self) -> None:
        """A replica goes bad while it is in use: the block goes on with the others."""
        key = await self.put_everywhere("fore/rotten.bin")
        file = self.file("nvme", self.here(key).path)
        file.chmod(0o600)
        with file.open("r+b") as bad:
            bad.write(b"rot")
        with suppress(BlockStale):
            block = await self.store.blocks.open_reader(row_at(self.store, self.path(key)).id)
            await self.store.blocks.close(block, writer=False)

    async def refusals(self) -> None:
        """A tier refuses a name: what was begun is taken back."""
        key = await self.put("fore/refused/stays.bin")
        obstacle = self.file("nvme", "fore/refused/directory.x/obstacle")
        obstacle.mkdir(parents=True)
        with suppress(OSError):
            await create(self.store, b"fore/refused/directory.x")
        goal = self.here(key)._replace(path="fore/refused/stays.x")
        obstacle.parent.rename(obstacle.parent.with_name("stays.x"))
        self.ledger.maybe(key, goal)
        with suppress(OSError):
            await self.rename(self.here(key).path, goal.path)
        shutil.rmtree(self.file("nvme", goal.path))
        obstacle = self.file("nvme", "fore/refused/file.x")
        obstacle.touch()
        with suppress(OSError):
            await make_directory(self.store, b"fore/refused/file.x")
        obstacle.unlink()
        await self.fanning_out()

    async def fanning_out(self) -> None:
        """A crowded directory, and a tier that refuses names though it has room."""
        catalog = self.store.volume.catalog
        before, catalog.fan_out_names = catalog.fan_out_names, 0
        await self.put_everywhere("fore/fanned/crowd.bin")
        catalog.fan_out_names = before
        refuse_once("file.making")
        await self.put("fore/fanned/overflow.bin", by="close")
        refuse_once("intent.renaming")
        await self.put("fore/fanned/renamed-there.bin")

    async def heat(self) -> None:
        key = await self.put("fore/hot.bin")
        number = row_at(self.store, self.path(key)).id
        self.store.volume.accesses.touch(number, self.store.volume.clock.now_s() + 5)
        self.store.namespace.directory_changed(row_at(self.store, b"fore").id)
        await services.flush_once(self.store)

    async def spilling(self) -> None:
        """A file that outgrows its tier, also in place of an older copy on the next one."""
        key = await self.put("fore/big.bin", by="close")
        await self.unlink(key)

    # --- the background

    @asynccontextmanager
    async def load(self) -> AsyncIterator[None]:
        """Writers, readers, moves and the daemon's own services, while the foreground works."""
        async with trio.open_nursery() as nursery:
            self.start_services(nursery)
            for number in range(WRITERS):
                nursery.start_soon(self._write, number)
            for number in range(READERS):
                nursery.start_soon(self._read, number)
            for number in range(MOVERS):
                nursery.start_soon(self._move, number)
            yield
            nursery.cancel_scope.cancel()

    def start_services(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self.store.sealer.run)
        nursery.start_soon(services.settle_intents, self.store)
        nursery.start_soon(services.flush_heat, self.store)
        nursery.start_soon(services.checkpoint, self.store.volume)

    async def _write(self, number: int) -> None:
        """Publish and remove blocks of its own."""
        rng = random.Random(f"{self.seed}/write/{number}")
        for _ in range(1_000_000):
            key = f"w{number}k{rng.randrange(KEYS_PER_WRITER)}"
            with suppress(KvfsError):
                if self.here(key).path and rng.random() < 0.3:
                    await self.unlink(key)
                else:
                    await self._publish(f"load/{number}/{key}.bin")
            await trio.sleep(PAUSE_S)

    async def _publish(self, path: str) -> None:
        key = key_of(path)
        version = self.next_version(key)
        temporary = f"{path}_{version}.tmp"
        block = await create(self.store, temporary.encode())
        await self.write_pieces(block, bytes_of(key, version))
        await self.store.blocks.close(block, writer=True)
        with self.ledger.change(Outcome(path, version)):
            await self.rename(temporary, path)

    async def _read(self, number: int) -> None:
        rng = random.Random(f"{self.seed}/read/{number}")
        for _ in range(1_000_000):
            key = f"w{rng.randrange(WRITERS)}k{rng.randrange(KEYS_PER_WRITER)}"
            path = self.path(key)
            if path and self.store.volume.catalog.resolve(path) is not None:
                with suppress(KvfsError):
                    await read(self.store, path)
            await trio.sleep(PAUSE_S)

    async def _move(self, number: int) -> None:
        rng = random.Random(f"{self.seed}/move/{number}")
        for _ in range(1_000_000):
            key = f"w{rng.randrange(WRITERS)}k{rng.randrange(KEYS_PER_WRITER)}"
            path = self.path(key)
            row = self.store.volume.catalog.resolve(path) if path else None
            readable = self.store.replicas.readable(row.id) if row else []
            target = rng.choice(TIERS)
            if readable and readable[0][0].name != target:
                source = readable[0][0].name
                up = TIERS.index(target) < TIERS.index(source)
                with suppress(KvfsError, OSError):
                    await self.move("promote" if up else "demote", key, source, target)
            await trio.sleep(PAUSE_S)


def refuse_once(point: str) -> None:
    """Whoever calls this meets a directory that takes no more names, when it passes there next."""
    refused = iter([OSError(errno.ENOSPC, "no space for a name")])
    caller = trio.lowlevel.current_task()

    def refuse(_: str) -> None:
        # Only a new name is refused, and what the load does may be to replace one.
        if trio.lowlevel.in_trio_task() and trio.lowlevel.current_task() is caller:
            for error in refused:
                raise error

    # Unless it is where the process is to be killed.
    if point not in failpoints.armed():
        failpoints.on(point, refuse)
