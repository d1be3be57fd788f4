"""`kvfs mount`: the options of a mount become one checked configuration, then a daemon.

Owns how `--config`, `--tier` and the defaults combine. Mounting is `kvfs.mount.session`, imported
when it is needed: the other verbs run where pyfuse3 is absent.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from kvfs.config import Config, check_config, default_config, load_config, parse_tier_option
from kvfs.errors import KvfsError, UsageError
from kvfs.tools.render import name_text


def register(app: typer.Typer) -> None:
    app.command("mount")(mount)


class Passthrough(StrEnum):
    """The values of `[mount] passthrough`."""

    AUTO = "auto"
    REQUIRE = "require"
    OFF = "off"


def mount(
    mountpoint: Annotated[Path, typer.Argument(metavar="MOUNTPOINT", help="An empty directory.")],
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="Configuration (TOML).")
    ] = None,
    tier: Annotated[
        list[str] | None,
        typer.Option(
            "--tier",
            "-t",
            metavar="NAME=PATH,capacity=SIZE",
            help="A tier, fastest first; instead of --config.",
        ),
    ] = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", "-f", help="Stay, and log to stderr.")
    ] = False,
    passthrough: Annotated[
        Passthrough | None,
        typer.Option(
            "--passthrough", help="Reads past the daemon: if possible, or fail, or never."
        ),
    ] = None,
    forget_tier: Annotated[
        list[str] | None,
        typer.Option("--forget-tier", metavar="NAME", help="Give up the blocks only it has."),
    ] = None,
    log_file: Annotated[
        Path | None, typer.Option("--log-file", metavar="FILE", help="Log of the daemon.")
    ] = None,
) -> None:
    """Mount kvfs on MOUNTPOINT and return when it answers.

    Without --config and --tier the tiers lie below your data directory.
    """
    if foreground and log_file is not None:
        raise UsageError("--foreground logs to stderr: leave out --log-file")
    absolute = Path(os.path.realpath(mountpoint))
    effective = effective_config(config, tier or ())
    if passthrough is not None:
        changed = msgspec.structs.replace(effective.mount, passthrough=passthrough.value)
        effective = msgspec.structs.replace(effective, mount=changed)
    check_config(effective, absolute)
    forget = tuple(forget_tier or ())
    with _fuse_needed():
        from kvfs.mount.session import mount_background, mount_foreground

        if foreground:
            raise typer.Exit(mount_foreground(absolute, effective, forget_tiers=forget))
        log_path = None if log_file is None else Path(os.path.abspath(log_file))
        pid = mount_background(absolute, effective, forget_tiers=forget, log_file=log_path)
    typer.echo(f"mounted {name_text(absolute)} (pid {pid})")


def effective_config(file: Path | None, tiers: Sequence[str]) -> Config:
    """The configuration that the options of a command name; the default's directory is made."""
    if file is not None and tiers:
        raise UsageError("--config and --tier exclude each other: name the tiers in the file")
    if file is not None:
        # The daemon reads it again on a reload, and its working directory is /.
        return load_config(Path(os.path.abspath(file)))
    if tiers:
        return Config(tuple(parse_tier_option(text) for text in tiers))
    config = default_config()
    for tier in config.tier:
        tier.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return config


@contextmanager
def _fuse_needed() -> Iterator[None]:
    """Around the import of what needs pyfuse3: says what to install."""
    try:
        yield
    except ImportError as error:
        raise KvfsError(f"mounting needs pyfuse3: `pip install 'kvfs[mount]'` ({error})") from error
