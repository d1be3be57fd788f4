"""Fan-out: names that a directory of a tier refuses, though the tier has room, lie one level down.

ext4 does that: the index of a directory has two levels, and takes so many names.
"""

from __future__ import annotations

import errno
import os

from kvfs import layout
from kvfs.catalog.catalog import Catalog
from kvfs.catalog.rows import Intent, Kind
from kvfs.tiers.space import PAGE_BYTES
from kvfs.tiers.tier import Tier

# The directories of the fan-out and the file.
INODES = 3


async def refuses_name(tier: Tier, error: OSError) -> bool:
    """Whether it was the name that a tier had no room for: bytes and inodes are free."""
    if error.errno != errno.ENOSPC:
        return False
    status = await tier.run(os.statvfs, tier.root)
    free_inodes = status.f_favail if status.f_files else INODES
    return status.f_bavail * status.f_frsize >= PAGE_BYTES and free_inodes >= INODES


async def redirect(catalog: Catalog, tier: Tier, intent: Intent, error: OSError) -> Intent:
    """After a rename was refused: one to where the name is fanned out, in the catalog too.

    Raises `error` when it was not the name, or cannot be fanned out: a directory.
    """
    assert intent.target is not None, "a rename has a target"
    path, fanned = layout.logical_path(intent.target)
    if fanned or intent.target == intent.path or not await refuses_name(tier, error):
        raise error
    inode = catalog.get(intent.inode)
    if inode is None or inode.kind != Kind.BLOCK:
        raise error
    target = layout.stored_path(path, fanned=True)
    with catalog.transaction("fan_out_rename"):
        if catalog.path_of(inode.id) == path:
            catalog.set_fanned(inode.id, tier.number, True)
        catalog.intents.retarget(intent.id, target)
    return intent._replace(target=target)
