"""Mountpoints: checks, dead mounts, starting in the background, unmounting."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import logging
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from kvfs.config import Config, check_config
from kvfs.control import ControlClient, find_mount, kvfs_mountpoints
from kvfs.errors import KvfsError, MountpointError, NotPermitted, exit_code_of
from kvfs.mount.passthrough import preload
from kvfs.tiers.tier_lock import has_ended

MNT_FORCE, MNT_DETACH = 1, 2
POLL_S = 0.02
DYING_POLLS = 250
CONNECT_TIMEOUT_S = 5.0
_CREDENTIALS = struct.Struct("iII")

_libc = ctypes.CDLL(None, use_errno=True)


def umount2(mountpoint: Path, flags: int) -> None:
    """umount2(2). Raises OSError."""
    if _libc.umount2(os.fsencode(mountpoint), flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(mountpoint))


def detach(mountpoint: Path, *, dead: bool = False) -> None:
    """Take the mount away whoever uses it; fine when there is none. Requests to a `dead` one are
    not waited for any more."""
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            umount2(mountpoint, MNT_DETACH | (MNT_FORCE if dead else 0))
    else:
        subprocess.run(
            ["fusermount3", "-uz", mountpoint], check=False, capture_output=True, timeout=30
        )


def check_mountpoint(mountpoint: Path) -> None:
    """Raise MountpointError for what cannot be mounted on; a dead kvfs mount is cleared."""
    if is_dead(mountpoint):
        if mountpoint not in kvfs_mountpoints():
            raise MountpointError(f"{mountpoint}: a dead mount that is not of kvfs; unmount it")
        detach(mountpoint, dead=True)
    if not mountpoint.exists():
        raise MountpointError(f"{mountpoint}: no such directory; create it first")
    if not mountpoint.is_dir():
        raise MountpointError(f"{mountpoint}: not a directory")
    if mountpoint in kvfs_mountpoints():
        raise MountpointError(f"{mountpoint}: kvfs is mounted there; `kvfs umount` it first")
    if os.listdir(mountpoint):
        raise MountpointError(f"{mountpoint}: not empty; kvfs would hide what is in it")


def is_dead(mountpoint: Path) -> bool:
    """A mount whose daemon is gone. stat could still be answered from the kernel's cache."""
    if mountpoint in kvfs_mountpoints() and _is_left_over(mountpoint):
        return True
    for _ in range(DYING_POLLS):
        try:
            os.listdir(mountpoint)
        except OSError as error:
            if error.errno != errno.ECONNABORTED:
                return error.errno == errno.ENOTCONN
            # It died while it was asked; the next answer tells whether it is gone.
            time.sleep(POLL_S)
        else:
            return False
    return True


def _is_left_over(mountpoint: Path) -> bool:
    """Whether the daemon was killed while one of its calls hangs: it keeps the mount, and nobody
    answers there. So the mount is not asked, but the socket, which knows who made it."""
    from kvfs.mount.server import socket_path_for

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        try:
            client.settimeout(CONNECT_TIMEOUT_S)
            client.connect(os.fspath(socket_path_for(mountpoint)))
            peer = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        except OSError:
            return False
    return has_ended(_CREDENTIALS.unpack(peer)[0])


def mount_foreground(mountpoint: Path, config: Config, *, forget_tiers: tuple[str, ...]) -> int:
    """Serve until unmounted; the exit status."""
    preload()
    from kvfs.mount.daemon import run  # needs pyfuse3, which unmounting does not

    check_config(config, mountpoint)
    check_mountpoint(mountpoint)
    return run(mountpoint, config, forget_tiers)


def mount_background(
    mountpoint: Path, config: Config, *, forget_tiers: tuple[str, ...], log_file: Path | None
) -> int:
    """Start a daemon and return its pid once the mount answers. Raises what stopped it."""
    check_config(config, mountpoint)
    check_mountpoint(mountpoint)
    log_path = log_file or default_log(mountpoint)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    ready_read, ready_write = os.pipe()
    order = pickle.dumps((mountpoint, config, forget_tiers))
    try:
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "kvfs.mount.background", str(ready_write)],
                stdin=subprocess.PIPE, stdout=log, stderr=log, cwd="/",
                pass_fds=(ready_write,), start_new_session=True,
            )  # fmt: skip
    except BaseException:
        os.close(ready_read)
        raise
    finally:
        os.close(ready_write)
    assert process.stdin is not None, "stdin is a pipe"
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(order)
        process.stdin.close()
    with open(ready_read, "rb") as ready:
        answer = ready.read()
    _raise_refusal(answer, log_path)
    return process.pid


def _raise_refusal(answer: bytes, log_path: Path) -> None:
    if answer == b"ready":
        return
    if not answer:
        raise KvfsError(f"the daemon ended before the mount answered; see {log_path}")
    refusal = json.loads(answer)
    error = KvfsError(refusal["message"])
    error.exit_code = refusal["exit_code"]
    raise error


def refusal_of(error: BaseException) -> bytes:
    """What a daemon that cannot start tells its starter."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    text = str(error) or type(error).__name__
    return json.dumps({"message": text, "exit_code": exit_code_of(error)}).encode()


def default_log(mountpoint: Path) -> Path:
    """Where a daemon in the background logs."""
    name = str(mountpoint).strip("/").replace("/", "-") + ".log"
    if os.geteuid() == 0:
        return Path("/var/log/kvfs") / name
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local/state")
    return Path(state) / "kvfs" / name


def unmount(mountpoint: Path, *, force: bool, timeout_s: float) -> None:
    """Unmount and wait until the daemon is gone. Raises MountpointError."""
    if mountpoint not in kvfs_mountpoints():
        raise MountpointError(f"{mountpoint}: kvfs is not mounted there")
    if is_dead(mountpoint):
        detach(mountpoint, dead=True)
        return
    pid = _daemon_pid(mountpoint)
    _unmount_once(mountpoint, force)
    if pid is not None:
        _wait_for_end(pid, timeout_s, mountpoint)


def _unmount_once(mountpoint: Path, force: bool) -> None:
    if os.geteuid() != 0:
        command = [shutil.which("fusermount3") or "fusermount3", "-uz" if force else "-u"]
        done = subprocess.run([*command, mountpoint], check=False, capture_output=True, text=True)
        if "not found in /etc/mtab" in done.stderr:
            raise NotPermitted(f"{mountpoint}: only root and who mounted it may unmount it")
        if done.returncode:
            raise MountpointError(f"{mountpoint}: {done.stderr.strip()}")
        return
    try:
        umount2(mountpoint, MNT_DETACH if force else 0)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise MountpointError(
                f"{mountpoint}: busy; stop who uses it (`fuser -vm {mountpoint}`) or use --force"
            ) from None
        if error.errno == errno.EPERM:
            raise NotPermitted(f"{mountpoint}: only root may unmount it") from None
        raise


def _daemon_pid(mountpoint: Path) -> int | None:
    try:
        with ControlClient(find_mount(mountpoint).socket_path) as client:
            return int(client.call("status", timeout_s=10)["pid"])
    except KvfsError:
        return None


def _wait_for_end(pid: int, timeout_s: float, mountpoint: Path) -> None:
    for _ in _until(timeout_s):
        if has_ended(pid):
            return
    raise MountpointError(
        f"{mountpoint}: unmounted, but after {timeout_s:g} s the daemon (pid {pid}) still serves "
        f"open files or writes; it ends with them, or at once with `kill {pid}`"
    )


def _until(timeout_s: float) -> Iterator[None]:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        yield
        time.sleep(POLL_S)


def set_up_logging(level: str) -> None:
    """One line per event on stderr, which a daemon in the background has pointed at its log."""
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, force=True,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )  # fmt: skip
