"""Paths cannot lead out of a tier: by the kernel's own resolution, and by the walk without it."""

from __future__ import annotations

import ast
import errno
import fcntl
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs.tiers import beneath
from kvfs.tiers.beneath import Root
from tests.sources import modules_below


@pytest.fixture(params=[True, False], ids=["openat2", "walk"], autouse=True)
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param and not beneath.HAS_OPENAT2:
        pytest.skip("this kernel has no openat2")
    monkeypatch.setattr(beneath, "HAS_OPENAT2", request.param)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What nobody may reach through the tier."""
    directory = tmp_path / "outside"
    (directory / "below").mkdir(parents=True)
    (directory / "secret").write_bytes(b"secret")
    (directory / "below/secret").write_bytes(b"secret")
    return directory


@pytest.fixture
def root(tmp_path: Path) -> Root:
    (tmp_path / "tier").mkdir()
    return Root(os.fsencode(tmp_path / "tier"))


@pytest.fixture
def before(outside: Path) -> Iterator[None]:
    """Fail when anything outside is not as it was."""
    there = _listing(outside)
    yield
    assert _listing(outside) == there


def _listing(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(directory)): (
            path.read_bytes() if path.is_file() else b"", path.lstat().st_mode,
        )
        for path in directory.rglob("*")
    }  # fmt: skip


def at(root: Root, path: str) -> bytes:
    return root.path + b"/" + os.fsencode(path)


def write(root: Root, path: str, data: bytes = b"data") -> None:
    root.make_directories(os.path.dirname(at(root, path)))
    root.write(at(root, path), data)


def read(root: Root, path: str) -> bytes:
    return root.read(at(root, path), 100)


def test_files_are_made_read_renamed_and_removed(root: Root) -> None:
    write(root, "a/b/file")
    assert read(root, "a/b/file") == b"data"
    assert root.status(at(root, "a/b/file")).st_size == 4
    root.rename(at(root, "a/b/file"), at(root, "a/b/other"))
    root.rename(at(root, "a/b/other"), at(root, "moved"))
    assert not root.exists(at(root, "a/b/other"))
    assert sorted(root.names(root.path)) == [b"a", b"moved"]
    root.unlink(at(root, "moved"))
    root.rmdir(at(root, "a/b"))
    root.rmdir(at(root, "a"))
    assert root.names(root.path) == []


def test_errors_name_the_path_that_was_asked_for(root: Root) -> None:
    for act in (root.status, root.unlink, root.rmdir, root.names):
        with pytest.raises(FileNotFoundError) as raised:
            act(at(root, "no/such"))
        assert raised.value.filename in (at(root, "no/such"), at(root, "no"))
    write(root, "file")
    with pytest.raises(FileExistsError):
        root.open(at(root, "file"), os.O_CREAT | os.O_EXCL | os.O_RDWR)
    with pytest.raises(NotADirectoryError):
        root.status(at(root, "file/below"))
    with pytest.raises(FileNotFoundError) as raised:
        root.rename(at(root, "none"), at(root, "file"))
    assert (raised.value.filename, raised.value.filename2) == (at(root, "none"), at(root, "file"))


ESCAPES = {
    "absolute link": lambda tier, outside: (tier / "d").symlink_to(outside),
    "relative link": lambda tier, outside: (tier / "d").symlink_to("../outside"),
    "link to a link": lambda tier, outside: (
        (tier / "first").symlink_to(outside), (tier / "d").symlink_to("first"),
    ),
    "link to /proc": lambda tier, outside: (tier / "d").symlink_to("/proc/self/cwd"),
}  # fmt: skip


@pytest.mark.usefixtures("before")
@pytest.mark.parametrize("plant", ESCAPES.values(), ids=ESCAPES)
def test_what_lies_behind_a_planted_link_is_not_there(
    root: Root, outside: Path, plant: Callable[[Path, Path], object]
) -> None:
    plant(Path(os.fsdecode(root.path)), outside)
    write(root, "file")
    for below in ("d/secret", "d/below/secret"):
        path = at(root, below)
        for act in (
            lambda path: root.open(path, os.O_RDONLY),
            lambda path: root.open(path, os.O_RDWR),
            lambda path: root.open(path + b".new", os.O_RDWR | os.O_CREAT | os.O_EXCL),
            root.status,
            root.unlink,
            root.rmdir,
            lambda path: root.rename(path, at(root, "stolen")),
            lambda path: root.rename(at(root, "file"), path),
            lambda path: root.names(os.path.dirname(path)),
            lambda path: root.sync_directory(os.path.dirname(path)),
        ):
            with pytest.raises(FileNotFoundError, match="symbolic link"):
                act(path)
        assert not root.exists(path)
    assert read(root, "file") == b"data"


@pytest.mark.usefixtures("before")
@pytest.mark.parametrize(
    "path", ["../outside/secret", "a/../../outside/secret", "..", "a/..", "a/../../outside", "../"]
)
def test_dots_lead_nowhere(root: Root, path: str) -> None:
    write(root, "a/file")
    for act in (
        lambda: root.open(at(root, path), os.O_RDONLY),
        lambda: root.open(at(root, path), os.O_RDWR | os.O_CREAT),
        lambda: root.status(at(root, path)),
        lambda: root.unlink(at(root, path)),
        lambda: root.rmdir(at(root, path)),
        lambda: root.rename(at(root, path), at(root, "stolen")),
        lambda: root.rename(at(root, "a/file"), at(root, path)),
        lambda: root.make_directories(at(root, path)),
        lambda: root.names(at(root, path)),
    ):
        with pytest.raises(OSError) as raised:  # noqa: PT011 # each says it in its own way
            act()
        assert raised.value.errno in (errno.ENOENT, errno.EBUSY, errno.ENOTEMPTY, errno.EISDIR)
    assert read(root, "a/file") == b"data"


def test_two_dots_in_a_name_are_a_name(root: Root) -> None:
    write(root, "a..b/..c")
    assert read(root, "a..b/..c") == b"data"


@pytest.mark.usefixtures("before")
def test_paths_of_elsewhere_are_refused(root: Root, outside: Path) -> None:
    sibling = root.path + b"-more"
    os.mkdir(sibling)
    for path in (os.fsencode(outside / "secret"), b"secret", b"/", b"", sibling, b"/a\0b"):
        with pytest.raises(FileNotFoundError, match="not below"):
            root.open(path, os.O_RDONLY)
    for act in (root.status, root.unlink, root.rmdir, root.names, root.make_directories):
        with pytest.raises(FileNotFoundError, match="not below"):
            act(at(root, "a") + b"\0/../x")
    with pytest.raises(FileNotFoundError, match="not below"):
        root.rename(at(root, "a"), at(root, "b\0"))


@pytest.mark.usefixtures("before")
def test_a_link_in_the_place_of_a_file_is_not_followed(root: Root, outside: Path) -> None:
    link = Path(os.fsdecode(at(root, "link")))
    link.symlink_to(outside / "secret")
    for flags in (os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_CREAT, os.O_RDWR | os.O_TRUNC):
        with pytest.raises(FileNotFoundError, match="symbolic link"):
            root.open(at(root, "link"), flags)
    assert root.exists(at(root, "link"))
    root.write(at(root, "link"), b"ours")
    assert not link.is_symlink()
    assert read(root, "link") == b"ours"


@pytest.mark.usefixtures("before")
def test_a_link_in_the_place_of_a_directory_makes_way_for_one(
    root: Root, outside: Path, expect_log: list[str]
) -> None:
    expect_log.append("a symbolic link was in place of the directory 'd': removed")
    Path(os.fsdecode(at(root, "d"))).symlink_to(outside)
    write(root, "d/below/secret", b"ours")
    assert read(root, "d/below/secret") == b"ours"
    assert not Path(os.fsdecode(at(root, "d"))).is_symlink()


def test_a_file_in_the_place_of_a_directory_stays(root: Root) -> None:
    write(root, "d")
    with pytest.raises(NotADirectoryError):
        root.make_directories(at(root, "d/below"))
    assert read(root, "d") == b"data"


def test_special_files_neither_hang_nor_look_like_a_failing_medium(root: Root) -> None:
    os.mkfifo(at(root, "fifo"))
    os.close(root.open(at(root, "fifo"), os.O_RDONLY))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(at(root, "socket"))
        with pytest.raises(FileNotFoundError, match="not a regular file"):
            root.open(at(root, "socket"), os.O_RDONLY)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
def test_a_lease_on_a_file_is_waited_for_a_moment_only(root: Root, flags: int) -> None:
    path = root.path + b"/leased"
    os.close(root.open(path, os.O_RDWR | os.O_CREAT))
    holder = root.open(path, os.O_RDONLY)
    try:
        fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        # The kernel would have it wait for most of a minute.
        with pytest.raises(BlockingIOError):
            root.open(path, flags)
        let_go = threading.Timer(0.001, fcntl.fcntl, (holder, fcntl.F_SETLEASE, fcntl.F_UNLCK))
        let_go.start()
        os.close(root.open(path, flags))
        let_go.join()
    finally:
        os.close(holder)


def test_a_tier_that_is_mounted_over_stays_what_it_was(root: Root, tmp_path: Path) -> None:
    write(root, "file")
    Path(os.fsdecode(root.path)).rename(tmp_path / "elsewhere")
    (tmp_path / "tier").mkdir()
    assert read(root, "file") == b"data"
    write(root, "second")
    assert (tmp_path / "elsewhere/second").read_bytes() == b"data"


def test_its_descriptor_goes_with_it(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    root = Root(os.fsencode(tmp_path))
    assert len(set(os.listdir("/proc/self/fd")) - before) == 1
    del root
    assert set(os.listdir("/proc/self/fd")) == before


parts = st.sampled_from(["a", "b", "link", "up", "..", ".", "", "secret", "below", "new"])
paths = st.lists(parts, min_size=1, max_size=6).map("/".join)
Act = Callable[[Root, bytes, bytes], object]
ACTS: list[Act] = [
    lambda root, one, _: os.close(root.open(one, os.O_RDWR)),
    lambda root, one, _: os.close(root.open(one, os.O_RDWR | os.O_CREAT)),
    lambda root, one, _: os.close(root.open(one, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)),
    lambda root, one, _: root.unlink(one),
    lambda root, one, _: root.rmdir(one),
    lambda root, one, _: root.make_directories(one),
    lambda root, one, _: root.write(one, b"ours"),
    lambda root, one, other: root.rename(one, other),
]


@given(st.lists(st.tuples(st.sampled_from(ACTS), paths, paths), max_size=12))
def test_nothing_outside_is_ever_changed(
    tmp_path_factory: pytest.TempPathFactory,
    caplog: pytest.LogCaptureFixture,
    steps: list[tuple[Act, str, str]],
) -> None:
    base = tmp_path_factory.mktemp("any")
    outside, tier = base / "outside", base / "tier"
    (outside / "below").mkdir(parents=True)
    (outside / "secret").write_bytes(b"secret")
    (tier / "a/b").mkdir(parents=True)
    (tier / "link").symlink_to("../outside")
    (tier / "a/link").symlink_to(outside)
    (tier / "a/up").symlink_to("..")
    (tier / "a/b/up").symlink_to("../../..")
    there = _listing(outside)
    root = Root(os.fsencode(tier))
    for act, one, other in steps:
        try:
            act(root, at(root, one), at(root, other))
        except OSError:
            continue
    caplog.clear()
    assert _listing(outside) == there
    assert sorted(os.listdir(base)) == ["outside", "tier"]


# Modules that reach what is no tier's, or no file of one: the configuration's own paths, the
# catalog, the control socket, the mount itself.
NOT_OF_TIERS = {
    "beneath.py", "catalog.py", "config.py", "control.py", "plain_client.py", "volume.py",
}  # fmt: skip
PLAIN_CALLS = {
    "open", "lstat", "unlink", "remove", "rename", "replace", "mkdir", "makedirs", "rmdir",
    "scandir", "walk", "exists", "lexists", "isdir", "isfile", "islink",
}  # fmt: skip


def _plain_calls(module: Path) -> Iterator[str]:
    tree = ast.parse(module.read_text())
    # A function that opens once more what is open already.
    reopening = {
        call
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        and "/proc/self/fd/" in ast.unparse(function)
        for call in ast.walk(function)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called == "os.open" and node in reopening:
            continue
        of_os = called.startswith(("os.", "os.path.")) and called.rpartition(".")[2] in PLAIN_CALLS
        if of_os or called in ("open", "shutil.rmtree"):
            yield f"{module.name}: {called}"


def test_nothing_on_a_tier_is_reached_by_a_plain_path() -> None:
    modules = [path for path in modules_below("kvfs") if path.name not in NOT_OF_TIERS]
    assert len(modules) > 60
    # Looking whether a directory that is no tier yet is empty.
    allowed = {"identity.py: os.walk"}
    assert {call for module in modules for call in _plain_calls(module)} <= allowed
