"""`kvfs fsck`: compare the catalog with the tiers, through the daemon or without one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvfs.config import load_config
from kvfs.errors import UsageError
from kvfs.tools.mounts import order, socket_of
from kvfs.tools.render import (
    count_text,
    name_text,
    print_json,
    progress_bar,
    show,
    table,
)

OFFLINE = "tier-offline"


def register(app: typer.Typer) -> None:
    app.command("fsck")(fsck)


def fsck(
    mountpoint: Annotated[
        Path | None, typer.Argument(metavar="MOUNTPOINT", help="Default: the only mount.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", metavar="FILE", help="Check unmounted tiers instead."),
    ] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Repair what is found.")] = False,
    rebuild: Annotated[
        bool,
        typer.Option("--rebuild", help="With --config: make the catalog anew; heat is lost."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Compare catalog and tiers. Exit 1 if a finding is left unrepaired."""
    if config is not None and mountpoint is not None:
        raise UsageError("a mountpoint and --config exclude each other")
    if config is not None:
        report = _check_offline(config, repair=repair, rebuild=rebuild)
    elif rebuild:
        raise UsageError("--rebuild works on unmounted tiers: `kvfs umount`, then give --config")
    else:
        with progress_bar("fsck") as feed:
            report = order(socket_of(mountpoint), "fsck", {"repair": repair}, feed)
    if as_json:
        print_json(report)
    else:
        _print_report(report)
    if any(not finding["repaired"] for finding in report["findings"]):
        raise typer.Exit(1)


def _check_offline(file: Path, *, repair: bool, rebuild: bool) -> dict[str, Any]:
    configuration = load_config(file)
    # It brings the whole store along, which no other verb needs.
    from kvfs.fsck import check_offline

    with progress_bar("fsck") as feed:
        report = check_offline(
            configuration,
            repair=repair,
            rebuild=rebuild,
            progress=lambda done, total: feed({"done": done, "total": total}),
        )
    findings = [
        {
            "kind": finding.kind,
            "path": finding.path,
            "tier": finding.tier,
            "detail": finding.detail,
            "repaired": finding.repaired,
        }
        for finding in report.findings
    ]
    return {"findings": findings, "checked": report.checked}


def _print_report(report: dict[str, Any]) -> None:
    findings = report["findings"]
    if findings:
        view = table("Finding", "Tier", "Repaired", "Detail", "Path")
        for finding in findings:
            view.add_row(
                finding["kind"],
                finding["tier"] or "",
                "yes" if finding["repaired"] else "no",
                finding["detail"],
                name_text(finding["path"]),
            )
        show(view)
    left = sum(not finding["repaired"] for finding in findings)
    checked = f"checked {count_text(report['checked'])}"
    if not findings:
        typer.echo(f"{checked}: clean")
    elif left:
        typer.echo(f"{checked}: {len(findings)} findings, {left} left; {_remedy(findings)}")
    else:
        typer.echo(f"{checked}: {len(findings)} findings, all repaired")


def _remedy(findings: list[dict[str, Any]]) -> str:
    left = {finding["kind"] for finding in findings if not finding["repaired"]}
    if left == {OFFLINE}:
        return "bring the tier back and run it again"
    return "--repair mends them"
