"""What this machine has for the way from disk to GPU, found out by a process of its own.

Half-installed CUDA does not fail: it hangs or aborts. So the questions are asked by a child
(`kvfs.gpu.probe_child`) that says what it is at before each step, and is ended when it takes too
long. The answer about the machine is kept for the life of the process.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from typing import Any

import msgspec

from kvfs.errors import DeviceError
from kvfs.gpu.device import Route

TIMEOUT_S = 60.0


class Probe(msgspec.Struct, frozen=True):
    """Everything a route depends on. `problem` is why there is no GPU to use; empty if there is."""

    problem: str = ""
    cuda: str = ""
    """The CUDA version of the driver."""

    devices: tuple[str, ...] = ()
    libraries: dict[str, str] = {}
    """Versions of kvikio, cupy, nvcomp and cuda-bindings; without those that do not import."""

    cufile: str = ""
    """The version of libcufile; empty if cuFile cannot be used, and `compat_because` says why."""

    compat_because: str = "kvikio was not asked"
    """Why bytes have to go through the host's memory; empty if they need not."""

    nvidia_fs: bool = False
    p2pdma: bool = False
    """Whether cuFile is told to use the kernel's PCI P2PDMA."""

    @property
    def usable(self) -> bool:
        """Whether there is a GPU that `CudaDevice` can use."""
        return not self.problem

    @property
    def compat(self) -> bool:
        return bool(self.compat_because)


@functools.cache
def probe(timeout_s: float = TIMEOUT_S) -> Probe:
    """What the machine has. Takes seconds the first time where there is a GPU."""
    return probe_of(_ask([], (), timeout_s))


def probe_of(answer: dict[str, Any]) -> Probe:
    """The probe in a child's answer, also in one that broke off. Pure."""
    if "devices" not in answer:
        broken = "libcuda.so.1" if answer["step"] == "driver" else f"the step {answer['step']}"
        return Probe(problem=answer.get("problem") or f"{broken} {answer['ended']}")
    facts = {name: answer[name] for name in Probe.__struct_fields__ if name in answer}
    if answer["ended"] and "compat_because" not in facts:
        facts["compat_because"] = f"cuFile {answer['ended']} at the step {answer['step']}"
    if not facts.get("problem") and not facts["devices"]:
        facts["problem"] = "the NVIDIA driver finds no GPU"
    if not facts.get("problem"):
        missing = [name for name in ("kvikio", "cupy") if name not in facts.get("libraries", {})]
        if missing:
            facts["problem"] = f"{' and '.join(missing)} cannot be imported: install kvfs[gpu]"
    return msgspec.convert(facts, Probe)


def prove(fd: int, size_bytes: int, device: int, timeout_s: float = TIMEOUT_S) -> Route:
    """The way that a read of this file takes, told by reading it in a child.

    cuFile's own counters tell it, if cuda-bindings is there. Raises DeviceError if the read fails.
    """
    answer = _ask([str(fd), str(size_bytes), str(device)], (fd,), timeout_s)
    if "route" not in answer:
        why = answer.get("problem") or f"it {answer['ended']} at the step {answer['step']}"
        raise DeviceError(f"a trial read into the GPU failed: {why}")
    return Route(answer["route"], answer["why"])


def _ask(arguments: list[str], fds: tuple[int, ...], timeout_s: float) -> dict[str, Any]:
    """What the child said, its last step, and how it `ended` if not well."""
    command = [sys.executable, "-m", "kvfs.gpu.probe_child", *arguments]
    environment = {"CUFILE_LOGFILE_PATH": os.devnull, **os.environ}
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        pass_fds=fds, env=environment,
    )  # fmt: skip
    try:
        output, _ = child.communicate(timeout=timeout_s)
        ended = f"ended with status {child.returncode}" if child.returncode else ""
    except subprocess.TimeoutExpired:
        child.kill()
        output, _ = child.communicate()
        ended = f"did not return within {timeout_s:g} s"
    answer: dict[str, Any] = {"step": "start", "ended": ended}
    for line in output.splitlines():
        if line.startswith(b"{"):
            answer.update(json.loads(line))
    return answer
