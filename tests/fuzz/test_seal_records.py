"""Seal records: whatever a file carries, a walk of the tiers makes sense of it or sets it aside."""

from __future__ import annotations

import logging
import os
import struct
from pathlib import Path

import pytest
import trio
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvfs.tiers.seal import SEAL_XATTR, Seal, decode_seal
from tests.fuzz.filled import CONTENTS, Copies, catalog_of, opened, try_everything
from tests.fuzz.fuzzing import corpus, damaged, fuzz, replay

U64 = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2, 3, 2**31, 2**56 - 1, 2**56, 2**63 - 1])
U32 = st.integers(0, 2**32 - 1)
RECORD = struct.Struct("<4sBBHQQQ16sIIIq")
FILES = (
    "nvme/d/both", "hdd/d/both", "nvme/d/fast", "hdd/d/slow", "hdd/d/packed", "nvme/e/f/deep",
    "nvme/top",
)  # fmt: skip


def with_check(body: bytes) -> bytes:
    """A record whose own checksum is right, whatever it says."""
    return body + struct.pack("<I", xxhash.xxh32_intdigest(body))


records = st.builds(
    lambda *fields: with_check(RECORD.pack(b"KVFS", *fields)),
    st.integers(0, 2), st.integers(0, 255), st.integers(0, 2**16 - 1), U64, U64, U64,
    st.binary(min_size=16, max_size=16), U32, U32, U32, st.integers(-(2**63), 2**63 - 1),
)  # fmt: skip
changes = st.fixed_dictionaries(
    {},
    optional={
        "inode": st.integers(2, 40) | st.integers(2, 2**56 - 1),
        "generation": st.integers(0, 5) | st.integers(0, 2**56 - 1),
        "length_bytes": st.integers(0, 2000), "mode": st.integers(0, 0o7777), "uid": U32,
        "gid": U32, "mtime_ns": st.integers(-(2**63), 2**63 - 1),
        "checksum": st.binary(min_size=16, max_size=16), "codec": st.integers(0, 1),
    },
)  # fmt: skip


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Copies:
    return Copies(tmp_path_factory.mktemp("seals"))


@pytest.fixture(autouse=True)
def _no_log(caplog: pytest.LogCaptureFixture) -> None:
    """Damage is to be warned of, a hundred thousand times in a soak."""
    caplog.set_level(logging.CRITICAL, logger="kvfs")


def try_record(data: bytes) -> None:
    seal = decode_seal(data)
    if seal is not None:
        assert decode_seal(seal.encode()) == seal
        assert 1 < seal.inode < 2**56
        assert seal.mode <= 0o7777


@replay("seal")
def test_each_record_of_the_corpus(data: bytes) -> None:
    try_record(data)


@fuzz(500)
@given(data=records | damaged(corpus("seal")) | st.binary(max_size=100))
def test_any_record(data: bytes) -> None:
    try_record(data)


def plant(base: Path, file: str, record: bytes) -> None:
    os.setxattr(base / file, SEAL_XATTR, record)


def lose_catalog(base: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        Path(f"{catalog_of(base)}{suffix}").unlink(missing_ok=True)


async def recover(base: Path, lost: bool) -> None:
    """Start on these tiers: every name that is there then has bytes that it once had."""
    if lost:
        lose_catalog(base)

    def unexpected(error: Exception) -> None:
        raise error

    with opened(base) as store:
        await store.recovery.before_serving()
        if not lost:
            await store.recovery.reconcile()
        found = await try_everything(store, unexpected)
    for path, data in found.items():
        assert CONTENTS.get(path, data) == data, path


@replay("seal")
def test_each_record_of_the_corpus_on_a_tier(copies: Copies, data: bytes) -> None:
    for file in FILES:
        with copies.copy() as base:
            plant(base, file, data)
            trio.run(recover, base, True)


@fuzz(30, costly=True)
@given(
    planted=st.lists(st.tuples(st.sampled_from(FILES), records), min_size=1, max_size=4),
    lost=st.booleans(),
)
def test_any_record_on_a_tier(copies: Copies, planted: list[tuple[str, bytes]], lost: bool) -> None:
    with copies.copy() as base:
        for file, record in planted:
            plant(base, file, record)
        trio.run(recover, base, lost)


@fuzz(60, costly=True)
@given(
    planted=st.lists(st.tuples(st.sampled_from(FILES), changes), min_size=1, max_size=4),
    lost=st.booleans(),
)
def test_a_record_with_other_numbers(
    copies: Copies, planted: list[tuple[str, dict[str, int]]], lost: bool
) -> None:
    """What somebody who knows the format would plant: all is right but what is changed."""
    with copies.copy() as base:
        for file, changed in planted:
            seal = decode_seal(os.getxattr(base / file, SEAL_XATTR))
            assert seal is not None
            values = {name: getattr(seal, name) for name in seal.__slots__} | changed
            plant(base, file, Seal(**values).encode())
        trio.run(recover, base, lost)
