"""What inference engines do with their KV directory, system call by system call."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.mount.live import (
    MIB,
    TIERS,
    aligned,
    below,
    call,
    put_on,
    replicas,
    state,
    wait_sealed,
)
from tests.mounting import MountedKvfs

BLOCK_BYTES = 2 * MIB
HEADER_BYTES = 4096
MOVED_BLOCKS = 10
READERS = 3
MOVES = [
    ("demote", "hdd"), ("promote", "nvme"), ("demote", "remote"), ("promote", "hdd"),
    ("promote", "nvme"),
]  # fmt: skip


def vllm_store(path: Path, data: bytes) -> None:
    """One write of the whole block with `O_DIRECT`, close, rename; no fsync."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}_{os.urandom(4).hex()}.tmp")
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_TRUNC | os.O_DIRECT
    with aligned(data) as buffer:
        descriptor = os.open(temporary, flags, 0o644)
        try:
            assert os.write(descriptor, buffer) == len(data)
        finally:
            os.close(descriptor)
    temporary.rename(path)


def vllm_load(path: Path, size: int = BLOCK_BYTES) -> bytes:
    """One read of the whole block with `O_DIRECT`. vLLM unlinks the file on a short one."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with aligned(size) as buffer:
            assert os.readv(descriptor, [buffer]) == size, "a short read"
            return bytes(buffer)
    finally:
        os.close(descriptor)


@pytest.mark.semantics("S-names-5")
def test_vllm_asks_for_blocks_whose_directories_are_missing(there: Path) -> None:
    names = [there / "model" / f"{n:02x}" / f"{n:064x}.bin" for n in range(50)]
    assert not any(os.access(name, os.F_OK) for name in names)
    assert not any(os.access(name, os.F_OK) for name in names)
    assert list(there.iterdir()) == []


@pytest.mark.semantics("S-names-6", "S-publish-1")
def test_vllm_finds_a_block_that_it_missed_before(there: Path) -> None:
    path = there / "model" / "ab" / "block.bin"
    assert not os.access(path, os.F_OK)
    vllm_store(path, os.urandom(BLOCK_BYTES))
    assert os.access(path, os.F_OK)
    assert state(path) in ("published", "sealed")


@pytest.mark.semantics("S-read-1", "S-read-2")
@pytest.mark.parametrize("tier", TIERS)
def test_vllm_loads_the_whole_block_from_each_tier(
    shared: MountedKvfs, there: Path, tier: str
) -> None:
    data = os.urandom(BLOCK_BYTES)
    path = there / "model" / "ab" / "block.bin"
    vllm_store(path, data)
    put_on(shared, path, tier)
    assert vllm_load(path) == data
    assert vllm_load(path) == data
    assert path.read_bytes() == data


@pytest.mark.semantics("S-read-1")
@pytest.mark.parametrize("size", [0, 1, 4095, 131_073, 3 * MIB + 17, 33 * MIB])
def test_a_read_ends_short_only_at_the_end_of_the_file(there: Path, size: int) -> None:
    path = there / "odd.bin"
    data = os.urandom(size)
    path.write_bytes(data)
    wait_sealed(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert os.read(descriptor, size + 100) == data
        assert os.pread(descriptor, 100, max(0, size - 50)) == data[max(0, size - 50) :]
        assert os.pread(descriptor, 100, size) == b""
    finally:
        os.close(descriptor)


@pytest.mark.semantics("S-read-2")
def test_vllm_probes_o_direct(there: Path) -> None:
    probe = there / ".o_direct_probe"
    descriptor = os.open(probe, os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o600)
    try:
        with aligned(bytes(4096)) as buffer:
            assert os.write(descriptor, buffer) == 4096
    finally:
        os.close(descriptor)
    probe.unlink()
    assert not probe.exists()


@pytest.mark.semantics("S-read-2")
def test_unaligned_o_direct_is_answered_by_who_has_the_bytes(
    shared: MountedKvfs, there: Path
) -> None:
    def write_and_read(path: Path) -> bytes | int:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_DIRECT, 0o600)
        try:
            assert os.pwrite(descriptor, b"abcdefg", 3) == 7
            return os.pread(descriptor, 5, 4)
        except OSError as error:
            return error.errno or 0
        finally:
            os.close(descriptor)

    served = not call(shared, "status")["data_path"]["passthrough"]
    answer = write_and_read(there / "odd.bin")
    assert answer == (b"bcdef" if served else write_and_read(shared.tiers["nvme"] / ".odd"))
    (shared.tiers["nvme"] / ".odd").unlink(missing_ok=True)


@pytest.mark.semantics("S-rename-1")
def test_sglang_stats_replaces_and_reads_into(there: Path) -> None:
    path = there / "0123_model_8_0.bin"
    for data in (os.urandom(64 << 10), os.urandom(96 << 10)):
        temporary = there / f"{path.name}.{os.getpid()}.tmp"
        with temporary.open("wb") as file:
            file.write(data)
        os.replace(temporary, path)
        assert path.stat().st_size == len(data)
        buffer = bytearray(len(data))
        with path.open("rb", buffering=0) as file:
            assert file.readinto(buffer) == len(data)
        assert bytes(buffer) == data
    assert os.listdir(there) == [path.name]


@pytest.mark.semantics("S-rename-1", "S-publish-6")
@pytest.mark.parametrize("tier", TIERS)
def test_lmcache_replaces_lists_and_rewrites_its_header(
    shared: MountedKvfs, there: Path, tier: str
) -> None:
    path = there / "vllm@model@1@0@abc.data"
    body = os.urandom(256 << 10)
    with (there / "x.tmp").open("wb") as file:
        file.write(bytes(HEADER_BYTES) + body)
    os.replace(there / "x.tmp", path)
    assert os.path.exists(path)
    assert os.listdir(there) == [path.name]
    put_on(shared, path, tier)
    header = os.urandom(HEADER_BYTES)
    with path.open("r+b") as file:
        file.write(header)
    assert path.read_bytes() == header + body
    wait_sealed(path)
    assert path.read_bytes() == header + body
    assert replicas(path) == [tier]
    backing = shared.tiers[tier] / os.fsdecode(below(shared, path))
    assert backing.read_bytes() == header + body


@pytest.mark.semantics("S-moves-1", "S-read-1")
def test_readers_get_every_byte_while_blocks_move(shared: MountedKvfs, there: Path) -> None:
    blocks = {there / f"{n}.bin": os.urandom(BLOCK_BYTES) for n in range(MOVED_BLOCKS)}
    for path, data in blocks.items():
        vllm_store(path, data)
    for path in blocks:
        wait_sealed(path)
    done = False
    moved = 0

    def read(offset: int) -> int:
        paths = list(blocks)
        count = 0
        while not done:
            path = paths[(count * 7 + offset) % len(paths)]
            assert vllm_load(path) == blocks[path]
            count += 1
        return count

    with ThreadPoolExecutor(READERS) as pool:
        readers = [pool.submit(read, n) for n in range(READERS)]
        try:
            for verb, tier in MOVES:
                moved += call(shared, verb, paths=[below(shared, there)], to=tier)["moved"]
        finally:
            done = True
        assert all(reader.result() > 0 for reader in readers)
    assert moved >= MOVED_BLOCKS
    for path, data in blocks.items():
        put_on(shared, path, "remote")
        assert vllm_load(path) == data
