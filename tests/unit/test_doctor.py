"""The checks of `kvfs doctor` on machines and tiers good and bad."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from kvfs.config import TierConfig
from kvfs.gpu.probe import Probe
from kvfs.tools import doctor_cmd
from kvfs.tools.cli import run
from kvfs.tools.doctor_checks import (
    Finding,
    allow_other,
    fuse_device,
    fusermount,
    gpu,
    kernel,
    privileges,
    tier_findings,
)


def states(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.state for finding in findings}


def test_a_missing_device_prevents_mounting(tmp_path: Path) -> None:
    finding = fuse_device(tmp_path / "fuse")
    assert finding.state == "fail"
    assert "modprobe fuse" in finding.remedy
    assert fuse_device(Path(os.devnull)).state == "ok"


@pytest.mark.parametrize(
    ("release", "state"),
    [("6.9.0", "ok"), ("6.18.1-x", "ok"), ("7.0", "ok"), ("6.8.12", "warn"), ("5.15.0", "warn")],
)
def test_kernels(release: str, state: str) -> None:
    assert kernel(release).state == state


def test_privileges_are_read_from_the_process(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("CapPrm:\t0000000000000000\nCapEff:\t0000000000200000\n")
    assert privileges(status).state == "ok"
    status.write_text("CapPrm:\t0000000000200000\nCapEff:\t0000000000000000\n")
    assert "fusermount3" in privileges(status).cost


def test_allow_other_matters_to_users_only(tmp_path: Path) -> None:
    conf = tmp_path / "fuse.conf"
    assert allow_other(conf, 0) == []
    assert allow_other(conf, 1000)[0].state == "warn"
    conf.write_text("#user_allow_other\n")
    assert allow_other(conf, 1000)[0].state == "warn"
    conf.write_text("user_allow_other\n")
    assert allow_other(conf, 1000)[0].state == "ok"


@pytest.mark.parametrize(("uid", "state"), [(0, "warn"), (1000, "fail")])
def test_without_fusermount_only_root_mounts(
    uid: int, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert fusermount().state == state


def test_what_is_said_of_a_gpu() -> None:
    none = gpu(Probe(problem="there is no NVIDIA driver"))
    assert (none.state, none.detail) == (
        "ok", "none: there is no NVIDIA driver; engines load blocks into the host's memory",
    )  # fmt: skip
    found = Probe(cuda="13.0", devices=("H200",), cufile="1.20")
    unused = gpu(replace(found, problem="kvikio cannot be imported: install kvfs[gpu]"))
    assert (unused.state, unused.cost) == ("warn", "engines here cannot load blocks into the GPU")
    through_host = gpu(replace(found, compat_because="/run/udev cannot be read"))
    assert through_host.state == "warn"
    assert "/run/udev" in through_host.detail
    straight = gpu(replace(found, compat_because=""))
    assert (straight.state, straight.detail) == ("ok", "H200, CUDA 13.0, cuFile 1.20")


def test_a_good_tier_is_probed_and_left_as_it_was(tmp_path: Path) -> None:
    findings = tier_findings(TierConfig("nvme", tmp_path, "nvme", 4096))
    checks = {"tier nvme", "tier nvme: O_DIRECT", "tier nvme: xattrs", "tier nvme: leases"}
    # Where there is a GPU, a read into it as well.
    assert set(states(findings)) - {"tier nvme: gpu"} == checks | {"tier nvme: space"}
    assert states(findings)["tier nvme"] == "ok"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("medium", "state"), [("hdd", "fail"), ("remote", "warn")])
def test_a_tier_that_is_not_there(tmp_path: Path, medium: str, state: str) -> None:
    missing = tmp_path / "missing"
    config = TierConfig("slow", missing, "hdd" if medium == "hdd" else "remote", 4096)
    [finding] = tier_findings(config)
    assert (finding.state, finding.detail) == (state, f"{missing} is no directory")
    assert finding.cost
    assert finding.remedy


def test_a_capacity_above_the_filesystem_prevents_mounting(tmp_path: Path) -> None:
    findings = tier_findings(TierConfig("nvme", tmp_path, "nvme", 2**62))
    assert states(findings)["tier nvme: space"] == "fail"


def test_the_exit_code_and_the_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor_cmd, "host_findings", lambda: [Finding("kernel", "warn", "old")])
    file = tmp_path / "kvfs.toml"
    text = '[[tier]]\nname = "a"\npath = "{}"\nmedium = "nvme"\ncapacity = 4096\n'
    file.write_text(text.format(tmp_path))
    assert run(["doctor", "--config", str(file), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["can_mount"] is True
    assert document["findings"][0] == {
        "check": "kernel",
        "state": "warn",
        "detail": "old",
        "cost": "",
        "remedy": "",
    }
    file.write_text(text.format(tmp_path / "missing"))
    assert run(["doctor", "--config", str(file)]) == 1
    shown = capsys.readouterr().out
    assert f"FAIL  tier a: {tmp_path}/missing is no directory" in shown
    assert "do:   mount its disk, or create the directory" in shown
