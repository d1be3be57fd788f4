"""What the tiers know better than a catalog that is behind them.

After a power loss the catalog may lack its last transactions: a name may hold a later block than
the catalog knows, and what it promises may have been done long ago. Seal records tell, because
numbers of inodes and generations only grow. Blocking functions, for `Tier.run`.
"""

from __future__ import annotations

import contextlib
import stat

from kvfs.catalog.rows import Inode, Intent
from kvfs.tiers.seal import Seal
from kvfs.tiers.tier import Tier


def is_another(seal: Seal, row: Inode) -> bool:
    """Whether a record is not of this row: of another block, or of a later generation.

    A block that got a new number may still have the old one in its record.
    """
    if seal.inode == row.id:
        return seal.generation > row.generation
    return seal.checksum != row.checksum


def holds_another(tier: Tier, absolute: bytes, row: Inode) -> bool:
    """Whether the file at the place of a block is whole, and not its own any more."""
    seal = None
    with contextlib.suppress(FileNotFoundError):
        seal = tier.read_fitting_seal(absolute)
    return seal is not None and is_another(seal, row)


def holds(tier: Tier, absolute: bytes, inode: int) -> bool:
    """Whether a file is this block's, as its seal record says."""
    seal = tier.read_seal(absolute)
    return seal is not None and seal.inode == inode


def is_overtaken(tier: Tier, intent: Intent, *, alive: bool) -> bool:
    """Whether an intent may have been carried out before, and its names be others' by now.

    Of a block that is `alive` no file is removed: it may have come back as the only one. A
    directory has no record: what has the new name is taken for the one that was renamed.
    """
    path = tier.root + b"/" + intent.path
    seal = tier.read_seal(path)
    if intent.target is None:
        return alive or (seal is not None and seal.inode != intent.inode)
    target = tier.root + b"/" + intent.target
    if not tier.files.exists(path) or not tier.files.exists(target):
        return seal is not None and seal.inode != intent.inode
    if stat.S_ISDIR(tier.files.status(path).st_mode):
        return True
    replaced = tier.read_seal(target)
    later = replaced is not None and replaced.inode >= intent.inode
    return later or (seal is not None and seal.inode != intent.inode)
