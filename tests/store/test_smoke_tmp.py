import os
from tests.store.helpers import *
async def test_it(bench):
    store = await bench.start()
    await put(store, b"d/a", b"x"*10000)
    await put(store, b"e/b", b"y"*10000)
    f = file_on(store, "nvme", b"d/a")
    print(os.stat(f).st_blocks*512, store.volume.space[0])
    assert await read(store, b"d/a") == b"x"*10000
    await move(store, "demote", b"d/a", "nvme", "hdd")
    f = file_on(store, "hdd", b"d/a")
    print(os.stat(f).st_blocks*512, store.volume.space[1])
    await assert_consistent(store)
    bench.stop(store)
    bench.lose_catalog()
    store = await bench.start()
    await assert_consistent(store)
    print(tiers_of(store, b"d/a"), tiers_of(store, b"e/b"))
