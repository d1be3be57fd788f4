"""`kvfs scrub`: read what is stored and see whether it is still what was sealed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvfs.control import find_mount
from kvfs.errors import UsageError
from kvfs.tools.mounts import order, socket_of
from kvfs.tools.render import (
    count_text,
    name_text,
    print_json,
    progress_bar,
    show,
    size_text,
    table,
    warn,
)
from kvfs.units import parse_size


def register(app: typer.Typer) -> None:
    app.command("scrub")(scrub)


def scrub(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="PATH",
            help="A mountpoint, or a block or directory in one. Default: the only mount.",
        ),
    ] = None,
    tier: Annotated[
        str | None, typer.Option("--tier", metavar="TIER", help="Only the copies on this tier.")
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option("--rate", metavar="SIZE/s", help='At most, such as "100MiB/s".'),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew instead of where the last one stopped.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Read every copy from its medium and verify it. Exit 1 if one is bad or unreadable.

    Bad copies go to quarantine. Interrupted, the scrub of a whole mount goes on when run again.
    """
    args: dict[str, Any] = {"tier": tier, "rate": _rate(rate), "restart": restart}
    socket_path, args["path"] = _place(path)
    with progress_bar("scrub") as feed:
        answer = order(socket_path, "scrub", args, feed)
    if as_json:
        print_json(answer)
    else:
        _print(answer)
    if answer["bad"] or answer["unreadable"]:
        raise typer.Exit(1)


def _rate(text: str | None) -> int:
    """Bytes a second; 0 is no limit."""
    if text is None:
        return 0
    try:
        return parse_size(text.removesuffix("/s"))
    except ValueError as error:
        raise UsageError(f"--rate: {error}") from None


def _place(path: Path | None) -> tuple[Path, bytes]:
    """The socket to ask, and the path below its mount; b"" is all of it."""
    if path is None:
        return socket_of(None), b""
    mount = find_mount(path)
    return mount.socket_path, mount.relative


def _print(answer: dict[str, Any]) -> None:
    if answer["named"]:
        view = table("Tier", "What", "Path")
        for one in answer["named"]:
            view.add_row(one["tier"], one["what"], name_text(one["path"]))
        show(view)
    for name in answer["offline"]:
        warn(f"tier {name} is offline: not scrubbed")
    found = ""
    if answer["bad"]:
        found += f", {count_text(answer['bad'])} bad: `kvfs quarantine` lists them"
    if answer["unreadable"]:
        found += f", {count_text(answer['unreadable'])} unreadable: check the disk"
    resumed = " (with what an earlier scrub had checked)" if answer["resumed"] else ""
    typer.echo(
        f"scrubbed {count_text(answer['checked'])} copies{resumed}, "
        f"read {size_text(answer['bytes'])}{found or ': all sound'}"
    )
