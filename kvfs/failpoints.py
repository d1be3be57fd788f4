"""Named places where a test can kill, fail or delay kvfs. Compiled in, off unless armed.

`hit("move.copied")` looks at an empty dictionary and returns. A name says what has just been
done, and is a literal, so that the tests find every one of them in the source. A transaction of the
catalog called NAME has two by itself, NAME.changed and NAME.committed.

Armed by the environment, `KVFS_FAILPOINT=NAME[:NTH][=ACTION]` with several separated by commas, or
by a test's call. ACTION is `kill` (the default: SIGKILL to this process), `error ERRNO` (that
OSError) or `sleep SECONDS`; with NTH only that pass counts, without it each one.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import signal
import time
from collections.abc import Callable
from functools import partial

from kvfs.errors import UsageError

VARIABLE = "KVFS_FAILPOINT"
# Armed by this name, an action is told of every pass.
EVERY = "*"

Action = Callable[[str], None]

_SPECIFICATION = re.compile(
    r"(?P<name>[\w.]+)(:(?P<nth>[1-9]\d*))?"
    r"(=(kill|error (?P<errno>E[A-Z0-9]+)|sleep (?P<seconds>\d+(\.\d+)?)))?"
)
# Written before threads that pass these places start, read by all of them.
_armed: dict[str, Action] = {}


def hit(name: str) -> None:
    """Pass a place. Raises OSError where a test asked for it."""
    if _armed:
        _pass(name)


def arm(specifications: str) -> None:
    """Arm what KVFS_FAILPOINT would. Raises UsageError."""
    for text in filter(None, specifications.split(",")):
        found = _SPECIFICATION.fullmatch(text.strip())
        if found is None or (found["errno"] and not hasattr(errno, found["errno"])):
            raise UsageError(f"{VARIABLE}: {text!r} is not NAME[:NTH][=kill|error ERRNO|sleep S]")
        action: Action = _kill
        if found["errno"]:
            action = partial(_fail, getattr(errno, found["errno"]))
        elif found["seconds"]:
            action = partial(_sleep, float(found["seconds"]))
        on(found["name"], _at(int(found["nth"]), action) if found["nth"] else action)


def on(name: str, action: Action) -> None:
    """Call `action(name)` at each pass of a place, in whatever thread passes it."""
    _armed[name] = action


def disarm() -> None:
    """No place does anything any more."""
    _armed.clear()


def armed() -> str:
    """The names that are armed, for a log."""
    return ", ".join(sorted(_armed))


def _pass(name: str) -> None:
    for action in (_armed.get(EVERY), _armed.get(name)):
        if action is not None:
            action(name)


def _at(nth: int, action: Action) -> Action:
    passes = itertools.count(1)

    def act(name: str) -> None:
        if next(passes) == nth:
            action(name)

    return act


def _kill(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def _fail(number: int, name: str) -> None:
    raise OSError(number, f"{os.strerror(number)} (failpoint)", name)


def _sleep(seconds: float, _: str) -> None:
    time.sleep(seconds)


arm(os.environ.get(VARIABLE, ""))
