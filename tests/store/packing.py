"""What tests of compressed replicas share: blocks that compress, tiers that do it, and damage."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from kvfs.config import Compress, Config
from kvfs.store import Store
from kvfs.tiers.codec import open_compressed
from kvfs.tiers.space import Reservation
from tests.store.helpers import row_at, writable

SLOWER = ["hdd", "remote"]


def text_of(size: int, seed: int = 0) -> bytes:
    """Something that compresses."""
    line = b"%d: the keys and values of a block\n" % seed
    return (line * (size // len(line) + 1))[:size]


def compressing(config: Config, **compress: Compress) -> Config:
    tiers = tuple(
        msgspec.structs.replace(tier, compress=compress.get(tier.name, "none"))
        for tier in config.tier
    )
    return msgspec.structs.replace(config, tier=tiers)


def codec_on(store: Store, tier: str, path: bytes) -> int:
    number = store.volume.tier_named(tier).number
    replicas = store.volume.catalog.replicas(row_at(store, path).id)
    return next(replica.codec for replica in replicas if replica.tier == number)


def fill_up(store: Store, tier: str) -> Reservation:
    """The tier has no room."""
    account = store.volume.space[store.volume.tier_named(tier).index]
    reserved = store.volume.space.reserve(store.volume.tier_named(tier).index, account.free_bytes)
    assert reserved is not None
    return reserved


def flip(file: Path, offset: int) -> None:
    with writable(file).open("r+b") as bad:
        bad.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        byte = bad.read(1)
        bad.seek(-1, os.SEEK_CUR)
        bad.write(bytes([byte[0] ^ 0xFF]))


def place_of(file: Path, what: str) -> int:
    """Where in a compressed file something is that must not change."""
    with file.open("rb") as compressed:
        frames = open_compressed(compressed.fileno()).frames
    return {
        "header": 20, "table": 4096 + 20, "frame": frames[0].offset + 8,
        "last frame": frames[-1].offset + 8,
    }[what]  # fmt: skip
