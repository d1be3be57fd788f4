"""Making and renaming backing files while others remove the directories that are empty."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvfs.catalog.rows import ROOT_INODE
from kvfs.tiers.backing import create_file, rename_into_place
from kvfs.tiers.tier import Tier
from tests.store.helpers import Workbench


@contextmanager
def another_thread(work: Callable[[], None]) -> Iterator[None]:
    """Repeat `work` in a thread until the block ends."""
    done = threading.Event()

    def repeat() -> None:
        while not done.is_set():
            work()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def sweeper(tier: Tier, path: bytes) -> Callable[[], None]:
    """What an unlink of the last block of a directory does to the directories above."""
    return lambda: tier.remove_empty_parents(os.path.dirname(tier.locate(path)))


async def test_a_file_is_made_while_its_directories_are_removed(bench: Workbench) -> None:
    store = await bench.start()
    hdd = store.volume.tiers[1]
    inode = store.volume.catalog.get(ROOT_INODE)
    assert inode is not None
    with another_thread(sweeper(hdd, b"a/b/c/x")):
        for _ in range(2000):
            os.close(create_file(hdd, b"a/b/c/block", False, inode))
            os.unlink(hdd.locate(b"a/b/c/block"))


async def test_a_file_is_renamed_while_its_directories_are_removed(bench: Workbench) -> None:
    store = await bench.start()
    hdd = store.volume.tiers[1]
    source, target = hdd.locate(b"source"), hdd.locate(b"a/b/c/block")
    with another_thread(sweeper(hdd, b"a/b/c/x")):
        for _ in range(2000):
            os.close(os.open(source, os.O_CREAT | os.O_WRONLY))
            rename_into_place(hdd, source, target)
            os.unlink(target)
