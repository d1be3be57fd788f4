"""Sizes, times, rates and names as text: what users write, and what users are shown.

Pure; it owns no defaults and no limits. The configuration, the command and the extended attributes
read through it, so that "2TiB" and "120s" mean the same everywhere. What the format functions
print, the parse functions read.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal

# The catalog and off_t hold sizes in 64 bits, signed.
MAX_SIZE_BYTES = 2**63 - 1

_SIZE_UNITS = {
    "": 1,
    "b": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "pib": 2**50,
    "eib": 2**60,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "pb": 10**15,
    "eb": 10**18,
}
_SHOWN_SIZE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)")

_DURATION_UNITS_S = {
    "us": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "min": 60.0,
    "h": 3600.0,
    "d": 86400.0,
    "w": 7 * 86400.0,
}
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([a-z]+) *")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")


def parse_size(value: str | int) -> int:
    """Bytes from "2TiB", "512 MiB", "2TB" (decimal), "1000000" or a number of bytes."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(_not_a_size(value))
    text = str(value).strip()
    match = _SIZE.fullmatch(text)
    factor = _SIZE_UNITS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(_not_a_size(value))
    size = Decimal(match[1]) * factor
    if factor == 1 and size != int(size):
        raise ValueError(_not_a_size(value))
    if size > MAX_SIZE_BYTES:
        raise ValueError(f"{text!r} is more than 8 EiB; write for example '2TiB'")
    return int(size)


def parse_duration(value: str | float) -> float:
    """Seconds from "120s", "500ms", "1h", "1h 30m", "2d", "90" or a number of seconds."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(_not_a_duration(value))
    seconds = _seconds_in(value.strip().lower()) if isinstance(value, str) else float(value)
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        raise ValueError(_not_a_duration(value))
    return seconds


def _seconds_in(text: str) -> float | None:
    if _NUMBER.fullmatch(text):
        return float(text)
    seconds = 0.0
    position = 0
    while position < len(text):
        part = _DURATION_PART.match(text, position)
        if part is None or part[2] not in _DURATION_UNITS_S:
            return None
        seconds += float(part[1]) * _DURATION_UNITS_S[part[2]]
        position = part.end()
    return seconds if text else None


def _not_a_size(value: object) -> str:
    return f"{value!r} is not a size; write for example '2TiB', '512MiB' or a number of bytes"


def _not_a_duration(value: object) -> str:
    return f"{value!r} is not a time; write for example '120s', '1h' or a number of seconds"


def format_size(size_bytes: int) -> str:
    """A size for people: "17 B", "1.5 GiB", "2 TiB"; a decimal only where it is not whole."""
    if size_bytes < 0:
        return f"-{format_size(-size_bytes)}"
    unit = 0
    while size_bytes >= 1024 ** (unit + 1) and unit < len(_SHOWN_SIZE_UNITS) - 1:
        unit += 1
    scaled = size_bytes / 1024**unit
    if round(scaled, 1) >= 1024 and unit < len(_SHOWN_SIZE_UNITS) - 1:
        unit += 1
        scaled /= 1024
    digits = 0 if size_bytes % 1024**unit == 0 else 1
    return f"{scaled:.{digits}f} {_SHOWN_SIZE_UNITS[unit]}"


def format_duration(duration_s: float) -> str:
    """A time for people, in its two largest units: "350ms", "1.5s", "2m 5s", "3h 20m", "2d 4h"."""
    if duration_s < 0:
        return f"-{format_duration(-duration_s)}"
    if duration_s < 0.9995:
        return f"{round(duration_s * 1000, 3):.3g}ms"
    if duration_s < 59.95:
        return f"{duration_s:.3g}s"
    seconds = round(duration_s)
    for large, small in (("d", "h"), ("h", "m"), ("m", "s")):
        large_s, small_s = int(_DURATION_UNITS_S[large]), int(_DURATION_UNITS_S[small])
        if seconds >= large_s:
            break
    rest = seconds % large_s // small_s
    return f"{seconds // large_s}{large}" + (f" {rest}{small}" if rest else "")


def format_rate(bytes_per_s: float) -> str:
    """A rate for people: "1.2 GiB/s"."""
    return f"{format_size(round(bytes_per_s))}/s"


def format_blocks(count: int) -> str:
    """A number of blocks for people: `1 block`, `4,813 blocks`."""
    return f"{count:,} block" if count == 1 else f"{count:,} blocks"


def printable(text: str) -> str:
    """`text` in one line: control characters and the stray bytes of a name are escaped."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # how os.fsdecode carries a byte that is not UTF-8
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")
