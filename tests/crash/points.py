"""Every failpoint of kvfs, found in its source: a new one is tested without being listed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.sources import modules_below

FOLDERS = ("kvfs", "mount")
# What a transaction hits by itself; `Catalog.transaction` makes these names.
OF_A_TRANSACTION = ("changed", "committed")


def all_points() -> list[str]:
    """Their names, sorted. Raises AssertionError for one that cannot be read from the source."""
    names: set[str] = set()
    for module in modules_below(*FOLDERS):
        names |= set(_points_in(module))
    return sorted(names)


def _points_in(module: Path) -> Iterator[str]:
    for call in ast.walk(ast.parse(module.read_text())):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        if call.func.attr == "transaction":
            name = _literal(module, call)
            yield from (f"{name}.{moment}" for moment in OF_A_TRANSACTION)
        elif ast.unparse(call.func) == "failpoints.hit" and not _is_of_a_transaction(call):
            yield _literal(module, call)


def _is_of_a_transaction(call: ast.Call) -> bool:
    return isinstance(call.args[0], ast.JoinedStr) and ast.unparse(call.args[0]).strip("f'\"") in {
        f"{{name}}.{moment}" for moment in OF_A_TRANSACTION
    }


def _literal(module: Path, call: ast.Call) -> str:
    place = f"{module.name}:{call.lineno}"
    assert call.args, f"{place}: it needs a name"
    name = call.args[0]
    assert isinstance(name, ast.Constant), f"{place}: write the name as a literal"
    assert isinstance(name.value, str), f"{place}: a name is a string"
    return name.value
