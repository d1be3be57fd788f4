"""Backing files of blocks on a tier: make, open, rename, fetch. Functions for `Tier.run`."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, TypeVar

from kvfs import failpoints, layout
from kvfs.catalog.rows import RAW, Inode
from kvfs.errors import BlockCorrupt, BlockTorn, StagingFailed
from kvfs.tiers.checksum import Digest
from kvfs.tiers.copying import copy_file
from kvfs.tiers.deadlines import is_wanted
from kvfs.tiers.forms import check_looks, is_readable, transfer
from kvfs.tiers.tier import UNSEALED_MODE, Tier, give_owner

T = TypeVar("T")


def create_file(tier: Tier, path: bytes, fanned: bool, inode: Inode) -> int:
    """A new backing file, open for reading and writing. Blocking.

    A file that is there already belongs to no block (the catalog was asked): its readers keep it,
    its name goes.
    """
    failpoints.hit("file.making")
    absolute = tier.locate(path, fanned)
    descriptor = in_directory(tier, absolute, lambda: _open_new(tier, absolute))
    try:
        give_owner(descriptor, inode.uid, inode.gid)
        if not is_wanted():
            _withdraw(tier, absolute, descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    failpoints.hit("file.made")
    return descriptor


def _withdraw(tier: Tier, absolute: bytes, descriptor: int) -> None:
    """A file that was asked for too long ago goes, unless its name is another's by now."""
    if tier.files.status(absolute).st_ino == os.fstat(descriptor).st_ino:
        tier.files.unlink(absolute)
    raise TimeoutError(errno.ETIMEDOUT, "nobody waits for this file any more")


def continue_file(tier: Tier, path: bytes, fanned: bool, inode: Inode, source: int) -> int:
    """A new backing file with what `source` has so far; nothing is left when that fails. Blocking.

    The source is duplicated: its number may be another file's when a slow tier answers at last.
    """
    source = os.dup(source)
    try:
        descriptor = create_file(tier, path, fanned, inode)
        try:
            copy_file(source, descriptor)
            failpoints.hit("spill.copied")
        except BaseException:
            os.close(descriptor)
            tier.remove(path, fanned)
            raise
    finally:
        os.close(source)
    return descriptor


def _open_new(tier: Tier, absolute: bytes) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    try:
        return tier.files.open(absolute, flags, UNSEALED_MODE)
    except FileExistsError:
        if not is_wanted():
            raise
        _make_way(tier, absolute)
        return tier.files.open(absolute, flags, UNSEALED_MODE)


def _make_way(tier: Tier, absolute: bytes) -> None:
    try:
        tier.files.unlink(absolute)
    except IsADirectoryError:
        tier.files.rmdir(absolute)


def in_directory(tier: Tier, absolute: bytes, act: Callable[[], T]) -> T:
    """Do something with a path whose directories may be missing; they are made then. Blocking.

    Directories exist on a tier while a file needs them: other threads remove those that are
    empty, under the same lock.
    """
    try:
        return act()
    except FileNotFoundError:
        # An unmounted disk is not to be filled.
        tier.check_present()
        with tier.directory_lock:
            tier.files.make_directories(os.path.dirname(absolute))
            return act()


def rename_into_place(tier: Tier, source: bytes, target: bytes) -> None:
    """rename(2) that makes missing directories, even while others remove empty ones. Blocking."""
    try:
        tier.files.rename(source, target)
    except FileNotFoundError:
        tier.files.status(source)
        in_directory(tier, target, lambda: tier.files.rename(source, target))
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        _merge_directory(tier, source, target)


def _merge_directory(tier: Tier, source: bytes, target: bytes) -> None:
    """Move what is in a directory into another that has left-overs. Blocking."""
    for name in tier.files.names(source):
        rename_into_place(tier, source + b"/" + name, target + b"/" + name)
    tier.files.rmdir(source)


def sync_names(tier: Tier, files: Iterable[bytes]) -> None:
    """The names of files, of their seal records and of what is above are on the medium. Blocking.

    A file that is gone is somebody else's matter.
    """
    directories: set[bytes] = set()
    for file in files:
        names = [file]
        with contextlib.suppress(FileNotFoundError):
            if not tier.identity.probe.xattrs:
                record = layout.sidecar_path(tier.files.status(file).st_ino)
                names.append(tier.root + b"/" + record)
        for name in names:
            while len(name) > len(tier.root):
                name = os.path.dirname(name)
                directories.add(name)
    for directory in sorted(directories, key=len, reverse=True):
        with contextlib.suppress(FileNotFoundError):
            tier.files.sync_directory(directory)


def sync_block(tier: Tier, files: Iterable[bytes]) -> None:
    """Bytes, seal records and names of files are on the medium. Blocking."""
    files = list(files)
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            descriptor = tier.files.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    sync_names(tier, files)


@dataclass(slots=True)
class Expected:
    """What the file of a sealed replica must be like. Whoever opens it, in whatever thread, notes
    what it is like; the loop reads that afterwards.

    `size_bytes` is the length of the block, which that of a compressed file is not. A `mtime_ns` of
    0 is not known: the one that is found is as good.
    """

    size_bytes: int
    mtime_ns: int
    checksum: bytes
    codec: int = RAW
    file_bytes: int = 0
    found_mtime_ns: int = 0

    @property
    def touched(self) -> bool:
        """Whether the file was changed, or given another time, beside kvfs."""
        return self.mtime_ns != self.found_mtime_ns

    def found(self, descriptor: int, status: os.stat_result) -> None:
        """Note how it is. Raises BlockCorrupt when it does not look like it. Blocking."""
        check_looks(descriptor, self.codec, self.size_bytes, self.checksum, status.st_size)
        self.file_bytes, self.found_mtime_ns = status.st_size, status.st_mtime_ns
        self.mtime_ns = self.mtime_ns or status.st_mtime_ns

    def compare(self, digest: Digest) -> None:
        """Raise BlockCorrupt unless this is the checksum of what was sealed."""
        if digest.length_bytes != self.size_bytes:
            raise BlockTorn(f"{digest.length_bytes} bytes, sealed with {self.size_bytes}")
        if digest.checksum() != self.checksum:
            raise BlockCorrupt("it has not the checksum it was sealed with")


def open_file(tier: Tier, path: bytes, fanned: bool, flags: int, expected: Expected | None) -> int:
    """Open a backing file. Raises BlockCorrupt when it does not look like what was sealed.
    Blocking."""
    absolute = tier.locate(path, fanned)
    descriptor = _open_existing(tier, absolute, flags)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(errno.ENOENT, "not a regular file", os.fsdecode(absolute))
        if expected is not None:
            expected.found(descriptor, status)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _open_existing(tier: Tier, absolute: bytes, flags: int) -> int:
    try:
        return tier.files.open(absolute, flags)
    except IsADirectoryError:
        raise FileNotFoundError(errno.ENOENT, "not a regular file", absolute) from None
    except PermissionError:
        # Sealed files are read-only, also for a daemon that is not root.
        if not flags & os.O_ACCMODE:
            raise
        descriptor = tier.files.open(absolute, os.O_RDONLY)
        try:
            os.fchmod(descriptor, UNSEALED_MODE)
        finally:
            os.close(descriptor)
        return tier.files.open(absolute, flags)


def fetch_file(
    tier: Tier, path: bytes, fanned: bool, expected: Expected, local: Tier, verify: bool
) -> int:
    """Copy a block, raw then, into a nameless local file; its descriptor. Blocking.

    Raises BlockCorrupt when `verify` and what arrived is not what was sealed, StagingFailed when
    the local tier is to blame.
    """
    source, done_bytes = open_file(tier, path, fanned, os.O_RDONLY, expected), 0

    def progress(now_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes = now_bytes

    try:
        with nameless_file(local) as target:
            transfer(source, expected.codec, target.fileno(), "none", progress)
            failpoints.hit("fetch.copied")
            if verify:
                digest = Digest(target.fileno())
                digest.advance()
                expected.compare(digest)
            return os.dup(target.fileno())
    except OSError as error:
        if is_readable(source, expected.codec, done_bytes):
            raise StagingFailed(f"tier {local.name}: {error}") from None
        raise
    finally:
        os.close(source)


@contextlib.contextmanager
def nameless_file(tier: Tier) -> Iterator[IO[bytes]]:
    """A temporary file in the staging of a tier that no crash leaves behind. Blocking."""
    flags = os.O_RDONLY | os.O_DIRECTORY
    staging = tier.files.open(tier.root + b"/" + layout.STAGING_DIR, flags)
    try:
        with tempfile.TemporaryFile(dir=f"/proc/self/fd/{staging}", buffering=0) as file:
            yield file
    finally:
        os.close(staging)
