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
import resource
import signal
import socket
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import pyfuse3
import trio

from kvfs import layout
from kvfs.config import (
    Config,
    TierConfig,
    check_config,
    config_to_builtins,
    load_config,
    reloadable_changes,
)
from kvfs.errors import ConfigError, KvfsError, MountpointError
from kvfs.metrics import prometheus_text
from kvfs.mount import services
from kvfs.mount.control_dir import PROBE, ControlDirectory
from kvfs.mount.invalidate import Invalidator
from kvfs.mount.operations import Operations
from kvfs.mount.passthrough import Channel, Passthrough, is_preloaded
from kvfs.mount.server import ControlServer, socket_path_for
from kvfs.mount.session import detach, set_up_logging, umount2
from kvfs.mount.tiering import Tiering
from kvfs.mount.verbs import Verbs
from kvfs.seal import ignore_lease_breaks
from kvfs.store import Store
from kvfs.tier import Tier
from kvfs.views import Views
from kvfs.volume import check_capacity, open_volume

log = logging.getLogger(__name__)

READ_AHEAD_KIB = 1024
FINAL_FLUSH_S = 60.0
# Enough for the 1 MiB requests of many readers; what is above waits in the kernel.
MAX_FUSE_TASKS = 64
# mallopt(3): keep freed memory up to here, and take no mapping of its own for a 1 MiB answer.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 64 << 20
MAPPED_FROM_BYTES = 32 << 20


def run(
    mountpoint: Path, config: Config, forget_tiers: tuple[str, ...] = (),
    on_ready: Callable[[], None] = lambda: None,
) -> int:  # fmt: skip
    """Serve until unmounted. Raises KvfsError when it cannot start; the exit status otherwise."""
    set_up_logging(config.mount.log_level)
    ignore_lease_breaks()
    keep_freed_memory()
    raise_descriptor_limit()
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
        self.volume = open_volume(config, forget_tiers)
        self.store = Store(self.volume)
        socket_path = socket_path_for(mountpoint)
        self.store.attributes.socket_path = str(socket_path)
        self.views = Views(self.store, str(mountpoint), str(socket_path))
        self.tiering = Tiering(self.store, self.views)
        self.server = ControlServer(
            socket_path, Verbs(self.store, self.views, self.tiering, self.reload)
        )
        self.invalidator = Invalidator()
        self.volume.name_changed = self.invalidator.name_changed
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
                self._start_services(nursery)
                await nursery.start(self.server.run)
                nursery.start_soon(self._watch_signals)
                nursery.start_soon(self._announce)
                if self._channel is not None:
                    nursery.start_soon(self._channel.finish)
                await pyfuse3.main(min_tasks=2, max_tasks=MAX_FUSE_TASKS)
                nursery.cancel_scope.cancel()
        finally:
            pyfuse3.close(unmount=False)

    def _start_services(self, nursery: trio.Nursery) -> None:
        store = self.store
        nursery.start_soon(self.invalidator.run)
        nursery.start_soon(store.sealer.run)
        nursery.start_soon(self.tiering.run)
        nursery.start_soon(services.flush_heat, store)
        nursery.start_soon(services.settle_intents, store)
        nursery.start_soon(services.expire, store)
        nursery.start_soon(services.watch_tiers, store)
        nursery.start_soon(services.checkpoint, self.volume)
        if self.volume.unclean and not self.volume.rebuild:
            nursery.start_soon(store.recovery.reconcile)

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
                    self._reload_on_signal()
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

    def reload(self) -> tuple[list[str], list[str]]:
        """Read the configuration file again; what changed now, and what needs a remount."""
        old = self.volume.config
        path = Path(old.source)
        if not path.is_file():
            raise ConfigError("mounted without a configuration file: there is nothing to reload")
        new = load_config(path)
        check_config(new, self.mountpoint)
        changed = self._changed_tiers(new)
        applied, needs_remount = reloadable_changes(old, new)
        for opened, config in changed:
            opened.reconfigure(config)
            self.volume.space[opened.index].capacity_bytes = config.capacity_bytes
        tiers = tuple(tier.config for tier in self.volume.tiers)
        self.volume.config = msgspec.structs.replace(old, tiering=new.tiering, tier=tiers)
        self.volume.accesses.half_life_s = new.tiering.half_life_s
        self.tiering.reconfigure()
        log.info("reloaded %s: applied %s", path, ", ".join(applied) or "nothing")
        if needs_remount:
            log.warning("these need a remount: %s", ", ".join(needs_remount))
        return applied, needs_remount

    def _changed_tiers(self, new: Config) -> list[tuple[Tier, TierConfig]]:
        """The mounted tiers with their new limits, checked. Paths and media stay."""
        by_name = {tier.name: tier for tier in new.tier}
        changed = []
        for opened in self.volume.tiers:
            if opened.name not in by_name:
                continue
            config = msgspec.structs.replace(
                by_name[opened.name], path=opened.config.path, medium=opened.config.medium
            )
            # A remote mount that hangs must not stop the loop; it was checked when mounted.
            if not opened.remote:
                check_capacity(config)
            changed.append((opened, config))
        return changed

    def _reload_on_signal(self) -> None:
        try:
            self.reload()
        except KvfsError as error:
            log.error("not reloaded: %s", error)

    async def _finish(self, *, clean: bool) -> None:
        """What was promised and can still be done, within a bound."""
        notify_systemd("STOPPING=1")
        try:
            with trio.move_on_after(FINAL_FLUSH_S) as scope:
                await self.operations.close_all()
                await self.store.sealer.seal_pending()
                with self.volume.tolerate("the last flush of the heat"):
                    await services.flush_once(self.store)
                for tier in self.volume.tiers:
                    if tier.online:
                        await services.settle(self.store, tier)
            clean = clean and not scope.cancelled_caught
        except BaseException:
            clean = False
            raise
        finally:
            self.volume.close(clean=clean)
            log.info("stopped")


def keep_freed_memory() -> None:
    """Every read allocates 1 MiB: given back each time, its pages fault in anew each time."""
    # Another libc than glibc has no mallopt, and nothing to tune.
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def raise_descriptor_limit() -> None:
    """Every open block takes a descriptor: as many as the system lets a process have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def raise_read_ahead(mountpoint: Path) -> None:
    """Let the kernel ask for 1 MiB at once instead of 128 KiB; only root may say so."""
    device = os.stat(mountpoint).st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    try:
        setting.write_text(str(READ_AHEAD_KIB))
    except OSError as error:
        log.info("read-ahead stays small, buffered reads are slower: %s", error)


def notify_systemd(state: str) -> None:
    """sd_notify(3), when a supervisor asked for it."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notifier:
        notifier.connect(address)
        notifier.sendall(state.encode())
