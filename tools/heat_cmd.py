"""`kvfs heat`: the hottest or coldest blocks of a mount or of one directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvfs.control import find_mount
from kvfs.tools.ls_cmd import block_cells
from kvfs.tools.mounts import ask, socket_of
from kvfs.tools.render import name_text, print_json, show, table


def register(app: typer.Typer) -> None:
    app.command("heat")(heat)


def heat(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="PATH", help="A mount, or a directory in it; default: the only mount."
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many.")] = 20,
    coldest: Annotated[bool, typer.Option("--coldest", help="Coldest first.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List blocks by heat, hottest first."""
    if path is None:
        socket_path, relative = socket_of(None), b""
    else:
        mount = find_mount(path)
        socket_path, relative = mount.socket_path, mount.relative
    answer = ask(socket_path, "heat", {"path": relative, "limit": limit, "coldest": coldest})
    if as_json:
        print_json(answer)
        return
    view = table(">Size", ">Heat", "Tiers", "State", ">Last access", "Block")
    for block in answer["blocks"]:
        view.add_row(*block_cells(block), name_text(block["path"]))
    show(view)
