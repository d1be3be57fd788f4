"""A daemon without a mount, in a thread of the test: store, services and control socket."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import trio

from kvfs.config import Config
from kvfs.mount import services
from kvfs.mount.server import ControlServer
from kvfs.mount.tiering import Tiering
from kvfs.mount.verbs import Verbs
from kvfs.store import Store
from kvfs.views import Views
from kvfs.volume.volume import open_volume
from tests.store.helpers import put, put_on

T = TypeVar("T")
READY_S = 30.0


class Served:
    """Runs from `start` to `stop`. What touches the store goes through `run`."""

    def __init__(self, config: Config, socket_path: Path) -> None:
        self.config = config
        self.socket_path = socket_path
        self.store: Store = None  # type: ignore[assignment] # until it is started
        self._ready = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: list[BaseException] = []

    def start(self) -> None:
        self._ready.clear()
        self._thread = threading.Thread(target=self._main)
        self._thread.start()
        assert self._ready.wait(READY_S), "the daemon is ready"
        if self._failure:
            self._thread.join()
            raise self._failure[0]

    def stop(self) -> None:
        """End it in order; fails if something is left open."""
        if self._thread is None:
            return
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._scope.cancel)
        self._thread.join()
        self._thread = None
        if self._failure:
            raise self._failure[0]

    def _main(self) -> None:
        try:
            trio.run(self._serve)
        except BaseException as error:  # raised where it is joined
            self._failure.append(error)
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        volume = open_volume(self.config)
        self.store = store = Store(volume)
        views = Views(store, str(self.socket_path), str(self.socket_path))
        tiering = Tiering(store, views)

        def reload() -> tuple[list[str], list[str]]:
            return [], []

        verbs = Verbs(store, views, tiering, reload)
        server = ControlServer(self.socket_path, verbs, allow_other=True)
        self._token = trio.lowlevel.current_trio_token()
        try:
            await store.recovery.before_serving()
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                for service in (
                    store.sealer.run, store.leases.run, store.lingering.run, store.prefetcher.run,
                ):  # fmt: skip
                    nursery.start_soon(service)
                for loop in (services.settle_intents, services.flush_heat):
                    nursery.start_soon(loop, store)
                await nursery.start(server.run)
                self._ready.set()
            with trio.CancelScope(shield=True):
                store.lingering.clear()
                store.blocks.idle.clear()
                await store.sealer.seal_pending()
        finally:
            volume.close(clean=True)

    # --- from the test

    def run(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Call an async function in the daemon's loop."""
        return trio.from_thread.run(function, *args, trio_token=self._token)

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function in the daemon's loop."""
        return trio.from_thread.run_sync(function, *args, trio_token=self._token)

    def put(self, path: bytes, data: bytes, *tiers: str, mode: int = 0o644) -> int:
        """A sealed block, on these tiers if any are named; its inode."""
        if tiers:
            return self.run(put_on, self.store, path, data, *tiers)
        return self.run(put, self.store, path, data, mode)
