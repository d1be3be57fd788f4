"""Fetching: a remote or compressed block, whole and raw, into local staging, so that no later read
of it can fail."""

from __future__ import annotations

from kvfs.catalog.rows import RAW
from kvfs.errors import StagingFailed
from kvfs.tiers.backing import Expected, fetch_file
from kvfs.tiers.space import rounded
from kvfs.volume.open_block import OpenBlock
from kvfs.volume.volume import Volume


async def fetch(
    volume: Volume, block: OpenBlock, path: bytes, fanned: bool, expected: Expected | None
) -> int:
    """A descriptor of the copy, whose room `block` holds then.

    -1 when the fastest tier cannot take it: the block is then read where it lies. Raises
    BlockCorrupt, TierOffline, OSError.
    """
    local = volume.tiers[0]
    if local.remote or expected is None:
        return -1
    reservation = volume.space.reserve(local.index, rounded(expected.size_bytes))
    if reservation is None:
        return -1
    # Its bytes are read here anyway, so it is checked at each open; one that is decoded always is.
    verify = expected.codec == RAW and volume.config.tiering.verify != "never"
    try:
        descriptor = await block.tier.run_open(
            fetch_file, block.tier, path, fanned, expected, local, verify,
            patient=not block.tier.remote,
        )  # fmt: skip
    except StagingFailed as error:
        reservation.release()
        volume.incidents.note(
            "fetches_unstaged", f"fetching: {error}", reason=error.reason, tier=local.name
        )
        return -1
    except BaseException:
        reservation.release()
        raise
    block.reservation = reservation
    return descriptor
