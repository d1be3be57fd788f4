"""The `kvfs` command: its verbs, and how an error becomes one line and an exit code.

Owns the typer application. Never does what a verb does: each is a module with `register(app)`.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from kvfs import __version__
from kvfs.errors import KvfsError, exit_code_of
from kvfs.tools import (
    config_cmd,
    doctor_cmd,
    fsck_cmd,
    heat_cmd,
    info_cmd,
    ls_cmd,
    match_cmd,
    mount_cmd,
    move_cmd,
    pin_cmd,
    quarantine_cmd,
    replay_cmd,
    scrub_cmd,
    serve_cmd,
    status_cmd,
    tier_cmd,
    umount_cmd,
)
from kvfs.tools.render import name_text

INTERRUPTED = 130

EPILOG = (
    "Exit codes: 0 done; 1 tried and failed, or a check found something; 2 wrong use; "
    "3 the configuration is wrong; 4 a tier is wrong; 5 the mountpoint is wrong; "
    "6 no daemon answers; 7 the catalog cannot be used; 8 no such block; 9 not permitted; "
    "130 interrupted."
)

app = typer.Typer(
    name="kvfs",
    help="A filesystem for LLM KV-cache blocks that moves them among tiers by heat.",
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for verb in (
    mount_cmd,
    umount_cmd,
    serve_cmd,
    status_cmd,
    info_cmd,
    ls_cmd,
    heat_cmd,
    match_cmd,
    pin_cmd,
    move_cmd,
    tier_cmd,
    fsck_cmd,
    scrub_cmd,
    quarantine_cmd,
    config_cmd,
    replay_cmd,
    doctor_cmd,
):
    verb.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvfs {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def kvfs(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """A filesystem for LLM KV-cache blocks that moves them among tiers by heat."""
    if context.invoked_subcommand is None and not version:
        typer.echo(context.get_help())
        raise typer.Exit(2)


def run(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code; errors are one line on stderr."""
    try:
        result = app(args=list(arguments), prog_name="kvfs", standalone_mode=False)
    except typer.TyperException as error:
        return _fail(_usage_text(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except KvfsError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        return _fail(_os_error_text(error), exit_code_of(error))
    return result if isinstance(result, int) else 0


def _usage_text(error: typer.TyperException) -> str:
    message = " ".join(error.format_message().split()).rstrip(".")
    context: typer.Context | None = getattr(error, "ctx", None)
    if not message or context is None:
        return message
    return f"{message}: see `{context.command_path} --help`"


def _os_error_text(error: OSError) -> str:
    if error.filename is None:
        return str(error)
    return f"{os.fsdecode(error.filename)}: {error.strerror}"


def _fail(message: str, code: int) -> int:
    if message:
        typer.echo(f"kvfs: {name_text(message)}", err=True)
    return code


def main() -> None:
    """The entry point of the installed `kvfs`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))
