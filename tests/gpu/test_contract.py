"""What onboarder and offloader promise, on every device alike."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfs.errors import BlockCorrupt, BlockNotFound, BlockTorn, InvalidOperation, UsageError
from kvfs.gpu.layout import PagedLayout
from kvfs.gpu.offloader import Offloader
from kvfs.gpu.onboarder import Onboarder
from kvfs.gpu.source import BackingFiles
from kvfs.gpu.verification import TRUST_SEAL, VERIFY_ALL, Verification
from tests.gpu.machines import STAGING_BYTES, Machine, content_of, publish, publish_many

KIB = 1 << 10
BLOCK = 96 * KIB
ODD = 70_001
PAGES = 24
WAYS = {"raw": {}, "packed": {"packed": True}, "split": {"packed": True, "plane_split": True}}


def onboarder(
    machine: Machine, directory: Path, verification: Verification = VERIFY_ALL
) -> Onboarder:
    return Onboarder(BackingFiles(directory), machine.device, verification)


def contents(count: int, size_bytes: int) -> list[bytes]:
    return [content_of(number, size_bytes) for number in range(count)]


def layouts(machine: Machine) -> dict[str, tuple[PagedLayout, list[Any]]]:
    """Caches of blocks of BLOCK bytes, and the arrays they consist of."""
    whole = [machine.array(PAGES, BLOCK)]
    layers = [machine.array(PAGES, BLOCK // 4) for _ in range(4)]
    halves = [machine.array(PAGES, BLOCK // 4) for _ in range(4)]
    return {
        "contiguous": (PagedLayout.contiguous(whole[0]), whole),
        "per_layer": (PagedLayout.per_layer(layers), layers),
        "kv_split": (PagedLayout.kv_split(halves[0::2], halves[1::2]), halves),
    }


def block_in(machine: Machine, arrays: Sequence[Any], page: int) -> bytes:
    """A page of each array, one after the other."""
    parts = []
    for array in arrays:
        content = machine.bytes_of(array)
        page_bytes = len(content) // PAGES
        parts.append(content[page * page_bytes : (page + 1) * page_bytes])
    return b"".join(parts)


def damage(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    ("way", "size_bytes"),
    [("raw", 4096), *((way, size) for way in WAYS for size in (BLOCK, 300 * KIB, ODD))],
)
def test_blocks_are_loaded_into_a_list_of_arrays(
    machine: Machine, tmp_path: Path, way: str, size_bytes: int
) -> None:
    wanted = contents(9, size_bytes)
    names = publish_many(tmp_path, wanted, **WAYS[way])
    arrays = [machine.array(1, size_bytes) for _ in names]
    done = onboarder(machine, tmp_path).read(names, arrays)
    assert done.complete
    assert done.loaded_bytes == 9 * size_bytes
    assert [machine.bytes_of(array) for array in arrays] == wanted


def test_blocks_of_unlike_sizes_and_codecs(machine: Machine, tmp_path: Path) -> None:
    wanted = [content_of(number, 20_000 + 30_000 * number) for number in range(9)]
    names = [f"{number}.bin" for number in range(9)]
    ways = list(WAYS.values())
    for number, (name, content) in enumerate(zip(names, wanted, strict=True)):
        publish(tmp_path, name, content, **ways[number % 3])
    arrays = [machine.array(1, len(content)) for content in wanted]
    onboarder(machine, tmp_path).read(names, arrays).check()
    assert [machine.bytes_of(array) for array in arrays] == wanted


def test_blocks_are_loaded_into_the_rows_of_one_array(machine: Machine, tmp_path: Path) -> None:
    wanted = contents(40, 8 * KIB)
    array = machine.array(40, 8 * KIB)
    done = onboarder(machine, tmp_path).read(publish_many(tmp_path, wanted), array)
    assert done.complete
    assert machine.bytes_of(array) == b"".join(wanted)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["contiguous", "per_layer", "kv_split"])
def test_blocks_are_loaded_into_pages(
    machine: Machine, tmp_path: Path, way: str, kind: str
) -> None:
    # More than the staging memory holds at once.
    count = STAGING_BYTES // BLOCK + 2
    wanted = contents(count, BLOCK)
    names = publish_many(tmp_path, wanted, **WAYS[way])
    layout, arrays = layouts(machine)[kind]
    pages = np.random.default_rng(1).permutation(PAGES)[:count].tolist()
    onboarder(machine, tmp_path).read(names, layout.at(pages)).check()
    expected = dict(zip(pages, wanted, strict=True))
    for page in range(PAGES):
        assert block_in(machine, arrays, page) == expected.get(page, bytes(BLOCK))


def test_pages_with_raw_and_compressed_blocks(machine: Machine, tmp_path: Path) -> None:
    wanted = contents(9, BLOCK)
    names = [f"{number}.bin" for number in range(9)]
    for kind, (layout, arrays) in layouts(machine).items():
        for number, (name, content) in enumerate(zip(names, wanted, strict=True)):
            publish(tmp_path, name, content, packed=number in (1, 4, 5))
        onboarder(machine, tmp_path).read(names, layout.at(range(9))).check()
        assert [block_in(machine, arrays, page) for page in range(9)] == wanted, kind


@settings(max_examples=25)
@given(sizes=st.lists(st.integers(1, 200 * KIB), min_size=1, max_size=6))
def test_any_sizes(machine: Machine, tmp_path: Path, sizes: list[int]) -> None:
    wanted = [content_of(number, size) for number, size in enumerate(sizes)]
    names = publish_many(tmp_path, wanted)
    arrays = [machine.array(1, size) for size in sizes]
    onboarder(machine, tmp_path).read(names, arrays).check()
    assert [machine.bytes_of(array) for array in arrays] == wanted


def test_a_miss_ends_the_prefix_and_is_no_error(machine: Machine, tmp_path: Path) -> None:
    wanted = contents(6, BLOCK)
    names = publish_many(tmp_path, wanted)
    (tmp_path / names[4]).unlink()
    array = machine.array(6, BLOCK)
    done = onboarder(machine, tmp_path).read(names, array)
    assert (done.loaded, done.loaded_bytes, done.failure) == (4, 4 * BLOCK, None)
    assert done.stopped == "missing"
    assert not done.complete
    done.check()
    assert machine.bytes_of(array)[: 4 * BLOCK] == b"".join(wanted[:4])


@pytest.mark.parametrize("size_bytes", [8 * KIB, BLOCK])
@pytest.mark.parametrize("paged", [False, True], ids=["arrays", "pages"])
def test_a_rotten_block_ends_the_prefix_and_is_named(
    machine: Machine, tmp_path: Path, paged: bool, size_bytes: int
) -> None:
    wanted = contents(12, size_bytes)
    names = publish_many(tmp_path, wanted)
    damage(tmp_path / names[5], size_bytes // 2)
    damage(tmp_path / names[9], 0)
    arrays = [machine.array(PAGES, size_bytes // 2) for _ in range(2)]
    rows = machine.array(12, size_bytes)
    into = PagedLayout.per_layer(arrays).at(range(12)) if paged else rows
    done = onboarder(machine, tmp_path).read(names, into)
    assert done.loaded == 5
    assert done.stopped == "failed"
    assert done.failure is not None
    assert done.failure.path == names[5].encode()
    with pytest.raises(BlockCorrupt, match=names[5]):
        done.check()
    if paged:
        loaded = [block_in(machine, arrays, page) for page in range(5)]
    else:
        content = machine.bytes_of(rows)
        loaded = [content[page * size_bytes :][:size_bytes] for page in range(5)]
    assert loaded == wanted[:5]


def test_who_trusts_the_seal_is_not_told_of_rot(machine: Machine, tmp_path: Path) -> None:
    names = publish_many(tmp_path, contents(3, BLOCK))
    damage(tmp_path / names[1], 7)
    array = machine.array(3, BLOCK)
    assert onboarder(machine, tmp_path, TRUST_SEAL).read(names, array).complete
    assert not onboarder(machine, tmp_path, VERIFY_ALL).read(names, array).complete


@pytest.mark.parametrize("way", ["packed", "split"])
@pytest.mark.parametrize("offset", [10, 4100, -5000], ids=["header", "table", "frame"])
def test_a_rotten_compressed_block_is_never_decoded(
    machine: Machine, tmp_path: Path, way: str, offset: int
) -> None:
    names = publish_many(tmp_path, contents(4, 300 * KIB), **WAYS[way])
    rotten = tmp_path / names[2]
    damage(rotten, offset % rotten.stat().st_size)
    array = machine.array(4, 300 * KIB)
    done = onboarder(machine, tmp_path, TRUST_SEAL).read(names, array)
    assert done.loaded == 2
    with pytest.raises(BlockCorrupt, match=names[2]):
        done.check()


@pytest.mark.parametrize("size_bytes", [8 * KIB, BLOCK])
def test_a_torn_block_is_named(machine: Machine, tmp_path: Path, size_bytes: int) -> None:
    names = publish_many(tmp_path, contents(3, size_bytes))
    os.truncate(tmp_path / names[1], size_bytes - 1)
    done = onboarder(machine, tmp_path, TRUST_SEAL).read(names, machine.array(3, size_bytes))
    assert done.loaded == 1
    with pytest.raises(BlockTorn, match=f"{names[1]}.*{size_bytes - 1} bytes"):
        done.check()


def test_memory_of_another_size_is_not_loaded_into(machine: Machine, tmp_path: Path) -> None:
    names = publish_many(tmp_path, contents(3, BLOCK))
    arrays = [machine.array(1, size) for size in (BLOCK, BLOCK - 4096, BLOCK)]
    done = onboarder(machine, tmp_path).read(names, arrays)
    assert done.loaded == 1
    with pytest.raises(InvalidOperation, match=f"{names[1]}.*{BLOCK}.*{BLOCK - 4096}"):
        done.check()
    assert machine.bytes_of(arrays[2]) == bytes(BLOCK)


def test_paths_and_memory_have_to_be_as_many(machine: Machine, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="3 paths, but memory for 2"):
        onboarder(machine, tmp_path).read(["a", "b", "c"], machine.array(2, 10))


def test_nothing_asked_for_is_nothing_done(machine: Machine, tmp_path: Path) -> None:
    done = onboarder(machine, tmp_path).read([], [])
    assert (done.complete, done.loaded) == (True, 0)


def test_memory_elsewhere_is_refused(machine: Machine, tmp_path: Path) -> None:
    class OfDevice:
        __cuda_array_interface__ = {  # noqa: RUF012 # an array's is no class variable
            "shape": (1, 4), "typestr": "|u1", "data": (4096, False), "version": 3,
        }  # fmt: skip

    elsewhere: object = OfDevice() if machine.device.number is None else bytearray(4)
    with pytest.raises(UsageError, match="the memory is"):
        onboarder(machine, tmp_path).read(["a"], [elsewhere])
    with pytest.raises(UsageError, match="the memory is"):
        Offloader(BackingFiles(tmp_path), machine.device).write(["a"], [elsewhere])


def test_nothing_stays_open(machine: Machine, tmp_path: Path) -> None:
    names = publish_many(tmp_path, contents(20, BLOCK))
    (tmp_path / names[15]).unlink()
    damage(tmp_path / names[10], 3)
    array = machine.array(20, BLOCK)
    loader = onboarder(machine, tmp_path)
    loader.read(names, array)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        loader.read(names, array)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("kind", ["contiguous", "per_layer", "kv_split"])
def test_pages_are_stored_and_loaded_again(machine: Machine, tmp_path: Path, kind: str) -> None:
    layout, arrays = layouts(machine)[kind]
    for number, array in enumerate(arrays):
        machine.fill(array, content_of(number, len(machine.bytes_of(array))))
    pages = np.random.default_rng(2).permutation(PAGES)[:15].tolist()
    names = [f"ns/{page}.bin" for page in pages]
    offloader = Offloader(BackingFiles(tmp_path), machine.device)
    done = offloader.write(names, layout.at(pages))
    done.check()
    assert (done.complete, done.stored_bytes) == (True, 15 * BLOCK)
    for name, page in zip(names, pages, strict=True):
        assert (tmp_path / name).read_bytes() == block_in(machine, arrays, page)
    array = machine.array(15, BLOCK)
    onboarder(machine, tmp_path).read(names, array).check()
    assert machine.bytes_of(array) == b"".join(block_in(machine, arrays, page) for page in pages)


def test_arrays_are_stored(machine: Machine, tmp_path: Path) -> None:
    wanted = [content_of(number, 10_000 + 5_000 * (number // 2)) for number in range(7)]
    arrays = []
    for content in wanted:
        arrays.append(machine.array(1, len(content)))
        machine.fill(arrays[-1], content)
    names = [f"{number}.bin" for number in range(7)]
    Offloader(BackingFiles(tmp_path), machine.device).write(names, arrays).check()
    assert [(tmp_path / name).read_bytes() for name in names] == wanted


def test_one_thread_loads_while_another_stores(machine: Machine, tmp_path: Path) -> None:
    wanted = contents(12, BLOCK)
    names = publish_many(tmp_path, wanted)
    layout, arrays = layouts(machine)["kv_split"]
    other, others = layouts(machine)["per_layer"]
    for number, array in enumerate(others):
        machine.fill(array, content_of(number, len(machine.bytes_of(array))))
    offloader = Offloader(BackingFiles(tmp_path), machine.device)
    storing = threading.Thread(
        target=lambda: [
            offloader.write([f"{turn}/{page}" for page in range(PAGES)], other.at(range(PAGES)))
            for turn in range(3)
        ]
    )
    storing.start()
    loader = onboarder(machine, tmp_path)
    for turn in range(3):
        pages = range(turn, turn + 12)
        loader.read(names, layout.at(pages)).check()
        assert [block_in(machine, arrays, page) for page in pages] == wanted
    storing.join()
    for turn in range(3):
        for page in range(PAGES):
            stored = (tmp_path / f"{turn}/{page}").read_bytes()
            assert stored == block_in(machine, others, page)


def test_a_block_that_cannot_be_stored_ends_the_prefix(machine: Machine, tmp_path: Path) -> None:
    array = machine.array(4, 4096)
    (tmp_path / "file").touch()
    names = ["a.bin", "b.bin", "file/c.bin", "d.bin"]
    done = Offloader(BackingFiles(tmp_path), machine.device).write(names, array)
    assert (done.stored, done.stored_bytes) == (2, 2 * 4096)
    assert done.failure is not None
    assert done.failure.path == b"file/c.bin"
    with pytest.raises(OSError, match="file"):
        done.check()
    assert not (tmp_path / "d.bin").exists()


def test_a_stream_orders_the_work_where_there_are_streams(machine: Machine, tmp_path: Path) -> None:
    names = publish_many(tmp_path, contents(2, BLOCK))
    loader = onboarder(machine, tmp_path)
    if machine.has_streams:
        loader.read(names, machine.array(2, BLOCK), stream=0).check()
    else:
        with pytest.raises(UsageError, match="no streams"):
            loader.read(names, machine.array(2, BLOCK), stream=0)


def test_the_route_is_known_after_a_read(machine: Machine, tmp_path: Path) -> None:
    loader = onboarder(machine, tmp_path)
    loader.read(publish_many(tmp_path, contents(3, BLOCK)), machine.array(3, BLOCK)).check()
    route = loader.describe()
    assert route.kind == ("host" if machine.device.number is None else route.kind)
    assert route.kind != "unknown"
    assert route.why
    with pytest.raises(BlockNotFound, match="no such block"):
        loader.describe("nothing.bin")
