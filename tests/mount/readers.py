"""Reader processes: each opens, reads and verifies blocks of a directory until it is told to end.

Run as `python -m tests.mount.readers DIRECTORY SEED`; it ends when its standard input closes, and
prints how many blocks it read. A block's content follows from its name, so nothing is shared. The
first open that fails or byte that is wrong ends it with status 1 and one line.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import select
import sys
from collections.abc import Callable
from pathlib import Path

PIECE_BYTES = 64 << 10


def content_of(name: str) -> bytes:
    """The bytes of a block: from none to 256 KiB, not of whole pages."""
    size = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") % (256 << 10)
    return hashlib.shake_128(name.encode()).digest(size)


def read_whole(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def read_in_pieces(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        pieces = []
        while piece := os.read(descriptor, PIECE_BYTES):
            pieces.append(piece)
        return b"".join(pieces)
    finally:
        os.close(descriptor)


def read_direct(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 256 << 10) as buffer:
            return buffer[: os.preadv(descriptor, [buffer], 0)]
    finally:
        os.close(descriptor)


def read_mapped(path: str) -> bytes:
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return b""
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return view[:]


WAYS: tuple[Callable[[str], bytes], ...] = (read_whole, read_in_pieces, read_direct, read_mapped)


def read_until_told(directory: Path, seed: int) -> int:
    """How many blocks were read. Raises OSError, AssertionError."""
    dice = random.Random(seed)
    expected = {entry.path: content_of(entry.name) for entry in os.scandir(directory)}
    paths, count = sorted(expected), 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        path, way = dice.choice(paths), dice.choice(WAYS)
        found = way(path)
        what = f"{path}: {way.__name__} gave {len(found)} bytes that are not its content"
        assert found == expected[path], what
        count += 1
    return count


def main() -> None:
    try:
        print(read_until_told(Path(sys.argv[1]), int(sys.argv[2])))
    except (OSError, AssertionError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
