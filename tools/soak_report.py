"""What the last `make soak` did, for docs/RELIABILITY.md: a row for each test, from its report.

    python -m kvfs.tools.soak_report REPORT.xml [REPORT.xml ...]

Replaces the section between the two marks of that page; one that was made in parts has several
reports. A soak that failed is recorded as such.
"""

from __future__ import annotations

import platform
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

PAGE = Path(__file__).resolve().parents[1] / "docs" / "RELIABILITY.md"
BEGIN, END = "<!-- the last soak: by `make soak` -->", "<!-- end of the last soak -->"


@dataclass(slots=True)
class Row:
    """All cases of one test function. `did` is what they say they did, added up by unit."""

    cases: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    did: dict[str, int] | None = None

    def add(self, case: ElementTree.Element) -> None:
        self.cases += 1
        self.failed += case.find("failure") is not None or case.find("error") is not None
        self.skipped += case.find("skipped") is not None
        self.seconds += float(case.get("time", 0))
        for said in case.iterfind("properties/property"):
            self.did = self.did or {}
            unit = said.get("name", "")
            self.did[unit] = self.did.get(unit, 0) + int(said.get("value", 0))

    def line(self, test: str) -> str:
        did = ", ".join(f"{count:,} {unit}" for unit, count in (self.did or {}).items())
        result = f"{self.failed} FAILED" if self.failed else "passed"
        if self.skipped:
            result += f", {self.skipped} skipped"
        return f"| `{test}` | {self.cases} | {did or '-'} | {result} | {self.seconds / 60:.1f} |"


def rows_of(report: ElementTree.Element) -> dict[str, Row]:
    """Test function -> its row, in the order in which they ran."""
    rows: dict[str, Row] = {}
    for case in report.iter("testcase"):
        module = case.get("classname", "").removeprefix("tests.").replace(".", "/")
        name = case.get("name", "").partition("[")[0]
        rows.setdefault(f"{module}.py: {name}", Row()).add(case)
    return rows


def section(report: ElementTree.Element) -> str:
    """The part of the page: when, of what version and where it ran, and the rows."""
    suite = next(report.iter("testsuite"))
    about = {p.get("name"): p.get("value") for p in suite.iterfind("properties/property")}
    began = datetime.fromisoformat(suite.get("timestamp", "")).astimezone(UTC)
    rows = rows_of(report)
    failed = sum(row.failed for row in rows.values())
    cases = sum(row.cases for row in rows.values())
    return "\n".join(
        [
            f"Begun {began:%Y-%m-%d %H:%M} UTC, FACTOR={about['factor']}, kvfs {about['version']},"
            f" Linux {platform.release()}: {cases} cases, {failed} failed,"
            f" {float(suite.get('time', 0)) / 60:.0f} minutes.",
            "",
            "| test | cases | did | result | minutes |",
            "| --- | --- | --- | --- | --- |",
            *(row.line(test) for test, row in rows.items()),
        ]
    )


def with_section(page: str, text: str) -> str:
    """The page with that part replaced."""
    head, rest = page.split(BEGIN, 1)
    return f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.split(END, 1)[1]}"


def main(
    reports: Annotated[list[Path], typer.Argument(metavar="REPORT...", exists=True)],
) -> None:
    """Record a soak in docs/RELIABILITY.md."""
    parts = [section(ElementTree.parse(report).getroot()) for report in reports]
    PAGE.write_text(with_section(PAGE.read_text(), "\n\n".join(parts)))
    for part in parts:
        typer.echo(part.partition("\n")[0])


if __name__ == "__main__":
    typer.run(main)
