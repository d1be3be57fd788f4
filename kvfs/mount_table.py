"""What is mounted where, as the kernel tells without asking any of the filesystems.

`stat` of a mount that is dead or hangs fails or hangs too; the table does neither.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import msgspec

# Filesystems whose server is the kernel itself: what lies elsewhere may not answer.
LOCAL_FILESYSTEMS = frozenset(
    {"bcachefs", "btrfs", "devtmpfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs", "iso9660",
     "ntfs3", "overlay", "proc", "ramfs", "squashfs", "sysfs", "tmpfs", "vfat", "xfs", "zfs"}
)  # fmt: skip
LINKS_FOLLOWED = 40
_OCTAL_ESCAPE = re.compile(rb"\\([0-7]{3})")


class MountEntry(msgspec.Struct, frozen=True):
    """One line of mountinfo; `root` is the directory of the filesystem that is mounted there."""

    mountpoint: bytes
    root: bytes
    fstype: str


def entries(mountinfo: Path = Path("/proc/self/mountinfo")) -> list[MountEntry]:
    """Every mount that this process sees, those above others after them."""
    found = []
    for line in mountinfo.read_bytes().splitlines():
        fields, _, source = line.partition(b" - ")
        _, _, _, root, mountpoint, *_ = fields.split(b" ")
        fstype = source.split(b" ")[0].decode("ascii", "replace")
        found.append(MountEntry(_unescape(mountpoint), _unescape(root), fstype))
    return found


def _unescape(field: bytes) -> bytes:
    return _OCTAL_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field)


def resolve(path: Path) -> Path:
    """`Path.resolve` that asks no filesystem which may hang: from its mountpoint on, the path is
    taken as it is written. Raises OSError(ELOOP)."""
    distant = {entry.mountpoint for entry in entries() if entry.fstype not in LOCAL_FILESYSTEMS}
    pending = os.fsencode(path.absolute()).split(b"/")
    current, followed = b"/", 0
    while pending:
        name = pending.pop(0)
        if name in (b"", b"."):
            continue
        if name == b"..":
            current = os.path.dirname(current)
            continue
        following = os.path.join(current, name)
        if following in distant:
            return Path(os.fsdecode(os.path.normpath(os.path.join(following, *pending))))
        try:
            target = os.readlink(following)
        except OSError:
            current = following  # no link, or nothing there
            continue
        followed += 1
        if followed > LINKS_FOLLOWED:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        pending = target.split(b"/") + pending
        current = b"/" if target.startswith(b"/") else current
    return Path(os.fsdecode(current))
