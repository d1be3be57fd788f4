"""`kvfs quarantine`: what was set aside as bad or unknown, and how it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvfs.tools.mounts import order, socket_of
from kvfs.tools.render import (
    ago_text,
    count_text,
    name_text,
    print_json,
    show,
    size_text,
    table,
)


def register(app: typer.Typer) -> None:
    app.command("quarantine")(quarantine)


def quarantine(
    mountpoint: Annotated[
        Path | None, typer.Argument(metavar="MOUNTPOINT", help="Default: the only mount.")
    ] = None,
    tier: Annotated[
        str | None, typer.Option("--tier", metavar="TIER", help="Only that of this tier.")
    ] = None,
    purge: Annotated[bool, typer.Option("--purge", help="Remove what is listed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the files that are never served again, oldest first, or remove them."""
    answer = order(socket_of(mountpoint), "quarantine", {"tier": tier, "purge": purge})
    if as_json:
        print_json(answer)
        return
    files = answer["files"]
    if files:
        view = table("Tier", "Since", "Reason", ">Size", "Path")
        for file in files:
            view.add_row(
                file["tier"],
                ago_text(file["at"]),
                file["reason"],
                size_text(file["size_bytes"]),
                name_text(file["path"]),
            )
        show(view)
    removed = " removed" if purge else ""
    typer.echo(f"{count_text(len(files))} files, {size_text(answer['bytes'])}{removed}")
