"""A node's daemon but for the mount: store, services and control socket. Never imports pyfuse3.

`kvfs serve` runs it alone, for clients that lease blocks where no filesystem can be mounted;
`kvfs.mount.daemon` runs it beside a mount.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec
import trio

from kvfs import failpoints
from kvfs.config import Config, TierConfig, check_config, load_config, reloadable_changes
from kvfs.errors import ConfigError, KvfsError
from kvfs.mount import services
from kvfs.mount.server import ControlServer
from kvfs.mount.session import set_up_logging
from kvfs.mount.tiering import Tiering
from kvfs.mount.verbs import Verbs
from kvfs.store import Store
from kvfs.tiers.seal import ignore_lease_breaks
from kvfs.tiers.tier import Tier
from kvfs.views import Views
from kvfs.volume.volume import check_capacity, open_volume

log = logging.getLogger(__name__)

FINAL_FLUSH_S = 60.0


class Node:
    """Owned by the trio loop."""

    def __init__(
        self, config: Config, socket_path: Path, mountpoint: Path | None,
        forget_tiers: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        """Raises TierError, CatalogError."""
        self.mountpoint = mountpoint
        self.volume = open_volume(config, forget_tiers)
        self.store = Store(self.volume)
        self.store.attributes.socket_path = str(socket_path)
        self.views = Views(self.store, str(mountpoint or ""), str(socket_path))
        self.tiering = Tiering(self.store, self.views)
        self.server = ControlServer(
            socket_path, Verbs(self.store, self.views, self.tiering, self.reload),
            allow_other=config.mount.allow_other,
        )  # fmt: skip

    def start_services(self, nursery: trio.Nursery) -> None:
        """Everything that goes on by itself."""
        store, volume = self.store, self.volume
        for service in (
            store.sealer.run, self.tiering.run, store.scrubber.run, store.leases.run,
            store.lingering.run, store.prefetcher.run,
        ):  # fmt: skip
            nursery.start_soon(service)
        for loop in (
            services.flush_heat, services.account_unseen, services.settle_intents,
            services.expire, services.watch_tiers, services.tidy_quarantine,
        ):  # fmt: skip
            nursery.start_soon(loop, store)
        nursery.start_soon(services.tell_incidents, volume)
        nursery.start_soon(services.checkpoint, volume)
        if volume.unclean and not volume.rebuild:
            nursery.start_soon(store.recovery.reconcile)

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
        self.volume.config = msgspec.structs.replace(
            old, tiering=new.tiering, tier=tiers, leases=new.leases
        )
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

    def reload_on_signal(self) -> None:
        """What is wrong with the configuration is only told."""
        try:
            self.reload()
        except KvfsError as error:
            log.error("not reloaded: %s", error)

    async def finish(self, *, clean: bool) -> None:
        """What was promised and can still be done, within a bound; then the volume is closed."""
        try:
            if self.volume.damaged:
                return
            with trio.move_on_after(FINAL_FLUSH_S) as scope:
                self.store.lingering.clear()
                self.store.blocks.idle.clear()
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
            self.volume.incidents.tell(all_of_them=True)
            self.volume.close(clean=clean)
            log.info("stopped")


def prepare_process(log_level: str) -> None:
    """What every daemon does before it opens anything."""
    set_up_logging(log_level)
    if failpoints.armed():
        log.warning("failpoints are armed: %s", failpoints.armed())
    ignore_lease_breaks()
    raise_descriptor_limit()


def raise_descriptor_limit() -> None:
    """Every open block takes a descriptor: as many as the system lets a process have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


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


# --- without a mount


def run(
    config: Config, socket_path: Path, forget_tiers: tuple[str, ...] = (),
    on_ready: Callable[[], None] = lambda: None,
) -> int:  # fmt: skip
    """Serve until SIGTERM or SIGINT. Raises KvfsError when it cannot start."""
    prepare_process(config.mount.log_level)
    node = Node(config, socket_path, None, forget_tiers)
    trio.run(_serve, node, on_ready)
    return 0


async def _serve(node: Node, on_ready: Callable[[], None]) -> None:
    clean = False
    try:
        with node.volume.damage_told():
            await node.store.recovery.before_serving()
            async with trio.open_nursery() as nursery:
                node.start_services(nursery)
                await nursery.start(node.server.run)
                log.info("serving on %s", node.server.path)
                notify_systemd("READY=1")
                on_ready()
                await _until_told(node)
                nursery.cancel_scope.cancel()
        clean = True
    finally:
        notify_systemd("STOPPING=1")
        with trio.CancelScope(shield=True):
            await node.finish(clean=clean)


async def _until_told(node: Node) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async for number in signals:
            if number != signal.SIGHUP:
                return
            node.reload_on_signal()
