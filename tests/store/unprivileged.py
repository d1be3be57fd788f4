"""The life of blocks under a daemon that is not root: `python -m tests.store.unprivileged DIR UID`.

A process of its own, because a user cannot be changed back.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import trio

from kvfs.config import Config, MountConfig, TierConfig, TieringConfig
from tests.store.helpers import (
    Workbench,
    assert_consistent,
    file_on,
    move,
    put,
    put_on,
    read,
    rewrite,
    row_at,
    seal_all,
)

MIB = 1 << 20


async def scenario(bench: Workbench) -> None:
    """Every change of a file that is sealed, on a tier with xattrs and on one without."""
    bench.without_xattrs("remote")
    store = await bench.start()
    for tier in ("nvme", "hdd", "remote"):
        path = b"d/" + tier.encode()
        inode = await put_on(store, path, b"first" * 1000, tier)
        assert stat.S_IMODE(file_on(store, tier, path).stat().st_mode) == 0o444
        await store.attributes.set_xattr(inode, b"user.foreign", b"1")
        await store.attributes.set_xattr(inode, b"user.foreign", b"2")
        await store.attributes.remove_xattr(inode, b"user.foreign")
        await store.attributes.set(inode, mtime_ns=1_000_000_000)
        await rewrite(store, path, b"OTHER")
        await seal_all(store)
        # A block that nobody may read is still kvfs' to move.
        await store.attributes.set(inode, mode=0)
        assert (await read(store, path)).startswith(b"OTHERfirst")
        assert row_at(store, path).mode == 0
        if tier == "nvme":
            await move(store, "demote", path, "nvme", "hdd")
        else:
            await move(store, "promote", path, tier, "nvme")
        await rewrite(store, path, b"THIRD")
        await seal_all(store)
    await put(store, b"left", b"data", 0o200)
    await assert_consistent(store)
    bench.stop(store)
    bench.lose_catalog()
    store = await bench.start()
    assert row_at(store, b"d/hdd").mode == 0
    assert (await read(store, b"d/hdd")).startswith(b"THIRDfirst")
    await assert_consistent(store)
    bench.stop(store)


def main() -> None:
    base, uid = Path(sys.argv[1]), int(sys.argv[2])
    tiers = []
    for name in ("nvme", "hdd", "remote"):
        path = base / name
        path.mkdir()
        os.chown(path, uid, uid)
        tiers.append(TierConfig(name, path, "nvme" if name == "nvme" else "hdd", 64 * MIB))
    config = Config(tuple(tiers), TieringConfig(), MountConfig())
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    trio.run(scenario, Workbench(lambda: config))
    print("done")


if __name__ == "__main__":
    main()
