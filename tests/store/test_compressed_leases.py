"""Leases of compressed replicas: which codec a client is told, and that they stay."""

from __future__ import annotations

import pytest

from kvfs.catalog.rows import RAW, ZSTD
from kvfs.tiers.codec import open_compressed
from tests.store.borrowing import Borrower
from tests.store.helpers import (
    Workbench,
    assert_consistent,
    move,
    put_on,
    read,
    rewrite,
    row_at,
    seal_all,
    settle_all,
)
from tests.store.packing import SLOWER, text_of

# --- moves


@pytest.mark.parametrize("tier", SLOWER)
@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
async def test_a_lease_hands_it_out_with_its_codec(
    packing: Workbench, tier: str, direct: bool
) -> None:
    """That of a local tier as it is, that of a remote one fetched, and raw then."""
    store = await packing.start()
    data = text_of(600_000)
    await put_on(store, b"a", data, tier)
    borrower = Borrower(store)
    got = await borrower.lease(b"a", direct=direct)
    (loan,) = borrower.loans
    assert (loan.codec, loan.row.size_bytes) == (ZSTD if tier == "hdd" else RAW, len(data))
    assert loan.direct == direct
    if tier == "hdd":
        block = open_compressed(got.descriptors[0])
        assert block.read(0, len(data)) == data
        assert loan.row.checksum == block.checksum
    else:
        assert got.read() == data
    assert await read(store, b"a") == data, "a reader joins"
    await move(store, "promote", b"a", tier, "nvme")
    await borrower.give_back(got)
    assert await read(store, b"a") == data
    await assert_consistent(store)


async def test_a_lease_of_a_block_that_is_read_from_staging_is_raw(packing: Workbench) -> None:
    store = await packing.start()
    data = text_of(600_000)
    await put_on(store, b"a", data, "hdd")
    block = await store.blocks.open_reader(row_at(store, b"a").id)
    assert block.fetched
    borrower = Borrower(store)
    got = await borrower.lease(b"a")
    assert borrower.loans[0].codec == RAW
    assert got.read() == data
    await store.blocks.close(block, writer=False)
    await borrower.give_back(got)
    await assert_consistent(store)


async def test_a_leased_block_that_is_written_to_stays_as_it_was_for_the_client(
    packing: Workbench,
) -> None:
    store = await packing.start()
    data = text_of(600_000)
    await put_on(store, b"a", data, "hdd")
    borrower = Borrower(store)
    got = await borrower.lease(b"a")
    await rewrite(store, b"a", b"new")
    await seal_all(store)
    await settle_all(store)
    assert open_compressed(got.descriptors[0]).read(0, len(data)) == data
    await borrower.give_back(got)
    assert await read(store, b"a") == b"new" + data[3:]
    await assert_consistent(store)
