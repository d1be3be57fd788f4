"""`kvfs serve`: the installed command without a mount, also where there is no FUSE."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvfs.client import Client
from kvfs.errors import DaemonUnavailable, QuotaExceeded
from tests.mounting import KVFS, run_kvfs, wait_until

WITHOUT_FUSE = (
    "import sys\n"
    "sys.modules['pyfuse3'] = None\n"
    "from kvfs.tools.cli import run\n"
    "sys.exit(run(sys.argv[1:]))\n"
)
CONFIG = """\
[[tier]]
name = "nvme"
medium = "nvme"
path = "{path}"
capacity = "1GiB"
[leases]
max_leases = {most}
"""


@contextmanager
def serving(command: list[object], *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """The daemon, once it has said where it serves; ended in order, with exit code 0."""
    words = [str(word) for word in (*command, "serve", *arguments)]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("serving on "), process.stderr and process.stderr.read()
            yield process
        finally:
            process.terminate()
            _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    assert "WARNING" not in log, log
    assert "ERROR" not in log, log


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "kvfs.sock"


@pytest.fixture
def tier(tmp_path: Path) -> Path:
    (tmp_path / "nvme").mkdir()
    return tmp_path / "nvme"


@pytest.mark.parametrize(
    "command", [[KVFS], [sys.executable, "-c", WITHOUT_FUSE]], ids=["fuse", "no fuse"]
)
def test_clients_are_served_and_blocks_stay(
    command: list[object], socket_path: Path, tier: Path
) -> None:
    options = ("--socket", socket_path, "--tier", f"nvme={tier},capacity=1GiB")
    data = os.urandom(100_000)
    with serving(command, *options), Client(socket_path=socket_path) as client:
        assert client.put("d/a", data).created
    assert not socket_path.exists()
    with pytest.raises(DaemonUnavailable):
        Client(socket_path=socket_path).lookup(["d/a"])
    with (
        serving(command, *options),
        Client(socket_path=socket_path) as client,
        client.lease(["d/a"]) as leased,
    ):
        assert os.pread(leased[0].fd, len(data) + 1, 0) == data
    assert (tier / "d/a").read_bytes() == data


def test_a_socket_and_tiers_that_are_in_use_are_refused(
    socket_path: Path, tier: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    mine, other = (f"nvme={path},capacity=1GiB" for path in (tier, tmp_path / "other"))
    with serving([KVFS], "--socket", socket_path, "--tier", mine):
        done = run_kvfs("serve", "--socket", socket_path, "--tier", other, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "a daemon listens there already" in done.stderr
        elsewhere = socket_path.with_name("other.sock")
        done = run_kvfs("serve", "--socket", elsewhere, "--tier", mine, check=False)
        assert done.returncode == 4
        with Client(socket_path=socket_path) as client:
            assert client.lookup(["x"]).stopped == "missing"


def test_it_takes_a_new_configuration(socket_path: Path, tier: Path, tmp_path: Path) -> None:
    config = tmp_path / "kvfs.toml"
    config.write_text(CONFIG.format(path=tier, most=1))
    with (
        serving([KVFS], "--socket", socket_path, "--config", config) as process,
        Client(socket_path=socket_path) as client,
    ):
        for name in ("a", "b"):
            client.put(name, b"1")
        with pytest.raises(QuotaExceeded), client.lease(["a", "b"]):
            pass
        config.write_text(CONFIG.format(path=tier, most=2))
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: _both(client), "two blocks may be leased")


def _both(client: Client) -> bool:
    try:
        with client.lease(["a", "b"]) as leased:
            return len(leased) == 2
    except QuotaExceeded:
        return False
