"""`kvfs status`: what a mount does now, what is wrong first.

Owns the view of the statistics document. Without a mountpoint it shows the only mount, or one line
for each of several.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvfs.control import SOCKET_ENV, kvfs_mountpoints
from kvfs.errors import KvfsError, UsageError
from kvfs.tools.mounts import ask, socket_of
from kvfs.tools.render import (
    ago_text,
    console,
    count_text,
    fits,
    json_text,
    name_text,
    print_json,
    share_text,
    show,
    size_text,
    state_text,
    table,
    usage_bar,
)
from kvfs.units import format_duration, parse_duration

SHOWN_MOVES = 10
STATE_NOTES = {
    "recovering": "it still compares its tiers with the catalog: counts are not complete",
}

# Events that an operator should not learn about from an engine.
ALARMING_EVENTS = {
    "checksum_mismatches": "copies did not match their checksum and were dropped: check the disks",
    "quarantined": "files were set aside as damaged or unknown: `kvfs quarantine` lists them",
    "replicas_lost": "replicas were gone from their tier: run `kvfs fsck`",
    "refused_full": "writes were refused because no tier had room: raise a capacity or evict",
    "handler_failures": "requests failed by a fault of kvfs: its log has the tracebacks",
    "moves_failed": "moves failed: the log of the daemon says why",
}


def register(app: typer.Typer) -> None:
    app.command("status")(status)


def status(
    mountpoint: Annotated[
        Path | None,
        typer.Argument(metavar="MOUNTPOINT", help="Default: the only mount, or a list of all."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the document.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh until Ctrl-C.")] = False,
    interval: Annotated[str, typer.Option(help="Between two refreshes.")] = "1s",
) -> None:
    """Show tiers, usage, hit shares and running moves; what is wrong comes first."""
    if mountpoint is None and not os.environ.get(SOCKET_ENV) and len(kvfs_mountpoints()) > 1:
        if watch:
            raise UsageError("--watch follows one mount: name it")
        _show_all(as_json)
        return
    socket_path = socket_of(mountpoint)
    if watch:
        _watch(socket_path, as_json, _interval_s(interval))
        return
    stats = ask(socket_path, "status")
    if as_json:
        print_json(stats)
    else:
        show(status_view(stats))


def _interval_s(text: str) -> float:
    try:
        interval_s = parse_duration(text)
    except ValueError as error:
        raise UsageError(f"--interval: {error}") from None
    return max(interval_s, 0.1)


def _watch(socket_path: Path, as_json: bool, interval_s: float) -> None:
    """Refresh in place on a terminal; into a pipe one view, or one line of JSON, after another."""
    out = console()
    if as_json or not out.is_terminal:
        while True:
            stats = ask(socket_path, "status")
            if as_json:
                typer.echo(json_text(stats, indent=None))
            else:
                show(status_view(stats))
            time.sleep(interval_s)
    with Live(console=out, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            live.update(status_view(ask(socket_path, "status")), refresh=True)
            time.sleep(interval_s)


def _show_all(as_json: bool) -> None:
    documents = [_stats_or_error(mountpoint) for mountpoint in kvfs_mountpoints()]
    if as_json:
        print_json({"mounts": documents})
        return
    listing = table("State", ">Used", ">Capacity", ">Blocks", "Mountpoint")
    for stats in documents:
        tiers = stats.get("tiers", ())
        wrong = stats.get("error") or "; ".join(problems(stats))
        listing.add_row(
            state_text(str(stats["state"])),
            size_text(sum(tier["used_bytes"] for tier in tiers)) if tiers else "",
            size_text(sum(tier["capacity_bytes"] for tier in tiers)) if tiers else "",
            count_text(stats["blocks"]) if tiers else "",
            Text(name_text(stats["mountpoint"])).append(f"  {wrong}" if wrong else "", style="red"),
        )
    show(listing)


def _stats_or_error(mountpoint: Path) -> dict[str, Any]:
    try:
        return ask(socket_of(mountpoint), "status")
    except KvfsError as error:
        return {"mountpoint": mountpoint, "state": "dead", "error": str(error)}


def problems(stats: dict[str, Any]) -> list[str]:
    """What an operator must know, worst first, one sentence each."""
    found = []
    tiers = stats["tiers"]
    for tier in tiers:
        reason = f" ({tier['last_error']})" if tier.get("last_error") else ""
        if tier["state"] == "offline":
            found.append(
                f"tier {tier['name']} is offline{reason}: blocks that only it has answer EIO"
            )
        elif tier["state"] != "online":
            found.append(f"tier {tier['name']} is {tier['state']}{reason}")
    for tier in tiers:
        over = claimed_bytes(tier) - tier["capacity_bytes"]
        if over > 0:
            found.append(f"tier {tier['name']} is {size_text(over)} over its capacity")
        room_bytes = tier.get("room_bytes", tier["capacity_bytes"])
        if room_bytes < tier["capacity_bytes"]:
            found.append(
                f"tier {tier['name']} has room for {size_text(room_bytes)} of its "
                f"{size_text(tier['capacity_bytes'])}: others fill its disk"
            )
    if tiers and stats["on_full"] == "refuse" and claimed_bytes(tiers[-1]) >= _nearly_full(tiers):
        found.append("the last tier is full and on_full is refuse: new blocks will get ENOSPC")
    if stats["state"] in STATE_NOTES:
        found.append(STATE_NOTES[stats["state"]])
    for event, meaning in ALARMING_EVENTS.items():
        count = stats["counters"].get(event, 0)
        if count:
            found.append(f"{count:,} {meaning}")
    return found


def claimed_bytes(tier: dict[str, Any]) -> int:
    """What counts against the capacity: used, reserved and held bytes, and the quarantine."""
    return int(tier["used_bytes"]) + set_apart_bytes(tier)


def set_apart_bytes(tier: dict[str, Any]) -> int:
    """What counts against the capacity and is no replica."""
    return int(tier["reserved_bytes"] + tier["held_bytes"] + tier["quarantine_bytes"])


def _nearly_full(tiers: list[dict[str, Any]]) -> float:
    return float(tiers[-1]["capacity_bytes"]) * 0.98


def status_view(stats: dict[str, Any]) -> Group:
    """The whole picture of one mount."""
    title = Text(name_text(stats["mountpoint"]), style="bold")
    title.append("  ").append_text(state_text(stats["state"]))
    title.append(f"  pid {stats['pid']}, up {format_duration(stats['uptime_s'])}", style="default")
    contents = (
        f"{count_text(stats['blocks'])} blocks ({count_text(stats['unsealed'])} unsealed), "
        f"{count_text(stats['directories'])} directories"
    )
    parts: list[RenderableType] = [title, Text(contents)]
    reason = stats.get("data_path", {}).get("reason")
    if reason:
        parts.append(Text(f"reads go through the daemon: {reason}", style="yellow"))
    parts += [Text(f"! {problem}", style="bold red") for problem in problems(stats)]
    parts += [Text(), _tier_table(stats["tiers"]), Text(), *_traffic_view(stats["tiers"])]
    parts += [Text(), *_moves_view(stats["moves"])]
    tiers = stats["tiers"]
    lines = (*_compression_lines(tiers), *_quarantine_lines(tiers), *_scrub_lines(stats))
    parts += [Text(line) for line in lines]
    return Group(*parts)


def _compression_lines(tiers: list[dict[str, Any]]) -> list[str]:
    return [
        f"compression on {tier['name']} saves {size_text(tier['saved_bytes'])}"
        for tier in tiers
        if tier["saved_bytes"]
    ]


def _quarantine_lines(tiers: list[dict[str, Any]]) -> list[str]:
    return [
        f"quarantine of {tier['name']}: {count_text(tier['quarantine_files'])} files, "
        f"{size_text(tier['quarantine_bytes'])}"
        for tier in tiers
        if tier["quarantine_files"]
    ]


def _scrub_lines(stats: dict[str, Any]) -> list[str]:
    """How far scrubs are; nothing of tiers that were never scrubbed."""
    lines = []
    for progress in stats["scrub"]["passes"]:
        if not progress["started_s"]:
            continue
        how = f"{count_text(progress['blocks'])} blocks, {count_text(progress['bad'])} bad"
        if progress["finished_s"]:
            how += f", finished {ago_text(progress['finished_s'])}"
        else:
            how += ", under way" if stats["scrub"]["at"] == progress["tier"] else ", not finished"
        lines.append(f"scrub of {progress['tier']}: {how}")
    return lines


def _tier_table(tiers: list[dict[str, Any]]) -> Table:
    view = table("Tier", "Medium", "State", "Usage", ">Used", ">Capacity", ">Blocks", ">Hits")
    for tier in tiers:
        claimed = set_apart_bytes(tier)
        view.add_row(
            tier["name"],
            tier["medium"],
            state_text(tier["state"]),
            usage_bar(tier["used_bytes"], claimed, tier["capacity_bytes"]),
            size_text(tier["used_bytes"]),
            size_text(tier["capacity_bytes"]),
            count_text(tier["blocks"]),
            share_text(tier["hit_share"]),
        )
    return view


def _traffic_view(tiers: list[dict[str, Any]]) -> list[RenderableType]:
    """The paths stand beside the numbers, or below them where the terminal is narrow."""
    wide = _traffic_table(tiers, "Path")
    if fits(wide):
        return [wide]
    places = table("Tier", "Path")
    for tier in tiers:
        places.add_row(tier["name"], name_text(tier["path"]))
    return [_traffic_table(tiers), Text(), places]


def _traffic_table(tiers: list[dict[str, Any]], *last: str) -> Table:
    traffic = (">Read", ">Written", ">Moved in", ">Moved out")
    view = table("Tier", ">Promoted", ">Demoted", ">Evicted", *traffic, *last)
    for tier in tiers:
        view.add_row(
            tier["name"],
            count_text(tier["promotions"]),
            count_text(tier["demotions"]),
            count_text(tier["evictions"]),
            size_text(tier["bytes_read"]),
            size_text(tier["bytes_written"]),
            size_text(tier["moved_in_bytes"]),
            size_text(tier["moved_out_bytes"]),
            *([name_text(tier["path"])] if last else []),
        )
    return view


def _moves_view(moves: dict[str, Any]) -> list[RenderableType]:
    running = moves["running"]
    if not running:
        return [Text(f"no moves running, {count_text(moves['queued'])} queued")]
    view = table("Move", "From", "To", ">Size", ">Done", "Block")
    for move in running[:SHOWN_MOVES]:
        size_bytes = move["size_bytes"]
        view.add_row(
            move["kind"],
            move["source"],
            move["target"] or "",
            size_text(size_bytes),
            share_text(move["done_bytes"] / size_bytes) if size_bytes else "",
            name_text(move["path"]),
        )
    more = len(running) - SHOWN_MOVES
    return [
        Text(f"{len(running)} moves running, {count_text(moves['queued'])} queued"),
        view,
        *([Text(f"and {more} more")] if more > 0 else []),
    ]
