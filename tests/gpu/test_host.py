"""What only `HostDevice` promises."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from kvfs.errors import KvfsError, QuotaExceeded, UsageError
from kvfs.gpu.blocks import blocks_of
from kvfs.gpu.device import Load
from kvfs.gpu.host import HostDevice
from kvfs.gpu.layout import PagedLayout
from kvfs.gpu.onboarder import MAX_LEASED, Onboarder
from kvfs.gpu.source import BackingFiles, Leased
from tests.gpu.machines import content_of, publish, publish_many

FORKED = """
import os, sys
from kvfs.errors import UsageError
from kvfs.gpu.host import HostDevice
from kvfs.gpu.onboarder import Onboarder
from kvfs.gpu.source import BackingFiles
device = HostDevice()
loader = Onboarder(BackingFiles("/"), device)
child = os.fork()
if child == 0:
    try:
        loader.read(["bin/sh"], [bytearray(os.path.getsize("/bin/sh"))])
    except UsageError as error:
        device.close()
        os._exit(0 if "does not survive fork" in str(error) else 2)
    os._exit(3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_after_fork_it_refuses_instead_of_hanging() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], timeout=30, check=False)
    assert done.returncode == 0


def test_what_is_not_in_the_page_cache_is_waited_for(tmp_path: Path) -> None:
    path = publish(tmp_path, "block", content_of(0, 8192))
    memory = bytearray(8192)
    with HostDevice() as device, path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        blocks = blocks_of([memory], 1, writable=True)
        assert device.load([Load(b"block", file.fileno(), 8192)], blocks) == [None]
    assert memory == content_of(0, 8192)


def test_an_error_of_the_medium_names_the_block(tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        with HostDevice() as device:
            for size in (4096, 1 << 20):
                blocks = blocks_of([bytearray(size)], 1, writable=True)
                [error] = device.load([Load(b"ns/a.bin", directory, size)], blocks)
                assert isinstance(error, IsADirectoryError)
                assert "ns/a.bin" in str(error)
    finally:
        os.close(directory)


def test_after_an_error_no_further_block_is_begun(tmp_path: Path) -> None:
    names = publish_many(tmp_path, [content_of(number, 1 << 20) for number in range(8)])
    os.truncate(tmp_path / names[0], 5)
    memory = np.zeros((8, 1 << 20), np.uint8)
    with (
        HostDevice(threads=1) as device,
        BackingFiles(tmp_path).lease([os.fsencode(name) for name in names]) as leased,
    ):
        loads = [Load(b"b", block.fd, 1 << 20) for block in leased]
        errors = device.load(loads, blocks_of(memory, 8, writable=True))
    assert all(isinstance(error, KvfsError) for error in errors)
    assert not memory[1:].any()


def test_more_segments_than_one_call_takes(tmp_path: Path) -> None:
    planes = [np.zeros((2, 16), np.uint8) for _ in range(2 * os.sysconf("SC_IOV_MAX") + 5)]
    content = content_of(0, 16 * len(planes))
    publish(tmp_path, "raw", content)
    publish(tmp_path, "packed", content, packed=True, plane_split=True)
    with HostDevice() as device:
        into = PagedLayout.per_layer(planes).at([1, 0])
        Onboarder(BackingFiles(tmp_path), device).read(["raw", "packed"], into).check()
    for page in (0, 1):
        assert b"".join(plane[page].tobytes() for plane in planes) == content


def test_a_long_prompt_takes_several_leases(tmp_path: Path) -> None:
    count = MAX_LEASED + 100
    names = publish_many(tmp_path, [number.to_bytes(64, "big") for number in range(count)])
    assert len(names) > MAX_LEASED
    memory = np.zeros((count, 64), np.uint8)
    with HostDevice() as device:
        loader = Onboarder(BackingFiles(tmp_path), device)
        assert loader.read(names, memory).complete
        assert memory[-1].tobytes() == (count - 1).to_bytes(64, "big")
        (tmp_path / names[MAX_LEASED]).unlink()
        assert loader.read(names, memory).loaded == MAX_LEASED
        (tmp_path / names[5]).unlink()
        assert loader.read(names, memory).loaded == 5


class RefusesLater:
    """A source that refuses the second lease, and counts which are open."""

    def __init__(self, directory: Path) -> None:
        self._files = BackingFiles(directory)
        self.leases = 0
        self.open = 0

    @contextmanager
    def lease(self, paths: Sequence[bytes], *, direct: bool = False) -> Iterator[Leased]:
        self.leases += 1
        if self.leases == 2:
            raise QuotaExceeded("no more")
        with self._files.lease(paths, direct=direct) as leased:
            self.open += 1
            yield leased
            self.open -= 1


def test_what_is_loaded_stays_when_a_later_lease_is_refused(tmp_path: Path) -> None:
    count = MAX_LEASED + 10
    names = publish_many(tmp_path, [bytes([number % 251]) * 64 for number in range(count)])
    memory = np.zeros((count, 64), np.uint8)
    source = RefusesLater(tmp_path)
    with HostDevice() as device:
        loader = Onboarder(source, device)
        done = loader.read(names, memory)
        assert (done.loaded, done.stopped) == (MAX_LEASED, "failed")
        with pytest.raises(QuotaExceeded):
            done.check()
        assert source.open == 0
        source.leases = 1
        with pytest.raises(QuotaExceeded):
            loader.read(names, memory)


def test_threads_take_turns(tmp_path: Path) -> None:
    wanted = [content_of(number, 300 << 10) for number in range(6)]
    names = publish_many(tmp_path, wanted)
    arrays = [np.zeros((6, 300 << 10), np.uint8) for _ in range(4)]
    with HostDevice(threads=2) as device:
        loader = Onboarder(BackingFiles(tmp_path), device)
        threads = [
            threading.Thread(target=lambda array=array: loader.read(names, array).check())
            for array in arrays
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(array.tobytes() == b"".join(wanted) for array in arrays)


def test_a_device_has_a_thread() -> None:
    with pytest.raises(UsageError):
        HostDevice(threads=0)
