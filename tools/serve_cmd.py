"""`kvfs serve`: the daemon without a mount, for clients of the library on a node without FUSE.

Owns the verb's options. Serving is `kvfs.mount.node`, imported when it is needed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kvfs.config import check_config
from kvfs.control import ControlClient
from kvfs.errors import DaemonUnavailable, UsageError
from kvfs.tools.mount_cmd import effective_config
from kvfs.tools.render import name_text


def register(app: typer.Typer) -> None:
    app.command("serve")(serve)


def serve(
    socket: Annotated[
        Path, typer.Option("--socket", metavar="PATH", help="Where clients connect.")
    ],
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="Configuration (TOML).")
    ] = None,
    tier: Annotated[
        list[str] | None,
        typer.Option(
            "--tier", "-t", metavar="NAME=PATH,capacity=SIZE",
            help="A tier, fastest first; instead of --config.",
        ),
    ] = None,
    forget_tier: Annotated[
        list[str] | None,
        typer.Option("--forget-tier", metavar="NAME", help="Give up the blocks only it has."),
    ] = None,
) -> None:  # fmt: skip
    """Serve blocks without a mount, to clients of the library (KVFS_SOCKET), until it is ended.

    It stays in the foreground and logs to stderr.
    """
    from kvfs.mount.node import run

    path = Path(os.path.abspath(socket))
    effective = effective_config(config, tier or ())
    check_config(effective, None)
    _refuse_served(path)
    told = f"serving on {name_text(path)}"
    status = run(effective, path, tuple(forget_tier or ()), on_ready=lambda: typer.echo(told))
    raise typer.Exit(status)


def _refuse_served(path: Path) -> None:
    """Raise UsageError for a socket on which a daemon answers."""
    try:
        ControlClient(path).connect()
    except DaemonUnavailable:
        return
    raise UsageError(f"{path}: a daemon listens there already")
