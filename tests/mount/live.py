"""What tests of a real mount share: a mount of three tiers, and calls to its daemon."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from kvfs.config import Config, MountConfig, TierConfig, TieringConfig
from kvfs.control import ControlClient, find_mount
from tests.mounting import MountedKvfs, run_kvfs, wait_until

KIB, MIB = 1 << 10, 1 << 20
TIERS = ("nvme", "hdd", "remote")
CALL_TIMEOUT_S = 30.0
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
AT_FDCWD = -100

_libc = ctypes.CDLL(None, use_errno=True)


def config_in(
    base: Path,
    capacities_mib: Mapping[str, int] | None = None,
    passthrough: Literal["auto", "require", "off"] = "auto",
    **tiering: object,
) -> Config:
    """Tiers below `base`; without other word nothing is promoted by heat."""
    sizes = capacities_mib or {"nvme": 64, "hdd": 128, "remote": 256}
    tiers = []
    for name, size in sizes.items():
        path = base / name
        path.mkdir(exist_ok=True)
        tiers.append(TierConfig(name, path, name, size * MIB))  # type: ignore[arg-type] # media
    settings = {"promote_heat": 1000.0, **tiering}
    mount = MountConfig(passthrough=passthrough)
    return Config(tuple(tiers), TieringConfig(**settings), mount)  # type: ignore[arg-type] # keywords of the caller


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory that every user may enter, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="kvfs-mount-") as name:
        base = Path(name)
        base.chmod(0o755)
        yield base


@contextmanager
def live(mount: MountedKvfs, expected_log: list[str] | None = None) -> Iterator[MountedKvfs]:
    """Mount, and unmount whatever the test did; its log may only hold what was expected."""
    mount.start()
    try:
        yield mount
    finally:
        if mount.is_mounted():
            run_kvfs("umount", mount.path, "--force", "--timeout", "20s", check=False)
    mount.check_log(expected_log or [])


def call(mount: MountedKvfs, verb: str, **args: Any) -> dict[str, Any]:
    """One verb of the control protocol."""
    with ControlClient(find_mount(mount.path).socket_path) as client:
        return client.call(verb, args, timeout_s=CALL_TIMEOUT_S)


def below(mount: MountedKvfs, path: Path) -> bytes:
    """A path as the daemon calls it."""
    return os.fsencode(path.relative_to(mount.path))


def info(mount: MountedKvfs, path: Path) -> dict[str, Any]:
    return call(mount, "info", path=below(mount, path))


def demote(mount: MountedKvfs, path: Path, to: str) -> dict[str, Any]:
    """Move what is at or below `path`, waiting for seals."""
    return call(mount, "demote", paths=[below(mount, path)], to=to)


def promote(mount: MountedKvfs, path: Path, to: str = "nvme") -> dict[str, Any]:
    return call(mount, "promote", paths=[below(mount, path)], to=to)


def put_on(mount: MountedKvfs, path: Path, tier: str) -> None:
    """Have a sealed block on this tier and no other."""
    wait_sealed(path)
    if tier != "nvme":
        assert demote(mount, path, tier)["skipped"] == []
    assert replicas(path) == [tier]


def state(path: Path) -> str:
    return os.getxattr(path, "user.kvfs.state").decode()


def replicas(path: Path) -> list[str]:
    """The tiers that have a block."""
    return os.getxattr(path, "user.kvfs.replicas").decode().split(",")


def heat(path: Path) -> float:
    return float(os.getxattr(path, "user.kvfs.heat"))


def wait_sealed(path: Path) -> None:
    wait_until(lambda: state(path) == "sealed", f"{path} sealed")


def wait_gone(path: Path) -> None:
    """Until `access` says that a file, in the mount or on a tier, is not there."""
    wait_until(lambda: not os.access(path, os.F_OK), f"{path} gone")


def refusal_of(operation: Callable[[], object]) -> int:
    """The errno of a call that must fail."""
    try:
        operation()
    except OSError as error:
        return error.errno or 0
    raise AssertionError("it was not refused")


def publish(path: Path, data: bytes) -> Path:
    """Write the way engines do: a temporary name, then `rename`."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.rename(path)
    return path


def aligned(data: bytes | int) -> mmap.mmap:
    """A page-aligned buffer, for `O_DIRECT`."""
    if isinstance(data, int):
        return mmap.mmap(-1, data)
    buffer = mmap.mmap(-1, len(data))
    buffer.write(data)
    return buffer


def renameat2(source: Path, target: Path, flags: int) -> None:
    """renameat2(2). Raises OSError."""
    done = _libc.renameat2(
        AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), ctypes.c_uint(flags)
    )
    if done != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))
