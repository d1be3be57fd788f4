"""kvfs.config: what it takes, and that each refusal names file, key and reason in one line."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import msgspec
import pytest

from kvfs.config import (
    Config,
    MountConfig,
    TierConfig,
    TieringConfig,
    check_config,
    config_to_builtins,
    default_config,
    load_config,
    parse_tier_option,
    reloadable_changes,
)
from kvfs.errors import ConfigError, exit_code_of

TWO_TIERS = """
[[tier]]
name = "nvme"
path = "/mnt/a"
medium = "nvme"
capacity = "2TiB"

[[tier]]
name = "disk"
path = "/mnt/b"
medium = "hdd"
capacity = "20TB"
"""


def write(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "kvfs.toml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(tmp_path: Path, content: str | bytes) -> str:
    """The message for a file, without the file's name, which each has to begin with."""
    path = write(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    assert exit_code_of(caught.value) == 3
    return message.removeprefix(f"{path}: ")


def make_config(*paths: Path, mount: MountConfig | None = None) -> Config:
    tiers = tuple(TierConfig(f"t{i}", path, "nvme", 2**30) for i, path in enumerate(paths))
    return Config(tiers, mount=mount or MountConfig(), source="test")


def test_a_short_file_gets_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, TWO_TIERS)
    config = load_config(path)
    nvme, disk = config.tier
    assert nvme == TierConfig("nvme", Path("/mnt/a"), "nvme", 2 * 2**40)
    assert (nvme.concurrency, nvme.deadline_s) == (8, 5.0)
    assert (disk.capacity_bytes, disk.concurrency, disk.deadline_s) == (20 * 10**12, 4, 10.0)
    assert config.source == str(path)
    assert config.tiering == TieringConfig()
    assert (config.tiering.half_life_s, config.tiering.tmp_ttl_s) == (120.0, 3600.0)
    assert config.mount.allow_other == (os.geteuid() == 0)
    assert config.mount.catalog is None
    assert config.tiering.watermarks(nvme) == (0.90, 0.95)
    assert config.tiering.promote_bandwidth_of(nvme) == 256 * 2**20


def test_every_key_is_read(tmp_path: Path) -> None:
    config = load_config(
        write(
            tmp_path,
            """
            [[tier]]
            name = "far"
            path = "/mnt/far"
            medium = "remote"
            capacity = 1000
            concurrency = 3
            deadline = "1.5s"
            high_watermark = 0.8
            low_watermark = 0.5
            promote_bandwidth = "1MiB"
            write_budget_per_day = "1GiB"
            [tiering]
            interval = "250ms"
            half_life = 60
            high_watermark = 0.7
            low_watermark = 0.6
            promote_heat = 2
            hysteresis = 3.5
            promote_bandwidth = 4096
            on_full = "refuse"
            tmp_ttl = "2h"
            keep = ["*.keep"]
            quiet_uids = [34]
            workers = 4
            ghosts = 0
            [mount]
            allow_other = false
            entry_timeout = "1m"
            attr_timeout = 2.5
            negative_timeout = 0
            log_level = "debug"
            fsname = "cache"
            catalog = "/var/lib/kvfs/catalog.sqlite"
            """,
        )
    )
    (tier,) = config.tier
    assert tier == TierConfig(
        "far", Path("/mnt/far"), "remote", 1000, 3, 1.5, 0.8, 0.5, 2**20, 2**30
    )
    assert config.tiering == TieringConfig(
        0.25, 60.0, 0.7, 0.6, 2.0, 3.5, 4096, "refuse", 7200.0, ("*.keep",), (34,), 4, 0
    )
    assert config.mount == MountConfig(
        False, 60.0, 2.5, 0.0, "debug", "cache", Path("/var/lib/kvfs/catalog.sqlite")
    )
    assert config.tiering.watermarks(tier) == (0.5, 0.8)
    assert config.tiering.promote_bandwidth_of(tier) == 2**20


def test_a_home_directory_is_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    config = load_config(write(tmp_path, TWO_TIERS.replace("/mnt/a", "~/blocks")))
    assert config.tier[0].path == Path("/home/ada/blocks")


def test_order_comes_from_the_file_whatever_the_media(tmp_path: Path) -> None:
    swapped = TWO_TIERS.replace('"nvme"', '"x"').replace('"hdd"', '"nvme"')
    swapped = swapped.replace('medium = "x"', 'medium = "remote"')
    assert [t.medium for t in load_config(write(tmp_path, swapped)).tier] == ["remote", "nvme"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("capacity", "capcity", "tier[0].capcity: unknown key; did you mean capacity?"),
        ('capacity = "20TB"', "", "tier[1].capacity: is missing"),
        ('"20TB"', "0", "tier[1].capacity: must be more than 0"),
        ('"20TB"', "-5", "tier[1].capacity: -5 is not a size"),
        ('"20TB"', '"2T"', "tier[1].capacity: '2T' is not a size; write for example '2TiB'"),
        ('"20TB"', "true", "tier[1].capacity: True is not a size"),
        ('"20TB"', "[1]", "tier[1].capacity: must be more than 0"),
        ('"20TB"', "99999999999999999999", "is more than 8 EiB"),
        ('"hdd"', '"tape"', "tier[1].medium: must be one of nvme, hdd, remote"),
        ('"20TB"', '"1TB"\ncompress = "lz4"', "tier[1].compress: must be one of none, zstd, zstd-"),
        ('"2TiB"', '"1TB"\ncompress = "zstd"', "tier[0].compress: is for hdd and remote"),
        ('"disk"', '"nvme"', "tier[1].name: nvme is the name of tier[0] as well"),
        ('"disk"', '"a b"', "tier[1].name: must be 1 to 32 of"),
        ('"disk"', '"disk\\n"', "tier[1].name: must be 1 to 32 of"),
        ('"disk"', '""', "tier[1].name: must be 1 to 32 of"),
        ('"disk"', f'"{"d" * 33}"', "tier[1].name: must be 1 to 32 of"),
        ('"/mnt/b"', '"mnt/b"', "tier[1].path: 'mnt/b' is relative; write an absolute path"),
        ('"/mnt/b"', "5", "tier[1].path: expected path, got int"),
        ('"/mnt/b"', '"/mnt/\\u0000"', "tier[1].path: a path has no NUL"),
        ('"/mnt/b"', '"~nobody-has-this-name/b"', "tier[1].path: ~nobody-has-this-name/b: whose"),
        ('"/mnt/b"', '"/mnt/a"', "tier[1].path: /mnt/a is tier[0]'s directory"),
        ('"/mnt/b"', '"/mnt/x/../a/"', "tier[1].path: /mnt/a is tier[0]'s directory"),
        ('"/mnt/b"', '"/mnt/a/b"', "tier[1].path: /mnt/a/b is inside tier[0]'s directory, /mnt/a"),
        ('"/mnt/b"', '"/mnt"', "tier[1].path: /mnt contains tier[0]'s directory, /mnt/a"),
    ],
)
def test_a_bad_tier_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TWO_TIERS
    assert message in refusal(tmp_path, TWO_TIERS.replace(old, new))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("[tiering]\nhalflife = 1", "tiering.halflife: unknown key; did you mean half_life?"),
        ("[tiering]\nzzz = 1", "tiering.zzz: unknown key; known are interval, half_life"),
        ('[tiering]\n"a\\nb" = 1', "tiering.a\\nb: unknown key"),
        ("[monut]", "monut: unknown key; did you mean mount?"),
        ("source = 'x'", "source: unknown key"),
        ("[tiering]\nhalf_life = 0", "tiering.half_life: expected float > 0.0"),
        ("[tiering]\nhalf_life = nan", "tiering.half_life: nan is not a time"),
        ("[tiering]\nhalf_life = 'soon'", "tiering.half_life: 'soon' is not a time; write for"),
        ("[tiering]\npromote_heat = inf", "tiering.promote_heat: expected float <= 1000000.0"),
        ("[tiering]\nhysteresis = 0.5", "tiering.hysteresis: expected float >= 1.0"),
        ("[tiering]\nhigh_watermark = 1.5", "tiering.high_watermark: expected float <= 1.0"),
        ("[tiering]\nlow_watermark = 0", "tiering.low_watermark: expected float > 0.0"),
        ("[tiering]\nlow_watermark = 0.95", "tiering.low_watermark: needs 0 < low < high <= 1"),
        ("[tiering]\nhigh_watermark = '95%'", "tiering.high_watermark: expected float, got str"),
        ("[tiering]\non_full = 'panic'", "tiering.on_full: must be one of evict, refuse"),
        (
            "[tiering]\nverify = 'sometimes'",
            "tiering.verify: must be one of first-open, after-crash, always, never",
        ),
        ("[tiering]\nunfinished = 'keep'", "tiering.unfinished: must be one of remove, quarantine"),
        ("[tiering]\nscrub_rate = 'fast'", "tiering.scrub_rate: "),
        ("[tiering]\nquarantine_ttl = 0", "tiering.quarantine_ttl: "),
        ("[tiering]\nkeep = ['']", "tiering.keep[0]: expected str of length >= 1"),
        ("[tiering]\nkeep = 'x'", "tiering.keep: expected array, got str"),
        ("[tiering]\nquiet_uids = [-1]", "tiering.quiet_uids[0]: expected int >= 0"),
        ("[tiering]\nworkers = 0", "tiering.workers: expected int >= 1"),
        ("[mount]\nallow_other = 1", "mount.allow_other: expected bool, got int"),
        ("[mount]\nlog_level = 'loud'", "mount.log_level: must be one of debug, info"),
        ("[mount]\nfsname = 'a,b'", "mount.fsname: must be 1 to 64 of"),
        ("[mount]\ncatalog = 'c.db'", "mount.catalog: 'c.db' is relative"),
        ("[mount]\ncatalog = '/mnt/a/c.db'", "mount.catalog: /mnt/a/c.db is inside tier[0]"),
        ("mount = 3", "mount: expected table, got int"),
    ],
)
def test_a_bad_setting_is_refused(tmp_path: Path, lines: str, message: str) -> None:
    assert message in refusal(tmp_path, lines + "\n" + TWO_TIERS)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ("low_watermark = 0.95", "tier[1].low_watermark: needs 0 < low < high <= 1, but low is"),
        ("high_watermark = 0.9", "tier[1].high_watermark: needs 0 < low < high <= 1, but low is"),
        ("low_watermark = 0.8\nhigh_watermark = 0.7", "low is 0.8 and high is 0.7"),
    ],
)
def test_watermarks_out_of_order_are_refused(tmp_path: Path, own: str, message: str) -> None:
    assert message in refusal(tmp_path, TWO_TIERS + own)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "tier: is empty; give at least one [[tier]]"),
        ("tier = []", "tier: is empty"),
        ("tier = [3]", "tier[0]: expected table, got int"),
        ("[tier]\nname = 'nvme'", "tier: must be an array of tables: write [[tier]]"),
        ("[[tier]]\nname = 'nvme'\ncapacity 5", "is not TOML: "),
        (b"# \xff", "is not UTF-8 at byte 2"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    assert message in refusal(tmp_path, content)


def test_bad_toml_is_refused_by_line(tmp_path: Path) -> None:
    assert "(at line 3, column" in refusal(tmp_path, "[[tier]]\nname = 'nvme'\ncapacity 5\n")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    with pytest.raises(ConfigError, match=r"missing\.toml: cannot be read: No such file"):
        load_config(missing)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


def test_tiers_are_compared_behind_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(ConfigError, match=r"tier\[1\]\.path: .*real is tier\[0\]'s directory"):
        check_config(make_config(tmp_path / "real", tmp_path / "link"), None)
    with pytest.raises(ConfigError, match=r"tier\[1\]\.path: .*/new is inside tier\[0\]'s"):
        check_config(make_config(tmp_path / "real", tmp_path / "link" / "new"), None)


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match=r"tier\[0\]\.path: .* cannot be followed"):
        check_config(make_config(tmp_path / "loop"), None)


@pytest.mark.parametrize(
    ("tier", "mountpoint", "reason"),
    [
        ("mnt", "mnt", "is the mountpoint"),
        ("mnt/tier", "mnt", "is inside the mountpoint"),
        ("tier", "tier/mnt", "contains the mountpoint"),
    ],
)
def test_a_tier_and_the_mountpoint_stay_apart(
    tmp_path: Path, tier: str, mountpoint: str, reason: str
) -> None:
    config = make_config(tmp_path / "other", tmp_path / tier)
    check_config(config, None)
    with pytest.raises(ConfigError, match=rf"test: tier\[1\]\.path: .*{reason}"):
        check_config(config, tmp_path / mountpoint)


def test_the_catalog_stays_out_of_the_mountpoint(tmp_path: Path) -> None:
    mount = MountConfig(catalog=tmp_path / "mnt" / "catalog.sqlite")
    with pytest.raises(ConfigError, match=r"mount\.catalog: .* is inside the mountpoint"):
        check_config(make_config(tmp_path / "tier", mount=mount), tmp_path / "mnt")


def test_names_that_begin_alike_do_not_overlap(tmp_path: Path) -> None:
    private_catalog = MountConfig(catalog=tmp_path / "tier" / ".kvfs" / "catalog.sqlite")
    config = make_config(tmp_path / "tier", tmp_path / "tier2", mount=private_catalog)
    check_config(config, tmp_path / "tier3")


def test_a_tier_option() -> None:
    assert parse_tier_option("nvme=/mnt/a,capacity=2TiB") == TierConfig(
        "nvme", Path("/mnt/a"), "nvme", 2 * 2**40
    )
    assert parse_tier_option(
        "cold=/mnt/b,b,medium=hdd,capacity=10GB,concurrency=2,deadline=3s,low_watermark=0.5"
    ) == TierConfig("cold", Path("/mnt/b,b"), "hdd", 10**10, 2, 3.0, low_watermark=0.5)
    assert parse_tier_option("hdd=/a,capacity=1GB,medium=remote").medium == "remote"
    assert parse_tier_option("hdd=/a,capacity=1GB,compress=zstd-planes").compress == "zstd-planes"


def test_a_tier_option_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_tier_option("nvme=a/b,capacity=1GB").path == tmp_path / "a" / "b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "write for example nvme=/mnt/a,capacity=2TiB"),
        ("nvme", "write for example nvme=/mnt/a,capacity=2TiB"),
        ("nvme=", "write for example nvme=/mnt/a,capacity=2TiB"),
        ("nvme=/mnt/a", "capacity: is missing"),
        ("fast=/mnt/a,capacity=1GB", "medium: is missing; it must be one of nvme, hdd, remote"),
        ("nvme=/mnt/a,capacity=lots", "capacity: 'lots' is not a size"),
        ("nvme=/mnt/a,capacity=0", "capacity: must be more than 0"),
        ("nvme=/mnt/a,capacity=1GB,capacity=2GB", "capacity: is given twice"),
        ("nvme=/mnt/a,capacity=1GB,name=x", "name: is given twice"),
        ("nvme=/mnt/a,capacity=1GB,speed=9", "speed: unknown key"),
        ("nvme=/mnt/a,capacity=1GB,concurrency=few", "concurrency: expected int, got str"),
        ("a b=/mnt/a,capacity=1GB,medium=hdd", "name: must be 1 to 32 of"),
    ],
)
def test_a_bad_tier_option_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        parse_tier_option(text)
    assert str(caught.value).startswith("--tier ")


def test_the_defaults_are_below_the_data_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    config = default_config()
    check_config(config, tmp_path / "mnt")
    (tier,) = config.tier
    assert (tier.path, tier.medium) == (tmp_path / "kvfs" / "default", "nvme")
    assert not tier.path.exists()
    space = os.statvfs(tmp_path)
    assert 0 < tier.capacity_bytes <= space.f_blocks * space.f_frsize


def test_the_defaults_ignore_a_relative_data_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", "data")
    assert default_config().tier[0].path == tmp_path / ".local/share/kvfs/default"


def test_what_the_default_tier_holds_counts_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Space:
        f_bavail, f_frsize = 1000, 1000

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr("kvfs.config.os.statvfs", lambda _: Space)
    assert default_config().tier[0].capacity_bytes == 800_000
    block = tmp_path / "kvfs/default/vllm/block.bin"
    block.parent.mkdir(parents=True)
    block.write_bytes(b"x" * 100_000)
    held_bytes = block.stat().st_blocks * 512
    assert default_config().tier[0].capacity_bytes == int((1_000_000 + held_bytes) * 0.8)


def test_what_is_shown_is_json_with_the_keys_of_the_file(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, TWO_TIERS))
    shown = json.loads(json.dumps(config_to_builtins(config)))
    assert list(shown) == ["tier", "tiering", "mount", "source", "leases"]
    assert shown["tier"][0]["capacity"] == 2 * 2**40
    assert shown["tier"][1]["path"] == "/mnt/b"
    assert shown["tiering"]["half_life"] == 120.0
    assert shown["mount"]["catalog"] is None


def test_nothing_changed_nothing_to_reload(tmp_path: Path) -> None:
    path = write(tmp_path, TWO_TIERS)
    assert reloadable_changes(load_config(path), load_config(path)) == ([], [])


def test_a_reload_applies_limits_and_tiering(tmp_path: Path) -> None:
    old = load_config(write(tmp_path, TWO_TIERS))
    limits = 'low_watermark = 0.5\npromote_bandwidth = "1MiB"\nwrite_budget_per_day = "1GiB"\n'
    content = TWO_TIERS.replace("20TB", "10TB") + limits + "concurrency = 1\ndeadline = 1\n"
    new = load_config(write(tmp_path, content + '[tiering]\nhalf_life = "60s"\nkeep = []\n'))
    applied, needs_remount = reloadable_changes(old, new)
    assert needs_remount == []
    assert applied == [
        "tier[1].capacity",
        "tier[1].concurrency",
        "tier[1].deadline",
        "tier[1].low_watermark",
        "tier[1].promote_bandwidth",
        "tier[1].write_budget_per_day",
        "tiering.half_life",
        "tiering.keep",
    ]


def test_a_reload_says_what_needs_a_new_mount(tmp_path: Path) -> None:
    old = load_config(write(tmp_path, TWO_TIERS))
    content = TWO_TIERS.replace("/mnt/b", "/mnt/c").replace('"hdd"', '"remote"')
    new = load_config(write(tmp_path, content + "[mount]\nentry_timeout = 1\n"))
    applied, needs_remount = reloadable_changes(old, new)
    # The limits that follow from the medium change with it.
    assert applied == ["tier[1].concurrency"]
    assert needs_remount == ["tier[1].path", "tier[1].medium", "mount.entry_timeout"]


def test_a_reload_does_not_take_other_tiers() -> None:
    first, second = make_config(Path("/a"), Path("/b")).tier
    larger = msgspec.structs.replace(second, capacity_bytes=2**31)
    old, new = Config((first, second)), Config((larger, first))
    assert reloadable_changes(old, new) == (["tier[0].capacity"], ["tier"])
    assert reloadable_changes(old, Config((first,))) == ([], ["tier"])
