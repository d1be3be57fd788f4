"""The table of docs/RELIABILITY.md that the fault matrix fills in and is held to.

Each row is what one run of the test saw. `make reliability` writes rows; every other run compares.
"""

from __future__ import annotations

import os
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "RELIABILITY.md"
WRITE = os.environ.get("KVFS_WRITE_MATRIX") == "1"
FIRST = "fault"

Row = dict[str, str]


def marks(tier: str) -> tuple[str, str]:
    """The lines around a tier's table."""
    return f"<!-- faults of {tier}: by `make reliability` -->", f"<!-- end of faults of {tier} -->"


def table_of(tier: str, page: str) -> dict[str, Row]:
    """Fault -> column -> cell."""
    begin, end = marks(tier)
    lines = page.split(begin, 1)[1].split(end, 1)[0].strip().splitlines()
    if len(lines) < 2:
        return {}
    columns = _cells(lines[0])[1:]
    rows = (_cells(line) for line in lines[2:])
    return {fault: dict(zip(columns, cells, strict=True)) for fault, *cells in rows}


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def with_row(tier: str, page: str, fault: str, row: Row, order: list[str]) -> str:
    """The page with one row replaced, or added at its place in `order`."""
    table = table_of(tier, page) | {fault: row}
    kept = [name for name in order if name in table]
    lines = [_line([FIRST, *row]), _line(["---"] * (len(row) + 1))]
    lines += [_line([name, *(table[name].get(column, "") for column in row)]) for name in kept]
    begin, end = marks(tier)
    head, rest = page.split(begin, 1)
    return f"{head}{begin}\n\n" + "\n".join(lines) + f"\n\n{end}" + rest.split(end, 1)[1]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def documented(tier: str, fault: str) -> Row:
    """What the page says of a fault; nothing when it does not know it."""
    return table_of(tier, PAGE.read_text()).get(fault, {})


def record(tier: str, fault: str, row: Row, order: list[str]) -> None:
    """Compare a row with the page, or write it there when that was asked for."""
    if WRITE:
        PAGE.write_text(with_row(tier, PAGE.read_text(), fault, row, order))
        return
    page = documented(tier, fault)
    other = {name: (cell, page.get(name)) for name, cell in row.items() if page.get(name) != cell}
    assert not other, f"docs/RELIABILITY.md says otherwise, `make reliability` writes it: {other}"
    assert list(page) == list(row)
