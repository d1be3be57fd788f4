"""What the daemon shows of itself while something is under way."""

from __future__ import annotations

import msgspec
import pytest

from kvfs.views import Views
from tests.store.helpers import Workbench, during_copy, move, put, seal_all


async def test_the_statistics_show_a_move_that_is_under_way(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await bench.start()
    await put(store, b"d/a", b"x" * 10_000)
    await seal_all(store)
    views = Views(store, "", "")
    seen: list[object] = []

    async def look() -> None:
        document = msgspec.json.decode(msgspec.json.encode(views.statistics()))
        seen.extend(document["moves"]["running"])

    during_copy(monkeypatch, look)
    await move(store, "demote", b"d/a", "nvme", "hdd")
    assert seen == [
        {"kind": "demote", "path": "d/a", "source": "nvme", "target": "hdd",
         "size_bytes": 10_000, "done_bytes": 10_000}
    ]  # fmt: skip
    assert views.statistics()["moves"]["running"] == []
