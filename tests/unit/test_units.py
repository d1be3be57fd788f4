"""kvfs.units: what users write is what is meant, and what is shown can be read back."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs.units import (
    MAX_SIZE_BYTES,
    format_blocks,
    format_duration,
    format_rate,
    format_size,
    parse_duration,
    parse_size,
)

BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50}
DECIMAL = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15}


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("2TiB", 2 * 2**40),
        ("512 MiB", 512 * 2**20),
        ("1000000", 1_000_000),
        (1_000_000, 1_000_000),
        ("2TB", 2 * 10**12),
        ("1.5GiB", 3 * 2**29),
        ("17B", 17),
        (" 4kib ", 4096),
        ("0.1KiB", 102),
        (0, 0),
        (MAX_SIZE_BYTES, MAX_SIZE_BYTES),
    ],
)
def test_parse_size(text: str | int, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "garbage",
    [
        "",
        " ",
        "TiB",
        "-1",
        -1,
        "-2TiB",
        "2 T i B",
        "2T",
        "1e9",
        "1.5",
        "1.",
        "0x10",
        "2TiB2",
        "٣MiB",
    ],
)
def test_parse_size_refuses_with_an_example(garbage: str | int) -> None:
    with pytest.raises(ValueError, match="write for example '2TiB'"):
        parse_size(garbage)


@pytest.mark.parametrize("wrong_type", [True, 1.5, None, [1]])
def test_parse_size_refuses_other_types(wrong_type: object) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(wrong_type)  # type: ignore[arg-type]  # what an unchecked TOML value may be


@pytest.mark.parametrize("too_much", [2**63, "8192PiB", "8EiB", "9" * 40])
def test_parse_size_refuses_more_than_the_catalog_holds(too_much: str | int) -> None:
    with pytest.raises(ValueError, match="more than 8 EiB"):
        parse_size(too_much)


@given(st.integers(0, 2000), st.sampled_from([*BINARY.items(), *DECIMAL.items()]), st.booleans())
def test_parse_size_multiplies_exactly(count: int, unit: tuple[str, int], spaced: bool) -> None:
    name, factor = unit
    assert parse_size(f"{count}{' ' if spaced else ''}{name}") == count * factor


@given(st.integers(0, 2**62))
def test_a_shown_size_reads_back_within_its_precision(size_bytes: int) -> None:
    read_back = parse_size(format_size(size_bytes))
    assert math.isclose(read_back, size_bytes, rel_tol=0.051)


@given(st.integers(1, 1023), st.sampled_from(list(BINARY.items())))
def test_a_whole_size_reads_back_exactly(count: int, unit: tuple[str, int]) -> None:
    name, factor = unit
    assert format_size(count * factor) == f"{count} {name}"
    assert parse_size(format_size(count * factor)) == count * factor


def test_format_blocks() -> None:
    shown = [format_blocks(count) for count in (0, 1, 2, 4813)]
    assert shown == ["0 blocks", "1 block", "2 blocks", "4,813 blocks"]


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**20 - 1, "1.0 MiB"), (-(2**21), "-2 MiB")],
)
def test_format_size(size_bytes: int, shown: str) -> None:
    assert format_size(size_bytes) == shown


@pytest.mark.parametrize(
    ("text", "duration_s"),
    [
        ("120s", 120.0),
        ("1h", 3600.0),
        ("500ms", 0.5),
        ("2d", 172_800.0),
        ("250us", 0.00025),
        ("5min", 300.0),
        ("1h 30m", 5400.0),
        ("1h30m", 5400.0),
        ("1.5 s", 1.5),
        ("90", 90.0),
        (90, 90.0),
        (0.25, 0.25),
        (0, 0.0),
    ],
)
def test_parse_duration(text: str | float, duration_s: float) -> None:
    assert parse_duration(text) == pytest.approx(duration_s)


@pytest.mark.parametrize(
    "garbage",
    [
        "",
        " ",
        "s",
        "-1s",
        -1,
        "1 fortnight",
        "1h half",
        "1e3s",
        math.nan,
        math.inf,
        "inf",
        "nan",
        "1h-",
    ],
)
def test_parse_duration_refuses_with_an_example(garbage: str | float) -> None:
    with pytest.raises(ValueError, match="write for example '120s'"):
        parse_duration(garbage)


@pytest.mark.parametrize("wrong_type", [True, None, ["1s"]])
def test_parse_duration_refuses_other_types(wrong_type: object) -> None:
    with pytest.raises(ValueError, match="is not a time"):
        parse_duration(wrong_type)  # type: ignore[arg-type]  # what an unchecked TOML value may be


@given(st.floats(0, 1e9))
def test_a_shown_duration_reads_back_within_its_precision(duration_s: float) -> None:
    read_back = parse_duration(format_duration(duration_s))
    # The smaller of two units is cut off, so up to one of it is lost: at most 1/24 of the larger.
    assert math.isclose(read_back, duration_s, rel_tol=0.05, abs_tol=1e-6)


@pytest.mark.parametrize(
    ("duration_s", "shown"),
    [
        (0, "0ms"),
        (0.35, "350ms"),
        (0.9999, "1s"),
        (1.5, "1.5s"),
        (59.99, "1m"),
        (125, "2m 5s"),
        (12_000, "3h 20m"),
        (3600, "1h"),
        (187_200, "2d 4h"),
        (-2, "-2s"),
    ],
)
def test_format_duration(duration_s: float, shown: str) -> None:
    assert format_duration(duration_s) == shown


def test_format_rate() -> None:
    assert format_rate(1.2 * 2**30) == "1.2 GiB/s"
