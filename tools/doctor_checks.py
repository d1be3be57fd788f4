"""The checks of `kvfs doctor`: can this machine mount kvfs, and what will be slow or missing.

Each check is a function that returns findings. They change nothing but a scratch directory on a
tier, which they remove. Called by `kvfs.tools.doctor_cmd`.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import msgspec

from kvfs.config import TierConfig
from kvfs.errors import DeviceError
from kvfs.gpu.probe import Probe, probe, prove
from kvfs.layout import IDENTITY_FILE, STAGING_DIR
from kvfs.units import format_size

FUSE_DEVICE = Path("/dev/fuse")
FUSE_CONF = Path("/etc/fuse.conf")
CAP_SYS_ADMIN = 21
PASSTHROUGH_KERNEL = (6, 9)
IMPORT_TIMEOUT_S = 30.0
GPU_READ_BYTES = 4 << 20

State = Literal["ok", "warn", "fail"]


class Finding(msgspec.Struct, frozen=True):
    """One thing checked: what it costs the user and what to do, both empty if it is ok."""

    check: str
    state: State
    detail: str
    cost: str = ""
    remedy: str = ""


def host_findings() -> list[Finding]:
    """Everything about the machine and this user."""
    return [
        fuse_device(FUSE_DEVICE),
        fusermount(),
        pyfuse3_import(),
        kernel(os.uname().release),
        extension(),
        privileges(),
        *allow_other(FUSE_CONF, os.geteuid()),
        gpu(probe()),
    ]


def fuse_device(device: Path) -> Finding:
    """Whether the kernel's door to FUSE opens."""
    cost = "nothing can be mounted"
    if not device.exists():
        remedy = "run `modprobe fuse`; in a container, pass `--device /dev/fuse`"
        return Finding("fuse device", "fail", f"{device} is missing", cost, remedy)
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        remedy = f"run `chmod 666 {device}`; in a container, pass `--device /dev/fuse`"
        detail = f"{device} does not open: {error.strerror}"
        return Finding("fuse device", "fail", detail, cost, remedy)
    return Finding("fuse device", "ok", f"{device} opens")


def fusermount() -> Finding:
    """The helper that mounts for users without privileges."""
    found = shutil.which("fusermount3")
    root = os.geteuid() == 0
    if found is None:
        cost = "only root can mount" if root else "you cannot mount"
        remedy = "install the package fuse3"
        return Finding("fusermount3", "warn" if root else "fail", "not found", cost, remedy)
    if not root and not os.stat(found).st_mode & stat.S_ISUID:
        remedy = f"run `chmod u+s {found}` as root, or reinstall the package fuse3"
        return Finding("fusermount3", "warn", f"{found} is not setuid", "you may not mount", remedy)
    return Finding("fusermount3", "ok", found)


def pyfuse3_import() -> Finding:
    """Whether the binding loads, in a process of its own: a broken one can crash."""
    script = (
        "import ctypes, pyfuse3\n"
        "version = ''\n"
        "for name in ('libfuse3.so.4', 'libfuse3.so.3'):\n"
        "    try: library = ctypes.CDLL(name)\n"
        "    except OSError: continue\n"
        "    if hasattr(library, 'fuse_pkgversion'):\n"
        "        library.fuse_pkgversion.restype = ctypes.c_char_p\n"
        "        version = library.fuse_pkgversion().decode()\n"
        "    break\n"
        "print(pyfuse3.__version__, version)\n"
    )
    cost = "nothing can be mounted; the other verbs work"
    remedy = "install fuse3, libfuse3-dev, pkg-config and gcc, then `pip install 'kvfs[mount]'`"
    try:
        ran = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            timeout=IMPORT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Finding("pyfuse3", "fail", "the import hangs", cost, remedy)
    if ran.returncode != 0:
        lines = ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"]
        return Finding("pyfuse3", "fail", lines[-1], cost, remedy)
    binding, _, library = ran.stdout.strip().partition(" ")
    return Finding("pyfuse3", "ok", f"pyfuse3 {binding}, libfuse {library or 'of unknown version'}")


def kernel(release: str) -> Finding:
    """Whether the kernel could hand reads straight to the disk."""
    match = re.match(r"(\d+)\.(\d+)", release)
    if match is None or (int(match[1]), int(match[2])) < PASSTHROUGH_KERNEL:
        detail = f"Linux {release} has no FUSE passthrough"
        cost = "every byte goes through the daemon, never at the disk's own speed"
        return Finding("kernel", "warn", detail, cost, "use Linux 6.9 or newer")
    return Finding("kernel", "ok", f"Linux {release}")


def extension() -> Finding:
    """Whether the part is built that hands files to the kernel."""
    if find_spec("kvfs.mount._reply") is not None:
        return Finding("passthrough extension", "ok", "built")
    return Finding(
        "passthrough extension", "warn", "kvfs.mount._reply is not built",
        "every byte goes through the daemon, several times slower",
        "install libfuse3-dev, pkg-config and gcc, then install kvfs anew",
    )  # fmt: skip


def data_path(mounted: dict[str, Any]) -> Finding:
    """What the mount found out about itself when it began."""
    if mounted["passthrough"]:
        return Finding("data path", "ok", "bytes go past the daemon (passthrough)")
    return Finding(
        "data path", "warn", f"bytes go through the daemon: {mounted['reason']}",
        "large reads and writes are several times slower",
        "mount as root on Linux 6.9 or newer, with tiers on ext4 or xfs, without --passthrough=off",
    )  # fmt: skip


def privileges(process_status: Path = Path("/proc/self/status")) -> Finding:
    """Whether this process may mount without a helper."""
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", process_status.read_text(), re.MULTILINE)
    if match is not None and int(match[1], 16) >> CAP_SYS_ADMIN & 1:
        return Finding("privileges", "ok", "CAP_SYS_ADMIN")
    return Finding(
        "privileges",
        "warn",
        "no CAP_SYS_ADMIN",
        "mounting needs fusermount3, and only you see the mount unless allow_other is permitted",
        "mount as root, or with `setpriv --ambient-caps +sys_admin`",
    )


def allow_other(conf: Path, euid: int) -> list[Finding]:
    """Whether a user without privileges may let others see the mount; root always may."""
    if euid == 0:
        return []
    try:
        lines = [line.strip() for line in conf.read_text(errors="replace").splitlines()]
    except OSError:
        lines = []
    if "user_allow_other" in lines:
        return [Finding("allow_other", "ok", f"permitted by {conf}")]
    cost = "engines of another user or in a container get EACCES"
    remedy = f"add a line user_allow_other to {conf}"
    return [Finding("allow_other", "warn", f"not permitted by {conf}", cost, remedy)]


def gpu(answer: Probe) -> Finding:
    """Which way blocks can go into a GPU of this machine, if it has one."""
    if not answer.usable:
        detail = f"none: {answer.problem}"
        if not answer.cuda:
            return Finding("gpu", "ok", f"{detail}; engines load blocks into the host's memory")
        cost = "engines here cannot load blocks into the GPU"
        return Finding("gpu", "warn", detail, cost, "see docs/GPU.md: install, container")
    names = f"{', '.join(answer.devices)}, CUDA {answer.cuda}"
    if answer.compat:
        cost = "blocks go to the GPU through the host's memory"
        detail = f"{names}: {answer.compat_because}"
        return Finding("gpu", "warn", detail, cost, "see docs/GPU.md: what GDS needs")
    return Finding("gpu", "ok", f"{names}, cuFile {answer.cufile}")


def gpu_route(check: str, path: Path) -> Finding:
    """Which way a file of this tier takes into GPU 0, told by reading one."""
    name = f"{check}: gpu"
    with tempfile.NamedTemporaryFile(dir=path) as file:
        file.write(os.urandom(GPU_READ_BYTES))
        file.flush()
        os.fsync(file.fileno())
        try:
            route = prove(file.fileno(), GPU_READ_BYTES, 0)
        except DeviceError as error:
            cost = "engines here cannot load blocks into the GPU"
            return Finding(name, "warn", str(error), cost, "see docs/GPU.md")
    if route.kind in ("gds", "p2pdma"):
        return Finding(name, "ok", f"{route.kind}: {route.why}")
    cost = "its blocks go to the GPU through the host's memory"
    return Finding(name, "warn", f"{route.kind}: {route.why}", cost, "see docs/GPU.md: filesystems")


def tier_findings(tier: TierConfig) -> list[Finding]:
    """Everything about one tier's directory."""
    check = f"tier {tier.name}"
    missing: State = "warn" if tier.medium == "remote" else "fail"
    if not tier.path.is_dir():
        cost = "the tier starts offline" if missing == "warn" else "kvfs refuses to mount"
        remedy = "mount its disk, or create the directory"
        return [Finding(check, missing, f"{tier.path} is no directory", cost, remedy)]
    try:
        return [*_abilities(check, tier.path), space(check, tier)]
    except OSError as error:
        detail = f"{tier.path}: {error.strerror}"
        cost = "no block can be stored there"
        remedy = f"let the daemon's user write there: `ls -ld {tier.path}`, `mount`, `dmesg`"
        return [Finding(check, missing, detail, cost, remedy)]


def _abilities(check: str, path: Path) -> Iterator[Finding]:
    """What the filesystem can do, tried in a scratch directory that is gone afterwards."""
    # It brings trio along, which no other verb needs.
    from kvfs.tiers.identity import probe_filesystem

    staging = path / os.fsdecode(STAGING_DIR)
    parent = staging if staging.is_dir() else path
    with tempfile.TemporaryDirectory(prefix=".kvfs-doctor-", dir=parent) as scratch:
        (Path(scratch) / os.fsdecode(STAGING_DIR)).mkdir(parents=True)
        abilities = probe_filesystem(Path(scratch))
        if probe().usable:
            yield gpu_route(check, Path(scratch))
    yield Finding(check, "ok", f"{path} is writable")
    yield _ability(
        f"{check}: O_DIRECT",
        abilities.o_direct,
        "copies fill the page cache and push out what engines need",
        "use ext4 or xfs for local tiers",
    )
    yield _ability(
        f"{check}: xattrs",
        abilities.xattrs,
        "seal records live in sidecar files: a rebuild of the catalog is slower",
        "mount it with user_xattr, or use ext4 or xfs",
    )
    yield _ability(
        f"{check}: leases",
        abilities.leases,
        "kvfs serves writes itself there, and cannot see writers that bypass it",
        "use ext4 or xfs; own the directory, or have CAP_LEASE",
    )


def _ability(check: str, works: bool, cost: str, remedy: str) -> Finding:
    if works:
        return Finding(check, "ok", "works")
    return Finding(check, "warn", "does not work", cost, remedy)


def space(check: str, tier: TierConfig) -> Finding:
    """Whether the configured capacity is there."""
    name = f"{check}: space"
    filesystem = os.statvfs(tier.path)
    total_bytes = filesystem.f_blocks * filesystem.f_frsize
    free_bytes = filesystem.f_bavail * filesystem.f_frsize
    capacity = format_size(tier.capacity_bytes)
    detail = f"capacity {capacity}, free {format_size(free_bytes)} of {format_size(total_bytes)}"
    if tier.capacity_bytes > total_bytes:
        remedy = f"lower its capacity below {format_size(total_bytes)}"
        return Finding(name, "fail", detail, "kvfs refuses to mount", remedy)
    known = (tier.path / os.fsdecode(IDENTITY_FILE)).exists()
    if free_bytes < tier.capacity_bytes and not known:
        cost = "the disk is full before the tier is: writes go to the next tier"
        return Finding(name, "warn", detail, cost, "lower its capacity, or free space")
    return Finding(name, "ok", detail)
