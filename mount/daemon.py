"""The daemon: opens the volume, mounts, and runs every service in one nursery.

A service that crashes takes the mount down loudly; an error of a tier does not. On every way out
the mount is detached, what can be flushed is flushed, and the catalog is closed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyfuse3
import trio

from kvfs import layout
from kvfs.config import (
    Config,
    config_to_builtins,
)
from kvfs.errors import MountpointError
from kvfs.metrics import prometheus_text
from kvfs.mount import readiness
from kvfs.mount.control_dir import PROBE, ControlDirectory
from kvfs.mount.invalidate import Invalidator
from kvfs.mount.node import FINAL_FLUSH_S, Node, notify_systemd, prepare_process
from kvfs.mount.operations import Operations
from kvfs.mount.passthrough import Channel, Passthrough, is_preloaded
from kvfs.mount.server import socket_path_for
from kvfs.mount.session import detach, umount2
from kvfs.tiers.tier import MOST_WAITING

log = logging.getLogger(__name__)

READ_AHEAD_KIB = 1024
# Enough for the 1 MiB requests of many readers, besides those that wait for slower tiers; what is
# above waits in the kernel.
FUSE_TASKS = 64
# mallopt(3): keep freed memory up to here, and take no mapping of its own for a 1 MiB answer.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 64 << 20
MAPPED_FROM_BYTES = 32 << 20


def run(
    mountpoint: Path, config: Config, forget_tiers: tuple[str, ...] = (),
    on_ready: Callable[[], None] = lambda: None,
) -> int:  # fmt: skip
    """Serve until unmounted. Raises KvfsError when it cannot start; the exit status otherwise."""
    prepare_process(config.mount.log_level)
    keep_freed_memory()
    trio.run(Daemon(mountpoint, config, forget_tiers, on_ready).serve)
    return 0


class Daemon:
    """One mount. Owned by the trio loop."""

    def __init__(
        self, mountpoint: Path, config: Config, forget_tiers: tuple[str, ...],
        on_ready: Callable[[], None],
    ) -> None:  # fmt: skip
        self.mountpoint = mountpoint
        self._on_ready = on_ready
        self.node = Node(config, socket_path_for(mountpoint), mountpoint, forget_tiers)
        self.volume, self.store, self.views = self.node.volume, self.node.store, self.node.views
        self.invalidator = Invalidator(self.volume.counters)
        self.volume.name_changed = self.invalidator.name_changed
        self.volume.attributes_changed = self.invalidator.attributes_changed
        self.volume.names_told = self.invalidator.told
        self.passthrough = Passthrough()
        self.views.data_path = self.passthrough.describe
        self._channel: Channel | None = None
        self.operations = Operations(self.store, self._control_directory(), self.passthrough)

    def _control_directory(self) -> ControlDirectory:
        def document(make: Callable[[], object]) -> Callable[[], bytes]:
            return lambda: json.dumps(make(), indent=2).encode() + b"\n"

        return ControlDirectory({
            b"stats": document(self.views.statistics),
            b"metrics": lambda: prometheus_text(self.views.statistics()),
            b"config": document(lambda: config_to_builtins(self.volume.config)),
            b"tiers": document(self.views.tiers),
            PROBE: lambda: (self.passthrough.reason or "passthrough").encode() + b"\n",
        })  # fmt: skip

    async def serve(self) -> None:
        """From recovery to the last flush."""
        clean = False
        try:
            with self.volume.damage_told():
                await self.store.recovery.before_serving()
                self._mount()
                try:
                    await self._serve_mounted()
                    clean = True
                finally:
                    with trio.CancelScope(shield=True):
                        await trio.to_thread.run_sync(detach, self.mountpoint)
        finally:
            with trio.CancelScope(shield=True):
                await self._finish(clean=clean)

    def _mount(self) -> None:
        config = self.volume.config.mount
        if config.passthrough != "off" and self._mount_for_passthrough():
            return
        if config.passthrough == "require":
            raise MountpointError(f"passthrough is required: {self.passthrough.reason}")
        options = set(pyfuse3.default_options)
        options |= {f"fsname={config.fsname}", "subtype=kvfs"}
        if config.allow_other:
            options.add("allow_other")
        try:
            pyfuse3.init(self.operations, str(self.mountpoint), options)
        except RuntimeError as error:
            raise MountpointError(
                f"{self.mountpoint}: mounting failed ({error}); `kvfs doctor` says what is missing"
            ) from None

    def _mount_for_passthrough(self) -> bool:
        """Mount through a channel of our own; False when only libfuse's way is left."""
        config = self.volume.config.mount
        if not is_preloaded():
            self.passthrough.reason = "the reply extension is not built"
            return False
        if os.geteuid() != 0:
            self.passthrough.reason = "the daemon lacks CAP_SYS_ADMIN"
            return False
        try:
            self._channel = Channel(self.mountpoint, config.fsname, allow_other=config.allow_other)
        except OSError as error:
            self.passthrough.reason = f"mount(2) failed: {error}"
            return False
        self.passthrough.use(self._channel)
        pyfuse3.init(self.operations, self._channel.path, set())
        return True

    async def _serve_mounted(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.invalidator.run)
                self.node.start_services(nursery)
                await nursery.start(self.node.server.run)
                nursery.start_soon(self._watch_signals)
                nursery.start_soon(self._announce)
                if self._channel is not None:
                    nursery.start_soon(self._channel.finish)
                readiness.install(self.operations.readiness)
                await pyfuse3.main(min_tasks=2, max_tasks=self._most_tasks())
                nursery.cancel_scope.cancel()
        finally:
            pyfuse3.close(unmount=False)

    def _most_tasks(self) -> int:
        """So many that requests which wait for slower tiers leave some for the fastest."""
        slower = sum(not tier.inline for tier in self.volume.tiers)
        return FUSE_TASKS + MOST_WAITING * slower

    async def _announce(self) -> None:
        """Ready means that the mount answers, not that it was made.

        Abandoned when a service crashes first: nobody would answer then.
        """
        ask = partial(trio.to_thread.run_sync, abandon_on_cancel=True)
        await ask(os.listdir, self.mountpoint)
        await ask(raise_read_ahead, self.mountpoint)
        if self._channel is not None:
            await self._probe_passthrough(self._channel)
        elif self.volume.config.mount.passthrough != "off":
            self.passthrough.decide(works=False, reason=self.passthrough.reason)
        log.info("mounted on %s", self.mountpoint)
        notify_systemd("READY=1")
        self._on_ready()

    async def _probe_passthrough(self, channel: Channel) -> None:
        """Read a file whose bytes only the kernel can have fetched."""
        if not channel.offered:
            self.passthrough.decide(works=False, reason="the kernel does not offer it (6.9 does)")
        else:
            token = os.urandom(16).hex().encode()
            staging = os.fsdecode(self.volume.tiers[0].root + b"/" + layout.STAGING_DIR)
            try:
                with tempfile.TemporaryFile(dir=staging, buffering=0) as file:
                    file.write(token)
                    await self._read_probe(file.fileno(), token)
            except OSError as error:
                # A full disk, say: it must not keep anybody from mounting.
                self.passthrough.decide(works=False, reason=f"no probe could be written: {error}")
        if self.volume.config.mount.passthrough == "require" and not self.passthrough.active:
            raise MountpointError(f"passthrough is required: {self.passthrough.reason}")

    async def _read_probe(self, descriptor: int, token: bytes) -> None:
        try:
            self.operations.probe_id = self.passthrough.register(descriptor)
        except OSError as error:
            self.passthrough.decide(works=False, reason=f"registering a file failed: {error}")
            return
        path = self.mountpoint / os.fsdecode(layout.PRIVATE_DIR) / os.fsdecode(PROBE)
        try:
            seen = await trio.to_thread.run_sync(path.read_bytes, abandon_on_cancel=True)
            works, reason = seen == token, "the probe's bytes came through the daemon"
        except OSError as error:
            works, reason = False, f"the probe could not be read: {error}"
        finally:
            self.passthrough.unregister(self.operations.probe_id)
            self.operations.probe_id = 0
        self.passthrough.decide(works=works, reason=reason)

    async def _watch_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async for number in signals:
                if number == signal.SIGHUP:
                    self.node.reload_on_signal()
                else:
                    await self._unmount()

    async def _unmount(self) -> None:
        """Leave the mount: in order when nobody uses it, else at once."""
        log.info("unmounting %s", self.mountpoint)
        try:
            await trio.to_thread.run_sync(umount2, self.mountpoint, 0, abandon_on_cancel=True)
        except OSError as error:
            log.info("it is in use (%s): detached", error.strerror)
            await trio.to_thread.run_sync(detach, self.mountpoint)
            pyfuse3.terminate()

    async def _finish(self, *, clean: bool) -> None:
        """What was promised and can still be done, within a bound."""
        notify_systemd("STOPPING=1")
        closed = False
        try:
            with trio.move_on_after(FINAL_FLUSH_S):
                if not self.volume.damaged:
                    await self.operations.close_all()
                closed = True
        finally:
            await self.node.finish(clean=clean and closed)


def keep_freed_memory() -> None:
    """Every read allocates 1 MiB: given back each time, its pages fault in anew each time."""
    # Another libc than glibc has no mallopt, and nothing to tune.
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def raise_read_ahead(mountpoint: Path) -> None:
    """Let the kernel ask for 1 MiB at once instead of 128 KiB; only root may say so."""
    device = os.stat(mountpoint).st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    try:
        setting.write_text(str(READ_AHEAD_KIB))
    except OSError as error:
        log.info("read-ahead stays small, buffered reads are slower: %s", error)
