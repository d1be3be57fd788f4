"""`kvfs promote`, `demote` and `evict`: moves that an operator orders.

They return when the bytes are where they should be; what was skipped is named, with the reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvfs.tools.mounts import by_mount, order
from kvfs.tools.render import name_text, print_json, progress_bar, size_text, warn
from kvfs.units import format_blocks

NAMED_REASONS = 5

Paths = Annotated[
    list[Path], typer.Argument(metavar="PATH", help="Blocks, or directories with all below.")
]
To = Annotated[str | None, typer.Option("--to", metavar="TIER", help="Default: the next tier.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


def register(app: typer.Typer) -> None:
    app.command("promote")(promote)
    app.command("demote")(demote)
    app.command("evict")(evict)


def promote(paths: Paths, to: To = None, as_json: AsJson = False) -> None:
    """Copy PATHS to a faster tier and wait; lower copies stay. Exit 1 if a block was skipped."""
    _report("promoted", "moved", _carry_out("promote", "moved", paths, {"to": to}), as_json)


def demote(paths: Paths, to: To = None, as_json: AsJson = False) -> None:
    """Move PATHS to a slower tier and wait. Exit 1 if a block was skipped."""
    _report("demoted", "moved", _carry_out("demote", "moved", paths, {"to": to}), as_json)


def evict(paths: Paths, as_json: AsJson = False) -> None:
    """Remove PATHS from every tier: the blocks are gone. Exit 1 if a block was skipped."""
    _report("evicted", "evicted", _carry_out("evict", "evicted", paths, {}), as_json)


def _carry_out(
    verb: str, counted: str, paths: list[Path], options: dict[str, Any]
) -> dict[str, Any]:
    """Ask every mount concerned; the sum of their answers."""
    total: dict[str, Any] = {counted: 0, "bytes": 0, "skipped": [], "skipped_count": 0}
    with progress_bar(verb) as feed:
        for socket_path, mounts in by_mount(paths).items():
            args = {"paths": [mount.relative for mount in mounts], **options}
            answer = order(socket_path, verb, args, feed)
            total[counted] += answer[counted]
            total["bytes"] += answer["bytes"]
            total["skipped"] += answer["skipped"]
            total["skipped_count"] += answer["skipped_count"]
    return total


def _report(done: str, counted: str, total: dict[str, Any], as_json: bool) -> None:
    skipped, count = total["skipped"], total["skipped_count"]
    if as_json:
        print_json(total)
    else:
        rest = f", {count} skipped" if count else ""
        typer.echo(f"{done} {format_blocks(total[counted])} ({size_text(total['bytes'])}){rest}")
    for skip in skipped[:NAMED_REASONS]:
        warn(f"skipped {name_text(skip['path'])}: {skip['reason']}")
    if count > NAMED_REASONS:
        warn(f"skipped {count - NAMED_REASONS} more; --json lists {len(skipped)} of {count}")
    if count:
        raise typer.Exit(1)
