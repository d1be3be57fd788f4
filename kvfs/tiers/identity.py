"""What a tier is known by: the identity in its `tier.json`, and what its filesystem can do.

A tier is a directory with an identity, whatever path it has. Blocking functions.
"""

from __future__ import annotations

import mmap
import os
import time
import uuid as uuidlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from kvfs import failpoints, layout
from kvfs.errors import TierError
from kvfs.tiers.beneath import Root
from kvfs.tiers.seal import no_writer_left

# 2: shorter seal records (kvfs/tiers/seal.py), which who knows only 1 takes for none.
FORMAT_VERSION = 2
PROBE_FILE = layout.STAGING_DIR + b"/probe"
# Some members: a hundred tiers would fit.
IDENTITY_BYTES = 64 << 10


class Probe(msgspec.Struct, frozen=True):
    """What the tier's filesystem was found to support."""

    xattrs: bool
    o_direct: bool
    leases: bool
    name_max: int


# What is assumed of a remote tier that is away at mount, until it comes and says.
ABSENT = Probe(xattrs=True, o_direct=False, leases=False, name_max=255)


class Member(msgspec.Struct, frozen=True):
    """A tier that belongs to the same catalog."""

    name: str
    path: str


class TierIdentity(msgspec.Struct, frozen=True):
    """The content of `tier.json`. A known tier without it is an unmounted disk."""

    uuid: str
    format_version: int
    created_at: float
    probe: Probe
    adopt: bool = False
    # How often this set of tiers was mounted: a catalog that counts fewer is an old one.
    mounts: int = 0
    members: dict[str, Member] = {}


def read_identity(path: Path) -> TierIdentity:
    """The identity of the tier at `path`. Raises FileNotFoundError or TierError."""
    root = Root(os.fsencode(path))
    file = path / os.fsdecode(layout.IDENTITY_FILE)
    try:
        data = root.read(_below(root, layout.IDENTITY_FILE), IDENTITY_BYTES)
        identity = msgspec.json.decode(data, type=TierIdentity)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TierError(f"{file}: not a kvfs tier identity ({error})") from None
    if identity.format_version > FORMAT_VERSION:
        raise TierError(f"{file}: written by a newer kvfs; upgrade kvfs to use this tier")
    return identity


def write_identity(path: Path, identity: TierIdentity) -> None:
    """Replace the identity atomically and durably."""
    root = Root(os.fsencode(path))
    file = _below(root, layout.IDENTITY_FILE)
    root.write(file + b".new", msgspec.json.format(msgspec.json.encode(identity), indent=2))
    failpoints.hit("identity.written")
    root.rename(file + b".new", file)
    failpoints.hit("identity.replaced")
    root.sync_directory(os.path.dirname(file))
    root.sync_directory(root.path)


def init_tier(path: Path, *, adopt: bool = False) -> TierIdentity:
    """Make `path` a tier: its private directories and a new identity.

    Raises TierError when it already is one, is no directory, or holds files and `adopt` is false.
    With `adopt` the next mount takes over what lies there.
    """
    if not path.is_dir():
        raise TierError(f"{path}: no such directory; create it or mount its disk first")
    root = Root(os.fsencode(path))
    if root.exists(_below(root, layout.IDENTITY_FILE)):
        raise TierError(f"{path}: is a kvfs tier already")
    if not adopt and not is_empty(path):
        raise TierError(
            f"{path}: not empty and not a kvfs tier; to take over what lies there run "
            f"`kvfs tier init {path} --adopt`"
        )
    make_private_directories(root)
    identity = TierIdentity(
        uuid=str(uuidlib.uuid4()),
        format_version=FORMAT_VERSION,
        created_at=time.time(),
        probe=probe_filesystem(path),
        adopt=adopt,
    )
    write_identity(path, identity)
    return identity


def make_private_directories(root: Root) -> None:
    """kvfs' own directories of a tier, where they are missing."""
    for directory in (
        layout.PRIVATE_DIR,
        layout.STAGING_DIR,
        layout.QUARANTINE_DIR,
        layout.META_DIR,
    ):
        root.make_directories(_below(root, directory), 0o700)
        failpoints.hit("init.directory_made")


def is_empty(path: Path) -> bool:
    """Nothing there but what mkfs leaves, or a tier that a crash kept from being made."""
    names = set(os.listdir(path)) - {"lost+found"}
    return names <= {os.fsdecode(layout.PRIVATE_DIR)} and not set(_private_files(path)) - {
        path / os.fsdecode(begun) for begun in (PROBE_FILE, layout.IDENTITY_FILE + b".new")
    }


def _private_files(path: Path) -> Iterator[Path]:
    for directory, _, names in os.walk(path / os.fsdecode(layout.PRIVATE_DIR)):
        yield from (Path(directory, name) for name in names)


def probe_filesystem(path: Path) -> Probe:
    """Find out by trying what the filesystem of `path` supports."""
    root = Root(os.fsencode(path))
    scratch = _below(root, PROBE_FILE)
    root.write(scratch, bytes(4096))
    try:
        return Probe(
            xattrs=_supports(root, scratch, os.O_RDONLY, _set_xattr),
            o_direct=_supports(root, scratch, os.O_RDONLY | os.O_DIRECT, _read_direct),
            leases=_supports(root, scratch, os.O_RDONLY, no_writer_left),
            name_max=os.statvfs(path).f_namemax,
        )
    finally:
        root.unlink(scratch)


def _below(root: Root, stored: bytes) -> bytes:
    return root.path + b"/" + stored


def _supports(root: Root, scratch: bytes, flags: int, attempt: Callable[[int], object]) -> bool:
    try:
        descriptor = root.open(scratch, flags)
    except OSError:
        return False
    try:
        attempt(descriptor)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _set_xattr(descriptor: int) -> None:
    os.setxattr(descriptor, "user.kvfs.probe", b"1")


def _read_direct(descriptor: int) -> None:
    with mmap.mmap(-1, 4096) as buffer:
        os.preadv(descriptor, [buffer], 0)
