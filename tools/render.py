"""How the command prints: tables for people, JSON for programs, progress on stderr.

Owns the look of everything that a verb shows. Never asks a daemon anything. Called by every verb.
Tables go to stdout unwrapped when it is not a terminal, so that `kvfs ls | grep` sees whole lines.
Names are bytes: JSON carries them the way `os.fsdecode` does, tables escape what a terminal cannot
show.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from kvfs.units import format_duration, format_size, printable

PIPE_WIDTH = 10_000
BAR_CELLS = 16
# What a progress bar needs besides the path, and the most that is shown of a path.
BAR_WIDTH = 80
PATH_CELLS = 40
UNKNOWN = "-"

_STATE_STYLES = {
    "online": "green",
    "sealed": "green",
    "ok": "green",
    "degraded": "yellow",
    "offline": "bold red",
    "dead": "bold red",
}


def plain(value: Any) -> Any:
    """`value` as JSON can say it: names decoded, tuples as lists, no infinities."""
    if isinstance(value, bytes | Path):
        return os.fsdecode(value)
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def json_text(document: Any, indent: int | None = 2) -> str:
    """The JSON of `document`, ASCII only, so that names of any bytes survive every pipe."""
    return json.dumps(plain(document), indent=indent, ensure_ascii=True, allow_nan=False)


def print_json(document: Any) -> None:
    """Print `document` as JSON on stdout."""
    typer.echo(json_text(document))


def name_text(name: bytes | str | Path) -> str:
    """`name` for a terminal: one line, with control characters and stray bytes escaped."""
    return printable(os.fsdecode(name))


def size_text(size_bytes: int | None) -> str:
    """A size for people."""
    return UNKNOWN if size_bytes is None else format_size(size_bytes)


def count_text(count: int | None) -> str:
    """A number for people."""
    return UNKNOWN if count is None else f"{count:,}"


def share_text(share: float | None) -> str:
    """A share of 1 as a percentage; one decimal, because 99.6 % is not all."""
    return UNKNOWN if share is None else f"{share:.1%}"


def heat_text(heat: float | None) -> str:
    """A heat, with the digits that tell one block from the next."""
    return UNKNOWN if heat is None else f"{heat:.3g}"


def ago_text(moment_s: float | None, now_s: float | None = None) -> str:
    """How long ago a wall clock time was."""
    if moment_s is None or not math.isfinite(moment_s):
        return "never"
    now_s = time.time() if now_s is None else now_s
    return f"{format_duration(round(max(0.0, now_s - moment_s), 1))} ago"


def state_text(state: str) -> Text:
    """A state in its colour: what is not known to be good stands out."""
    return Text(state, style=_STATE_STYLES.get(state, "yellow"))


def usage_bar(used: int, claimed: int, capacity: int, cells: int = BAR_CELLS) -> Text:
    """A bar of `used` and, lighter, `claimed` (reserved and held) bytes of `capacity`."""
    if capacity <= 0:
        return Text(UNKNOWN)
    full = min(cells, round(cells * used / capacity))
    light = min(cells - full, math.ceil(cells * claimed / capacity))
    share = (used + claimed) / capacity
    style = "red" if share > 0.98 else "yellow" if share > 0.95 else "green"
    bar = Text("█" * full + "▒" * light, style=style)
    bar.append("░" * (cells - full - light), style="dim")
    bar.append(f" {share:.0%}".rjust(5))
    return bar


def table(*columns: str, title: str | None = None) -> Table:
    """A table whose columns are named; a name that starts with `>` is right-aligned.

    The last column holds names and folds on a narrow terminal, the others keep their line.
    """
    result = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for position, column in enumerate(columns):
        last = position == len(columns) - 1
        result.add_column(
            column.removeprefix(">"),
            justify="right" if column.startswith(">") else "left",
            header_style="bold",
            no_wrap=not last,
            overflow="fold",
        )
    return result


def fits(renderable: RenderableType) -> bool:
    """Whether stdout is wide enough to show it without folding."""
    out = console()
    unbounded = out.options.update(width=PIPE_WIDTH)
    return out.measure(renderable, options=unbounded).maximum <= out.width


def fields(pairs: Mapping[str, RenderableType]) -> Table:
    """Two columns: names and values."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs.items():
        grid.add_row(name, value)
    return grid


def console() -> Console:
    """The console on stdout as it is now. Markup is off: names may hold brackets."""
    made = Console(file=sys.stdout, markup=False, highlight=False, emoji=False)
    if not made.is_terminal:
        made.width = PIPE_WIDTH
    return made


def show(renderable: RenderableType) -> None:
    """Print on stdout; into a pipe without padding at the ends of lines."""
    out = console()
    if out.is_terminal:
        out.print(renderable)
        return
    with out.capture() as capture:
        out.print(renderable)
    typer.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def warn(message: str) -> None:
    """One line on stderr, beside the result."""
    typer.echo(f"kvfs: {message}", err=True)


ProgressSink = Callable[[dict[str, Any]], None]


@contextmanager
def progress_bar(what: str) -> Iterator[ProgressSink]:
    """A bar on stderr, if that is a terminal, fed with `{done, total, bytes, path}`."""
    errors = Console(stderr=True, markup=False, highlight=False)
    room = min(PATH_CELLS, errors.width - BAR_WIDTH)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[moved]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[path]}", markup=False),
    )
    hidden = not errors.is_terminal
    with Progress(*columns, console=errors, transient=True, disable=hidden) as bar:
        task = bar.add_task(what, total=None, moved="", path="")

        def feed(progress: dict[str, Any]) -> None:
            path = name_text(progress.get("path") or b"")
            bar.update(
                task,
                completed=progress.get("done"),
                total=progress.get("total"),
                moved=size_text(progress.get("bytes")),
                path=path if len(path) <= room else "…" + path[1 - room :] if room > 1 else "",
            )

        yield feed
