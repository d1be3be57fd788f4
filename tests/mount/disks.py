"""Small disks of their own for tests that fill one: ext4 in a file, on a loop device."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MIB = 1 << 20


@contextmanager
def disk(base: Path, name: str, size_mib: int, *mkfs_options: str) -> Iterator[Path]:
    """The mountpoint of an ext4 of this size below `base`; options go to mkfs.ext4(8)."""
    if os.geteuid() != 0:
        pytest.skip("mounting a disk image needs root")
    image, mountpoint = base / f"{name}.img", base / name
    mountpoint.mkdir()
    with image.open("wb") as file:
        file.truncate(size_mib * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", *mkfs_options, image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mountpoint], check=True)
    try:
        yield mountpoint
    finally:
        subprocess.run(["umount", mountpoint], check=True)


def free_bytes(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def fill(path: Path, left_bytes: int = 0) -> Path:
    """Somebody else fills a disk; the file to remove again."""
    foreign = path / "of-somebody-else"
    with foreign.open("wb", buffering=0) as file:
        # Where nothing is to be left the rest is written: fallocate wants it in few pieces.
        at_once = free_bytes(path) - max(left_bytes, 4 * MIB)
        if at_once > 0:
            os.posix_fallocate(file.fileno(), 0, at_once)
        file.seek(0, os.SEEK_END)
        with contextlib.suppress(OSError):
            while free_bytes(path) > left_bytes:
                file.write(bytes(64 << 10))
        os.fsync(file.fileno())
    return foreign
