"""Configuration files and `--tier` options: whatever they hold is a configuration or one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs.config import (
    Config,
    check_config,
    config_to_builtins,
    load_config,
    parse_tier_option,
    reloadable_changes,
)
from kvfs.errors import ConfigError
from tests.fuzz.fuzzing import check_message, corpus, damaged, fuzz, replay

SCALARS = (
    b"0", b"-1", b"1e400", b"-inf", b"nan", b"true", b"[]", b"{}", b'""', b'"\\u0000"', b'"1 EiB"',
    b'"9999999999999999999 TiB"', b'"1e9 h"', b'"-5s"', b"1979-05-27T07:32:00Z", b"07:32:00",
    b"99999999999999999999999999", b'"/"', b'"~nobody-here/x"', b'"../x"', b'["/"]', b"[[1]]",
    b'"nvme"', b"0x7fffffffffffffff", b"'''\n'''", b'"\\ud800"', b'{ a = 1 }', b"\xff", b"\r",
)  # fmt: skip
KEYS = (
    b"name", b"path", b"medium", b"capacity", b"concurrency", b"deadline", b"high_watermark",
    b"low_watermark", b"promote_bandwidth", b"write_budget_per_day", b"interval", b"half_life",
    b"promote_heat", b"hysteresis", b"on_full", b"tmp_ttl", b"keep", b"quiet_uids", b"workers",
    b"ghosts", b"allow_other", b"entry_timeout", b"log_level", b"fsname", b"catalog",
    b"passthrough", b"verify", b"nonsense", b'"a\\nb"', b"a.b",
)  # fmt: skip
lines = st.one_of(
    st.sampled_from([b"[[tier]]", b"[tiering]", b"[mount]", b"[tier]", b"[x]", b"[[mount]]"]),
    st.builds(
        lambda key, value: key + b" = " + value, st.sampled_from(KEYS), st.sampled_from(SCALARS)
    ),
)
documents = st.lists(lines, max_size=12).map(b"\n".join)
options = st.one_of(
    st.text(max_size=80),
    st.lists(
        st.builds(lambda k, v: f"{k}={v}", st.sampled_from(["nvme", "a", "capacity", "medium"]),
                  st.sampled_from(["/a", "", "1GiB", "-1", "hdd", "\0", "x", "1e99", "é" * 40])),
        max_size=5,
    ).map(",".join),
)  # fmt: skip


def check_accepted(config: Config) -> None:
    """A configuration that was taken can be checked, shown and reloaded."""
    check_config(config, None)
    json.dumps(config_to_builtins(config), allow_nan=False)
    assert reloadable_changes(config, config) == ([], [])
    for tier in config.tier:
        low, high = config.tiering.watermarks(tier)
        assert 0 < low < high <= 1


def try_file(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        config = load_config(path)
    except ConfigError as error:
        check_message(error, str(path))
    else:
        check_accepted(config)


@replay("config")
def test_each_file_of_the_corpus(tmp_path: Path, data: bytes) -> None:
    try_file(tmp_path / "kvfs.toml", data)


@fuzz(500)
@given(data=st.one_of(documents, damaged(corpus("config"), SCALARS + KEYS), st.binary()))
def test_any_file(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    try_file(tmp_path_factory.getbasetemp() / "kvfs.toml", data)


def try_option(text: str) -> None:
    try:
        tier = parse_tier_option(text)
    except ConfigError as error:
        check_message(error)
    else:
        assert tier.path.is_absolute()
        assert tier.capacity_bytes > 0


@replay("tier-option")
def test_each_option_of_the_corpus(data: bytes) -> None:
    try_option(data.decode("utf-8", "surrogateescape"))


@fuzz(500)
@given(text=options)
def test_any_option(text: str) -> None:
    try_option(text)
