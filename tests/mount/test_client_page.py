"""docs/CLIENT.md: its examples run, and print what they say."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

from kvfs.async_client import AsyncClient
from kvfs.client import Client
from tests.mount.live import config_in, live, scratch
from tests.mounting import MountedKvfs

PAGE = Path(__file__).parents[2] / "docs" / "CLIENT.md"
EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SAYS = re.compile(r"# (.+)$", re.MULTILINE)


def test_every_example_runs_and_prints_what_it_says() -> None:
    examples = EXAMPLE.findall(PAGE.read_text())
    assert len(examples) >= 5
    with scratch() as base, live(MountedKvfs(base, config_in(base))) as mount:
        for example in examples:
            script = example.replace("/mnt/kvfs", str(mount.path))
            done = subprocess.run(
                [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True,
                timeout=60, check=False,
            )  # fmt: skip
            assert (done.returncode, done.stderr) == (0, ""), example
            printed = done.stdout.splitlines()
            for said in SAYS.findall(example):
                assert said in printed, example


def test_every_operation_is_on_the_page_and_both_clients_have_it() -> None:
    page = PAGE.read_text()
    operations = {
        name for name, _ in inspect.getmembers(Client, inspect.isfunction) if name[0] != "_"
    }
    assert operations == {
        name for name, _ in inspect.getmembers(AsyncClient, inspect.isfunction) if name[0] != "_"
    }
    assert {name for name in operations - {"close"} if f"`{name}" not in page} == set()
