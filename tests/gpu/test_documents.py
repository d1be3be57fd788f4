"""What docs/GPU.md says that can be checked: names, packages, the configuration file."""

from __future__ import annotations

import importlib
import json
import re
import tomllib
from pathlib import Path
from typing import get_args

from kvfs.gpu.device import RouteKind

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "GPU.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)


def test_the_program_is_one_and_what_it_imports_exists() -> None:
    (program,) = blocks("python")
    compile(program, "docs/GPU.md", "exec")
    for module, name in re.findall(r"^from (\S+) import (\w+)$", program, re.MULTILINE):
        assert hasattr(importlib.import_module(module), name)


def test_every_route_is_explained() -> None:
    table = DOCUMENT.split("| route |", 1)[1].split("\n\n", 1)[0]
    shown = set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))
    assert shown == set(get_args(RouteKind)) - {"unknown"}


def test_the_recipe_has_the_packages_of_the_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    recipe = next(block for block in blocks("sh") if "--no-deps" in block)
    named = {re.split(r"[><=!~]", requirement, maxsplit=1)[0] for requirement in extras["gpu"]}
    assert all(re.search(rf"(?<![\w-]){name}(?![\w-])", recipe) for name in named)
    light = (ROOT / "tests" / "gpu" / "requirements.txt").read_text()
    for package in re.findall(r"^([\w-]+)==", light, re.MULTILINE):
        assert package in recipe
    assert {name.replace("13", "12") for name in named} == {
        re.split(r"[><=!~]", requirement, maxsplit=1)[0] for requirement in extras["gpu-cu12"]
    }


def test_the_configuration_of_cufile_is_json() -> None:
    (text,) = blocks("json")
    assert json.loads(text)["properties"]["allow_compat_mode"] is True
