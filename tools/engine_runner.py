"""The engine of `make engine-demo`: its environment, its model and its processes.

Owns `.engine-demo` (a virtual environment of 6 GB, a model made of random numbers) and the process
that runs vLLM in it. The scripts of that side are in tools/engine/ and never import kvfs; this side
never looks at a mount. Called by kvfs.tools.engine_demo.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self, TypeVar

import msgspec
from rich.console import Console
from rich.table import Table

from kvfs.errors import KvfsError
from kvfs.units import format_size

SCRIPTS = Path(__file__).resolve().parent / "engine"
HOME = SCRIPTS.parents[1] / ".engine-demo"
MODEL = "tiny-llama"
UV = "uv==0.13.9"
ENVIRONMENT_BYTES = 7 << 30
ENVIRONMENT_SCRIPTS = ("requirements.txt",)
MODEL_SCRIPTS = ("requirements.txt", "make_tiny_model.py")

INSTALL_DEADLINE_S = 3600.0
ENGINE_DEADLINE_S = 900.0
HEARTBEAT_S = 15.0

ENGINE_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's core runs in the process of its run
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


class EngineReady(msgspec.Struct, frozen=True):
    """The engine process's first line, once vLLM is imported."""

    versions: dict[str, str]


class EngineRun(msgspec.Struct, frozen=True):
    """What one run answered; tools/engine/run_vllm.py says what it did."""

    exit_status: int
    rss_bytes: int
    prompt: tuple[int, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: tuple[int, ...] = ()
    blocks: int = 0
    block_bytes: tuple[int, ...] = ()
    start_s: float = 0.0
    generate_s: float = 0.0


Answer = TypeVar("Answer", EngineReady, EngineRun)


class Progress:
    """Prints each step with the seconds since the start."""

    def __init__(self) -> None:
        self._console = Console()
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        line = f"{time.monotonic() - self._started:7.1f} s  {text}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, table: Table) -> None:
        self._console.print(table)


def parse_answer(line: bytes, kind: type[Answer]) -> Answer:
    try:
        return msgspec.json.decode(line, type=kind)
    except msgspec.DecodeError as error:
        raise KvfsError(f"the engine answered {line[:200]!r}: {error}") from None


def parse_run(line: bytes) -> EngineRun:
    run = parse_answer(line, EngineRun)
    if run.exit_status != 0:
        raise KvfsError(f"the engine's process ended with exit status {run.exit_status}")
    return run


def fingerprint(names: Sequence[str]) -> str:
    """What an environment or a model made by these scripts depends on."""
    digest = hashlib.sha256(repr((str(HOME), sys.version)).encode())
    for name in names:
        digest.update((SCRIPTS / name).read_bytes())
    return digest.hexdigest()


def is_current(made: Path, names: Sequence[str]) -> bool:
    stamp = made / "engine-demo.stamp"
    return stamp.is_file() and stamp.read_text() == fingerprint(names)


def stamp_as_current(made: Path, names: Sequence[str]) -> None:
    (made / "engine-demo.stamp").write_text(fingerprint(names))


def run_logged(
    progress: Progress, what: str, command: Sequence[str | Path], log: Path, deadline_s: float
) -> None:
    """Runs one command of the set-up, with a line every HEARTBEAT_S while it lasts."""
    started = time.monotonic()
    environment = {**os.environ, "UV_CACHE_DIR": str(HOME / "uv-cache")}
    with (
        log.open("ab") as output,
        subprocess.Popen(
            command,
            cwd=HOME,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        ) as process,
        ending_group(process),
    ):
        while True:
            try:
                status = process.wait(HEARTBEAT_S)
                break
            except subprocess.TimeoutExpired:
                waited_s = time.monotonic() - started
                if waited_s > deadline_s:
                    raise KvfsError(f"{what} took over {deadline_s:.0f} s; see {log}") from None
                progress.say(f"  {what}: {waited_s:.0f} s so far")
    if status != 0:
        raise KvfsError(f"{what} failed with exit status {status}; see {log}")


@contextlib.contextmanager
def ending_group(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ends what is left of a process and its children on the way out, also after Ctrl-C."""
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def make_environment(progress: Progress, log: Path) -> Path:
    """The Python of the engine's virtual environment, made unless it is there and current."""
    if not SCRIPTS.is_dir():
        raise KvfsError("the engine's scripts are not installed: run this in a checkout of kvfs")
    environment = HOME / "venv"
    python = environment / "bin" / "python"
    if is_current(environment, ENVIRONMENT_SCRIPTS):
        progress.say(f"the engine's environment is in {environment}")
        return python
    shutil.rmtree(environment, ignore_errors=True)
    free_bytes = shutil.disk_usage(HOME).free
    if free_bytes < ENVIRONMENT_BYTES:
        raise KvfsError(
            f"the engine's environment needs {format_size(ENVIRONMENT_BYTES)} in {HOME}, "
            f"where {format_size(free_bytes)} are free: make room, then run this again"
        )
    progress.say(f"making the engine's environment in {environment}: 6 GB, some minutes")
    uv: list[str | Path] = [environment / "bin" / "uv", "pip", "install", "--python", python]
    commands: list[list[str | Path]] = [
        [sys.executable, "-m", "venv", environment],
        [python, "-m", "pip", "install", "--quiet", UV],
        [*uv, "--no-deps", "--requirements", SCRIPTS / "requirements.txt"],
    ]
    for command in commands:
        run_logged(progress, "installing the engine", command, log, INSTALL_DEADLINE_S)
    shutil.rmtree(HOME / "uv-cache", ignore_errors=True)
    stamp_as_current(environment, ENVIRONMENT_SCRIPTS)
    return python


def make_model(progress: Progress, python: Path, log: Path) -> None:
    model = HOME / MODEL
    if is_current(model, MODEL_SCRIPTS):
        return
    progress.say("making a Llama of 2.5 million random parameters")
    shutil.rmtree(model, ignore_errors=True)
    command = [python, SCRIPTS / "make_tiny_model.py", model]
    run_logged(progress, "making the model", command, log, ENGINE_DEADLINE_S)
    stamp_as_current(model, MODEL_SCRIPTS)


class Engine:
    """The process that has imported vLLM and forks one process with its own engine per run.

    Owned by the demo's only thread; leaving the context ends it and every run it started.
    """

    def __init__(self, progress: Progress, python: Path, log: Path) -> None:
        self._progress = progress
        self._log = log
        self._stack = contextlib.ExitStack()
        self._command = [python, SCRIPTS / "run_vllm.py"]
        self.versions: dict[str, str] = {}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(self._log.open("ab"))
            self._process = stack.enter_context(
                subprocess.Popen(
                    self._command,
                    cwd=HOME,
                    env={**os.environ, **ENGINE_SETTINGS},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,
                    bufsize=0,
                    start_new_session=True,
                )
            )
            stack.enter_context(ending_group(self._process))
            self._progress.say("importing vLLM: 20 s to 3 minutes")
            self.versions = parse_answer(self._answer("importing vLLM"), EngineReady).versions
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def run(self, name: str, store: Path) -> EngineRun:
        """One engine process on `store`, from start to end."""
        self._progress.say(f"{name}: a new engine process")
        request = json.dumps({"model": MODEL, "store": str(store)})
        assert self._process.stdin is not None
        self._process.stdin.write(f"{request}\n".encode())
        run = parse_run(self._answer(name))
        times = f"engine start {run.start_s:.1f} s, prompt {run.generate_s:.2f} s"
        self._progress.say(
            f"{name}: {run.cached_tokens} of {run.prompt_tokens} prompt tokens loaded; {times}, "
            f"{format_size(run.rss_bytes)} RSS"
        )
        return run

    def _answer(self, what: str) -> bytes:
        answers: IO[bytes] | None = self._process.stdout
        assert answers is not None
        started = time.monotonic()
        while not select.select([answers], [], [], HEARTBEAT_S)[0]:
            waited_s = time.monotonic() - started
            if waited_s > ENGINE_DEADLINE_S:
                raise KvfsError(f"{what} took more than {ENGINE_DEADLINE_S:.0f} s; see {self._log}")
            self._progress.say(f"  {what}: {waited_s:.0f} s so far")
        line = answers.readline()
        if not line:
            raise KvfsError(f"{what}: the engine ended; see {self._log}")
        return line
