"""One tier: a directory on one medium, with an identity, a state and the file operations on it.

Mechanism only: no placement, no catalog. `Tier.run` is how anything asynchronous calls a blocking
function on a tier; the functions themselves take absolute paths from `Tier.locate`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import threading
import time
import uuid as uuidlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar, TypeVarTuple

import msgspec
import trio

from kvfs import layout
from kvfs.config import TierConfig
from kvfs.errors import TierError, TierOffline
from kvfs.seal import SEAL_XATTR, Seal, decode_seal, no_writer_left

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
# Answers that speak of the medium, not of the one file.
TIER_ERRNOS = frozenset(
    {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT, errno.ENODEV,
     errno.EROFS, errno.ENXIO, errno.EREMOTEIO}
)  # fmt: skip
ERRORS_BEFORE_OFFLINE = 3
UNLOCK_S = 2.0

State = Literal["online", "degraded", "offline"]
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


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


class Tier:
    """One tier in use. State and error count belong to the trio loop; file functions to any thread.

    `inline` tiers (the fastest, if local) are called on the loop: a thread hop costs more than
    the call. All others go through `limiter`, and a remote one gives up after its deadline.
    """

    def __init__(self, index: int, number: int, config: TierConfig, identity: TierIdentity) -> None:
        self.index = index
        self.number = number
        self.config = config
        self.identity = identity
        self.root = os.fsencode(config.path)
        self.inline = index == 0 and config.medium == "nvme"
        self.remote = config.medium == "remote"
        # Held by threads that make directories for a file or remove those that are empty.
        self.directory_lock = threading.Lock()
        self.limiter = trio.CapacityLimiter(config.concurrency)
        self.state: State = "online"
        # An admin empties it: nothing new is put here.
        self.draining = False
        # It was away, so renames may be promised to it: its names are not to be relied on.
        self.behind = False
        self.last_error = ""
        self._errors = 0
        self._lock_fd = -1

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def online(self) -> bool:
        return self.state != "offline"

    @property
    def accepts(self) -> bool:
        """Whether new files may be put here."""
        return self.state == "online" and not self.draining

    def locate(self, path: bytes, fanned: bool = False) -> bytes:
        """The absolute path of a block's file on this tier."""
        return self.root + b"/" + layout.stored_path(path, fanned)

    async def run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Call a blocking function that touches this tier.

        Raises TierOffline when the tier is offline or its deadline passed, and whatever the
        function raises; errors of the medium count towards taking the tier offline.
        """
        if self.state == "offline":
            raise TierOffline(f"tier {self.name} is offline: {self.last_error}")
        try:
            if self.inline:
                result = function(*args)
            elif self.remote:
                result = await self._run_with_deadline(function, *args)
            else:
                result = await trio.to_thread.run_sync(function, *args, limiter=self.limiter)
        except OSError as error:
            if error.errno in TIER_ERRNOS:
                self.note_error(str(error))
            raise
        if self._errors:
            self._errors = 0
            self.state = "online"
        return result

    async def _run_with_deadline(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        try:
            with trio.fail_after(self.config.deadline_s):
                return await trio.to_thread.run_sync(
                    function, *args, limiter=self.limiter, abandon_on_cancel=True
                )
        except trio.TooSlowError:
            self.note_error(f"no answer within {self.config.deadline_s:g} s")
            raise TierOffline(f"tier {self.name}: {self.last_error}") from None

    async def run_in_thread(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """A call that takes long on any medium: never on the loop, and with the remote deadline."""
        if self.remote or self.state == "offline":
            return await self.run(function, *args)
        return await trio.to_thread.run_sync(function, *args, limiter=self.limiter)

    async def run_open(self, function: Callable[[*Ts], int], *args: *Ts) -> int:
        """`run` for functions that open a descriptor: one that comes too late is closed."""
        if not self.remote:
            return await self.run(function, *args)
        delivery = _Delivery()
        try:
            return await self.run(delivery.bring, lambda: function(*args))
        except TierOffline:
            delivery.refuse()
            raise

    def note_error(self, reason: str) -> None:
        """Count an error of the medium; the third in a row takes the tier offline."""
        self._errors += 1
        self.last_error = reason
        before = self.state
        self.state = "offline" if self._errors >= ERRORS_BEFORE_OFFLINE else "degraded"
        self.behind |= not self.online
        if self.state != before:
            log.error("tier %s is %s: %s", self.name, self.state, reason)

    def mark_online(self) -> None:
        """A probe succeeded."""
        self._errors = 0
        if self.state != "online":
            log.info("tier %s is online again", self.name)
        self.state = "online"

    def mark_offline(self, reason: str) -> None:
        """Take the tier offline without counting (it was missing at start)."""
        self.state = "offline"
        self.behind = True
        self.last_error = reason

    def reconfigure(self, config: TierConfig) -> None:
        """Take over limits that may change while mounted."""
        self.config = config
        self.limiter.total_tokens = config.concurrency

    def probe(self) -> None:
        """Raise OSError or TierError unless the tier is there and ours: what brings it back.

        Blocking.
        """
        identity = read_identity(self.config.path)
        if identity.uuid != self.identity.uuid:
            raise OSError(errno.ENODEV, "another tier is mounted at its path")
        if self._lock_fd < 0:
            self.lock()
        self.identity = identity

    def lock(self) -> None:
        """Claim the tier for this process. Raises TierError when another daemon has it."""
        path = self.root + b"/" + layout.LOCK_FILE
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise TierError(
                f"tier {self.name}: another kvfs daemon uses {self.config.path}; unmount it first"
            ) from None
        self._lock_fd = descriptor

    def unlock(self) -> None:
        if self._lock_fd >= 0:
            # A hung remote tier keeps its lock as long as it hangs; the others are given back.
            closing = threading.Thread(target=os.close, args=(self._lock_fd,), daemon=True)
            closing.start()
            closing.join(UNLOCK_S if self.remote else None)
            self._lock_fd = -1

    def write_seal(self, file: bytes | int, seal: Seal) -> None:
        """Attach a seal record to a file (a path or a descriptor), and give the file the block's
        time. Blocking."""
        os.utime(file, ns=(seal.mtime_ns, seal.mtime_ns))
        if self.identity.probe.xattrs:
            os.setxattr(file, SEAL_XATTR, seal.encode())
            return
        sidecar = self._sidecar(file)
        os.makedirs(os.path.dirname(sidecar), exist_ok=True)
        temporary = sidecar + b".new"
        with open(temporary, "wb") as out:
            out.write(seal.encode())
            out.flush()
            os.fsync(out.fileno())
        os.rename(temporary, sidecar)

    def read_seal(self, absolute: bytes) -> Seal | None:
        """The seal record of a file; None when it has none or it does not fit. Blocking."""
        try:
            if self.identity.probe.xattrs:
                return decode_seal(os.getxattr(absolute, SEAL_XATTR))
            with open(self._sidecar(absolute), "rb") as file:
                seal = decode_seal(file.read())
        except OSError as error:
            if error.errno in (errno.ENODATA, errno.ENOENT):
                return None
            raise
        # The number of a removed file is used again: a record that is not of this content is old.
        status = os.stat(absolute)
        if seal and (seal.length_bytes, seal.mtime_ns) != (status.st_size, status.st_mtime_ns):
            return None
        return seal

    def clear_seal(self, file: bytes | int) -> None:
        """The content of a file (a path or a descriptor) is about to change. Blocking."""
        with contextlib.suppress(OSError):
            if self.identity.probe.xattrs:
                os.removexattr(file, SEAL_XATTR)
            else:
                os.unlink(self._sidecar(file))

    def _sidecar(self, file: bytes | int) -> bytes:
        return self.root + b"/" + layout.sidecar_path(os.stat(file).st_ino)

    def remove(self, path: bytes, fanned: bool) -> None:
        """Unlink a block's file, and directories that are empty then. Missing is fine. Blocking."""
        absolute = self.locate(path, fanned)
        with contextlib.suppress(FileNotFoundError):
            if not self.identity.probe.xattrs:
                self.clear_seal(absolute)
            os.unlink(absolute)
        if self.index > 0:
            self.remove_empty_parents(os.path.dirname(absolute))

    def remove_empty_parents(self, directory: bytes) -> None:
        """Directories exist on a slower tier only while a file needs them. Blocking."""
        with self.directory_lock:
            while len(directory) > len(self.root):
                try:
                    os.rmdir(directory)
                except OSError:
                    return
                directory = os.path.dirname(directory)

    def remove_directory(self, path: bytes) -> None:
        """Remove a directory that the catalog knows to be empty, with its fan-out. Blocking."""
        absolute = self.locate(path)
        fan_out = absolute + b"/" + layout.FAN_OUT_DIR
        with contextlib.suppress(OSError):
            for bucket in os.listdir(fan_out):
                os.rmdir(fan_out + b"/" + bucket)
            os.rmdir(fan_out)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(absolute)

    def free_bytes(self) -> int:
        """Bytes that the filesystem would still take. Blocking."""
        status = os.statvfs(self.root)
        return status.f_bavail * status.f_frsize

    def sweep_staging(self) -> int:
        """Remove copies that a crash left; how many there were. Blocking."""
        staging = self.root + b"/" + layout.STAGING_DIR
        count = 0
        for entry in os.scandir(staging):
            os.unlink(entry.path)
            count += 1
        return count

    def quarantine(self, path: bytes, fanned: bool) -> bytes:
        """Put a file where it is never served; the path it has now. Blocking."""
        source = self.locate(path, fanned)
        name = b"%d-%s" % (time.time_ns(), os.path.basename(source)[-180:])
        target = self.root + b"/" + layout.QUARANTINE_DIR + b"/" + name
        os.rename(source, target)
        if self.index > 0:
            self.remove_empty_parents(os.path.dirname(source))
        return target


class _Delivery:
    """Hands a descriptor from a worker thread to a waiter that may have given up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._refused = False
        self._descriptor = -1

    def bring(self, function: Callable[[], int]) -> int:
        """In the worker thread."""
        descriptor = function()
        with self._lock:
            self._descriptor = descriptor
            if self._refused:
                os.close(descriptor)
        return descriptor

    def refuse(self) -> None:
        """On the loop, once nobody will take the descriptor."""
        with self._lock:
            self._refused = True
            if self._descriptor >= 0:
                _close_in_thread(self._descriptor)


def close_descriptor(tier: Tier, descriptor: int) -> None:
    """Close a file of a tier; one that hangs in close(2), which remote ones may, stops nobody."""
    if tier.remote:
        _close_in_thread(descriptor)
    else:
        os.close(descriptor)


def _close_in_thread(descriptor: int) -> None:
    trio.lowlevel.start_thread_soon(lambda: os.close(descriptor), lambda _: None)


def read_identity(path: Path) -> TierIdentity:
    """The identity of the tier at `path`. Raises FileNotFoundError or TierError."""
    file = path / os.fsdecode(layout.IDENTITY_FILE)
    try:
        identity = msgspec.json.decode(file.read_bytes(), type=TierIdentity)
    except msgspec.MsgspecError as error:
        raise TierError(f"{file}: not a kvfs tier identity ({error})") from None
    if identity.format_version > FORMAT_VERSION:
        raise TierError(f"{file}: written by a newer kvfs; upgrade kvfs to use this tier")
    return identity


def write_identity(path: Path, identity: TierIdentity) -> None:
    """Replace the identity atomically and durably."""
    file = path / os.fsdecode(layout.IDENTITY_FILE)
    temporary = file.with_suffix(".new")
    with temporary.open("wb") as out:
        out.write(msgspec.json.format(msgspec.json.encode(identity), indent=2))
        out.flush()
        os.fsync(out.fileno())
    temporary.rename(file)


def init_tier(path: Path, *, adopt: bool = False) -> TierIdentity:
    """Make `path` a tier: its private directories and a new identity.

    Raises TierError when it already is one, is no directory, or holds files and `adopt` is false.
    With `adopt` the next mount takes over what lies there.
    """
    if not path.is_dir():
        raise TierError(f"{path}: no such directory; create it or mount its disk first")
    if (path / os.fsdecode(layout.IDENTITY_FILE)).exists():
        raise TierError(f"{path}: is a kvfs tier already")
    if not adopt and not is_empty(path):
        raise TierError(
            f"{path}: not empty and not a kvfs tier; to take over what lies there run "
            f"`kvfs tier init {path} --adopt`"
        )
    for directory in (
        layout.PRIVATE_DIR,
        layout.STAGING_DIR,
        layout.QUARANTINE_DIR,
        layout.META_DIR,
    ):
        (path / os.fsdecode(directory)).mkdir(mode=0o700, exist_ok=True)
    identity = TierIdentity(
        uuid=str(uuidlib.uuid4()),
        format_version=FORMAT_VERSION,
        created_at=time.time(),
        probe=probe_filesystem(path),
        adopt=adopt,
    )
    write_identity(path, identity)
    return identity


def is_empty(path: Path) -> bool:
    """Nothing there but what mkfs leaves."""
    return all(name == "lost+found" for name in os.listdir(path))


def probe_filesystem(path: Path) -> Probe:
    """Find out by trying what the filesystem of `path` supports."""
    scratch = path / os.fsdecode(layout.STAGING_DIR) / "probe"
    descriptor = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, bytes(4096))
    finally:
        os.close(descriptor)
    try:
        return Probe(
            xattrs=_supports(lambda: os.setxattr(scratch, "user.kvfs.probe", b"1")),
            o_direct=_supports(lambda: _read_direct(scratch)),
            leases=_supports(lambda: _take_lease(scratch)),
            name_max=os.statvfs(path).f_namemax,
        )
    finally:
        scratch.unlink()


def _supports(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except OSError:
        return False
    return True


def _read_direct(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        with mmap.mmap(-1, 4096) as buffer:
            os.preadv(descriptor, [buffer], 0)
    finally:
        os.close(descriptor)


def _take_lease(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        no_writer_left(descriptor)
    finally:
        os.close(descriptor)
