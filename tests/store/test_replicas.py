"""Promises to change a tier's files: who carries them out, and that nobody does it twice."""

from __future__ import annotations

import trio
import trio.testing

from tests.store.helpers import Workbench, assert_consistent, move, put


async def test_a_promise_that_was_kept_meanwhile_is_not_mistaken_for_a_later_one(
    bench: Workbench,
) -> None:
    """The settling service waits for a claim; when it gets it, the promise is done, and another
    one has been made for another tier."""
    store = await bench.start()
    catalog, replicas = store.volume.catalog, store.replicas
    hdd, remote = store.volume.tier_named("hdd"), store.volume.tier_named("remote")
    inodes = {}
    for path in (b"d/a", b"d/b"):
        inodes[path] = await put(store, path, b"x" * 5000)
        await move(store, "promote", path, "nvme", "hdd")
        await move(store, "promote", path, "nvme", "remote")

    def promise(path: bytes, tier: int) -> int:
        gone = [r for r in catalog.replicas(inodes[path]) if r.tier == tier]
        return replicas.forget_replicas(inodes[path], path, gone)[tier]

    async with trio.open_nursery() as nursery, store.volume.claims.hold(b"d/a"):
        first = promise(b"d/a", hdd.number)
        nursery.start_soon(replicas.settle, hdd)
        await trio.testing.wait_all_tasks_blocked()
        hdd.remove(b"d/a", fanned=False)
        replicas.finish(hdd, first)
        catalog.intents.flush()
        second = promise(b"d/b", remote.number)
        held_bytes = store.volume.space[remote.index].held_bytes
    assert second != first
    assert store.volume.space[hdd.index].held_bytes == 0
    assert store.volume.space[remote.index].held_bytes == held_bytes > 0
    assert [intent.id for intent in catalog.intents.left(remote.number)] == [second]
    await replicas.settle(remote)
    assert not (remote.config.path / "d/b").exists()
    await assert_consistent(store)
