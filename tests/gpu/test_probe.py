"""The probe says what is there, and why not; also where CUDA hangs or aborts."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kvfs.errors import DeviceError
from kvfs.gpu import opening
from kvfs.gpu.host import HostDevice
from kvfs.gpu.opening import open_device
from kvfs.gpu.probe import Probe, probe, probe_of, prove
from kvfs.gpu.probe_child import p2pdma_wanted
from tests.gpu.stub import LIBRARY, build_driver

GOOD = {
    "step": "cuFile's driver_open", "ended": "", "cuda": "13.0", "devices": ["H200"],
    "libraries": {"kvikio": "26.10.0", "cupy": "14.2.0"}, "cufile": "1.20",
    "nvidia_fs": True, "p2pdma": False, "compat_because": "",
}  # fmt: skip


def answer(**changes: Any) -> dict[str, Any]:
    changed = {**GOOD, **changes}
    return {name: value for name, value in changed.items() if value is not None}


def test_a_machine_with_everything() -> None:
    found = probe_of(answer())
    assert found.usable
    assert not found.compat
    assert found.devices == ("H200",)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (answer(devices=[]), "the NVIDIA driver finds no GPU"),
        (answer(libraries={"cupy": "14"}), "kvikio cannot be imported"),
        (answer(libraries={}), "kvikio and cupy cannot be imported: install kvfs\\[gpu\\]"),
        ({"step": "driver", "ended": "", "problem": "no driver"}, "no driver"),
        (
            {"step": "driver", "ended": "did not return within 9 s"},
            "libcuda.so.1 did not return within 9 s",
        ),
    ],
)
def test_without_a_gpu_the_problem_is_named(said: dict[str, Any], problem: str) -> None:
    found = probe_of(said)
    assert not found.usable
    assert re.search(problem, found.problem)


def test_a_cufile_that_hangs_leaves_compat() -> None:
    said = answer(compat_because=None, cufile=None, ended="did not return within 60 s")
    found = probe_of(said)
    assert found.usable
    assert found.compat
    assert found.compat_because == (
        "cuFile did not return within 60 s at the step cuFile's driver_open"
    )


def fake_driver(directory: Path, body: str) -> None:
    """A libcuda.so.1 whose cuInit does this."""
    source = directory / "driver.c"
    source.write_text(
        f"#include <stdlib.h>\n#include <unistd.h>\nint cuInit(unsigned f) {{{body}}}\n"
    )
    command = ["cc", "-shared", "-fPIC", "-o", str(directory / LIBRARY), str(source)]
    subprocess.run(command, check=True)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("for (;;) pause();", "libcuda.so.1 did not return within 3 s"),
        ("abort();", "libcuda.so.1 ended with status -6"),
        ("return 100;", "the NVIDIA driver finds no GPU: cuInit says 100"),
    ],
    ids=["hangs", "aborts", "refuses"],
)
def test_a_driver_that_is_not_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, problem: str
) -> None:
    fake_driver(tmp_path, body)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    assert probe.__wrapped__(timeout_s=3.0).problem == problem


def test_a_driver_is_asked_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_driver(tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("KVIKIO_COMPAT_MODE", "ON")
    found = probe.__wrapped__(timeout_s=30.0)
    assert (found.devices, found.cuda) == (("stub",), "12.0")
    if "kvikio" in found.libraries:
        assert found.compat_because == "KVIKIO_COMPAT_MODE says so"
    if {"kvikio", "cupy"} - found.libraries.keys():
        assert "cannot be imported: install kvfs[gpu]" in found.problem
    with (tmp_path / LIBRARY).open("rb") as file, pytest.raises(DeviceError, match="trial read"):
        prove(file.fileno(), 4096, 0, timeout_s=30.0)


def test_the_answer_of_this_machine_is_kept() -> None:
    found = probe()
    assert found is probe()
    assert found.usable == bool(found.devices and not found.problem)
    if not os.path.exists("/dev/nvidiactl"):
        assert found.problem


def test_p2pdma_is_read_from_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration = tmp_path / "cufile.json"
    configuration.write_text('{ // comments are allowed\n"properties": {"use_pci_p2pdma": true}}')
    monkeypatch.setenv("CUFILE_ENV_PATH_JSON", str(configuration))
    assert p2pdma_wanted()
    configuration.write_text('{"properties": {}}')
    assert not p2pdma_wanted()
    monkeypatch.setenv("CUFILE_USE_PCIP2PDMA", "true")
    assert p2pdma_wanted()


def test_the_device_is_the_host_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "probe", lambda: Probe(problem="the fan is broken"))
    for where in ("auto", "host"):
        with open_device(where) as device:
            assert isinstance(device, HostDevice)
    with pytest.raises(DeviceError, match="CUDA device 1 cannot be used: the fan is broken"):
        open_device(1)


@pytest.mark.gpu
def test_a_trial_read_says_which_way_it_took(tmp_path: Path) -> None:
    if not probe().usable:
        pytest.skip(f"needs a GPU: {probe().problem}")
    block = tmp_path / "block"
    block.write_bytes(os.urandom(4 << 20))
    with block.open("rb") as file:
        route = prove(file.fileno(), 4 << 20, 0)
    assert route.kind in ("compat", "cufile", "gds", "p2pdma")
    assert route.why
