"""One tier: a directory on one medium, with an identity, a state and the file operations on it.

Mechanism only: no placement, no catalog. `Tier.run` is how anything asynchronous calls a blocking
function on a tier; the functions themselves take absolute paths from `Tier.locate`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar, TypeVarTuple

import trio

from kvfs import failpoints, layout
from kvfs.config import TierConfig
from kvfs.errors import TierBusy, TierDeadline, TierError, TierOffline
from kvfs.tiers import tier_lock
from kvfs.tiers.beneath import Root
from kvfs.tiers.deadlines import Closer, Delivery, run_watched
from kvfs.tiers.health import Health, Refusal, State, is_full
from kvfs.tiers.identity import TierIdentity, make_private_directories, read_identity
from kvfs.tiers.seal import MOST_SEAL_BYTES, SEAL_XATTR, Seal, decode_seal, fits

log = logging.getLogger(__name__)

# chown(2) of a file for which only the daemon's own user can be had.
NO_CHOWN_ERRNOS = frozenset({errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})
# A backing file that may be written is for kvfs alone.
UNSEALED_MODE = 0o600
UNLOCK_S = 2.0
# Requests of the mount that may wait for one tier: what is above is refused, so that the mount has
# tasks left for faster tiers.
MOST_WAITING = 512
# Probes at one time: one that hangs must not keep the next from finding the tier mounted anew.
PROBES = 2
PROBE_BYTES = 4096
# A call that is as long as its bytes may take so many of them while the tier answers probes.
DEADLINES_OF_PATIENCE = 30

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Tier:
    """One tier in use. Its health belongs to the trio loop; file functions to any thread.

    `inline` tiers (the fastest, if local) are called on the loop: a thread hop costs more than
    the call. All others go through `limiter`, and a call is given up after the tier's deadline.
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
        # Of their own, so that what is answered at once never waits for them.
        self.long_limiter = trio.CapacityLimiter(_long_calls(config))
        self.health = Health(config.name)
        # An admin empties it: nothing new is put here.
        self.draining = False
        # Requests of the mount that wait for an answer of this tier.
        self.waiting = 0
        self.closer = Closer()
        self._probes = trio.CapacityLimiter(PROBES)
        self._lock_fd = -1
        self._files: Root | None = None

    @property
    def files(self) -> Root:
        """The tier's files, which nothing may reach by a plain path; made anew by each probe."""
        if self._files is None:
            self._files = Root(self.root)
        return self._files

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def state(self) -> State:
        return self.health.state

    @property
    def online(self) -> bool:
        return self.health.online

    @property
    def accepts(self) -> bool:
        """Whether new files may be put here."""
        free = self.waiting < MOST_WAITING
        return self.health.shown == "online" and not self.draining and free

    @property
    def durable(self) -> bool:
        """Whether what is sealed here outlives a power loss."""
        return (self.config.durability or ("seal" if self.index else "none")) == "seal"

    def locate(self, path: bytes, fanned: bool = False) -> bytes:
        """The absolute path of a block's file on this tier."""
        return self.root + b"/" + layout.stored_path(path, fanned)

    async def run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Call a blocking function that touches this tier.

        Raises TierOffline when the tier is offline or its deadline passed, and whatever the
        function raises; errors of the medium count towards taking the tier offline.
        """
        self._check_online()
        if self.inline:
            with self.judged():
                return function(*args)
        answers = self.health.answers
        try:
            with self.judged(), trio.fail_after(self.config.deadline_s):
                return await trio.to_thread.run_sync(
                    function, *args, limiter=self.limiter, abandon_on_cancel=True
                )
        except trio.TooSlowError:
            raise self.gave_up(answers) from None

    async def run_in_thread(
        self, function: Callable[[*Ts], T], *args: *Ts, urgent: bool = False
    ) -> T:
        """`run` for what takes as long as it has bytes (fsync, hashing): never on the loop, and
        given up only when the tier does not answer a probe either, within its deadline.

        What is `urgent` does not wait for copies.
        """
        self._check_online()
        limiter = self.limiter if urgent else self.long_limiter
        try:
            with self.judged():
                return await run_watched(
                    function, *args, limiter=limiter, watch=self.until_it_hangs
                )
        except trio.TooSlowError:
            raise self.gave_up(self.health.answers) from None

    async def until_it_hangs(self, progress: Callable[[], int] = lambda: 0) -> None:
        """Return when a long call should be given up: it gets nowhere, and the tier does not
        answer a probe within its deadline; or it got nowhere for many deadlines."""
        half_s = self.config.deadline_s / 2
        idle, before = 0, progress()
        while self.online and idle < 2 * DEADLINES_OF_PATIENCE:
            await trio.sleep(half_s)
            idle, before = idle + 1 if progress() == before else 0, progress()
            if idle == 0:
                continue
            try:
                with trio.fail_after(half_s):
                    # An error is an answer.
                    with contextlib.suppress(OSError):
                        await trio.to_thread.run_sync(
                            self.check_present, limiter=self._probes, abandon_on_cancel=True
                        )
            except trio.TooSlowError:
                return

    @contextlib.contextmanager
    def judged(self) -> Iterator[None]:
        """Around something done with the tier: what comes out of it goes into the tier's health."""
        try:
            yield
        except OSError as error:
            self.health.failed(error)
            raise
        self.health.worked()

    def _check_online(self) -> None:
        if not self.online:
            raise TierOffline(f"tier {self.name} is offline: {self.health.last_error}")

    def gave_up(self, answers: int) -> TierDeadline:
        """The error for a call that began after so many answers and is not waited for any more."""
        error = TierDeadline(f"tier {self.name}: no answer within {self.config.deadline_s:g} s")
        self.health.hung(error, answers)
        return error

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Around a request of the mount that may have to wait for this tier.

        Raises TierBusy when too many do: those for faster tiers must find a free task.
        """
        if self.waiting >= MOST_WAITING and not self.inline:
            raise TierBusy(f"tier {self.name}: {self.waiting} requests wait for it already")
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    async def run_open(
        self, function: Callable[[*Ts], int], *args: *Ts, patient: bool = False
    ) -> int:
        """`run` for functions that open a descriptor: one that comes too late is closed.

        `patient`: as `run_in_thread`, for what takes as long as it has bytes.
        """
        if self.inline and not patient:
            return await self.run(function, *args)
        delivery = Delivery(self.closer)

        def bring() -> int:
            return delivery.bring(lambda: function(*args))

        try:
            if patient:
                return await self.run_in_thread(bring, urgent=True)
            return await self.run(bring)
        except BaseException:
            delivery.refuse()
            raise

    async def examine(self) -> None:
        """Probe the tier and take over what that says of it."""
        answers = self.health.answers
        try:
            with trio.fail_after(self.config.deadline_s):
                refusal, error = await trio.to_thread.run_sync(
                    self.probe, limiter=self._probes, abandon_on_cancel=True
                )
        except trio.TooSlowError:
            self.gave_up(answers)
        except (OSError, TierError) as reason:
            self.health.lost(str(reason))
        else:
            self.health.probed(refusal, error)

    async def confirm_present(self) -> None:
        """A file is missing that should be there: is the tier? Raises TierOffline if it is not."""
        try:
            await self.run(self.check_present)
        except OSError as error:
            self.health.lost(str(error))
            raise TierOffline(f"tier {self.name}: {error}") from None

    def reconfigure(self, config: TierConfig) -> None:
        """Take over limits that may change while mounted."""
        self.config = config
        self.limiter.total_tokens = config.concurrency
        self.long_limiter.total_tokens = _long_calls(config)

    def probe(self) -> tuple[Refusal, OSError | None]:
        """Whether the tier, which is there, takes new bytes; and why not. What brings it back.

        Raises OSError or TierError unless it is there and ours. Blocking.
        """
        identity = self.check_present()
        # It may have been mounted anew.
        self._files = Root(self.root)
        if self._lock_fd < 0:
            self.lock()
        self.identity = identity
        return self._probe_writing()

    def check_present(self) -> TierIdentity:
        """The identity at the tier's path now. Raises OSError when it is not this tier's: the disk
        is not mounted, say. Blocking."""
        try:
            identity = read_identity(self.config.path)
        except (FileNotFoundError, TierError) as error:
            raise OSError(errno.ENODEV, "the tier is not mounted at its path", self.root) from error
        if identity.uuid != self.identity.uuid:
            raise OSError(errno.ENODEV, "another tier is mounted at its path", self.root)
        return identity

    def _probe_writing(self) -> tuple[Refusal, OSError | None]:
        scratch = self.root + b"/" + layout.STAGING_DIR + b"/probe"
        try:
            self.files.write(scratch, bytes(PROBE_BYTES))
            self.files.unlink(scratch)
        except OSError as error:
            if is_full(error):
                return "full", error
            return "read-only" if error.errno == errno.EROFS else "failing", error
        return "", None

    def lock(self) -> None:
        """Claim the tier for this process, and close it to other users.

        Raises TierError when another daemon has it.
        """
        path = self.root + b"/" + layout.LOCK_FILE
        try:
            self._lock_fd = tier_lock.take(self.files, path)
        except BlockingIOError:
            raise TierError(
                f"tier {self.name}: another kvfs daemon uses {self.config.path}; unmount it first"
            ) from None
        make_private_directories(self.files)
        self._close_to_others()

    def _close_to_others(self) -> None:
        """Modes and owners below are those of blocks: only the root keeps other users out."""
        mode = stat.S_IMODE(os.stat(self.root).st_mode)
        if mode & 0o077:
            try:
                os.chmod(self.root, mode & 0o700)
            except OSError as error:
                path = self.config.path
                log.warning("tier %s: other users may enter %s: %s", self.name, path, error)

    def unlock(self) -> None:
        if self._lock_fd >= 0:
            # A tier that hangs keeps its lock as long; the others are given back.
            closing = threading.Thread(target=_close, args=(self._lock_fd,), daemon=True)
            closing.start()
            closing.join(UNLOCK_S)
            self._lock_fd = -1

    def read_fitting_seal(self, absolute: bytes) -> Seal | None:
        """The seal record of a file that, by its looks, is what it says; else None. Blocking."""
        seal = self.read_seal(absolute)
        if seal is not None:
            with self._descriptor_of(absolute) as descriptor:
                return seal if fits(seal, descriptor) else None
        return None

    def write_seal(
        self, file: bytes | int, seal: Seal, *, keep_time: bool = False
    ) -> os.stat_result:
        """Attach a seal record to a file (a path or a descriptor), and give the file the block's
        time, its owner where the filesystem lets us, and its mode but for writing. Blocking.

        The status of the file then: the record may have taken a page of its own."""
        with self._descriptor_of(file) as descriptor:
            if not keep_time:
                os.utime(descriptor, ns=(seal.mtime_ns, seal.mtime_ns))
            if self.identity.probe.xattrs:
                change_xattr(descriptor, SEAL_XATTR, seal.encode())
            else:
                self._write_sidecar(descriptor, seal)
            give_owner(descriptor, seal.uid, seal.gid)
            os.fchmod(descriptor, sealed_mode(seal.mode))
            return os.fstat(descriptor)

    def _write_sidecar(self, descriptor: int, seal: Seal) -> None:
        sidecar = self._sidecar(descriptor)
        self.files.make_directories(os.path.dirname(sidecar), 0o700)
        self.files.write(sidecar + b".new", seal.encode())
        failpoints.hit("sidecar.written")
        self.files.rename(sidecar + b".new", sidecar)
        failpoints.hit("sidecar.replaced")

    def read_seal(self, absolute: bytes) -> Seal | None:
        """The seal record of a file; None when it has none or it does not fit. Blocking."""
        try:
            with self._descriptor_of(absolute) as descriptor:
                if self.identity.probe.xattrs:
                    return decode_seal(os.getxattr(descriptor, SEAL_XATTR))
                seal = decode_seal(self.files.read(self._sidecar(descriptor), MOST_SEAL_BYTES + 1))
                # The number of a removed file is used again: a record that is not of this content
                # is old.
                if seal and seal.mtime_ns == os.fstat(descriptor).st_mtime_ns:
                    return seal if fits(seal, descriptor) else None
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.ENOENT):
                raise
        return None

    def clear_seal(self, file: bytes | int) -> None:
        """The content of a file (a path or a descriptor) is about to change. Blocking."""
        with contextlib.suppress(OSError), self._descriptor_of(file) as descriptor:
            os.fchmod(descriptor, UNSEALED_MODE)
            if self.identity.probe.xattrs:
                os.removexattr(descriptor, SEAL_XATTR)
            else:
                self.files.unlink(self._sidecar(descriptor))

    def mirror_xattr(self, absolute: bytes, name: bytes, value: bytes | None) -> None:
        """Set or remove an xattr of a file or directory, where the tier has any. Blocking."""
        if self.identity.probe.xattrs:
            with self._descriptor_of(absolute) as descriptor:
                change_xattr(descriptor, name, value)

    @contextlib.contextmanager
    def _descriptor_of(self, file: bytes | int) -> Iterator[int]:
        if isinstance(file, int):
            yield file
            return
        descriptor = self.files.open(file, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _sidecar(self, descriptor: int) -> bytes:
        return self.root + b"/" + layout.sidecar_path(os.fstat(descriptor).st_ino)

    def remove(self, path: bytes, fanned: bool) -> None:
        """Unlink a block's file, and directories that are empty then. Missing is fine. Blocking."""
        absolute = self.locate(path, fanned)
        try:
            if not self.identity.probe.xattrs:
                self.clear_seal(absolute)
            self.files.unlink(absolute)
        except FileNotFoundError:
            # Of a tier that is not there everything is missing.
            self.check_present()
        if self.index > 0:
            self.remove_empty_parents(os.path.dirname(absolute))

    def remove_empty_parents(self, directory: bytes) -> None:
        """Directories exist on a slower tier only while a file needs them. Blocking."""
        with self.directory_lock:
            while len(directory) > len(self.root):
                try:
                    self.files.rmdir(directory)
                except OSError:
                    return
                directory = os.path.dirname(directory)

    def remove_directory(self, path: bytes) -> None:
        """Remove a directory that the catalog knows to be empty, with its fan-out. Blocking."""
        absolute = self.locate(path)
        fan_out = absolute + b"/" + layout.FAN_OUT_DIR
        with contextlib.suppress(OSError):
            for bucket in self.files.names(fan_out):
                self.files.rmdir(fan_out + b"/" + bucket)
            self.files.rmdir(fan_out)
        with contextlib.suppress(FileNotFoundError):
            self.files.rmdir(absolute)

    def sweep_staging(self) -> int:
        """Remove copies that a crash left; how many there were. Blocking."""
        staging = self.root + b"/" + layout.STAGING_DIR
        count = 0
        for name in self.files.names(staging):
            self.files.unlink(staging + b"/" + name)
            failpoints.hit("sweep.removed")
            count += 1
        return count


def _close(descriptor: int) -> None:
    # A network filesystem that failed says so once more.
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _long_calls(config: TierConfig) -> int:
    """How many copies, checksums and fsyncs a tier gets at one time, besides all else."""
    return max(1, config.concurrency // 2)


def sealed_mode(mode: int) -> int:
    """The mode of a backing file that nobody is to write; kvfs itself always gets in."""
    return mode & 0o444 | 0o400


def give_owner(descriptor: int, uid: int, gid: int) -> None:
    """Give a file its block's owner. Not root, or on a filesystem that does not: it is ours."""
    status = os.fstat(descriptor)
    if (status.st_uid, status.st_gid) == (uid, gid):
        return
    try:
        os.fchown(descriptor, uid, gid)
    except OSError as error:
        if error.errno not in NO_CHOWN_ERRNOS:
            raise


def change_xattr(descriptor: int, name: bytes | str, value: bytes | None) -> None:
    """Set or (None) remove an xattr, also of a file that its owner may not write."""

    def change() -> None:
        if value is None:
            os.removexattr(descriptor, name)
        else:
            os.setxattr(descriptor, name, value)

    try:
        change()
    except PermissionError as error:
        if error.errno != errno.EACCES:
            raise
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.fchmod(descriptor, mode | stat.S_IWUSR)
        try:
            change()
        finally:
            os.fchmod(descriptor, mode)


def close_descriptor(tier: Tier, descriptor: int) -> None:
    """Close a file of a tier; one that hangs in close(2) stops nobody."""
    if tier.inline:
        with contextlib.suppress(OSError), tier.judged():
            os.close(descriptor)
    else:
        tier.closer.close(descriptor)
