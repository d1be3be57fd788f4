"""The contract on `CudaDevice` with the real kvikio and a driver that the test builds.

It shows that kvikio is called as it wants to be, that futures, files and staging memory are kept
and given back, and that compressed blocks reach the decoder in the right pieces. It proves nothing
about cupy, the kernels, nvcomp, GDS, real streams or speed: those tests are marked `gpu`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 100


def need_kvikio_and_compiler() -> None:
    """Skip where the stub driver cannot be built or kvikio does not import."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler for the stub driver")
    tried = subprocess.run(
        [sys.executable, "-c", "import kvikio"], capture_output=True, text=True, check=False
    )
    if tried.returncode != 0:
        why = tried.stderr.strip().splitlines()[-1]
        pytest.skip(
            "needs kvikio, by `pip install --no-deps -r tests/gpu/requirements.txt`, which "
            f"`make test` tries: {why}"
        )


def run_pytest(*arguments: str) -> str:
    """In a process of its own: kvikio takes the first driver that it finds, once."""
    # Without cuFile, whose driver would hang.
    environment = {**os.environ, "KVFS_TEST_MACHINE": "stub", "KVIKIO_COMPAT_MODE": "ON"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


@pytest.mark.parametrize("suite", ["test_contract.py", "stubdriver_suite.py"])
def test_cuda_device_stubdriver(suite: str) -> None:
    need_kvikio_and_compiler()
    output = run_pytest(f"tests/gpu/{suite}")
    found = re.search(r"(\d+) passed", output)
    assert found is not None
    assert int(found[1]) >= 5, output
    assert "skipped" not in output
