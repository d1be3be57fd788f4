"""`mount.kvfs`: what mount(8) and /etc/fstab call. The source is a configuration file.

/etc/kvfs.toml  /kv  kvfs  _netdev,log=/var/log/kvfs.log  0 0
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from kvfs.config import load_config
from kvfs.errors import KvfsError, UsageError, exit_code_of
from kvfs.mount.session import mount_background

# What mount(8) passes on for any filesystem and means nothing here.
IGNORED = frozenset({
    "rw", "defaults", "auto", "noauto", "user", "nouser", "_netdev", "nofail", "dev", "nodev",
    "suid", "nosuid", "exec", "noexec", "async", "sync", "noatime", "relatime",
})  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """mount.kvfs CONFIG MOUNTPOINT [-sfnv] [-o OPTIONS]."""
    parser = argparse.ArgumentParser(prog="mount.kvfs")
    parser.add_argument("config", type=Path)
    parser.add_argument("mountpoint", type=Path)
    parser.add_argument("-o", dest="options", action="append", default=[])
    for flag in "sfnv":
        parser.add_argument(f"-{flag}", action="store_true", dest=flag)
    parsed = parser.parse_args(arguments)
    try:
        log_file, forget = _read_options(",".join(parsed.options))
        if not parsed.f:
            mount_background(
                Path(os.path.realpath(parsed.mountpoint)), load_config(parsed.config.absolute()),
                forget_tiers=forget, log_file=log_file,
            )  # fmt: skip
    except (KvfsError, OSError) as error:
        print(f"mount.kvfs: {error}", file=sys.stderr)
        return exit_code_of(error)
    return 0


def _read_options(text: str) -> tuple[Path | None, tuple[str, ...]]:
    log_file: Path | None = None
    forget: list[str] = []
    for option in filter(None, text.split(",")):
        key, _, value = option.partition("=")
        if key == "log":
            log_file = Path(value)
        elif key == "forget-tier":
            forget.append(value)
        elif key not in IGNORED and not key.startswith("x-"):
            raise UsageError(f"unknown mount option {option!r}; options of kvfs are in its file")
    return log_file, tuple(forget)


if __name__ == "__main__":
    sys.exit(main())
