"""docs/OPERATIONS.md against the code: keys, defaults, what is live, exit codes, metrics."""

from __future__ import annotations

import inspect
import re
import tomllib
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from kvfs import errors, metrics
from kvfs.config import (
    Config,
    LeasesConfig,
    Medium,
    MountConfig,
    TierConfig,
    TieringConfig,
    load_config,
    reloadable_changes,
)
from kvfs.tiers.health import Refusal, State
from kvfs.tools.cli import INTERRUPTED
from kvfs.units import parse_duration
from tests.sources import modules_below

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "OPERATIONS.md").read_text()
ROW = re.compile(r"^\| `(\w+)` \| (.+?) \| (yes|no) \|", re.MULTILINE)
TIER = TierConfig("hdd", Path("/srv/hdd"), "hdd", 2**40)
# A value of each key that is not the one of TIER.
OTHER_TIER = TierConfig(
    "disk", Path("/srv/disk"), "remote", 2**41, 3, 4.0, 0.8, 0.7, 5, 6, "none", "zstd"
)


def section(heading: str) -> str:
    """The text below a heading, up to the next one."""
    return DOCUMENT.split(f"\n{heading}", 1)[1].split("\n#", 1)[0]


def rows(heading: str) -> dict[str, tuple[str, bool]]:
    """The key table of a section: key -> default as written, live."""
    return {key: (default, live == "yes") for key, default, live in ROW.findall(section(heading))}


def keys(kind: type[msgspec.Struct]) -> list[str]:
    return [field.encode_name for field in msgspec.structs.fields(kind)]


def literals(heading: str) -> str:
    """The documented defaults as a TOML table."""
    lines = [f"{key} = {default.strip('`')}" for key, (default, _) in rows(heading).items()]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("heading", "kind"),
    [
        ("### `[[tier]]`", TierConfig),
        ("### `[tiering]`", TieringConfig),
        ("### `[mount]`", MountConfig),
        ("### `[leases]`", LeasesConfig),
    ],
)
def test_every_key_is_documented_in_order(heading: str, kind: type[msgspec.Struct]) -> None:
    assert list(rows(heading)) == keys(kind)


def test_documented_defaults_of_tiering_are_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "kvfs.toml"
    tier = f'[[tier]]\nname = "a"\nmedium = "nvme"\npath = "{tmp_path}/a"\ncapacity = 1\n'
    file.write_text(f"{tier}[tiering]\n{literals('### `[tiering]`')}\n")
    assert load_config(file).tiering == TieringConfig()


def test_documented_defaults_of_leases_are_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "kvfs.toml"
    tier = f'[[tier]]\nname = "a"\nmedium = "nvme"\npath = "{tmp_path}/a"\ncapacity = 1\n'
    file.write_text(f"{tier}[leases]\n{literals('### `[leases]`')}\n")
    assert load_config(file).leases == LeasesConfig()


def test_documented_defaults_of_mount_are_the_defaults() -> None:
    documented = rows("### `[mount]`")
    default = MountConfig(allow_other=True)
    for key in ("entry_timeout", "attr_timeout", "negative_timeout"):
        value = tomllib.loads(f"x = {documented[key][0].strip('`')}")["x"]
        assert parse_duration(value) == getattr(default, f"{key}_s"), key
    assert documented["log_level"][0] == f'`"{default.log_level}"`'
    assert documented["fsname"][0] == f'`"{default.fsname}"`'
    assert documented["catalog"][0] == "below the first tier"
    assert default.catalog is None
    assert documented["allow_other"][0] == "root: `true`, others: `false`"


def test_documented_defaults_of_tier_are_the_defaults() -> None:
    documented = rows("### `[[tier]]`")
    for medium in get_args(Medium):
        tier = TierConfig("t", Path("/srv/t"), medium, 1)
        assert f"`{tier.concurrency}` {medium}" in documented["concurrency"][0]
        assert f'`"{tier.deadline_s:g}s"` {medium}' in documented["deadline"][0]
    for field in msgspec.structs.fields(TierConfig):
        default, _ = documented[field.encode_name]
        assert (default == "required") == field.required, field.encode_name
        inherited = field.encode_name in keys(TieringConfig)
        assert (default == "that of `[tiering]`") == inherited, field.encode_name
    assert documented["write_budget_per_day"][0] == "no limit"
    assert TIER.write_budget_per_day is None


def test_documented_live_keys_are_those_that_a_reload_applies() -> None:
    documented = rows("### `[[tier]]`")
    for field in msgspec.structs.fields(TierConfig):
        changed = msgspec.structs.replace(TIER, **{field.name: getattr(OTHER_TIER, field.name)})
        applied, needs_remount = reloadable_changes(Config((TIER,)), Config((changed,)))
        assert bool(applied) == documented[field.encode_name][1], field.encode_name
        assert bool(applied) != bool(needs_remount), field.encode_name
    assert all(live for _, live in rows("### `[tiering]`").values())
    assert not any(live for _, live in rows("### `[mount]`").values())
    assert all(live for _, live in rows("### `[leases]`").values())


def test_every_exit_code_is_documented_once() -> None:
    codes = {
        kind.exit_code
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.KvfsError)
    }
    documented = re.findall(r"^\| (\d+) \|", section("## Exit codes"), re.MULTILINE)
    assert [int(code) for code in documented] == sorted(codes | {0, INTERRUPTED})


def test_every_metric_is_documented() -> None:
    document = {
        "blocks": 0, "directories": 0, "unsealed": 0, "uptime_s": 0, "counters": {}, "incidents": [
            {"event": "quarantined", "reason": "checksum", "tier": "a", "count": 1}
        ],
        "seal": {"lag_s": 0.0, "size_bytes": 0, "medium_bytes": 0, "seconds": 0.0},
        "leases": dict.fromkeys(metrics.LEASE_GAUGES, 0),
        "tiers": [
            dict.fromkeys((*metrics.TIER_GAUGES, *metrics.TIER_COUNTERS), 0)
            | {"name": "a", "state": "online", "accepts": True}
        ],
    }  # fmt: skip
    text = metrics.prometheus_text(document).decode()
    shown = {re.split(r"[ {]", line)[0] for line in text.splitlines() if line[:1] != "#"}
    assert shown == set(re.findall(r"`(kvfs_\w+)`", section("## Metrics")))


def test_every_event_that_is_counted_is_documented() -> None:
    counted = {*metrics.ALARMING_EVENTS, "opens_passthrough", "opens_served", "opens_control"}
    for module in modules_below("kvfs", "mount"):
        called = r"\.(?:count|note|overlook)\(\s*\"(\w+)\""
        counted |= set(re.findall(called, module.read_text()))
        counted |= set(re.findall(r"_discard\([^)\n]*, \"(\w+)\"", module.read_text()))
    table = section("## Metrics").split("| event |", 1)[1].split("\n\n", 1)[0]
    events = " ".join(re.findall(r"^\| (.+?) \|", table, re.MULTILINE))
    assert counted == set(re.findall(r"`(\w+)`", events))


def test_every_reason_is_documented() -> None:
    given = {
        kind.reason
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.KvfsError)
    } | {"catalog", "bug", *get_args(State), *get_args(Refusal)} - {""}
    for module in modules_below("kvfs", "mount"):
        given |= set(re.findall(r"\breason=\"(\w+)\"", module.read_text()))
    table = section("## Metrics").split("| reason |", 1)[1].split("\n\n", 1)[0]
    assert {reason for reason in given if not reason.startswith("E")} == set(
        re.findall(r"`([\w-]+)`", table)
    )


def test_links_into_the_document_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.+)$", DOCUMENT, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
    linked = re.findall(r"\]\(#([\w-]+)\)", DOCUMENT)
    assert linked
    assert set(linked) <= anchors
