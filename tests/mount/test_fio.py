"""fio writes with checksums and verifies them, through every engine and both ways of the bytes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.live import MIB, demote, wait_sealed
from tests.mounting import MountedKvfs
from tests.soak import SOAKING, longer

FILE_MIB = 8
# A soak writes each file over and over.
LOOPS = longer(1)
RUN_TIMEOUT_S = None if SOAKING else 60


def fio(directory: Path, *jobs: str, **options: object) -> list[dict[str, object]]:
    """Run jobs side by side, each on a file of its own; what fio says of each.

    `verify_fatal` ends a job at the first block that is not what was written.
    """
    shared = {
        "directory": directory, "size": f"{FILE_MIB}m", "fallocate": "none", "verify": "crc32c",
        "verify_fatal": 1, "do_verify": 1, "verify_state_save": 0, "loops": LOOPS, "thread": 1,
        "randseed": 7, **options,
    }  # fmt: skip
    command = ["fio", "--output-format=json", *(f"--{key}={shared[key]}" for key in shared)]
    for job in jobs:
        command += [f"--name={job}", f"--rw={job}"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=RUN_TIMEOUT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return list(json.loads(done.stdout)["jobs"])


@pytest.fixture(autouse=True)
def room(there: Path) -> Iterator[None]:
    """The next test finds the fastest tier empty."""
    yield
    for path in there.iterdir():
        path.unlink()


def check(results: list[dict[str, object]]) -> None:
    """All was written, all was read back, nothing was wrong."""
    for job in results:
        assert job["error"] == 0
        for way in ("write", "read"):
            did = job[way]
            assert isinstance(did, dict)
            # Of the last bytes fio leaves those for which its sizes are too large.
            assert did["io_bytes"] > (FILE_MIB - 1) * MIB, (job["jobname"], way)


@pytest.mark.soak
@pytest.mark.parametrize("direct", [0, 1], ids=["buffered", "direct"])
@pytest.mark.parametrize("engine", ["psync", "libaio"])
def test_fio_reads_back_what_it_wrote(there: Path, engine: str, direct: int) -> None:
    options = {"ioengine": engine, "direct": direct, "iodepth": 1 if engine == "psync" else 8}
    check(fio(there, "write", "randwrite", **options, bs="64k", verify_backlog=64))
    check(fio(there, "write", "randwrite", **options, bs="4k"))


@pytest.mark.soak
def test_fio_reads_back_what_it_wrote_through_mappings(there: Path) -> None:
    check(fio(there, "write", "randwrite", ioengine="mmap", bs="16k"))


@pytest.mark.soak
def test_fio_writes_and_reads_in_odd_sizes(there: Path) -> None:
    check(fio(there, "write", "randwrite", ioengine="psync", bsrange="512-200k", bs_unaligned=1))


@pytest.mark.soak
@pytest.mark.parametrize("tier", ["nvme", "hdd", "remote"])
def test_fio_verifies_what_has_moved_and_overwrites_it(
    shared: MountedKvfs, there: Path, tier: str
) -> None:
    options = {"ioengine": "psync", "bs": "32k"}
    for direct in (0, 1):
        check(fio(there, "randwrite", **options, direct=direct))
        for path in there.iterdir():
            wait_sealed(path)
        if tier != "nvme":
            assert demote(shared, there, tier)["skipped"] == []
        only_read = fio(there, "randwrite", **options, direct=direct, verify_only=1)
        assert [job["error"] for job in only_read] == [0]


def test_fio_notices_a_wrong_byte(there: Path) -> None:
    """Else the tests above would prove nothing."""
    options = {"ioengine": "psync", "bs": "32k"}
    check(fio(there, "write", **options))
    (path,) = there.iterdir()
    with path.open("r+b") as file:
        file.seek(FILE_MIB * MIB // 2 + 1000)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(AssertionError, match="verify"):
        fio(there, "write", **options, verify_only=1)
