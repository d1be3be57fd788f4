"""A random file exerciser: system calls on a directory, each compared with what it must have done.

    python -m kvfs.tools.exerciser DIRECTORY --operations 5000 --seed 7

The same seed gives the same operations. It knows nothing of kvfs and runs on any filesystem. The
first thing that is wrong ends it with one line: seed, operation, name, offset, and what was done
last. With `--manifest FILE` it stores what the tree must hold, and with `--verify` it compares a
tree with that, after a remount say.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from kvfs.tools.exerciser_check import check_tree
from kvfs.tools.exerciser_model import ExpectedTree, Mismatch
from kvfs.tools.exerciser_operations import Operations


class Failure(Exception):
    """Something was wrong; the one line says all that is known of it."""


def exercise(
    directory: Path, operations: int, seed: int, *, history: int = 12, forks: bool = True
) -> ExpectedTree:
    """Do so many random operations and compare everything at the end. Raises Failure."""
    dice = Operations(directory, seed, history=history, forks=forks)
    try:
        for _ in range(operations):
            dice.step()
        dice.verify()
    except (Mismatch, OSError) as error:
        line = f"seed {seed}, operation {dice.done}: {error}; last: {dice.history()}"
        raise Failure(line) from error
    return dice.tree


def main(
    directory: Annotated[Path, typer.Argument(exists=True, file_okay=False)],
    operations: Annotated[int, typer.Option(min=0)] = 5000,
    seed: Annotated[int, typer.Option()] = 1,
    history: Annotated[int, typer.Option(min=1, help="Operations to show on failure.")] = 12,
    forks: Annotated[bool, typer.Option(help="Let child processes use the handles too.")] = True,
    manifest: Annotated[Path | None, typer.Option(help="What the tree must hold.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Only compare with MANIFEST.")] = False,
) -> None:
    """Exercise an empty DIRECTORY, or compare it with what it must hold."""
    try:
        if verify:
            if manifest is None:
                raise typer.BadParameter("--verify needs --manifest")
            tree = msgspec.msgpack.decode(manifest.read_bytes(), type=ExpectedTree)
            check_tree(str(directory), tree, settled=True)
        else:
            if any(directory.iterdir()):
                raise typer.BadParameter(f"{directory} is not empty")
            tree = exercise(directory, operations, seed, history=history, forks=forks)
            if manifest is not None:
                manifest.write_bytes(msgspec.msgpack.encode(tree))
    except (Failure, Mismatch) as error:
        typer.echo(f"{directory}: {error}", err=True)
        raise typer.Exit(1) from None
    size_bytes = sum(file.size for file in tree.files.values())
    what = "verified" if verify else f"seed {seed}, {operations} operations"
    typer.echo(f"{directory}: {what}, {len(tree.files)} files, {size_bytes} bytes")


if __name__ == "__main__":
    typer.run(main)
