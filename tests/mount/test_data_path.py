"""What system calls on open files must do, whichever way their bytes take.

The tests run with reads and writes past the daemon and through it; nothing in them depends on it.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import xxhash

from kvfs.tools.exerciser_handle import Mapping
from kvfs.tools.exerciser_model import TICK_NS
from tests.mount.live import (
    KIB,
    TIERS,
    aligned,
    demote,
    info,
    publish,
    put_on,
    refusal_of,
    state,
    wait_sealed,
)
from tests.mounting import MountedKvfs

PAST_NS = 10**18


def run_python(script: str, *arguments: object) -> None:
    """A script in a process of its own; it fails as the script does."""
    subprocess.run([sys.executable, "-S", "-c", script, *map(str, arguments)], check=True)


def start_python(script: str, *arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-S", "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def checksum(path: Path) -> str:
    return "xxh3-128:" + xxhash.xxh3_128_hexdigest(path.read_bytes())


def shown_elsewhere(path: Path) -> str:
    """Size and time as another process sees them."""
    command = ["stat", "-c", "%s %.9Y", str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def sealer_has_passed(there: Path) -> None:
    """Whatever was closed before could have been sealed by now."""
    for name in ("one", "two"):
        path = publish(there / name, b"x")
        wait_sealed(path)
        path.unlink()


# --- mappings


@pytest.mark.semantics("S-write-5")
@pytest.mark.parametrize("tier", TIERS)
def test_a_shared_mapping_is_one_memory_for_all_processes(
    shared: MountedKvfs, there: Path, tier: str
) -> None:
    path = publish(there / "block", bytes(64 * KIB))
    put_on(shared, path, tier)
    descriptor = os.open(path, os.O_RDWR)
    mapping = Mapping(descriptor, 64 * KIB, shared=True)
    mapping.store(100, b"ours")
    assert os.pread(descriptor, 4, 100) == b"ours"
    script = (
        "import mmap, sys\n"
        "with open(sys.argv[1], 'r+b') as f, mmap.mmap(f.fileno(), 0) as m:\n"
        "    assert m[100:104] == b'ours', m[100:104]\n"
        "    m[60_000:60_006] = b'theirs'\n"
    )
    run_python(script, path)
    assert mapping.load(60_000, 6) == b"theirs"
    mapping.sync()
    os.close(descriptor)
    mapping.close()
    wait_sealed(path)
    expected = bytes(100) + b"ours" + bytes(60_000 - 104) + b"theirs" + bytes(64 * KIB - 60_006)
    assert path.read_bytes() == expected


@pytest.mark.semantics("S-publish-4", "S-write-5")
@pytest.mark.parametrize("new", [True, False], ids=["new", "sealed before"])
def test_what_is_stored_after_the_descriptor_was_closed_counts(there: Path, new: bool) -> None:
    path = there / "block"
    if not new:
        wait_sealed(publish(path, bytes(32 * KIB)))
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    os.ftruncate(descriptor, 32 * KIB)
    mapping = Mapping(descriptor, 32 * KIB, shared=True)
    os.close(descriptor)
    mapping.store(0, b"early")
    sealer_has_passed(there)
    assert state(path) != "sealed"
    mapping.store(20_000, b"late")
    mapping.close()
    wait_sealed(path)
    data = path.read_bytes()
    assert (data[:5], data[20_000:20_004], len(data)) == (b"early", b"late", 32 * KIB)
    assert os.getxattr(path, "user.kvfs.checksum").decode() == checksum(path)


@pytest.mark.parametrize("reader", [True, False], ids=["beside a reader", "alone"])
def test_stores_through_a_mapping_move_the_time_once_it_is_gone(there: Path, reader: bool) -> None:
    """Backups and rsync look at times: a change that shows no other time is not copied."""
    path = publish(there / "block", bytes(32 * KIB))
    wait_sealed(path)
    os.utime(path, ns=(PAST_NS, PAST_NS))
    beside = os.open(path, os.O_RDONLY)
    if not reader:
        os.close(beside)
    descriptor = os.open(path, os.O_RDWR)
    mapping = Mapping(descriptor, 32 * KIB, shared=True)
    os.close(descriptor)
    sealer_has_passed(there)
    mapping.store(0, b"stored")
    mapping.sync()
    mapping.close()
    if reader:
        os.close(beside)
    wait_sealed(path)
    assert path.stat().st_mtime_ns > PAST_NS


@pytest.mark.parametrize("reader", [True, False], ids=["beside a reader", "alone"])
def test_a_time_set_after_stores_through_a_mapping_stays(there: Path, reader: bool) -> None:
    """Also when the descriptor was closed before them, so that kvfs had not seen them."""
    path = publish(there / "block", bytes(32 * KIB))
    descriptor = os.open(path, os.O_RDWR)
    mapping = Mapping(descriptor, 32 * KIB, shared=True)
    os.close(descriptor)
    sealer_has_passed(there)
    beside = os.open(path, os.O_RDONLY)
    if not reader:
        os.close(beside)
    mapping.store(0, b"stored")
    mapping.sync()
    os.utime(path, ns=(PAST_NS, PAST_NS))
    mapping.close()
    if reader:
        os.close(beside)
    wait_sealed(path)
    assert path.stat().st_mtime_ns == PAST_NS


# --- appending, unaligned requests


@pytest.mark.semantics("S-write-2")
def test_appenders_in_several_processes_lose_nothing(there: Path) -> None:
    path = there / "log"
    path.write_bytes(b"")
    script = (
        "import os, sys\n"
        "fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)\n"
        "for n in range(100):\n"
        "    line = b'%s %03d ' % (sys.argv[2].encode(), n) + b'x' * (37 * n % 3000) + b'\\n'\n"
        "    assert os.write(fd, line) == len(line)\n"
    )
    writers = [start_python(script, path, name) for name in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    for writer in writers:
        writer.communicate()
    lines = path.read_bytes().splitlines()
    for name in (b"a", b"b", b"c"):
        expected = [b"%s %03d " % (name, n) + b"x" * (37 * n % 3000) for n in range(100)]
        assert [line for line in lines if line.startswith(name)] == expected
    assert len(lines) == 300


@pytest.mark.semantics("S-read-2")
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(("offset", "length"), [(17, 100), (512, 1000), (100, 4096), (4096, 9000)])
def test_an_unaligned_direct_request_is_done_or_refused_whole(
    shared: MountedKvfs, there: Path, tier: str, offset: int, length: int
) -> None:
    before = os.urandom(64 * KIB)
    path = publish(there / "block", before)
    put_on(shared, path, tier)
    descriptor = os.open(path, os.O_RDWR | os.O_DIRECT)
    data = os.urandom(length)
    after = before[:offset] + data + before[offset + length :]

    def read_back() -> None:
        with aligned(length) as buffer:
            assert os.preadv(descriptor, [buffer], offset) == length
            assert buffer[:] == path.read_bytes()[offset : offset + length]

    def write() -> None:
        with aligned(data) as buffer:
            assert os.pwritev(descriptor, [buffer], offset) == length

    for request, changed in ((read_back, before), (write, after), (read_back, after)):
        try:
            request()
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            changed = before
        assert path.read_bytes() == changed
    os.close(descriptor)


# --- under open handles


@pytest.mark.semantics("S-write-3")
@pytest.mark.parametrize("how", ["by name", "by handle", "O_TRUNC"])
@pytest.mark.parametrize("tier", TIERS)
def test_a_reader_sees_a_truncation_at_once(
    shared: MountedKvfs, there: Path, tier: str, how: str
) -> None:
    data = os.urandom(300 * KIB)
    path = publish(there / "block", data)
    put_on(shared, path, tier)
    with path.open("rb", buffering=0) as reader:
        assert reader.read(200 * KIB) == data[: 200 * KIB]
        kept = 0 if how == "O_TRUNC" else 100 * KIB
        descriptor = os.open(path, os.O_RDWR | (os.O_TRUNC if how == "O_TRUNC" else 0))
        if how == "by name":
            os.truncate(path, kept)
        elif how == "by handle":
            os.ftruncate(descriptor, kept)
        assert os.fstat(reader.fileno()).st_size == path.stat().st_size == kept
        assert reader.read(10) == b""
        os.pwrite(descriptor, b"end", 250 * KIB)
        expected = data[:kept] + bytes(250 * KIB - kept) + b"end"
        assert os.fstat(reader.fileno()).st_size == len(expected)
        assert os.pread(reader.fileno(), 400 * KIB, 0) == expected
        os.close(descriptor)
        assert os.pread(reader.fileno(), 400 * KIB, 0) == expected
    wait_sealed(path)
    assert path.read_bytes() == expected


@pytest.mark.semantics("S-unlink-1")
def test_a_file_without_a_name_is_written_on_and_shows_it(there: Path) -> None:
    path = there / "block"
    writer = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    reader = os.open(path, os.O_RDONLY)
    os.write(writer, b"named")
    path.unlink()
    os.write(writer, b"nameless")
    assert os.fstat(reader).st_size == os.fstat(writer).st_size == 13
    os.pwrite(writer, b"!", 100 * KIB)
    os.close(writer)
    # The writer is gone; what it wrote since anybody looked is not.
    assert os.fstat(reader).st_size == 100 * KIB + 1
    assert os.pread(reader, 13, 0) == b"namednameless"
    os.close(reader)
    assert os.listdir(there) == []


@pytest.mark.semantics("S-rename-2")
def test_the_writer_of_a_replaced_file_writes_into_nothing_with_a_name(there: Path) -> None:
    path = there / "block"
    with path.open("w+b", buffering=0) as writer:
        writer.write(b"old")
        publish(path, b"new content")
        writer.write(b" and on")
        os.ftruncate(writer.fileno(), 2)
        assert path.read_bytes() == b"new content"
        assert path.stat().st_size == 11
        assert os.pread(writer.fileno(), 10, 0) == b"ol"
        assert os.fstat(writer.fileno()).st_size == 2
    wait_sealed(path)
    assert path.read_bytes() == b"new content"
    assert os.getxattr(path, "user.kvfs.checksum").decode() == checksum(path)


@pytest.mark.semantics("S-rename-2", "S-publish-4")
def test_a_file_is_renamed_again_and_again_while_it_is_written(there: Path) -> None:
    (there / "d").mkdir()
    path = there / "block"
    with path.open("wb", buffering=0) as writer:
        for number in range(20):
            writer.write(b"%02d" % number)
            path = path.rename(there / ("d" if number % 2 else "") / f"block-{number}")
            assert path.stat().st_size == 2 * (number + 1)
        assert state(path) == "published"
    wait_sealed(path)
    assert path.read_bytes() == b"".join(b"%02d" % number for number in range(20))


@pytest.mark.semantics("S-publish-1")
@pytest.mark.parametrize("flush", [os.fsync, os.fdatasync])
def test_fsync_records_what_was_written_so_far(
    shared: MountedKvfs, there: Path, flush: Callable[[int], None]
) -> None:
    path = there / "block"
    with path.open("wb", buffering=0) as writer:
        for pieces in (1, 2, 3):
            writer.write(b"p" * 10_000)
            flush(writer.fileno())
            assert state(path) == "published"
            assert info(shared, path)["size_bytes"] == pieces * 10_000
            backing = shared.tiers["nvme"] / there.name / "block"
            assert backing.stat().st_size == pieces * 10_000


# --- several writers


@pytest.mark.semantics("S-write-1")
@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_two_processes_write_one_file(there: Path, flags: int) -> None:
    path = there / "block"
    path.write_bytes(bytes(100))
    script = (
        "import mmap, os, sys\n"
        "path, flags, first = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])\n"
        "fd = os.open(path, os.O_RDWR | flags)\n"
        "page = mmap.mmap(-1, 4096)\n"
        "for n in range(first, 200, 2):\n"
        "    page[:] = n.to_bytes(2, 'little') * 2048\n"
        "    assert os.pwritev(fd, [page], n * 4096) == 4096\n"
        "for n in range(first, 200, 2):\n"
        "    assert os.preadv(fd, [page], n * 4096) == 4096\n"
        "    assert page[:] == n.to_bytes(2, 'little') * 2048, n\n"
    )
    writers = [start_python(script, path, flags, first) for first in (0, 1)]
    assert [writer.wait() for writer in writers] == [0, 0]
    for writer in writers:
        writer.communicate()
    expected = b"".join(n.to_bytes(2, "little") * 2048 for n in range(200))
    assert path.read_bytes() == expected
    wait_sealed(path)
    assert path.read_bytes() == expected


@pytest.mark.semantics("S-publish-4")
def test_a_child_writes_on_through_what_it_inherited(there: Path) -> None:
    """The parent closes and ends; as long as the child has it, the file is not sealed."""
    path = there / "block"
    script = (
        "import os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o644)\n"
        "os.write(fd, b'parent ')\n"
        "if os.fork():\n"
        "    os.close(fd)\n"
        "    os._exit(0)\n"
        "os.write(fd, b'child ')\n"
        "print(os.pread(fd, 100, 0).decode(), flush=True)\n"
        "sys.stdin.readline()\n"
        "os.write(fd, b'again')\n"
    )
    process = start_python(script, path)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"parent child \n"
    assert process.wait() == 0
    sealer_has_passed(there)
    assert state(path) != "sealed"
    assert path.read_bytes() == b"parent child "
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.stdout.read() == b""
    process.stdout.close()
    wait_sealed(path)
    assert path.read_bytes() == b"parent child again"


# --- attributes


@pytest.mark.semantics("S-write-1")
def test_attributes_grow_with_a_file_that_is_being_written(there: Path) -> None:
    path = there / "block"
    with path.open("wb", buffering=0) as writer:
        for number in range(1, 4):
            os.utime(path, ns=(PAST_NS, PAST_NS))
            assert path.stat().st_mtime_ns == PAST_NS
            earliest_ns = time.time_ns() - TICK_NS
            writer.write(b"x" * 1001)
            size = 1001 * number
            with os.scandir(there) as entries:
                assert [entry.name for entry in entries] == ["block"]
            for status in (path.stat(), os.fstat(writer.fileno())):
                assert (status.st_size, status.st_blocks) == (size, -(-size // 512))
                assert earliest_ns <= status.st_mtime_ns <= time.time_ns()
            assert shown_elsewhere(path).split()[0] == str(size)
            assert os.lseek(writer.fileno(), 0, os.SEEK_END) == size


def make(path: Path) -> None:
    path.write_bytes(b"n" * 5003)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"g" * 1234)


def shrink(path: Path) -> None:
    os.truncate(path, 777)


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"r")


def empty(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))


@pytest.mark.semantics("S-attributes-5")
@pytest.mark.parametrize(
    ("change", "size"), [(make, 5003), (grow, 4234), (shrink, 777), (rewrite, 3000), (empty, 0)]
)
def test_attributes_are_right_directly_after_the_close_and_stay(
    shared: MountedKvfs, there: Path, change: Callable[[Path], None], size: int
) -> None:
    path = there / "block"
    if change is not make:
        wait_sealed(publish(path, b"o" * 3000))
        os.utime(path, ns=(PAST_NS, PAST_NS))
        assert path.stat().st_mtime_ns == PAST_NS
    earliest_ns = time.time_ns() - TICK_NS
    change(path)
    after = path.stat()
    assert (after.st_size, after.st_blocks) == (size, -(-size // 512))
    assert earliest_ns <= after.st_mtime_ns <= after.st_ctime_ns <= time.time_ns()
    seen = shown_elsewhere(path)
    assert seen.split()[0] == str(size)
    wait_sealed(path)
    demote(shared, path, "hdd")
    with os.scandir(there) as entries:
        assert [entry.stat().st_size for entry in entries] == [size]
    later = path.stat()
    assert (later.st_size, later.st_blocks) == (after.st_size, after.st_blocks)
    assert later.st_mtime_ns == after.st_mtime_ns
    assert shown_elsewhere(path) == seen


@pytest.mark.parametrize("named", [True, False], ids=["by name", "by handle"])
@pytest.mark.semantics("S-attributes-1")
def test_a_time_that_was_set_while_a_writer_is_there_stays(there: Path, named: bool) -> None:
    """So do cp -p, tar and rsync: write, set the time, close."""
    path = there / "block"
    with path.open("wb", buffering=0) as writer:
        writer.write(b"x" * 100_000)
        os.utime(path if named else writer.fileno(), ns=(PAST_NS, PAST_NS))
        assert os.fstat(writer.fileno()).st_mtime_ns == PAST_NS
    assert path.stat().st_mtime_ns == PAST_NS
    wait_sealed(path)
    assert path.stat().st_mtime_ns == PAST_NS
    with path.open("r+b", buffering=0) as writer:
        os.utime(writer.fileno(), ns=(PAST_NS, PAST_NS + 1))
        writer.write(b"y")
        assert path.stat().st_mtime_ns > PAST_NS + 1
    assert path.stat().st_mtime_ns > PAST_NS + 1


def test_a_new_file_has_one_time_until_it_is_written(there: Path) -> None:
    path = there / "block"
    with path.open("wb") as writer:
        made_ns = os.fstat(writer.fileno()).st_mtime_ns
    assert path.stat().st_mtime_ns == made_ns
    (there / "other").write_bytes(b"")
    shown = subprocess.run(["stat", "-c", "%.9Y", path], check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == f"{made_ns // 10**9}.{made_ns % 10**9:09d}"
    wait_sealed(path)
    os.setxattr(path, "user.note", b"x")
    assert path.stat().st_mtime_ns == made_ns


@pytest.mark.semantics("S-write-3")
def test_what_is_asked_of_a_handle_for_reading_is_refused(there: Path) -> None:
    path = publish(there / "block", b"sealed")
    wait_sealed(path)
    reader = os.open(path, os.O_RDONLY)
    assert refusal_of(partial(os.write, reader, b"x")) == errno.EBADF
    assert refusal_of(partial(os.ftruncate, reader, 0)) == errno.EINVAL
    assert refusal_of(lambda: Mapping(reader, 4, shared=True)) == errno.EACCES
    os.close(reader)
    writer = os.open(path, os.O_WRONLY)
    assert refusal_of(partial(os.read, writer, 1)) == errno.EBADF
    os.close(writer)
    assert path.read_bytes() == b"sealed"
