"""Attributes: mode, owner, times, size, pins, TTLs and extended attributes.

The catalog is what the mount shows; backing files carry a copy, so that a walk can rebuild it.
`user.kvfs.*` is a computed view, of which pin and ttl can be set.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

from kvfs import failpoints
from kvfs.blocks.blocks import Blocks
from kvfs.blocks.namespace import Namespace, set_owner
from kvfs.catalog.rows import GOOD, RAW, ZSTD, BlockState, Inode, Kind, Replica
from kvfs.errors import (
    BlockStale,
    FilesystemError,
    InvalidOperation,
    KvfsError,
    NotPermitted,
)
from kvfs.policy import heat
from kvfs.tiers.seal import Seal, seal_from
from kvfs.tiers.tier import Tier
from kvfs.units import parse_duration
from kvfs.volume.open_block import OpenBlock
from kvfs.volume.replicas import Replicas
from kvfs.volume.volume import Volume

PREFIX = b"user.kvfs."
PIN = b"user.kvfs.pin"
TTL = b"user.kvfs.ttl"
SOCKET = b"user.kvfs.socket"
# What fits into ext4's one block of xattrs beside the seal record, a pin and a ttl: a tier must be
# able to carry all of them.
XATTR_TOTAL_BYTES = 3584
XATTR_ENTRY_BYTES = 16
LONGEST_TTL_S = 1e10
# What the catalog and a seal record can hold; the kernel passes on whatever it was asked for.
TIMES_NS = -(1 << 63), (1 << 63) - 1
# 1, or the name of a tier.
_PIN = re.compile(r"[A-Za-z0-9_-]{1,32}")
# A time that no file has: the replica is verified before it is read.
UNLIKE_ANY = -(2**63)
CODEC_NAMES = {RAW: "raw", ZSTD: "zstd"}
STATE_NAMES = {
    BlockState.WRITING: "writing",
    BlockState.PUBLISHED: "published",
    BlockState.SEALED: "sealed",
    BlockState.REOPENED: "reopened",
}


class Attributes:
    """Owned by the trio loop."""

    def __init__(
        self, volume: Volume, replicas: Replicas, blocks: Blocks, namespace: Namespace
    ) -> None:
        self.volume = volume
        self.replicas = replicas
        self.blocks = blocks
        self.namespace = namespace
        self.socket_path = ""

    # --- stat

    async def set(
        self, number: int, block: OpenBlock | None = None, *, size: int | None = None,
        mode: int | None = None, uid: int | None = None, gid: int | None = None,
        atime_ns: int | None = None, mtime_ns: int | None = None,
    ) -> Inode:  # fmt: skip
        """Change some attributes; the row after it. `block` is the handle's, when there is one."""
        inode = self._inode(number)
        if size is not None:
            await self._set_size(inode, block, size)
        columns: dict[str, Any] = {
            key: value
            for key, value in {
                "mode": None if mode is None else mode & 0o7777, "uid": uid, "gid": gid,
                "atime_ns": _storable(atime_ns), "mtime_ns": _storable(mtime_ns),
            }.items() if value is not None
        }  # fmt: skip
        if columns:
            columns["ctime_ns"] = int(self.volume.clock.now_s() * 1e9)
            await self._set_columns(number, columns)
        return self._inode(number)

    def _inode(self, number: int) -> Inode:
        inode = self.namespace.get(number)
        if inode is None:
            raise BlockStale("the inode is gone")
        return inode

    async def _set_size(self, inode: Inode, block: OpenBlock | None, size: int) -> None:
        if inode.kind == Kind.DIRECTORY:
            raise FilesystemError(errno.EISDIR)
        if block is not None and block.writers and block.writer_fd >= 0:
            await self.blocks.truncate(block, size)
            return
        block = await self.blocks.open_writer(inode.id)
        try:
            await self.blocks.truncate(block, size)
        finally:
            await self.blocks.close(block, writer=True)

    async def _set_columns(self, number: int, columns: dict[str, Any]) -> None:
        stored_ns = await self._times_of_stores(number) if "mtime_ns" in columns else {}
        block = self.replicas.open_blocks.get(number)
        if "mtime_ns" in columns:
            self.namespace.directory_times_set(number)
            if block is not None:
                block.look()
                block.mtime_ns = columns["mtime_ns"]
        if block is not None and block.orphan is not None:
            block.orphan = block.orphan._replace(**columns)
            return
        with self.volume.catalog.transaction("setattr"):
            self.volume.catalog.update(number, **columns)
            if block is None or not block.writers:
                for tier, mtime_ns in stored_ns.items():
                    self.volume.catalog.update_replica(number, tier, mtime_ns=mtime_ns)
        inode = self._inode(number)
        if inode.kind == Kind.DIRECTORY:
            await self._mirror_directory(inode)
        elif inode.state == BlockState.SEALED:
            await self.mirror_block(inode)

    async def _times_of_stores(self, number: int) -> dict[int, int]:
        """Tier number -> the time of an unsealed block's file there, which a mapping may have
        moved: the sealer takes over only what is stored after this."""
        inode, path = self._inode(number), self.volume.catalog.path_of(number)
        if inode.kind != Kind.BLOCK or inode.state == BlockState.SEALED or path is None:
            return {}
        found = {}
        for replica in self.volume.catalog.replicas(number):
            tier = self.volume.by_number[replica.tier]
            with self.volume.overlook("lookups_failed", tier):
                absolute = tier.locate(path, bool(replica.fanned))
                status = await tier.run(tier.files.status, absolute)
                found[tier.number] = status.st_mtime_ns
        return found

    async def mirror_block(self, inode: Inode) -> None:
        """The seal records of a block's files, with another mode, owner or time."""
        path = await self.blocks.paths.free_block(inode.id)
        for replica in self.volume.catalog.replicas(inode.id):
            tier = self.volume.by_number[replica.tier]
            absolute = tier.locate(path, bool(replica.fanned))
            # The catalog has it; a tier that is away learns by fsck.
            with self.volume.overlook("mirrors_failed", tier):
                status, mtime_ns = await tier.run(_rewrite_seal, tier, absolute, inode, replica)
                self.replicas.measured(inode.id, tier, status.st_blocks * 512, mtime_ns=mtime_ns)
                block = self.replicas.open_blocks.get(inode.id)
                if block is not None and block.tier is tier and block.sealed is not None:
                    block.sealed.mtime_ns = mtime_ns

    async def _mirror_directory(self, inode: Inode) -> None:
        first = self.volume.tiers[0]
        path = self.volume.catalog.directory_path(inode.id)
        if path is not None:
            with self.volume.overlook("mirrors_failed", first):
                owner = inode.mode, inode.uid, inode.gid
                await first.run(set_owner, first, first.locate(path), *owner)

    async def _mirror_xattr(self, inode: Inode, name: bytes, value: bytes | None) -> None:
        """Set or remove it on each copy that can be reached."""
        path = await self.blocks.paths.free_block(inode.id)
        if inode.kind == Kind.DIRECTORY:
            places = [(self.volume.tiers[0], False)]
        else:
            replicas = self.volume.catalog.replicas(inode.id)
            places = [(self.volume.by_number[r.tier], bool(r.fanned)) for r in replicas]
        for tier, fanned in places:
            # The catalog has it; a tier that is away learns by fsck.
            with self.volume.overlook("mirrors_failed", tier):
                status = await tier.run(_set_xattr, tier, tier.locate(path, fanned), name, value)
                self._measured(inode.id, tier, status)

    def _measured(self, number: int, tier: Tier, status: os.stat_result) -> None:
        """An xattr may have got a page. What is to be sealed is counted with one anyway."""
        row = self.volume.catalog.get(number)
        sealed = row is not None and row.state == BlockState.SEALED
        for replica in self.volume.catalog.replicas(number):
            if replica.tier == tier.number and (sealed or replica.state != GOOD):
                self.replicas.measured(number, tier, status.st_blocks * 512)

    # --- xattrs

    def get_xattr(self, number: int, name: bytes) -> bytes:
        """Raises FilesystemError(ENODATA)."""
        if not name.startswith(b"user."):
            raise FilesystemError(errno.ENODATA)
        if name == SOCKET and number == 1:
            return os.fsencode(self.socket_path)
        inode = self._inode(number)
        if name.startswith(PREFIX):
            value = self._computed(inode, name[len(PREFIX) :])
        else:
            value = self.volume.catalog.xattr(number, name)
        if value is None:
            raise FilesystemError(errno.ENODATA)
        return value

    def _computed(self, inode: Inode, name: bytes) -> bytes | None:
        if name == b"pin":
            return inode.pin.encode() if inode.pin else None
        if name == b"ttl":
            return f"{inode.ttl_s:g}s".encode() if inode.ttl_s else None
        if inode.kind == Kind.DIRECTORY:
            return None
        if name == b"state":
            return STATE_NAMES[BlockState(inode.state)].encode()
        if name == b"checksum":
            return b"xxh3-128:" + inode.checksum.hex().encode() if inode.checksum else None
        if name == b"heat":
            return f"{self.heat(inode.id):.3f}".encode()
        names = self.replica_names(inode.id)
        if name == b"replicas":
            return ",".join(names).encode()
        if name == b"tier":
            return names[0].encode() if names else None
        return None

    def heat(self, number: int) -> float:
        """The block's heat now."""
        now_s = self.volume.clock.now_s()
        stored = self.volume.catalog.tau_of(number)
        tau = self.volume.accesses.tau(number, heat.never if stored is None else stored)
        return heat.heat_at(tau, now_s, self.volume.config.tiering.half_life_s)

    def replica_names(self, number: int) -> list[str]:
        """The tiers that have the block, fastest first."""
        return [tier.name for tier, _ in self._places(number)]

    def replica_codecs(self, number: int) -> list[str]:
        """How each of them has it."""
        return [CODEC_NAMES[replica.codec] for _, replica in self._places(number)]

    def _places(self, number: int) -> list[tuple[Tier, Replica]]:
        by_number = self.volume.by_number
        places = [(by_number[r.tier], r) for r in self.volume.catalog.replicas(number)]
        return sorted(places, key=lambda place: place[0].index)

    def list_xattrs(self, number: int) -> list[bytes]:
        """Foreign ones, and a pin or ttl that is set: what a copy of the file should carry."""
        inode = self._inode(number)
        names = [name for name, _ in self.volume.catalog.xattrs(number)]
        return names + [PIN] * bool(inode.pin) + [TTL] * bool(inode.ttl_s)

    async def set_xattr(self, number: int, name: bytes, value: bytes) -> None:
        """Set a pin, a ttl or a foreign attribute; on every replica too."""
        if not name.startswith(b"user."):
            raise FilesystemError(errno.ENOTSUP)
        inode = self._inode(number)
        catalog = self.volume.catalog
        if name == PIN:
            catalog.update(number, pin=self.parse_pin(value))
        elif name == TTL:
            catalog.update(number, ttl_s=parse_ttl(value))
        elif name.startswith(PREFIX):
            raise NotPermitted(f"{name.decode()} cannot be set")
        else:
            taken = sum(xattr_cost(n, v) for n, v in catalog.xattrs(number) if n != name)
            if taken + xattr_cost(name, value) > XATTR_TOTAL_BYTES:
                raise FilesystemError(errno.ENOSPC)
            catalog.set_xattr(number, name, value)
        failpoints.hit("setxattr.recorded")
        await self._mirror_xattr(inode, name, value)

    def parse_pin(self, value: bytes) -> str | None:
        """None, '1' or a tier's name. Raises InvalidOperation."""
        text = value.rstrip(b"\0").decode("ascii", "replace").strip()
        if text in ("", "0"):
            return None
        if text != "1" and text not in {tier.name for tier in self.volume.tiers}:
            raise InvalidOperation(f"a pin is 0, 1 or a tier's name, not {text!r}")
        return text

    async def remove_xattr(self, number: int, name: bytes) -> None:
        """Raises FilesystemError(ENODATA) when it is not set."""
        inode = self._inode(number)
        catalog = self.volume.catalog
        if name == PIN and inode.pin:
            catalog.update(number, pin=None)
        elif name == TTL and inode.ttl_s:
            catalog.update(number, ttl_s=None)
        elif name.startswith(PREFIX) and name not in (PIN, TTL):
            raise NotPermitted(f"{name.decode()} cannot be removed")
        elif not catalog.remove_xattr(number, name):
            raise FilesystemError(errno.ENODATA)
        failpoints.hit("removexattr.recorded")
        await self._mirror_xattr(inode, name, None)


def _storable(time_ns: int | None) -> int | None:
    return None if time_ns is None else min(max(time_ns, TIMES_NS[0]), TIMES_NS[1])


def xattr_cost(name: bytes, value: bytes) -> int:
    """What an xattr takes on ext4: an entry, and name and value in steps of 4 bytes."""
    return XATTR_ENTRY_BYTES + len(name) + -len(name) % 4 + len(value) + -len(value) % 4


def parse_ttl(value: bytes) -> float | None:
    """Seconds, or None to have no TTL. Raises InvalidOperation."""
    text = value.rstrip(b"\0").decode("ascii", "replace").strip()
    try:
        seconds = parse_duration(text) if text else 0.0
    except (ValueError, KvfsError) as error:
        raise InvalidOperation(f"not a time: {error}") from None
    if seconds > LONGEST_TTL_S:
        raise InvalidOperation(f"a time to live is at most {LONGEST_TTL_S:g} s")
    return seconds or None


def stored_pin(value: bytes) -> str | None:
    """A pin as a file of a tier carries it, perhaps to a tier that is gone; nonsense is none."""
    text = value.rstrip(b"\0").decode("ascii", "replace").strip()
    return text if text != "0" and _PIN.fullmatch(text) else None


def takeable(xattrs: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """Of the xattrs that a file of a tier has, the foreign ones that a block may have."""
    taken_bytes = 0
    for name, value in xattrs:
        cost_bytes = xattr_cost(name, value)
        if not name.startswith(PREFIX) and taken_bytes + cost_bytes <= XATTR_TOTAL_BYTES:
            taken_bytes += cost_bytes
            yield name, value


def differs(seal: Seal, inode: Inode) -> bool:
    """Whether a record is not of what the row says is sealed."""
    recorded = (seal.inode, seal.generation, seal.checksum)
    return recorded != (inode.id, inode.generation, inode.checksum)


def _rewrite_seal(
    tier: Tier, absolute: bytes, inode: Inode, replica: Replica
) -> tuple[os.stat_result, int]:
    """The file's status then, and its time; UNLIKE_ANY if it was touched before: it stays known."""
    untouched = replica.mtime_ns in (0, tier.files.status(absolute).st_mtime_ns)
    status = tier.write_seal(absolute, seal_from(inode, replica.codec))
    failpoints.hit("setattr.mirrored")
    return status, status.st_mtime_ns if untouched else UNLIKE_ANY


def _set_xattr(tier: Tier, absolute: bytes, name: bytes, value: bytes | None) -> os.stat_result:
    tier.mirror_xattr(absolute, name, value)
    failpoints.hit("setxattr.mirrored")
    return tier.files.status(absolute)
