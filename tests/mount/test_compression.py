"""Compressed replicas behind a real mount: nobody who uses it notices."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kvfs.tiers.codec import CHUNK_BYTES, open_compressed, read_header
from kvfs.tiers.space import rounded
from tests.mount.live import (
    KIB,
    MIB,
    aligned,
    below,
    call,
    config_in,
    info,
    live,
    promote,
    publish,
    put_on,
    refusal_of,
    replicas,
    scratch,
    wait_sealed,
)
from tests.mounting import MountedKvfs, check_accounts, run_kvfs, toml_of, wait_until
from tests.store.packing import compressing

SLOWER = ("hdd", "remote")
ODD = 3 * MIB + 4097
DAMAGED_FRAME = 40


def text_of(size: int, seed: int = 0) -> bytes:
    """Something that compresses, though not to nothing."""
    source = random.Random(seed)
    words = [b"%d " % source.randrange(1000) for _ in range(4000)]
    return (b"".join(words) * (size // 8000 + 1))[:size]


@pytest.fixture(scope="module")
def shared(shared_log: list[str]) -> Iterator[MountedKvfs]:
    """hdd and remote compress, each in its way."""
    shared_log.append("is bad .*: quarantined")
    with scratch() as base:
        config = compressing(config_in(base), hdd="zstd", remote="zstd-planes")
        mount = MountedKvfs(base, config)
        with live(mount, shared_log):
            yield mount


@pytest.fixture
def own(tmp_path: Path, expect_log: list[str]) -> Iterator[MountedKvfs]:
    """A mount of a test's own."""
    mount = MountedKvfs(tmp_path, compressing(config_in(tmp_path), hdd="zstd"))
    with live(mount, expect_log):
        yield mount


def reconfigure(mount: MountedKvfs, **changes: object) -> None:
    """Other keys of the first two tiers (`nvme_capacity_bytes=...`), by a reload."""
    tiers = list(mount.config.tier)
    for place, tier in enumerate(tiers):
        mine = {
            key.removeprefix(f"{tier.name}_"): value
            for key, value in changes.items() if key.startswith(f"{tier.name}_")
        }  # fmt: skip
        tiers[place] = msgspec.structs.replace(tier, **mine)
    mount.config_file.write_text(toml_of(msgspec.structs.replace(mount.config, tier=tuple(tiers))))
    run_kvfs("config", "reload", mount.path)


def packed(mount: MountedKvfs, path: Path, data: bytes, tier: str) -> Path:
    """A block that only this tier has, compressed."""
    publish(path, data)
    put_on(mount, path, tier)
    file = mount.tiers[tier] / path.relative_to(mount.path)
    with file.open("rb") as compressed:
        assert read_header(compressed.fileno()).size_bytes == len(data)
    assert info(mount, path)["codecs"] == ["zstd"]
    return file


# --- reading


@pytest.mark.semantics("S-compress-1")
@pytest.mark.parametrize("tier", SLOWER)
@pytest.mark.parametrize("size", [64 * KIB, ODD], ids=["small", "odd"])
def test_every_way_to_read(shared: MountedKvfs, there: Path, tier: str, size: int) -> None:
    path, data = there / "block", text_of(size)
    publish(path, data)
    os.utime(path, ns=(10**18, 10**18))
    wait_sealed(path)
    before = path.stat()
    put_on(shared, path, tier)
    assert os.stat(path) == before
    assert path.read_bytes() == data
    descriptor = os.open(path, os.O_RDONLY)
    assert os.pread(descriptor, 10_000, size - 5_000) == data[-5_000:]
    assert os.pread(descriptor, 10, size) == b""
    assert os.lseek(descriptor, 0, os.SEEK_END) == size
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as view:
        assert view[:] == data
        assert view[size // 2] == data[size // 2]
    assert info(shared, path)["mode"] == "served"
    os.close(descriptor)
    direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
    buffer = aligned(-(-size // 4096) * 4096)
    done = os.preadv(direct, [buffer], 0)
    while 0 < done < size:
        more = os.preadv(direct, [memoryview(buffer)[done:]], done)
        assert more > 0, "a short read"
        done += more
    assert buffer[:size] == data
    os.close(direct)


READER = """
import hashlib, os, random, sys
path, seed = sys.argv[1], int(sys.argv[2])
whole = open(path, 'rb', buffering=0).read()
dice, fd = random.Random(seed), os.open(path, os.O_RDONLY)
for _ in range(60):
    at, size = dice.randrange(len(whole)), dice.choice([1, 5000, 200_000])
    assert os.pread(fd, size, at) == whole[at : at + size], (at, size)
print(hashlib.sha256(whole).hexdigest())
"""


@pytest.mark.semantics("S-compress-2")
@pytest.mark.parametrize("room", [True, False], ids=["staging", "decoded"])
def test_readers_beside_each_other(own: MountedKvfs, room: bool) -> None:
    """Whole and in pieces, also where the fastest tier could not take the block."""
    path, data = own.path / "block", text_of(6 * MIB + 1)
    packed(own, path, data, "hdd")
    if not room:
        reconfigure(own, nvme_capacity_bytes=MIB)
    command = [sys.executable, "-S", "-c", READER, str(path)]
    readers = [subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE) for seed in range(3)]
    for reader in readers:
        out, _ = reader.communicate(timeout=60)
        assert out.decode().strip() == hashlib.sha256(data).hexdigest()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        assert view[:] == data
        assert own.tier("nvme")["reserved_bytes"] == (rounded(len(data)) if room else 0)
        assert info(own, path)["mode"] == "served"
    assert own.status()["counters"]["opens_served"] >= 7
    assert replicas(path) == ["hdd"]
    wait_until(lambda: own.tier("nvme")["reserved_bytes"] == 0, "staging is given back")


# --- writing


@pytest.mark.semantics("S-compress-3")
@pytest.mark.parametrize("tier", SLOWER)
def test_it_is_raw_for_whoever_writes(shared: MountedKvfs, there: Path, tier: str) -> None:
    path, data = there / "block", text_of(ODD)
    packed(shared, path, data, tier)
    with path.open("rb", buffering=0) as reader:
        assert reader.read(100) == data[:100]
        with path.open("r+b", buffering=0) as writer:
            writer.seek(50)
            writer.write(b"new")
            assert os.pread(reader.fileno(), 10, 48) == data[48:50] + b"new" + data[53:58]
        assert os.pread(reader.fileno(), 10, 48) == data[48:50] + b"new" + data[53:58]
    wait_sealed(path)
    assert replicas(path) == ["nvme"]
    assert path.read_bytes() == data[:50] + b"new" + data[53:]


@pytest.mark.semantics("S-compress-3")
def test_append_truncate_and_map(shared: MountedKvfs, there: Path) -> None:
    data = text_of(300 * KIB)
    for name, change, expected in (
        ("append", append_to, data + b"more"),
        ("cut", lambda path: os.truncate(path, 1000), data[:1000]),
        ("new", lambda path: path.write_bytes(b"short"), b"short"),
        ("map", store_in_a_mapping, b"mapped" + data[6:]),
    ):
        path = there / name
        packed(shared, path, data, "hdd")
        change(path)
        wait_sealed(path)
        assert path.read_bytes() == expected, name
        assert replicas(path) == ["nvme"]


def append_to(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def store_in_a_mapping(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        view[:6] = b"mapped"


@pytest.mark.semantics("S-compress-3")
def test_a_writer_where_nothing_above_has_room(own: MountedKvfs) -> None:
    path, data = own.path / "block", text_of(6 * MIB)
    file = packed(own, path, data, "hdd")
    reconfigure(own, nvme_capacity_bytes=MIB)
    with path.open("r+b", buffering=0) as writer:
        writer.write(b"new")
    wait_sealed(path)
    assert info(own, path)["codecs"] == ["raw"]
    assert file.read_bytes() == path.read_bytes() == b"new" + data[3:]
    check_accounts(own)


# --- damage


@pytest.mark.semantics("S-compress-4")
@pytest.mark.parametrize("other", [True, False], ids=["another", "none"])
def test_a_damaged_one_is_never_served(shared: MountedKvfs, there: Path, other: bool) -> None:
    path, data = there / "block", text_of(ODD)
    file = packed(shared, path, data, "hdd")
    if other:
        call(shared, "demote", paths=[below(shared, path)], to="remote")
        promote(shared, path, "hdd")
        assert replicas(path) == ["hdd", "remote"]
    damage(file)
    if other:
        assert path.read_bytes() == data
        assert replicas(path) == ["remote"]
    else:
        assert refusal_of(path.read_bytes) == errno.ENOENT
        assert not path.exists()
    assert not file.exists()
    check_accounts(shared)


@pytest.mark.semantics("S-compress-4")
def test_damage_that_comes_while_it_is_open(own: MountedKvfs, expect_log: list[str]) -> None:
    expect_log += ["is bad .*: quarantined", "requests_failed|read: "]
    path, data = own.path / "block", text_of(20 * MIB)
    file = packed(own, path, data, "hdd")
    reconfigure(own, nvme_capacity_bytes=MIB)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    assert os.preadv(descriptor, [aligned(64 * KIB)], 0) == 64 * KIB
    damage(file)
    assert os.preadv(descriptor, [aligned(64 * KIB)], 0) == 64 * KIB
    offset = DAMAGED_FRAME * CHUNK_BYTES
    assert refusal_of(lambda: os.preadv(descriptor, [aligned(64 * KIB)], offset)) == errno.EIO
    os.close(descriptor)
    assert refusal_of(path.read_bytes) == errno.ENOENT


def damage(file: Path) -> None:
    """One byte of one frame."""
    file.chmod(0o600)
    with file.open("r+b") as bad:
        bad.seek(open_compressed(bad.fileno()).frames[DAMAGED_FRAME].offset + 100)
        byte = bad.read(1)
        bad.seek(-1, os.SEEK_CUR)
        bad.write(bytes([byte[0] ^ 0xFF]))


# --- what an admin sees and does


@pytest.mark.semantics("S-compress-5")
def test_the_option_is_live_and_what_gains_nothing_stays_raw(own: MountedKvfs) -> None:
    data = text_of(ODD)
    first, second, random_one = (own.path / name for name in ("first", "second", "random"))
    packed(own, first, data, "hdd")
    publish(random_one, os.urandom(MIB))
    put_on(own, random_one, "hdd")
    assert info(own, random_one)["codecs"] == ["raw"]
    reconfigure(own, hdd_compress="none")
    publish(second, data)
    put_on(own, second, "hdd")
    assert [info(own, path)["codecs"] for path in (first, second)] == [["zstd"], ["raw"]]
    assert first.read_bytes() == second.read_bytes() == data
    shown = run_kvfs("info", first).stdout
    assert "hdd (zstd)" in shown
    saved = own.tier("hdd")["saved_bytes"]
    assert saved == len(data) - (own.tiers["hdd"] / "first").stat().st_blocks * 512
    assert "compression on hdd saves" in run_kvfs("status", own.path).stdout
    metrics = (own.path / ".kvfs/metrics").read_text()
    measured = re.search(r'^kvfs_tier_saved_bytes{tier="hdd"} (.+)$', metrics, re.MULTILINE)
    assert measured is not None
    assert float(measured[1]) == saved
    check_accounts(own)


def test_a_rebuild_and_a_crash(own: MountedKvfs) -> None:
    blocks = {f"d/{number}": text_of(200 * KIB, number) for number in range(5)}
    (own.path / "d").mkdir()
    for name, data in blocks.items():
        packed(own, own.path / name, data, "hdd")
    before = {name: (own.path / name).stat() for name in blocks}
    own.kill()
    own.start()
    assert {name: (own.path / name).read_bytes() for name in blocks} == blocks
    own.stop()
    found = json.loads(run_kvfs("fsck", "--config", own.config_file, "--rebuild", "--json").stdout)
    assert found["findings"] == []
    own.start()
    assert {name: (own.path / name).read_bytes() for name in blocks} == blocks
    for name, status in before.items():
        after = (own.path / name).stat()
        assert (after.st_ino, after.st_size, after.st_mtime_ns) == (
            status.st_ino, status.st_size, status.st_mtime_ns,
        )  # fmt: skip
        assert info(own, own.path / name)["codecs"] == ["zstd"]
    check_accounts(own)
