"""The rows of the benchmark for onboarding."""

from __future__ import annotations

import os
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from kvfs.errors import DeviceError, InvalidOperation
from kvfs.gpu.probe import probe
from kvfs.gpu.source import BackingFiles
from kvfs.tools.bench_gpu import measure_gpu
from kvfs.tools.bench_onboard import OnboardRow, Shape, compare, onboard_table

SHAPE = Shape(64 << 10, 8, 0.6)


def write_blocks(directory: Path, size_bytes: int) -> list[str]:
    names = [f"{number}.bin" for number in range(SHAPE.blocks)]
    for name in names:
        (directory / name).write_bytes(os.urandom(size_bytes))
    return names


def test_a_row_compares_the_same_blocks(tmp_path: Path) -> None:
    names = write_blocks(tmp_path, SHAPE.block_bytes)
    row = compare(BackingFiles(tmp_path), tmp_path, names, SHAPE, 2)
    assert row.what == "8 x 64 KiB, host"
    assert min(row.onboarder_bytes_per_s, row.base_bytes_per_s, row.ratio) > 0
    assert row.document()["bar"] == 0.6


def test_a_block_that_is_not_whole_ends_the_benchmark(tmp_path: Path) -> None:
    names = write_blocks(tmp_path, SHAPE.block_bytes)
    os.truncate(tmp_path / names[3], 5)
    with pytest.raises(InvalidOperation, match=names[3]):
        compare(BackingFiles(tmp_path), tmp_path, names, SHAPE, 1)


def test_the_table_says_whether_a_bar_is_met() -> None:
    rows = [
        OnboardRow("met", 2e9, "preadv", 2e9, 1.0, 0.9),
        OnboardRow("missed", 1e9, "preadv", 2e9, 0.5, 0.9),
        OnboardRow("none", 1e9, "zstandard, one core", 2e8, 5.0),
    ]
    out = StringIO()
    Console(file=out, width=200).print(onboard_table(rows))
    _, met, missed, none = (" ".join(line.split()) for line in out.getvalue().splitlines())
    assert met == "met 2,000 MB/s 2,000 MB/s 1.00 >= 0.9 ok preadv"
    assert missed == "missed 1,000 MB/s 2,000 MB/s 0.50 >= 0.9 NOT MET preadv"
    assert none == "none 1,000 MB/s 200 MB/s 5.00 zstandard, one core"


def test_without_a_gpu_there_is_nothing_to_measure(tmp_path: Path) -> None:
    if probe().usable:
        pytest.skip("this machine has a GPU")
    with pytest.raises(DeviceError, match="there is no GPU to measure"):
        measure_gpu(tmp_path, 1)
