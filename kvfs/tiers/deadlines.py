"""Blocking calls that may hang: made in a thread, which is not waited for when it takes too long.

A thread cannot be ended. One that was given up goes on when its call is answered at last, so what
it would do after that asks `is_wanted` first; it keeps its token of the limiter as long.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar, TypeVarTuple

import trio

# For a call to notice that it is not wanted any more: a copy looks after each piece.
GRACE_S = 2.0

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


def answers(function: Callable[[], object], deadline_s: float) -> bool:
    """Whether a blocking call returns in time without an OSError. Blocking; needs no loop."""
    answered: list[bool] = []

    def call() -> None:
        with contextlib.suppress(OSError):
            function()
            answered.append(True)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(deadline_s)
    return bool(answered)


def is_wanted() -> bool:
    """In a worker thread between two steps: whether anybody still waits for it."""
    try:
        trio.from_thread.check_cancelled()
    except trio.Cancelled:
        return False
    except RuntimeError:
        return True  # called on the loop
    return True


async def run_watched(
    function: Callable[[*Ts], T], *args: *Ts,
    limiter: trio.CapacityLimiter, watch: Callable[[], Awaitable[None]],
) -> T:  # fmt: skip
    """A call that may take long, in a thread, while `watch` runs beside it.

    Raises what the function raises; when `watch` returns first the call is given up, with
    trio.TooSlowError. When whoever called is cancelled it gets a moment to clean up.
    """
    results: list[T] = []
    failure: Exception = trio.TooSlowError()
    call = _Call(function, args)

    async def look(scope: trio.CancelScope) -> None:
        await watch()
        call.given_up = True
        scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look, nursery.cancel_scope)
        try:
            results.append(
                await trio.to_thread.run_sync(call.make, limiter=limiter, abandon_on_cancel=True)
            )
        except trio.Cancelled:
            await call.end()
            raise
        except Exception as error:
            # Out of the nursery it would come as a group.
            failure = error
        nursery.cancel_scope.cancel()
    if not results:
        raise failure
    return results[0]


class Delivery:
    """Hands a descriptor from a worker thread to a waiter that may have given up."""

    def __init__(self, closer: Closer) -> None:
        self._closer = closer
        self._lock = threading.Lock()
        self._refused = False
        self._descriptor = -1

    def bring(self, function: Callable[[], int]) -> int:
        """In the worker thread."""
        descriptor = function()
        with self._lock:
            self._descriptor = descriptor
            if self._refused:
                self._closer.close(descriptor)
        return descriptor

    def refuse(self) -> None:
        """On the loop, once nobody will take the descriptor."""
        with self._lock:
            self._refused = True
            if self._descriptor >= 0:
                self._closer.close(self._descriptor)


class _Call(Generic[T, *Ts]):
    """A call in a thread, and whether it goes on. `given_up` belongs to the loop."""

    def __init__(self, function: Callable[[*Ts], T], args: tuple[*Ts]) -> None:
        self._function = function
        self._args = args
        self._token = trio.lowlevel.current_trio_token()
        self._begun = False
        self._ended = trio.Event()
        self.given_up = False

    def make(self) -> T:
        """In the thread."""
        self._begun = True
        try:
            return self._function(*self._args)
        finally:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._ended.set)

    async def end(self) -> None:
        """After a cancellation, unless that was because it hangs."""
        if self._begun and not self.given_up:
            with trio.move_on_after(GRACE_S, shield=True):
                await self._ended.wait()


class Closer:
    """Closes descriptors of one tier in a thread: close(2) hangs too, and then it stops nobody."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: list[int] = []
        self._running = False

    def close(self, descriptor: int) -> None:
        """Soon. From the loop or a thread."""
        with self._lock:
            self._pending.append(descriptor)
            if self._running:
                return
            self._running = True
        trio.lowlevel.start_thread_soon(self._work, lambda _: None)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._pending:
                    self._running = False
                    return
                descriptor = self._pending.pop()
            # Its bytes were written before, or are lost: the tier said so then.
            with contextlib.suppress(OSError):
                os.close(descriptor)
