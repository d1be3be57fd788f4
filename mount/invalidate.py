"""The only caller of `pyfuse3.invalidate_*`.

The kernel waits for lookups of the same directory, so a call from the loop, or under anything that
a handler needs, can stop the whole mount. One worker thread makes the calls, in batches; the queue
in front of it is bounded and a name that does not fit is answered with ESTALE at its next open.
"""

from __future__ import annotations

import logging

import pyfuse3
import trio

from kvfs.errors import reason_of
from kvfs.metrics import Counters

log = logging.getLogger(__name__)

QUEUE_NAMES = 65_536
BATCH_NAMES = 256

# A name in its directory, an inode (its attributes), or what is set once those before were told.
Item = tuple[int, bytes] | int | trio.Event


class Invalidator:
    """Owned by the trio loop; the calls happen in one thread."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._send, self._receive = trio.open_memory_channel[Item](QUEUE_NAMES)
        self._limiter = trio.CapacityLimiter(1)

    def name_changed(self, parent: int, name: bytes) -> None:
        """A name appeared or went without the kernel having asked. Commit first."""
        try:
            self._send.send_nowait((parent, name))
        except trio.WouldBlock:
            self._counters.count("invalidations_failed", reason="queue")

    def attributes_changed(self, inode: int) -> None:
        """The attributes of an inode are others without the kernel having asked. Commit first."""
        try:
            self._send.send_nowait(inode)
        except trio.WouldBlock:
            self._counters.count("invalidations_failed", reason="queue")

    async def told(self) -> None:
        """Return when the kernel knows of every change so far, or cannot be told."""
        event = trio.Event()
        try:
            self._send.send_nowait(event)
        except trio.WouldBlock:
            return
        await event.wait()

    async def run(self) -> None:
        """Tell the kernel."""
        while True:
            batch = [await self._receive.receive()]
            while len(batch) < BATCH_NAMES:
                try:
                    batch.append(self._receive.receive_nowait())
                except trio.WouldBlock:
                    break
            told = [item for item in batch if not isinstance(item, trio.Event)]
            failed = await trio.to_thread.run_sync(
                invalidate, told, limiter=self._limiter, abandon_on_cancel=True
            )
            for reason in failed:
                self._counters.count("invalidations_failed", reason=reason)
            for item in batch:
                if isinstance(item, trio.Event):
                    item.set()


def invalidate(items: list[tuple[int, bytes] | int]) -> list[str]:
    """Drop dentries, positive or negative, and attributes; the reasons of those that failed.

    What the kernel does not know is fine.
    """
    failed = []
    for item in items:
        try:
            if isinstance(item, int):
                pyfuse3.invalidate_inode(pyfuse3.InodeT(item), attr_only=True)
            else:
                parent, name = item
                pyfuse3.invalidate_entry(pyfuse3.InodeT(parent), pyfuse3.FileNameT(name))
        except FileNotFoundError:
            continue
        except OSError as error:
            log.debug("invalidating %r: %s", item, error)
            failed.append(reason_of(error))
    return failed
