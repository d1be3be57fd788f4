"""`kvfs doctor`: what keeps kvfs from working well here, what that costs, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Group
from rich.text import Text

from kvfs.config import TierConfig, load_config
from kvfs.control import kvfs_mountpoints
from kvfs.errors import UsageError
from kvfs.tools.doctor_checks import Finding, data_path, host_findings, tier_findings
from kvfs.tools.mounts import ask, socket_of
from kvfs.tools.render import print_json, show

_MARKS = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "bold red")}


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(
    mountpoint: Annotated[
        Path | None,
        typer.Argument(metavar="MOUNTPOINT", help="Its tiers too; default: the only mount."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", metavar="FILE", help="Check the tiers of this file."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Check this machine and the tiers. Exit 1 if something prevents mounting."""
    findings = host_findings()
    stats = _statistics(mountpoint, config)
    if stats is not None:
        findings.append(data_path(stats["data_path"]))
    tiers = load_config(config).tier if config else map(_tier_of, (stats or {}).get("tiers", ()))
    for tier in tiers:
        findings += tier_findings(tier)
    can_mount = all(finding.state != "fail" for finding in findings)
    if as_json:
        print_json({"can_mount": can_mount, "findings": msgspec.to_builtins(findings)})
    else:
        show(Group(*(_finding_text(finding) for finding in findings)))
    if not can_mount:
        raise typer.Exit(1)


def _statistics(mountpoint: Path | None, config: Path | None) -> dict[str, Any] | None:
    """What the mount says of itself, where one is asked for or there is only one."""
    if config is not None and mountpoint is not None:
        raise UsageError("a mountpoint and --config exclude each other")
    if config is not None or (mountpoint is None and len(kvfs_mountpoints()) != 1):
        return None
    return ask(socket_of(mountpoint), "status")


def _tier_of(tier: dict[str, Any]) -> TierConfig:
    return TierConfig(tier["name"], Path(tier["path"]), tier["medium"], tier["capacity_bytes"])


def _finding_text(finding: Finding) -> Text:
    mark, style = _MARKS[finding.state]
    text = Text(mark, style=style)
    text.append(f"  {finding.check}: {finding.detail}", style="default")
    if finding.cost:
        text.append(f"\n      cost: {finding.cost}", style="default")
    if finding.remedy:
        text.append(f"\n      do:   {finding.remedy}", style="default")
    return text
