"""`kvfs tier`: list the tiers, prepare a directory, empty a tier, run a tiering pass."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from kvfs.tools.mounts import ask, order, socket_of
from kvfs.tools.render import (
    count_text,
    fits,
    name_text,
    print_json,
    progress_bar,
    show,
    size_text,
    state_text,
    table,
    usage_bar,
    warn,
)
from kvfs.tools.status_cmd import set_apart_bytes
from kvfs.units import format_blocks

Mountpoint = Annotated[
    Path | None, typer.Argument(metavar="MOUNTPOINT", help="Default: the only mount.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


def register(app: typer.Typer) -> None:
    verbs = typer.Typer(help="List, prepare, empty and balance tiers.", no_args_is_help=True)
    verbs.command("list")(list_tiers)
    verbs.command("init")(init)
    verbs.command("drain")(drain)
    verbs.command("run")(run)
    app.add_typer(verbs, name="tier")


def list_tiers(mountpoint: Mountpoint = None, as_json: AsJson = False) -> None:
    """List the tiers, fastest first."""
    tiers = ask(socket_of(mountpoint), "status")["tiers"]
    if as_json:
        print_json({"tiers": tiers})
        return
    wide = _tier_table(tiers, "Usage")
    show(wide if fits(wide) else _tier_table(tiers))


def _tier_table(tiers: list[dict[str, Any]], *bar: str) -> Table:
    """On a narrow terminal the path is worth more than the bar."""
    # Seldom anything: it would only push the paths out.
    aside = [">Quarantine"] if any(tier["quarantine_files"] for tier in tiers) else []
    sizes = (">Used", *aside, ">Capacity", ">Blocks")
    view = table("Tier", "Medium", "State", *bar, *sizes, "Path")
    for tier in tiers:
        claimed = set_apart_bytes(tier)
        view.add_row(
            tier["name"],
            tier["medium"],
            state_text(tier["state"]),
            *([usage_bar(tier["used_bytes"], claimed, tier["capacity_bytes"])] if bar else []),
            size_text(tier["used_bytes"]),
            *([size_text(tier["quarantine_bytes"])] if aside else []),
            size_text(tier["capacity_bytes"]),
            count_text(tier["blocks"]),
            name_text(tier["path"]),
        )
    return view


def init(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The directory.")],
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Take over the files that lie there.")
    ] = False,
) -> None:
    """Make PATH a tier. An empty directory needs no init: `kvfs mount` does it."""
    # It brings trio along, which no other verb needs.
    from kvfs.tiers.identity import init_tier

    identity = init_tier(path.absolute(), adopt=adopt)
    then = "; the next mount takes over what lies there" if adopt else ""
    typer.echo(f"{name_text(path)} is tier {identity.uuid}{then}")


def drain(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The tier.")],
    mountpoint: Mountpoint = None,
    as_json: AsJson = False,
) -> None:
    """Move everything off tier NAME and wait. Interrupted or failed, run it again: it goes on."""
    with progress_bar(f"drain {name}") as feed:
        answer = order(socket_of(mountpoint), "tier_drain", {"name": name}, feed)
    if as_json:
        print_json(answer)
    else:
        typer.echo(
            f"moved {format_blocks(answer['moved'])} ({size_text(answer['bytes'])}) off {name}"
        )
    if answer["remaining"]:
        warn(
            f"{format_blocks(answer['remaining'])} left on {name}, open or without room elsewhere: "
            "run it again"
        )
        raise typer.Exit(1)


def run(
    mountpoint: Mountpoint = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what it would do, do nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run one tiering pass now, or show what it would do."""
    answer = order(socket_of(mountpoint), "tier_run", {"dry_run": dry_run})
    if as_json:
        print_json(answer)
        return
    moves = answer["moves"]
    if moves:
        view = table("Move", "From", "To", ">Size", "Reason", "Block")
        for move in moves:
            view.add_row(
                move["kind"],
                move["source"],
                move["target"] or "",
                size_text(move["size_bytes"]),
                move["reason"],
                name_text(move["path"]),
            )
        show(view)
    for line in _sums(moves):
        typer.echo(line)
    for note in answer["notes"]:
        typer.echo(note)
    size_bytes = sum(move["size_bytes"] for move in moves)
    typer.echo(
        f"{len(moves)} moves planned, {size_text(size_bytes)}, "
        f"in {answer['planning_s'] * 1000:.1f} ms"
    )


def _sums(moves: list[dict[str, Any]]) -> list[str]:
    """One line for each way that blocks go: a plan may have hundreds of moves."""
    if len(moves) < 2:
        return []
    sums: dict[str, list[int]] = {}
    for move in moves:
        way = f"{move['kind']} {move['source']}"
        way += f" -> {move['target']}" if move["target"] else ""
        sums.setdefault(way, []).append(move["size_bytes"])
    return [f"{way}: {len(sizes)}, {size_text(sum(sizes))}" for way, sizes in sums.items()]
