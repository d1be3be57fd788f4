"""Copying bytes between files, while somebody changes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvfs.errors import BlockBusy
from kvfs.tiers.copying import PIECE_BYTES, copy_file


def test_a_file_that_is_cut_while_it_is_copied_is_busy_and_not_broken(tmp_path: Path) -> None:
    path = tmp_path / "source"
    path.write_bytes(bytes(3 * PIECE_BYTES))
    with (
        path.open("rb") as source,
        (tmp_path / "target").open("wb") as target,
        pytest.raises(BlockBusy),
    ):
        copy_file(source.fileno(), target.fileno(), lambda _: os.truncate(path, 5))
