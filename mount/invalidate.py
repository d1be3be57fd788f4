"""The only caller of `pyfuse3.invalidate_*`.

The kernel waits for lookups of the same directory, so a call from the loop, or under anything that
a handler needs, can stop the whole mount. One worker thread makes the calls, in batches; the queue
in front of it is bounded and a name that does not fit is answered with ESTALE at its next open.
"""

from __future__ import annotations

import logging

import pyfuse3
import trio

log = logging.getLogger(__name__)

QUEUE_NAMES = 65_536
BATCH_NAMES = 256


class Invalidator:
    """Owned by the trio loop; the calls happen in one thread."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[tuple[int, bytes]](QUEUE_NAMES)
        self._limiter = trio.CapacityLimiter(1)
        self.dropped = 0

    def name_changed(self, parent: int, name: bytes) -> None:
        """A name appeared or went without the kernel having asked. Commit first."""
        try:
            self._send.send_nowait((parent, name))
        except trio.WouldBlock:
            self.dropped += 1

    async def run(self) -> None:
        """Tell the kernel."""
        while True:
            batch = [await self._receive.receive()]
            while len(batch) < BATCH_NAMES:
                try:
                    batch.append(self._receive.receive_nowait())
                except trio.WouldBlock:
                    break
            await trio.to_thread.run_sync(
                invalidate, batch, limiter=self._limiter, abandon_on_cancel=True
            )


def invalidate(names: list[tuple[int, bytes]]) -> None:
    """Drop dentries, positive or negative. A name that the kernel does not know is fine."""
    for parent, name in names:
        try:
            pyfuse3.invalidate_entry(pyfuse3.InodeT(parent), pyfuse3.FileNameT(name))
        except FileNotFoundError:
            continue
        except OSError as error:
            log.debug("invalidating %r in %d: %s", name, parent, error)
