"""`kvfs umount`: end a mount and its daemon, or clear a dead mount away."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kvfs.errors import UsageError
from kvfs.mount.session import unmount
from kvfs.tools.render import name_text
from kvfs.units import parse_duration


def register(app: typer.Typer) -> None:
    app.command("umount")(umount)


def umount(
    mountpoint: Annotated[
        Path, typer.Argument(metavar="MOUNTPOINT", help="The mount, alive or dead.")
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Detach even while files are open.")
    ] = False,
    timeout: Annotated[str, typer.Option(help="How long to wait for the daemon.")] = "60s",
) -> None:
    """Unmount MOUNTPOINT and wait until its daemon has written everything down."""
    try:
        timeout_s = parse_duration(timeout)
    except ValueError as error:
        raise UsageError(f"--timeout: {error}") from None
    absolute = Path(os.path.realpath(mountpoint))
    unmount(absolute, force=force, timeout_s=timeout_s)
    typer.echo(f"unmounted {name_text(absolute)}")
