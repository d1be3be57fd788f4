"""An outside witness of tier capacities: the most bytes each directory ever had allocated.

Owns nothing of kvfs and asks it nothing: it walks the directories and adds up what the filesystem
says each regular file occupies. `python -m kvfs.tools.watch_capacity TIERDIR... --json OUT` makes
OUT when it begins, samples until SIGTERM or SIGINT, and then writes OUT.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer

STAT_BLOCK_BYTES = 512


class TierPeak(msgspec.Struct):
    """The largest sample of one directory."""

    path: str
    max_allocated_bytes: int = 0
    last_allocated_bytes: int = 0


class Watch(msgspec.Struct):
    """All samples so far; owned by the loop in `watch`."""

    tiers: list[TierPeak]
    samples: int = 0
    longest_sample_s: float = 0.0

    def sample(self) -> None:
        started_s = time.monotonic()
        for tier in self.tiers:
            tier.last_allocated_bytes = allocated_bytes(tier.path)
            tier.max_allocated_bytes = max(tier.max_allocated_bytes, tier.last_allocated_bytes)
        self.samples += 1
        self.longest_sample_s = max(self.longest_sample_s, time.monotonic() - started_s)


def allocated_bytes(directory: str) -> int:
    """Bytes that the regular files below `directory` occupy; files may vanish meanwhile."""
    total = 0
    pending = [directory]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    else:
                        total += _file_bytes(entry)
        except (FileNotFoundError, NotADirectoryError):
            continue
    return total


def _file_bytes(entry: os.DirEntry[str]) -> int:
    try:
        if not entry.is_file(follow_symlinks=False):
            return 0
        return entry.stat(follow_symlinks=False).st_blocks * STAT_BLOCK_BYTES
    except FileNotFoundError:
        return 0


def watch(directories: Sequence[str], interval_s: float, ended: Callable[[float], bool]) -> Watch:
    """Sample every `interval_s`, and once more after `ended`, which waits so long, says so."""
    state = Watch([TierPeak(path) for path in directories])
    wait_s = 0.0
    while not ended(wait_s):
        next_s = time.monotonic() + interval_s
        state.sample()
        wait_s = max(0.0, next_s - time.monotonic())
    state.sample()
    return state


def main(
    directories: Annotated[list[Path], typer.Argument(exists=True, file_okay=False)],
    json_file: Annotated[Path, typer.Option("--json", help="Where the result goes.")],
    interval_ms: Annotated[int, typer.Option(min=1)] = 50,
) -> None:
    """Record the largest allocated size of each directory until SIGTERM."""
    ending = (signal.SIGTERM, signal.SIGINT)
    # Waited for instead of handled: a handler could run while its own event is locked.
    signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    json_file.write_bytes(b"")
    result = watch(
        [str(path) for path in directories],
        interval_ms / 1000,
        lambda wait_s: signal.sigtimedwait(ending, wait_s) is not None,
    )
    json_file.write_bytes(msgspec.json.encode(result))


if __name__ == "__main__":
    typer.run(main)
