"""Who asks, and what the mode and owner of a file let him do: the kernel's rule, for those who come
by the control socket instead of the mount. Pure."""

from __future__ import annotations

import stat
from dataclasses import dataclass

from kvfs.catalog.rows import Inode

READ, WRITE, SEARCH = 4, 2, 1
ROOT_UID = 0


@dataclass(frozen=True, slots=True)
class Credentials:
    """Effective user and group, and the supplementary groups, as the kernel says them."""

    uid: int
    gid: int
    groups: frozenset[int] = frozenset()

    def may(self, inode: Inode, wanted: int) -> bool:
        """Whether the permission bits allow all that is wanted. Only the first class that fits
        counts: an owner without a permission does not get it from his group."""
        if self.uid == ROOT_UID:
            return True
        if self.uid == inode.uid:
            granted = inode.mode >> 6
        elif inode.gid == self.gid or inode.gid in self.groups:
            granted = inode.mode >> 3
        else:
            granted = inode.mode
        return granted & wanted == wanted

    def may_replace(self, directory: Inode, inode: Inode) -> bool:
        """Whether a name in this directory may be given to another file."""
        sticky = directory.mode & stat.S_ISVTX
        ours = self.uid in (ROOT_UID, inode.uid, directory.uid)
        return self.may(directory, WRITE | SEARCH) and (ours or not sticky)


def inherited(
    directory: Inode | None, mode: int, gid: int, *, is_directory: bool = False
) -> tuple[int, int]:
    """Mode and group of a new file: a set-group-id directory passes its group on."""
    if directory is None or not directory.mode & stat.S_ISGID:
        return mode, gid
    return mode | (stat.S_ISGID if is_directory else 0), directory.gid
