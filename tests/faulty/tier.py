"""The test's side of the faulty filesystem: start it, set faults, take it away, bring it back."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kvfs.mount.session import MNT_DETACH, umount2
from tests.faulty.faults import Fault, Order, Report
from tests.mounting import wait_until

ANSWER_TIMEOUT_S = 30.0
ROOT = Path(__file__).resolve().parents[2]


class FaultyTier:
    """A directory to be a tier: `path` is what kvfs gets, `files` where they really lie."""

    def __init__(self, base: Path, name: str) -> None:
        self.path = base / name
        self.files = base / f"{name}-files"
        self._socket_path = base / f"{name}.sock"
        self._process: subprocess.Popen[str] | None = None
        for directory in (self.path, self.files):
            directory.mkdir()

    def start(self) -> None:
        """Mount it; also again, after `stop`."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faulty.filesystem", self.files, self.path,
             self._socket_path], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        assert self._process.stdout is not None, "stdout is a pipe"
        line = self._process.stdout.readline()
        assert line == "ready\n", f"the faulty filesystem did not start: {line!r}"

    def stop(self) -> None:
        """Unmount it, whoever uses it; what hangs is answered before."""
        process = self._process
        if process is None:
            return
        self._process = None
        with contextlib.suppress(OSError):
            self._ask(Order(()), process)
        with contextlib.suppress(OSError):
            umount2(self.path, MNT_DETACH)
        process.terminate()
        try:
            process.wait(ANSWER_TIMEOUT_S)
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None, "stdout is a pipe"
            process.stdout.close()
            self._socket_path.unlink(missing_ok=True)

    def start_again(self) -> None:
        """Without faults, whether it was stopped or not."""
        if self._process is None:
            self.start()
        self.clear()

    def set(self, *faults: Fault) -> None:
        """From now on these go wrong, and nothing else."""
        self._ask(Order(faults), self._process)

    def clear(self) -> None:
        self.set()

    @contextlib.contextmanager
    def failing(self, *faults: Fault) -> Iterator[None]:
        """Faults for a while."""
        self.set(*faults)
        try:
            yield
        finally:
            self.clear()

    def report(self) -> Report:
        """What was called so far."""
        return self._ask(None, self._process)

    def wait_hanging(self, count: int = 1) -> None:
        """Until so many calls hang."""
        wait_until(lambda: self.report().hanging >= count, f"{count} calls that hang")

    def _ask(self, order: Order | None, process: subprocess.Popen[str] | None) -> Report:
        assert process is not None, "it is not started"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
            # An abstract name that the kernel chooses: so that there is somebody to answer.
            client.bind("")
            client.settimeout(ANSWER_TIMEOUT_S)
            message = b"" if order is None else msgspec.json.encode(order)
            client.sendto(message, os.fspath(self._socket_path))
            return msgspec.json.decode(client.recv(1 << 16), type=Report)


@contextlib.contextmanager
def faulty_tier(base: Path, name: str) -> Iterator[FaultyTier]:
    """A tier that can fail, taken away in the end whatever it does then."""
    tier = FaultyTier(base, name)
    tier.start()
    try:
        yield tier
    finally:
        tier.stop()
