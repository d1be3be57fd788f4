"""What only `CudaDevice` promises. Run by test_contract_stubdriver.py in a process of its own."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from kvfs.errors import UsageError
from kvfs.gpu.layout import PagedLayout
from kvfs.gpu.offloader import Offloader
from kvfs.gpu.onboarder import Onboarder
from kvfs.gpu.source import BackingFiles
from kvfs.gpu.verification import VERIFY_ALL
from tests.gpu.machines import STAGING_BYTES, Machine, StubMachine, content_of, publish_many

BLOCK = 64 << 10


@pytest.fixture
def stub(machine: Machine) -> StubMachine:
    assert isinstance(machine, StubMachine)
    return machine


def test_bytes_took_the_way_of_a_device(stub: StubMachine, tmp_path: Path) -> None:
    names = publish_many(tmp_path, [content_of(number, BLOCK) for number in range(4)])
    before = stub.driver.copied_bytes()
    Onboarder(BackingFiles(tmp_path), stub.device).read(names, stub.array(4, BLOCK)).check()
    # By way of bounce buffers: had kvikio taken it for host memory, nothing would be copied.
    assert stub.driver.copied_bytes() - before == 4 * BLOCK
    assert stub.device.route().kind == "compat"


def test_the_callers_stream_is_waited_for_and_waits(stub: StubMachine, tmp_path: Path) -> None:
    class Stream:
        cuda_stream = 4711

    names = publish_many(tmp_path, [content_of(0, BLOCK)])
    stub.runtime.followed.clear()
    stub.runtime.preceded.clear()
    loader = Onboarder(BackingFiles(tmp_path), stub.device)
    loader.read(names, stub.array(1, BLOCK), stream=Stream()).check()
    assert (stub.runtime.followed, stub.runtime.preceded) == ([4711], [4711])
    loader.read(names, stub.array(1, BLOCK)).check()
    assert (stub.runtime.followed, stub.runtime.preceded) == ([4711, 0], [4711, 0])


def test_rot_does_not_reach_the_pages(stub: StubMachine, tmp_path: Path) -> None:
    names = publish_many(tmp_path, [content_of(number, BLOCK) for number in range(6)])
    path = tmp_path / names[2]
    path.write_bytes(bytes(BLOCK))
    planes = [stub.array(8, BLOCK // 2) for _ in range(2)]
    for plane in planes:
        stub.fill(plane, b"\7" * (4 * BLOCK))
    into = PagedLayout.per_layer(planes).at(range(6))
    loader = Onboarder(BackingFiles(tmp_path), stub.device, VERIFY_ALL)
    assert loader.read(names, into).loaded == 2
    for plane in planes:
        assert stub.bytes_of(plane)[2 * BLOCK // 2 :] == b"\7" * (6 * BLOCK // 2)


def test_a_block_too_large_for_staging_is_refused_before_any_is_loaded(
    stub: StubMachine, tmp_path: Path
) -> None:
    large = STAGING_BYTES // 2 + 4096
    names = publish_many(tmp_path, [content_of(0, large), content_of(1, large)])
    planes = [stub.array(2, large // 2) for _ in range(2)]
    layout = PagedLayout.per_layer(planes)
    with pytest.raises(UsageError, match=f"staging_bytes={2 * large}"):
        Onboarder(BackingFiles(tmp_path), stub.device).read(names, layout.at([0, 1]))
    with pytest.raises(UsageError, match="staging_bytes"):
        Offloader(BackingFiles(tmp_path), stub.device).write(["new"], layout.at([1]))
    assert stub.bytes_of(planes[0]) == bytes(large)
    assert not (tmp_path / "new").exists()
    # Straight into one array it needs no staging.
    rows = stub.array(2, large)
    Onboarder(BackingFiles(tmp_path), stub.device).read(names, rows).check()
    assert stub.bytes_of(rows) == content_of(0, large) + content_of(1, large)


def test_pages_that_are_no_whole_words_are_refused(stub: StubMachine, tmp_path: Path) -> None:
    names = publish_many(tmp_path, [content_of(0, 2 * 1000)])
    planes = [stub.array(2, 1000) for _ in range(2)]
    into = PagedLayout.per_layer(planes).at([1])
    with pytest.raises(UsageError, match="page size, 1000 bytes, is no multiple of 16"):
        Onboarder(BackingFiles(tmp_path), stub.device).read(names, into)
    with pytest.raises(UsageError, match="no multiple of 16"):
        Offloader(BackingFiles(tmp_path), stub.device).write(["new"], into)
    assert stub.bytes_of(planes[0]) == bytes(2000)


def test_descriptors_with_o_direct_serve_compressed_blocks(
    stub: StubMachine, tmp_path: Path
) -> None:
    assert stub.device.direct
    wanted = content_of(0, 5 * BLOCK)
    names = publish_many(tmp_path, [wanted], packed=True, plane_split=True)
    array = stub.array(1, 5 * BLOCK)
    Onboarder(BackingFiles(tmp_path), stub.device).read(names, array).check()
    assert stub.bytes_of(array) == wanted


def test_an_unlinked_block_is_loaded_by_its_lease(stub: StubMachine, tmp_path: Path) -> None:
    names = publish_many(tmp_path, [content_of(0, BLOCK)])
    source = BackingFiles(tmp_path)

    class UnlinkedMeanwhile:
        def lease(self, paths: list[bytes], *, direct: bool = False) -> object:
            lease = source.lease(paths, direct=direct)
            opened = lease.__enter__()
            for path in paths:
                os.unlink(os.path.join(os.fsencode(tmp_path), path))

            class Opened:
                def __enter__(self) -> object:
                    return opened

                def __exit__(self, *_: object) -> None:
                    lease.__exit__(None, None, None)

            return Opened()

    array = stub.array(1, BLOCK)
    Onboarder(UnlinkedMeanwhile(), stub.device).read(names, array).check()  # type: ignore[arg-type] # answers as one
    assert stub.bytes_of(array) == content_of(0, BLOCK)


def test_cache_of_two_byte_numbers(stub: StubMachine, tmp_path: Path) -> None:
    """bfloat16 has no name in array interfaces; it travels as bytes."""
    from tests.gpu.stub import Rows

    planes = [stub.array(4, BLOCK // 2) for _ in range(2)]
    views = [Rows(plane.array, (4, 16, BLOCK // 64), "<V2") for plane in planes]
    wanted = [content_of(number, BLOCK) for number in range(3)]
    into = PagedLayout.kv_split(views[:1], views[1:]).at([3, 0, 1])
    names = publish_many(tmp_path, wanted)
    Onboarder(BackingFiles(tmp_path), stub.device).read(names, into).check()
    keys = np.frombuffer(stub.bytes_of(planes[0]), np.uint8).reshape(4, -1)
    assert keys[3].tobytes() == wanted[0][: BLOCK // 2]
