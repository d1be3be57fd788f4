"""When a mountpoint is taken for one whose daemon is gone."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs.mount.session import is_dead


@pytest.mark.parametrize(
    ("answers", "dead"),
    [
        ([None], False),
        ([errno.ENOTCONN], True),
        ([errno.EACCES], False),
        ([errno.ECONNABORTED, errno.ENOTCONN], True),
        ([errno.ECONNABORTED, errno.ECONNABORTED, None], False),
    ],
)
def test_what_the_kernel_answers_decides(
    answers: list[int | None], dead: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    left: Iterator[int | None] = iter(answers)

    def listdir(path: Path) -> list[str]:
        assert path == tmp_path
        number = next(left)
        if number is not None:
            raise OSError(number, os.strerror(number))
        return []

    monkeypatch.setattr("kvfs.mount.session.os.listdir", listdir)
    assert is_dead(tmp_path) is dead
