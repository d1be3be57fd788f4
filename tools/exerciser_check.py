"""A real directory tree against the expected one. Every difference raises Mismatch."""

from __future__ import annotations

import os
import stat

from kvfs.tools.exerciser_model import ExpectedFile, ExpectedTree, Mismatch, compare

# What a filesystem may allocate beyond a file's end, for speed.
ALLOCATION_SLACK_BYTES = 4 << 20


def check_tree(root: str, tree: ExpectedTree, *, settled: bool = False) -> None:
    """Names, bytes, sizes, times and extended attributes of everything.

    `settled`: the filesystem was mounted anew, so times that come late are there.
    """
    for directory in sorted(tree.directories):
        check_listing(root, tree, directory)
    for _, file in sorted(tree.files.items()):
        with open(os.path.join(root, file.name), "rb", buffering=0) as real:
            compare(file.name, file.content, os.pread(real.fileno(), file.size + 1, 0))
        check_status(root, file, settled=settled)
        check_xattrs(root, file)


def check_listing(root: str, tree: ExpectedTree, directory: str) -> None:
    """The names in a directory, and which of them are directories."""
    expected = tree.children(directory)
    with os.scandir(os.path.join(root, directory)) as entries:
        found = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
    if sorted(found) != expected:
        surplus, missing = sorted(found.keys() - expected), sorted(set(expected) - found.keys())
        raise Mismatch(directory or ".", f"lists {surplus} too much, {missing} not")
    for name, is_directory in found.items():
        path = f"{directory}/{name}".lstrip("/")
        if is_directory != (path in tree.directories):
            raise Mismatch(path, f"is a directory: {is_directory}")


def check_status(root: str, file: ExpectedFile, *, settled: bool = False) -> None:
    """What stat(2) shows of a file that has a name."""
    status = os.stat(os.path.join(root, file.name))
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise Mismatch(file.name, f"mode {status.st_mode:o}, {status.st_nlink} links")
    if status.st_size != file.size:
        raise Mismatch(file.name, f"size {status.st_size} instead of {file.size}")
    file.check_blocks(status.st_blocks, ALLOCATION_SLACK_BYTES)
    file.check_mtime(status.st_mtime_ns, settled=settled)


def check_xattrs(root: str, file: ExpectedFile) -> None:
    """The `user.*` attributes of a file."""
    path = os.path.join(root, file.name)
    names = [name for name in os.listxattr(path) if name.startswith("user.")]
    found = {name: os.getxattr(path, name) for name in names}
    if found != file.xattrs:
        raise Mismatch(file.name, f"xattrs {found} instead of {file.xattrs}")
