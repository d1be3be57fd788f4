"""Which mount a verb speaks to, and one call to its daemon.

Owns the rule that a verb without a mountpoint means the only mount there is. Never prints. Called
by the verbs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvfs.control import SOCKET_ENV, ControlClient, Mount, find_mount, kvfs_mountpoints
from kvfs.errors import DaemonUnavailable, UsageError
from kvfs.tools.render import ProgressSink

# A daemon whose loop is healthy answers a question within milliseconds.
QUESTION_TIMEOUT_S = 30.0


def socket_of(mountpoint: Path | None) -> Path:
    """The control socket of `mountpoint`, or of the only mount."""
    if mountpoint is not None:
        return find_mount(mountpoint).socket_path
    override = os.environ.get(SOCKET_ENV)
    if override:
        return Path(override)
    mountpoints = kvfs_mountpoints()
    if not mountpoints:
        raise DaemonUnavailable("there is no kvfs mount: `kvfs mount MOUNTPOINT` makes one")
    if len(mountpoints) > 1:
        listed = ", ".join(map(str, mountpoints))
        raise UsageError(f"there are several kvfs mounts, name one of them: {listed}")
    return find_mount(mountpoints[0]).socket_path


def ask(socket_path: Path, verb: str, args: dict[str, Any] | None = None) -> dict[str, Any]:
    """A question that the daemon answers at once."""
    with ControlClient(socket_path) as client:
        return client.call(verb, args, timeout_s=QUESTION_TIMEOUT_S)


def order(
    socket_path: Path, verb: str, args: dict[str, Any], on_progress: ProgressSink | None = None
) -> dict[str, Any]:
    """Work that takes as long as it takes; interrupting the command closes the connection."""
    with ControlClient(socket_path) as client:
        return client.call(verb, args, on_progress)


def by_mount(paths: Sequence[Path]) -> dict[Path, list[Mount]]:
    """`paths` grouped by the control socket of their mounts; nothing is asked yet."""
    groups: dict[Path, list[Mount]] = {}
    for path in paths:
        mount = find_mount(path)
        groups.setdefault(mount.socket_path, []).append(mount)
    return groups
