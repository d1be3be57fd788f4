"""`kvfs config`: check a file, show what a mount runs with, have it read its file again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from kvfs.config import load_config
from kvfs.tools.mounts import ask, socket_of
from kvfs.tools.render import fields, name_text, print_json, show, size_text, table
from kvfs.units import format_duration

Mountpoint = Annotated[
    Path | None, typer.Argument(metavar="MOUNTPOINT", help="Default: the only mount.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]

_SIZE_KEYS = frozenset({"capacity", "promote_bandwidth", "write_budget_per_day"})
_DURATION_KEYS = frozenset({"deadline", "interval", "half_life", "tmp_ttl"})


def register(app: typer.Typer) -> None:
    verbs = typer.Typer(help="Check, show and reload the configuration.", no_args_is_help=True)
    verbs.command("check")(check)
    verbs.command("show")(show_config)
    verbs.command("reload")(reload)
    app.add_typer(verbs, name="config")


def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A configuration file.")],
    as_json: AsJson = False,
) -> None:
    """Check FILE without touching a tier. Exit 3 and one line if it is wrong."""
    config = load_config(file)
    tiers = [tier.name for tier in config.tier]
    if as_json:
        print_json({"file": file, "ok": True, "tiers": tiers})
    else:
        typer.echo(f"{name_text(file)}: right, {len(tiers)} tiers ({', '.join(tiers)})")


def show_config(mountpoint: Mountpoint = None, as_json: AsJson = False) -> None:
    """Show the configuration in effect, defaults included."""
    config = ask(socket_of(mountpoint), "config")
    if as_json:
        print_json(config)
    else:
        show(config_view(config))


def reload(mountpoint: Mountpoint = None, as_json: AsJson = False) -> None:
    """Have the daemon read its file again; says what only a new mount applies."""
    answer = ask(socket_of(mountpoint), "reload")
    if as_json:
        print_json(answer)
        return
    typer.echo(f"applied: {', '.join(answer['applied']) or 'nothing'}")
    if answer["needs_remount"]:
        typer.echo(f"needs a new mount: {', '.join(answer['needs_remount'])}")


def config_view(config: dict[str, Any]) -> Group:
    """The configuration by table, in the words of the file."""
    parts: list[RenderableType] = [Text(f"from {config['source']}")]
    tiers = table("Tier", "Medium", ">Capacity", ">Concurrency", ">Deadline", "Path")
    for tier in config["tier"]:
        tiers.add_row(
            tier["name"],
            tier["medium"],
            size_text(tier["capacity"]),
            str(tier["concurrency"]),
            format_duration(tier["deadline"]),
            name_text(tier["path"]),
        )
    parts += [Text(), tiers]
    for section in ("tiering", "mount"):
        values = {key: value_text(key, value) for key, value in config[section].items()}
        parts += [Text(f"\n[{section}]", style="bold"), fields(values)]
    return Group(*parts)


def value_text(key: str, value: Any) -> str:
    """A value in the unit that its key has in the file."""
    if value is None:
        return "-"
    if key in _SIZE_KEYS:
        return size_text(value)
    if key in _DURATION_KEYS or key.endswith("_timeout"):
        return format_duration(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return str(value)
