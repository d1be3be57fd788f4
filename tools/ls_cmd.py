"""`kvfs ls`: a directory of the mount with sizes, heat, tiers and states.

Pages through the daemon, so that a directory of millions of names costs neither side memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from kvfs.control import ControlClient, Mount, find_mount
from kvfs.tools.mounts import QUESTION_TIMEOUT_S
from kvfs.tools.render import ago_text, heat_text, json_text, name_text, show, size_text, table

PAGE_NAMES = 1000

# Fixed, so that every page lines up with the first.
_COLUMN_CELLS = {"Size": 10, "Heat": 6, "Tiers": 12, "State": 14, "Last access": 12}


def register(app: typer.Typer) -> None:
    app.command("ls")(ls)


def ls(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A directory inside a mount.")
    ] = Path(),
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="At most N; 0: all.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List PATH with sizes, heat, tiers and states."""
    mount = find_mount(path)
    pages = pages_of(mount, limit)
    if as_json:
        _print_json_pages(mount.relative, pages)
        return
    for number, entries in enumerate(pages):
        if entries or number == 0:
            show(listing(entries, header=number == 0))


def pages_of(mount: Mount, limit: int) -> Iterator[list[dict[str, Any]]]:
    """The entries of a directory, a page at a time."""
    after: int | None = None
    left = limit or None
    with ControlClient(mount.socket_path) as client:
        while True:
            count = PAGE_NAMES if left is None else min(left, PAGE_NAMES)
            args = {"path": mount.relative, "after": after, "limit": count}
            answer = client.call("ls", args, timeout_s=QUESTION_TIMEOUT_S)
            yield answer["entries"]
            if left is not None:
                left -= len(answer["entries"])
            after = answer["next"]
            if after is None or left == 0:
                return


def _print_json_pages(directory: bytes, pages: Iterator[list[dict[str, Any]]]) -> None:
    """One JSON object, written as the pages arrive."""
    opened = False
    for entries in pages:
        for entry in entries:
            lead = ",\n  " if opened else f'{{"path": {json_text(directory)}, "entries": [\n  '
            typer.echo(lead + json_text(entry, indent=None), nl=False)
            opened = True
    typer.echo("\n]}" if opened else json_text({"path": directory, "entries": []}, indent=None))


def listing(entries: list[dict[str, Any]], *, header: bool = True) -> Table:
    """One page as a table."""
    view = table(">Size", ">Heat", "Tiers", "State", ">Last access", "Name")
    view.show_header = header
    for column in view.columns:
        column.min_width = _COLUMN_CELLS.get(str(column.header))
    for entry in entries:
        view.add_row(*block_cells(entry), _name_of(entry))
    return view


def block_cells(block: dict[str, Any]) -> tuple[str, ...]:
    """What a line about a block says before its name."""
    if block["kind"] == "directory":
        return ("", "", "", "dir", "")
    return (
        size_text(block["size_bytes"]),
        heat_text(block["heat"]),
        ",".join(block["replicas"]),
        f"{block['state']}{', pinned' if block['pinned'] else ''}",
        ago_text(block["last_access"]),
    )


def _name_of(entry: dict[str, Any]) -> str:
    name = name_text(entry.get("name") or os.path.basename(entry["path"]))
    return f"{name}/" if entry["kind"] == "directory" else name
