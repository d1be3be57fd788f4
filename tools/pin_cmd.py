"""`kvfs pin` and `kvfs unpin`: keep blocks, or everything below a directory, from being evicted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvfs.tools.mounts import by_mount, order
from kvfs.tools.render import print_json


def register(app: typer.Typer) -> None:
    app.command("pin")(pin)
    app.command("unpin")(unpin)


def pin(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH", help="Blocks or directories.")],
    tier: Annotated[
        str | None, typer.Option("--tier", metavar="NAME", help="Also keep them on this tier.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Never evict PATHS by themselves; a directory stands for all below it."""
    _change("pin", paths, tier, as_json)


def unpin(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH", help="Blocks or directories.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Take the pins of PATHS away."""
    _change("unpin", paths, None, as_json)


def _change(verb: str, paths: list[Path], tier: str | None, as_json: bool) -> None:
    changed = 0
    for socket_path, mounts in by_mount(paths).items():
        args = {"paths": [mount.relative for mount in mounts], "tier": tier}
        changed += order(socket_path, verb, args)["changed"]
    if as_json:
        print_json({"changed": changed})
    else:
        typer.echo(f"{verb}ned {changed} of {len(paths)}")
