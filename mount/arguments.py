"""Arguments of a request, which come from anybody: of their type and within bounds, or refused."""

from __future__ import annotations

from typing import Any

from kvfs.errors import UsageError

# The most that a row of the catalog can hold.
MOST = (1 << 63) - 1


def number(args: dict[str, Any], key: str, default: int = 0, most: int = MOST) -> int:
    """A number of 0 to `most`; what is larger is as much. Raises UsageError."""
    value = args.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or value < 0:
        raise UsageError(f"{key} is a number of 0 or more")
    return min(value, most)


def name(args: dict[str, Any], key: str) -> str | None:
    """The name of a tier, say; None without one. Raises UsageError."""
    value = args.get(key)
    if value is not None and not isinstance(value, str):
        raise UsageError(f"{key} is a name")
    return value or None
