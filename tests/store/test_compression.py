"""Compressed replicas: written by moves, served whole or piece by piece, unpacked for writers."""

from __future__ import annotations

import os
import random
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfs.catalog.rows import RAW, ZSTD, BlockState
from kvfs.config import Compress
from kvfs.errors import TierFull
from kvfs.tiers import forms
from kvfs.tiers.codec import CHUNK_BYTES, CompressedBlock, open_compressed, read_header
from kvfs.tiers.decoder import SPAN_BYTES
from kvfs.upkeep import mover
from tests.mount.live import config_in
from tests.store.helpers import (
    Workbench,
    assert_consistent,
    assert_no_litter,
    during_copy,
    file_on,
    move,
    put,
    put_on,
    read,
    rename,
    rewrite,
    row_at,
    seal_all,
    settle_all,
    tiers_of,
    unlink,
)
from tests.store.packing import SLOWER, codec_on, compressing, fill_up, text_of

# --- moves


@pytest.mark.parametrize("target", SLOWER)
async def test_what_is_moved_to_such_a_tier_is_compressed_and_raw_again_above(
    packing: Workbench, target: str
) -> None:
    store = await packing.start()
    data = text_of(3_000_001)
    await put(store, b"ns/a", data)
    written = await move(store, "demote", b"ns/a", "nvme", target)
    assert 0 < written < len(data) // 10
    file = file_on(store, target, b"ns/a")
    assert file.stat().st_size == written
    with file.open("rb") as compressed:
        header = read_header(compressed.fileno())
    assert (header.size_bytes, header.checksum) == (len(data), xxhash.xxh3_128_digest(data))
    assert await read(store, b"ns/a") == data
    await assert_consistent(store)
    assert await move(store, "promote", b"ns/a", target, "nvme") == len(data)
    assert file_on(store, "nvme", b"ns/a").read_bytes() == data
    assert [codec_on(store, tier, b"ns/a") for tier in ("nvme", target)] == [RAW, ZSTD]
    await assert_consistent(store)


async def test_what_gains_nothing_stays_raw(packing: Workbench) -> None:
    store = await packing.start()
    for name, data in {
        b"random": os.urandom(300_000),
        b"empty": b"",
        b"small": bytes(8000),
    }.items():
        await put_on(store, name, data, "hdd")
        assert codec_on(store, "hdd", name) == RAW
        assert file_on(store, "hdd", name).read_bytes() == data
        assert await read(store, name) == data
    assert store.volume.space[1].saved_bytes == 0
    await assert_consistent(store)


@pytest.mark.parametrize(
    ("hdd", "remote", "same"),
    [("zstd", "zstd", True), ("zstd", "zstd-planes", False), ("zstd-planes", "zstd", False),
     ("zstd", "none", False), ("none", "zstd-planes", False)],
)  # fmt: skip
async def test_between_tiers_a_block_takes_the_form_of_each(
    bench: Workbench, hdd: Compress, remote: Compress, same: bool
) -> None:
    bench.config = compressing(bench.config, hdd=hdd, remote=remote)
    store = await bench.start()
    data = text_of(700_000)
    await put_on(store, b"a", data, "hdd", "remote")
    files = [file_on(store, tier, b"a").read_bytes() for tier in SLOWER]
    for tier, compress in (("hdd", hdd), ("remote", remote)):
        assert codec_on(store, tier, b"a") == (RAW if compress == "none" else ZSTD)
    await move(store, "drop", b"a", "remote", None)
    await move(store, "demote", b"a", "hdd", "remote")
    assert file_on(store, "remote", b"a").read_bytes() == files[1]
    assert (files[0] == files[1]) == same
    if remote == "zstd-planes":
        with file_on(store, "remote", b"a").open("rb") as compressed:
            assert open_compressed(compressed.fileno()).plane_split
    assert await read(store, b"a") == data
    await assert_consistent(store)


async def test_of_the_same_form_the_bytes_are_copied(
    packing: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await packing.start()
    await put_on(store, b"a", text_of(700_000), "hdd")
    monkeypatch.setattr(forms, "recompress", None)
    monkeypatch.setattr(forms, "compress_file", None)
    await move(store, "demote", b"a", "hdd", "remote")
    assert codec_on(store, "remote", b"a") == ZSTD
    await assert_consistent(store)


kinds = st.sampled_from(["text", "zeros", "random"])


def part_of(kind: str, size: int) -> bytes:
    if kind == "zeros":
        return bytes(size)
    return text_of(size) if kind == "text" else random.Random(size).randbytes(size)


@settings(max_examples=20)
@given(
    parts=st.lists(st.tuples(kinds, st.integers(0, 200_000)), max_size=4),
    compress=st.tuples(*[st.sampled_from(["none", "zstd", "zstd-planes"])] * 2),
    way=st.lists(st.sampled_from(["nvme", "hdd", "remote"]), max_size=4),
)
def test_any_block_comes_back_whichever_way_it_goes(
    tmp_path_factory: pytest.TempPathFactory,
    parts: list[tuple[str, int]],
    compress: tuple[Compress, Compress],
    way: list[str],
) -> None:
    data = b"".join(part_of(kind, size) for kind, size in parts)
    base = tmp_path_factory.mktemp("ways")
    bench = Workbench(lambda: compressing(config_in(base), hdd=compress[0], remote=compress[1]))
    trio.run(go_the_way, bench, data, way)


async def go_the_way(bench: Workbench, data: bytes, way: list[str]) -> None:
    store = await bench.start()
    await put(store, b"d/a", data)
    here = "nvme"
    for tier in way:
        if tier != here:
            await move(store, "demote", b"d/a", here, tier)
            assert await read(store, b"d/a") == data
            here = tier
    if here != "nvme":
        reserved = fill_up(store, "nvme")
        block = await store.blocks.open_reader(row_at(store, b"d/a").id)
        for start in range(0, len(data), 70_001):
            assert await store.blocks.read(block, start, 70_001) == data[start : start + 70_001]
        assert await store.blocks.read(block, len(data), 10) == b""
        await store.blocks.close(block, writer=False)
        reserved.release()
    await assert_consistent(store)
    bench.close_all()
    bench.lose_catalog()
    store = await bench.start()
    assert await read(store, b"d/a") == data
    await assert_consistent(store)
    bench.close_all()


async def test_what_is_saved_is_counted(packing: Workbench) -> None:
    store = await packing.start()
    account = store.volume.space[1]
    await put_on(store, b"a", text_of(1_000_000), "hdd")
    first = account.saved_bytes
    assert first > 900_000
    assert first == 1_000_000 - file_on(store, "hdd", b"a").stat().st_blocks * 512
    await put_on(store, b"b", text_of(500_000), "hdd")
    assert account.saved_bytes > first
    await unlink(store, b"a")
    await unlink(store, b"b")
    assert account.saved_bytes == 0
    await put_on(store, b"c", text_of(500_000), "hdd")
    packing.stop(store)
    store = await packing.start()
    assert store.volume.space[1].saved_bytes > 400_000
    await assert_consistent(store)


async def test_the_option_is_live_and_what_is_there_stays(packing: Workbench) -> None:
    store = await packing.start()
    await put_on(store, b"a", text_of(200_000), "hdd")
    hdd = store.volume.tier_named("hdd")
    hdd.reconfigure(msgspec.structs.replace(hdd.config, compress="none"))
    await put_on(store, b"b", text_of(200_000), "hdd")
    assert [codec_on(store, "hdd", name) for name in (b"a", b"b")] == [ZSTD, RAW]
    assert await read(store, b"a") == await read(store, b"b")
    await assert_consistent(store)


# --- reading


@pytest.mark.parametrize("tier", SLOWER)
async def test_a_reader_gets_it_whole_from_staging(packing: Workbench, tier: str) -> None:
    store = await packing.start()
    data = text_of(2_000_000)
    await put_on(store, b"a", data, tier)
    block = await store.blocks.open_reader(row_at(store, b"a").id)
    assert (block.fetched, block.decoder) == (True, None)
    assert store.volume.space[0].reserved_bytes >= len(data)
    file_on(store, tier, b"a").unlink()
    assert await store.blocks.read(block, 1_000_000, 3_000_000) == data[1_000_000:]
    await store.blocks.close(block, writer=False)
    assert store.volume.space[0].reserved_bytes == 0


@pytest.mark.parametrize("tier", SLOWER)
async def test_without_room_in_staging_it_is_decoded_where_it_lies(
    packing: Workbench, tier: str
) -> None:
    store = await packing.start()
    data = text_of(2 * CHUNK_BYTES) + os.urandom(100_000) + text_of(1_000_003)
    await put_on(store, b"a", data, tier)
    reserved = fill_up(store, "nvme")
    inode = row_at(store, b"a").id
    block = await store.blocks.open_reader(inode)
    assert block.decoder is not None
    assert (block.fetched, block.local) == (False, False)
    assert block.length_bytes() == len(data)

    async def reader(seed: int) -> None:
        mine = await store.blocks.open_reader(inode)
        assert mine is block
        source = random.Random(seed)
        for _ in range(40):
            offset = source.randrange(len(data) + 10)
            size = source.choice([1, 4096, 130_000, 1_000_000])
            assert await store.blocks.read(mine, offset, size) == data[offset : offset + size]
        await store.blocks.close(mine, writer=False)

    async with trio.open_nursery() as nursery:
        for seed in range(4):
            nursery.start_soon(reader, seed)
    await store.blocks.close(block, writer=False)
    reserved.release()
    await assert_consistent(store)


async def test_reading_on_decodes_each_piece_once(
    packing: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await packing.start()
    data = text_of(1_000_000)
    await put_on(store, b"a", data, "hdd")
    reserved = fill_up(store, "nvme")
    block = await store.blocks.open_reader(row_at(store, b"a").id)
    asked: list[tuple[int, int]] = []
    real = CompressedBlock.read

    def read_and_note(self: CompressedBlock, offset: int, size: int) -> bytes:
        asked.append((offset, size))
        return real(self, offset, size)

    monkeypatch.setattr(CompressedBlock, "read", read_and_note)
    for offset in range(0, len(data), 4096):
        assert await store.blocks.read(block, offset, 4096) == data[offset : offset + 4096]
    assert [offset for offset, _ in asked] == list(range(0, len(data), SPAN_BYTES))
    await store.blocks.close(block, writer=False)
    reserved.release()


async def test_a_renamed_and_an_unlinked_block_is_read_on(packing: Workbench) -> None:
    store = await packing.start()
    data = text_of(500_000)
    await put_on(store, b"a", data, "hdd")
    reserved = fill_up(store, "nvme")
    block = await store.blocks.open_reader(row_at(store, b"a").id)
    await rename(store, b"a", b"d/b")
    assert await store.blocks.read(block, 0, 1000) == data[:1000]
    await unlink(store, b"d/b")
    await settle_all(store)
    assert await store.blocks.read(block, 400_000, 200_000) == data[400_000:]
    await store.blocks.close(block, writer=False)
    reserved.release()
    await assert_consistent(store)
    assert store.volume.space[1].saved_bytes == 0


# --- writing


@pytest.mark.parametrize("tier", SLOWER)
@pytest.mark.parametrize("full", [False, True], ids=["above", "in place"])
async def test_a_writer_gets_a_raw_file(packing: Workbench, tier: str, full: bool) -> None:
    store = await packing.start()
    data = text_of(600_000)
    await put_on(store, b"d/a", data, tier)
    filled = [name for name in ("nvme", "hdd") if full and name != tier]
    reserved = [fill_up(store, name) for name in filled]
    await rewrite(store, b"d/a", b"new", 100)
    for reservation in reserved:
        reservation.release()
    await seal_all(store)
    assert tiers_of(store, b"d/a") == [tier if full else "nvme"]
    assert codec_on(store, tier if full else "nvme", b"d/a") == RAW
    assert await read(store, b"d/a") == data[:100] + b"new" + data[103:]
    await assert_consistent(store)
    assert_no_litter(store)


@pytest.mark.parametrize("staging", [True, False], ids=["staging", "decoded"])
@pytest.mark.parametrize("full", [False, True], ids=["above", "in place"])
async def test_who_reads_sees_what_a_writer_does(
    packing: Workbench, staging: bool, full: bool
) -> None:
    store = await packing.start()
    data = text_of(600_000)
    await put_on(store, b"a", data, "hdd")
    inode = row_at(store, b"a").id
    reserved = None if staging else fill_up(store, "nvme")
    reader = await store.blocks.open_reader(inode)
    assert reader.fetched == staging
    if reserved and not full:
        reserved.release()
    if staging and full:
        reserved = fill_up(store, "nvme")
    writer = await store.blocks.open_writer(inode)
    assert writer is reader
    assert writer.tier.name == ("hdd" if full else "nvme")
    await store.blocks.write(writer, 0, b"new")
    assert await store.blocks.read(reader, 0, 10) == b"new" + data[3:10]
    await store.blocks.close(writer, writer=True)
    assert await store.blocks.read(reader, 0, 700_000) == b"new" + data[3:]
    await store.blocks.close(reader, writer=False)
    if reserved:
        reserved.release()
    await seal_all(store)
    await assert_consistent(store)


async def test_an_unchanged_block_keeps_its_compressed_copy(packing: Workbench) -> None:
    store = await packing.start()
    data = text_of(600_000)
    await put_on(store, b"a", data, "hdd")
    await rewrite(store, b"a", data[:10])
    await seal_all(store)
    assert tiers_of(store, b"a") == ["nvme", "hdd"]
    assert [codec_on(store, tier, b"a") for tier in ("nvme", "hdd")] == [RAW, ZSTD]
    await assert_consistent(store)


async def test_truncation_and_a_temporary_name(packing: Workbench) -> None:
    store = await packing.start()
    data = text_of(600_000)
    await put_on(store, b"a", data, "hdd")
    block = await store.blocks.open_writer(row_at(store, b"a").id, truncate=True)
    await store.blocks.close(block, writer=True)
    await seal_all(store)
    assert await read(store, b"a") == b""
    await put_on(store, b"b", data, "hdd")
    await rename(store, b"b", b"b.tmp")
    await store.attributes.set(row_at(store, b"b.tmp").id, size=1000)
    await seal_all(store)
    assert await read(store, b"b.tmp") == data[:1000]
    await assert_consistent(store)


async def test_a_writer_waits_for_a_move_of_the_block(
    packing: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await packing.start()
    data = text_of(600_000)
    await put_on(store, b"a", data, "hdd")
    opened = trio.Event()
    async with trio.open_nursery() as nursery:

        async def write() -> None:
            await rewrite(store, b"a", b"new")
            opened.set()

        async def begin() -> None:
            nursery.start_soon(write)
            await trio.testing.wait_all_tasks_blocked(0.01)

        during_copy(monkeypatch, begin)
        await move(store, "promote", b"a", "hdd", "nvme")
    assert opened.is_set()
    await seal_all(store)
    assert await read(store, b"a") == b"new" + data[3:]
    assert tiers_of(store, b"a") == ["nvme"]
    await assert_consistent(store)


async def test_a_name_that_changes_meanwhile_does_not_keep_a_writer_out(
    packing: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await packing.start()
    data = text_of(600_000)
    await put_on(store, b"a", data, "hdd")
    inode = row_at(store, b"a").id
    during_copy(monkeypatch, lambda: rename(store, b"a", b"b"))
    block = await store.blocks.open_writer(inode)
    await store.blocks.write(block, 0, b"new")
    await store.blocks.close(block, writer=True)
    await seal_all(store)
    assert await read(store, b"b") == b"new" + data[3:]
    assert_no_litter(store)
    await assert_consistent(store)


@pytest.mark.semantics("S-compress-3")
async def test_without_any_room_a_writer_is_refused_and_nothing_is_lost(bench: Workbench) -> None:
    bench.configure(on_full="refuse")
    bench.config = compressing(bench.config, hdd="zstd")
    store = await bench.start()
    data = text_of(600_000)
    await put_on(store, b"a", data, "hdd")
    reserved = [fill_up(store, tier) for tier in ("nvme", "hdd", "remote")]
    with pytest.raises(TierFull):
        await store.blocks.open_writer(row_at(store, b"a").id)
    for reservation in reserved:
        reservation.release()
    assert row_at(store, b"a").state == BlockState.SEALED
    assert await read(store, b"a") == data
    await assert_consistent(store)


async def test_a_medium_that_writes_badly_is_not_waited_for_forever(
    packing: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await packing.start()
    data = text_of(600_000)
    await put_on(store, b"a", data, "hdd")

    def transfer_badly(*arguments: Any) -> int:
        codec = forms.transfer(*arguments)
        os.pwrite(arguments[2], b"\xff", 5)
        return codec

    monkeypatch.setattr(mover, "transfer", transfer_badly)
    with pytest.raises(OSError, match="Errno 5"):
        await store.blocks.open_writer(row_at(store, b"a").id)
    monkeypatch.undo()
    assert await read(store, b"a") == data
    assert_no_litter(store)
    await assert_consistent(store)
