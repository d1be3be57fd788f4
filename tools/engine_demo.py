"""`make engine-demo`: stock vLLM stores its KV blocks in a kvfs mount and loads them again.

Owns the mount of the demo and the checks between the engine's runs. It drives the installed `kvfs`
command as an admin would, and never imports the store. Nothing imports it; the Makefile runs it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.table import Table

from kvfs.errors import KvfsError, UsageError, exit_code_of
from kvfs.tools.engine_runner import HOME, Engine, EngineRun, Progress, make_environment, make_model

PROMPT_TOKENS = 1512
BLOCK_TOKENS = 32
BLOCKS = 47
LOADED_TOKENS = 1504
FILES = BLOCKS + 1  # with the config.json that vLLM writes beside its blocks

COMMAND_DEADLINE_S = 120.0
SEAL_DEADLINE_S = 60.0

# The policy stays out of the way: here the demo says where the blocks go.
CONFIG = """\
[[tier]]
name = "nvme"
path = {nvme}
medium = "nvme"
capacity = "256MiB"

[[tier]]
name = "hdd"
path = {hdd}
medium = "hdd"
capacity = "256MiB"

[tiering]
interval = "1h"
"""


@dataclass(frozen=True)
class Check:
    """One line of the table: what had to be seen at a step, and what was."""

    step: str
    what: str
    expected: str
    seen: str
    held: bool


def equal(step: str, what: str, expected: str, seen: str) -> Check:
    return Check(step, what, expected, seen, held=seen == expected)


def config_text(nvme: Path, hdd: Path) -> str:
    """The demo's kvfs.toml. A JSON string without escapes for non-ASCII is a TOML string."""
    quoted = [json.dumps(str(path), ensure_ascii=False) for path in (nvme, hdd)]
    return CONFIG.format(nvme=quoted[0], hdd=quoted[1])


class Mount:
    """A kvfs mount over two tiers in the scratch directory; leaving the context unmounts it."""

    def __init__(self, progress: Progress, scratch: Path) -> None:
        self._progress = progress
        self._command = Path(sys.executable).with_name("kvfs")
        if not self._command.exists():
            raise KvfsError(f"{self._command} is not installed: run `make setup`, then this again")
        self.mountpoint = scratch / "mnt"
        self.tiers = {name: scratch / name for name in ("nvme", "hdd")}
        self._config = scratch / "kvfs.toml"
        self._prompt = scratch / "prompt.json"
        self._log = scratch / "kvfs.log"
        self._mounted = False
        for directory in (self.mountpoint, *self.tiers.values()):
            directory.mkdir()
        self._config.write_text(config_text(self.tiers["nvme"], self.tiers["hdd"]))

    def __enter__(self) -> Self:
        self.mount()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._mounted:
            return
        try:
            self.umount()
        except KvfsError as failure:
            if error is None:
                raise
            self._progress.say(str(failure))

    def mount(self) -> None:
        self._progress.say(f"kvfs mount {self.mountpoint} --config {self._config}")
        self._kvfs("mount", self.mountpoint, "--config", self._config, "--log-file", self._log)
        self._mounted = True

    def umount(self) -> None:
        self._progress.say(f"kvfs umount {self.mountpoint}")
        self._kvfs("umount", self.mountpoint)
        self._mounted = False

    def demote(self, tier: str) -> None:
        """Moves everything to `tier`. Only sealed blocks move, and sealing follows the engine."""
        deadline = time.monotonic() + SEAL_DEADLINE_S
        while self.status()["unsealed"] and time.monotonic() < deadline:
            time.sleep(0.5)
        self._progress.say(f"kvfs demote {self.mountpoint} --to {tier}")
        self._kvfs("demote", self.mountpoint, "--to", tier)

    def status(self) -> dict[str, Any]:
        return self._kvfs_json("status", self.mountpoint)

    def replicas(self, path: Path) -> list[str]:
        replicas: list[str] = self._kvfs_json("info", path)["replicas"]
        return replicas

    def match(self, prompt: Sequence[int]) -> dict[str, Any]:
        """What kvfs finds of a prompt by names that it computes itself."""
        self._prompt.write_text(json.dumps(prompt))
        namespace = next(self.mountpoint.glob("*_r0"), self.mountpoint)
        options = ("--scheme", "vllm-sha256", "--block-tokens", str(BLOCK_TOKENS))
        return self._kvfs_json("match", self._prompt, "--namespace", namespace, *options)

    def tier_count(self, tier: str, key: str) -> int:
        return next(int(each[key]) for each in self.status()["tiers"] if each["name"] == tier)

    def counted(self, event: str) -> int:
        """How often it happened since the mount."""
        return int(self.status()["counters"].get(event, 0))

    def _kvfs_json(self, verb: str, path: Path, *options: str | Path) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self._kvfs(verb, path, *options, "--json"))
        return document

    def _kvfs(self, *arguments: str | Path) -> str:
        try:
            done = subprocess.run(
                [self._command, *arguments],
                capture_output=True,
                text=True,
                timeout=COMMAND_DEADLINE_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise KvfsError(f"kvfs {arguments[0]} took more than {error.timeout:.0f} s") from None
        if done.returncode != 0:
            raise KvfsError(f"kvfs {arguments[0]} ({done.returncode}): {done.stderr.strip()}")
        return done.stdout


def files_below(directory: Path) -> list[Path]:
    """The engine's files in a tier, read past kvfs; what kvfs keeps for itself is left out."""
    found: list[Path] = []
    for parent, folders, names in os.walk(directory):
        folders[:] = [folder for folder in folders if folder != ".kvfs"]
        found.extend(Path(parent, name) for name in names)
    return found


def check_store(step: str, run: EngineRun) -> list[Check]:
    stored = f"{BLOCKS} of 65536 B"
    sizes = " and ".join(str(size) for size in run.block_bytes)
    return [
        equal(step, "prompt tokens loaded", f"0 of {PROMPT_TOKENS}", loaded(run)),
        equal(step, "blocks stored", stored, f"{run.blocks} of {sizes} B"),
    ]


def check_load(step: str, run: EngineRun, first: EngineRun) -> list[Check]:
    tokens = "those of run 1" if run.tokens == first.tokens else f"others: {run.tokens}"
    return [
        equal(step, "prompt tokens loaded", f"{LOADED_TOKENS} of {PROMPT_TOKENS}", loaded(run)),
        equal(step, "generated tokens", "those of run 1", tokens),
    ]


def loaded(run: EngineRun) -> str:
    return f"{run.cached_tokens} of {run.prompt_tokens}"


def check_opens(step: str, mount: Mount, tier: str, before: int) -> Check:
    opened = mount.tier_count(tier, "opens") - before
    expected = f"{BLOCKS} or more"
    return Check(step, f"opens on {tier}", expected, str(opened), held=opened >= BLOCKS)


def check_path(step: str, mount: Mount) -> Check:
    """Which way the engine's bytes took: past the daemon, where this machine can."""
    path = mount.status()["data_path"]
    way = "passthrough" if path["passthrough"] else "served"
    expected = f"{BLOCKS} or more {way}"
    if path["reason"]:
        expected += f" ({path['reason']})"
    opened = mount.counted(f"opens_{way}")
    return Check(step, "opens by data path", expected, f"{opened} {way}", held=opened >= BLOCKS)


def check_placement(step: str, mount: Mount) -> list[Check]:
    """Asks the daemon, then looks into the tiers themselves."""
    block = next(path for path in files_below(mount.mountpoint) if path.suffix == ".bin")
    reported = [f"{tier} {mount.tier_count(tier, 'blocks')}" for tier in mount.tiers]
    present = [f"{tier} {len(files_below(path))}" for tier, path in mount.tiers.items()]
    expected = f"nvme 0, hdd {FILES}"
    return [
        equal(step, "files by kvfs status", expected, ", ".join(reported)),
        equal(step, "files in the tiers", expected, ", ".join(present)),
        equal(step, "replicas of a block", "hdd", ", ".join(mount.replicas(block))),
    ]


def check_match(step: str, found: Mapping[str, Any], tier: str) -> Check:
    """The names that kvfs computes from the prompt are those that the engine gave its files."""
    expected = f"{BLOCKS} of {BLOCKS} blocks, {tier} {BLOCKS}"
    tiers = ", ".join(f"{row['tier']} {row['blocks']}" for row in found["tiers"])
    seen = f"{found['hit_blocks']} of {found['blocks']} blocks, {tiers}"
    return equal(step, "kvfs match of the prompt", expected, seen)


def directory_demo(engine: Engine, directory: Path) -> list[Check]:
    """The engine alone on a plain directory: what the mount has to equal."""
    first = engine.run("run 1", directory)
    second = engine.run("run 2", directory)
    return [
        *check_store("run 1, empty directory", first),
        *check_load("run 2, same directory", second, first),
    ]


def mount_demo(engine: Engine, mount: Mount) -> list[Check]:
    checks: list[Check] = []
    first = engine.run("run 1", mount.mountpoint)
    checks += check_store("run 1, empty mount", first)
    checks.append(check_path("run 1, empty mount", mount))
    checks.append(check_match("run 1, empty mount", mount.match(first.prompt), "nvme"))
    before = mount.tier_count("nvme", "opens")
    second = engine.run("run 2", mount.mountpoint)
    checks += check_load("run 2, blocks on nvme", second, first)
    checks.append(check_opens("run 2, blocks on nvme", mount, "nvme", before))
    mount.demote("hdd")
    checks += check_placement("after kvfs demote", mount)
    checks.append(check_match("after kvfs demote", mount.match(first.prompt), "hdd"))
    mount.umount()
    mount.mount()
    before = mount.tier_count("hdd", "opens")
    third = engine.run("run 3", mount.mountpoint)
    checks += check_load("run 3, remounted, blocks on hdd", third, first)
    checks.append(check_opens("run 3, remounted, blocks on hdd", mount, "hdd", before))
    checks.append(check_path("run 3, remounted, blocks on hdd", mount))
    return checks


def table_of(title: str, checks: Sequence[Check], versions: dict[str, str]) -> Table:
    caption = ", ".join(f"{name} {version}" for name, version in versions.items())
    table = Table(title=title, caption=caption)
    for column in ("step", "what", "expected", "seen", "held"):
        table.add_column(column)
    for check in checks:
        table.add_row(
            check.step, check.what, check.expected, check.seen, "yes" if check.held else "NO"
        )
    return table


def run_demo(scratch: Path, directory: Path | None) -> bool:
    """Everything from the environment to the table; whether every check held."""
    progress = Progress()
    log = scratch / "engine.log"
    python = make_environment(progress, log)
    make_model(progress, python, log)
    with contextlib.ExitStack() as stack:
        if directory is None:
            mount = stack.enter_context(Mount(progress, scratch))
            engine = stack.enter_context(Engine(progress, python, log))
            title, checks = "vLLM on a kvfs mount", mount_demo(engine, mount)
        else:
            engine = stack.enter_context(Engine(progress, python, log))
            title, checks = "vLLM on a plain directory", directory_demo(engine, directory)
    progress.show(table_of(title, checks, engine.versions))
    return all(check.held for check in checks)


def empty_directory(path: Path, option: str) -> Path:
    path = path.absolute()
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise UsageError(f"{option} {path} is not empty: name an empty or a new directory")
    return path


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="engine_demo", description=__doc__)
    parser.add_argument("--scratch", type=Path, help="an empty directory for tiers, mount and log")
    parser.add_argument("--directory", type=Path, help="an empty plain directory, no mount at all")
    parser.add_argument("--keep", action="store_true", help="leave the scratch directory")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    # SystemExit unwinds like Ctrl-C does: the engine is ended, then the mount goes.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        directory = empty_directory(options.directory, "--directory") if options.directory else None
        HOME.mkdir(exist_ok=True)
        scratch = empty_directory(options.scratch or HOME / f"run-{os.getpid()}", "--scratch")
        held = run_demo(scratch, directory)
    except (KvfsError, OSError) as error:
        print(f"engine-demo: {error}", file=sys.stderr)
        return exit_code_of(error)
    if not held:
        print(f"engine-demo: a check failed; everything is left in {scratch}", file=sys.stderr)
    elif not options.keep:
        shutil.rmtree(scratch)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
