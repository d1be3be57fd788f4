"""`kvfs info`: everything kvfs knows about one block, and why it is where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from kvfs.control import find_mount
from kvfs.tools.mounts import ask
from kvfs.tools.render import (
    UNKNOWN,
    ago_text,
    count_text,
    fields,
    heat_text,
    name_text,
    print_json,
    show,
    size_text,
    state_text,
)
from kvfs.units import format_duration

# The order of the fields in JSON; what else the daemon says comes after them.
FIRST_FIELDS = (
    "path",
    "size_bytes",
    "tier",
    "replicas",
    "heat",
    "state",
    "pinned",
    "last_access",
    "why",
)
# What the mode of an open block means.
OPEN_TEXTS = {
    "passthrough": "yes, its bytes go past the daemon (passthrough)",
    "served": "yes, served by the daemon",
    None: "yes, by the daemon itself",
}


def register(app: typer.Typer) -> None:
    app.command("info")(info)


def info(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A block or directory inside a mount.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show where PATH is, its heat and state, and why it is there."""
    mount = find_mount(path)
    block = ask(mount.socket_path, "info", {"path": mount.relative})
    if as_json:
        print_json(ordered(block))
    else:
        show(fields(described(block)))


def ordered(block: dict[str, Any]) -> dict[str, Any]:
    """The document with its documented fields first."""
    first = {name: block.get(name) for name in FIRST_FIELDS}
    return first | {name: value for name, value in block.items() if name not in first}


def described(block: dict[str, Any]) -> dict[str, RenderableType]:
    """The fields as people read them."""
    ttl_s = block.get("ttl_s")
    return {
        "path": name_text(block["path"]) or "/",
        "kind": str(block["kind"]),
        "size": size_text(block.get("size_bytes")),
        "tier": str(block.get("tier") or UNKNOWN),
        "replicas": ", ".join(_replicas(block)) or UNKNOWN,
        "state": state_text(str(block.get("state") or UNKNOWN)),
        "heat": heat_text(block.get("heat")),
        "last access": ago_text(block.get("last_access")),
        "pinned": pin_text(block["pinned"], block.get("pin")),
        "ttl": UNKNOWN if ttl_s is None else format_duration(ttl_s),
        "open": OPEN_TEXTS[block.get("mode")] if block.get("open") else "no",
        "generation": count_text(block.get("generation")),
        "checksum": block.get("checksum") or UNKNOWN,
        "why": block.get("why") or UNKNOWN,
    }


def _replicas(block: dict[str, Any]) -> list[str]:
    """Tiers, and how one has the block that is compressed."""
    return [
        name if codec == "raw" else f"{name} ({codec})"
        for name, codec in zip(block["replicas"], block["codecs"], strict=True)
    ]


def pin_text(pinned: bool, pin: str | None) -> str:
    """Whether a block is pinned: by itself, perhaps to a tier, or by a directory above it."""
    if pin is None:
        return "by a directory above it" if pinned else "no"
    return "yes" if pin in ("", "1") else f"to {pin}"
