"""A mount and a plain directory under the same operations, while blocks move among the tiers.

Every operation must have the same result or the same errno on both, and both trees must be the
same after each. Left out is what docs/SEMANTICS.md says is different: hard links, other file types,
directory sizes and link counts, and extended attributes of a file without a name.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from kvfs.config import Config, MountConfig, TierConfig, TieringConfig
from kvfs.control import ControlClient, find_mount
from kvfs.errors import BlockNotFound
from tests.mount.live import RENAME_NOREPLACE, live, renameat2
from tests.mounting import MountedKvfs

MIB = 1 << 20
EXAMPLES = int(os.environ.get("KVFS_STATE_EXAMPLES", "40"))
NAMES = ("a", "b", "c.bin", "d.tmp")
FIRST_DIRECTORIES = ("a", "a/b", "b")
FIRST_FILES = {
    "c.bin": b"0123456789abcdef" * 700,
    "a/c.bin": b"",
    "a/a": b"x" * 4096,
    "a/b/a": b"y" * 20_000,
    "a/b/c.bin": b"z",
    "b/d.tmp": b"t" * 100,
    "b/a": b"u" * 8192,
}
XATTRS = ("user.crc32c", "user.note")
TIERS = ("nvme", "hdd", "remote")
# Times that `utime` set; later ones are the clock's and differ.
OLDEST_NOW_NS = 1_500_000_000 * 10**9

Outcome = tuple[str, object]
FileHandles = Bundle("file_handles")


@dataclass(frozen=True)
class Pair:
    """The same open file on both sides."""

    plain: int
    mounted: int


class MountAndDirectory(RuleBasedStateMachine):
    """Each example works in a directory of its own on one mount."""

    # Set by the test.
    mount: MountedKvfs
    client: ControlClient
    plain_parent: Path

    numbers = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.open_files: list[Pair] = []

    @initialize(spread=st.booleans())
    def begin(self, spread: bool) -> None:
        """A small tree, of which part has left the first tier and part is on two."""
        name = f"example{next(self.numbers)}"
        self.mounted = self.mount.path / name
        self.plain = self.plain_parent / name
        self.log_from_bytes = self.mount.log_file.stat().st_size
        for root in (self.mounted, self.plain):
            for directory in ("", *FIRST_DIRECTORIES):
                (root / directory).mkdir()
            for path, content in FIRST_FILES.items():
                (root / path).write_bytes(content)
        if spread:
            self.order("demote", "a", "hdd")
            self.order("promote", "a/b", "nvme")
            self.order("demote", "b", "remote")

    def teardown(self) -> None:
        for pair in self.open_files:
            os.close(pair.plain)
            os.close(pair.mounted)
        for root in (self.mounted, self.plain):
            shutil.rmtree(root)
        assert not self.new_trouble_in_log()

    def new_trouble_in_log(self) -> str:
        """What the daemon logged during this example, if any of it is a warning or worse."""
        with self.mount.log_file.open("rb") as log:
            log.seek(self.log_from_bytes)
            text = log.read().decode()
        return text if re.search(r" (WARNING|ERROR|CRITICAL) |Traceback", text) else ""

    # --- choosing and comparing

    def a_path(self, data: st.DataObject, *, what: str = "any") -> str:
        """An existing path, or a new name in an existing directory, or any path at all."""
        directories, files = [""], []
        for parent, below, names in os.walk(self.plain):
            at = os.path.relpath(parent, self.plain)
            directories += [os.path.normpath(os.path.join(at, name)) for name in below]
            files += [os.path.normpath(os.path.join(at, name)) for name in names]
        name = st.sampled_from(NAMES)
        new = st.tuples(st.sampled_from(sorted(directories)), name).map(lambda pair: "/".join(pair))
        anywhere = st.lists(name, min_size=1, max_size=3).map("/".join)
        existing = {"any": files + directories[1:], "file": files, "directory": directories[1:]}
        choices = [new, anywhere]
        if existing[what]:
            known = st.sampled_from(sorted(existing[what]))
            choices = [*[known] * 8, *choices]
        return str(data.draw(st.one_of(choices), label="path")).lstrip("/")

    def both(self, operation: Callable[[Path], object]) -> Outcome:
        """Do it on both sides; the common outcome."""
        expected = outcome(operation, self.plain)
        got = outcome(operation, self.mounted)
        assert got == expected
        return got

    def both_open(self, pair: Pair, operation: Callable[[int], object]) -> None:
        assert outcome(operation, pair.mounted) == outcome(operation, pair.plain)

    # --- files by name

    @rule(data=st.data(), content=st.binary(max_size=64), repeat=st.sampled_from([1, 300]))
    def write(self, data: st.DataObject, content: bytes, repeat: int) -> None:
        path = self.a_path(data, what="file")
        self.both(lambda root: (root / path).write_bytes(content * repeat))

    @rule(data=st.data(), content=st.binary(min_size=1, max_size=64))
    def create_exclusively(self, data: st.DataObject, content: bytes) -> None:
        path = self.a_path(data)
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY

        def create(root: Path) -> None:
            file = os.open(root / path, flags, 0o640)
            try:
                os.write(file, content)
            finally:
                os.close(file)

        self.both(create)

    @rule(data=st.data(), content=st.binary(min_size=1, max_size=5000))
    def append(self, data: st.DataObject, content: bytes) -> None:
        path = self.a_path(data, what="file")

        def append(root: Path) -> int:
            with (root / path).open("ab") as file:
                file.write(content)
                return file.tell()

        self.both(append)

    @rule(data=st.data(), content=st.binary(min_size=1, max_size=64), at=st.integers(0, 9000))
    def overwrite_in_place(self, data: st.DataObject, content: bytes, at: int) -> None:
        path = self.a_path(data, what="file")

        def overwrite(root: Path) -> None:
            with (root / path).open("r+b") as file:
                file.seek(at)
                file.write(content)

        self.both(overwrite)

    @rule(data=st.data(), content=st.binary(max_size=64), repeat=st.sampled_from([1, 1000]))
    def publish(self, data: st.DataObject, content: bytes, repeat: int) -> None:
        """What engines do: write under another name, then rename over."""
        path = self.a_path(data)

        def publish(root: Path) -> None:
            temporary = root / f"{path}.part.tmp"
            temporary.write_bytes(content * repeat)
            try:
                temporary.rename(root / path)
            except OSError:
                temporary.unlink()
                raise

        self.both(publish)

    @rule(data=st.data(), size=st.integers(0, 20_000))
    def truncate(self, data: st.DataObject, size: int) -> None:
        path = self.a_path(data, what="file")
        self.both(lambda root: os.truncate(root / path, size))

    @rule(data=st.data(), at=st.integers(0, 20_000), count=st.integers(1, 20_000))
    def read_a_part(self, data: st.DataObject, at: int, count: int) -> None:
        path = self.a_path(data, what="file")

        def read(root: Path) -> bytes:
            with (root / path).open("rb", buffering=0) as file:
                return os.pread(file.fileno(), count, at)

        self.both(read)

    @rule(data=st.data())
    def unlink(self, data: st.DataObject) -> None:
        path = self.a_path(data, what="file")
        self.both(lambda root: (root / path).unlink())

    # --- names and attributes

    @rule(data=st.data(), mode=st.sampled_from([0o755, 0o700, 0o2775]))
    def mkdir(self, data: st.DataObject, mode: int) -> None:
        path = self.a_path(data, what="directory")
        self.both(lambda root: os.mkdir(root / path, mode))

    @rule(data=st.data())
    def rmdir(self, data: st.DataObject) -> None:
        path = self.a_path(data, what="directory")
        self.both(lambda root: (root / path).rmdir())

    @rule(data=st.data())
    def rename(self, data: st.DataObject) -> None:
        old, new = self.a_path(data), self.a_path(data)
        self.both(lambda root: os.rename(root / old, root / new))

    @rule(data=st.data())
    def rename_directory(self, data: st.DataObject) -> None:
        old, new = self.a_path(data, what="directory"), self.a_path(data, what="directory")
        self.both(lambda root: os.rename(root / old, root / new))

    @rule(data=st.data())
    def rename_without_replacing(self, data: st.DataObject) -> None:
        old, new = self.a_path(data), self.a_path(data)
        self.both(lambda root: renameat2(root / old, root / new, RENAME_NOREPLACE))

    @rule(data=st.data(), mode=st.sampled_from([0o600, 0o644, 0o755, 0o400]))
    def chmod(self, data: st.DataObject, mode: int) -> None:
        path = self.a_path(data)
        self.both(lambda root: os.chmod(root / path, mode))

    @rule(data=st.data(), mtime_ns=st.integers(0, OLDEST_NOW_NS - 1))
    def utime(self, data: st.DataObject, mtime_ns: int) -> None:
        path = self.a_path(data)
        self.both(lambda root: os.utime(root / path, ns=(mtime_ns, mtime_ns)))

    @rule(
        data=st.data(),
        name=st.sampled_from(XATTRS),
        value=st.binary(max_size=100),
        flags=st.sampled_from([0, os.XATTR_CREATE, os.XATTR_REPLACE]),
    )
    def set_xattr(self, data: st.DataObject, name: str, value: bytes, flags: int) -> None:
        path = self.a_path(data)
        self.both(lambda root: os.setxattr(root / path, name, value, flags))

    @rule(data=st.data(), name=st.sampled_from(XATTRS))
    def get_xattr(self, data: st.DataObject, name: str) -> None:
        path = self.a_path(data)
        self.both(lambda root: os.getxattr(root / path, name))

    @rule(data=st.data(), name=st.sampled_from(XATTRS))
    def remove_xattr(self, data: st.DataObject, name: str) -> None:
        path = self.a_path(data)
        self.both(lambda root: os.removexattr(root / path, name))

    @rule(data=st.data())
    def list_a_directory(self, data: st.DataObject) -> None:
        path = self.a_path(data)
        self.both(lambda root: sorted(os.listdir(root / path)))

    @rule(data=st.data())
    def ask_whether_it_exists(self, data: st.DataObject) -> None:
        path = self.a_path(data)
        self.both(lambda root: os.access(root / path, os.F_OK))

    # --- open files, kept across everything else

    @rule(
        target=FileHandles,
        data=st.data(),
        flags=st.sampled_from(
            [os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_CREAT, os.O_RDWR | os.O_CREAT | os.O_TRUNC]
        ),
    )
    def open(self, data: st.DataObject, flags: int) -> object:
        path = self.a_path(data, what="file")
        plain = outcome(lambda root: os.open(root / path, flags, 0o644), self.plain)
        mounted = outcome(lambda root: os.open(root / path, flags, 0o644), self.mounted)
        assert mounted[0] == plain[0], (mounted, plain)
        if plain[0] == "errno":
            assert mounted == plain
            return multiple()
        assert isinstance(plain[1], int)
        assert isinstance(mounted[1], int)
        pair = Pair(plain[1], mounted[1])
        if stat.S_ISDIR(os.fstat(pair.plain).st_mode):
            os.close(pair.plain)
            os.close(pair.mounted)
            return multiple()
        self.open_files.append(pair)
        return pair

    @rule(pair=consumes(FileHandles))
    def close(self, pair: Pair) -> None:
        self.open_files.remove(pair)
        os.close(pair.plain)
        os.close(pair.mounted)

    @rule(pair=FileHandles, content=st.binary(min_size=1, max_size=64), at=st.integers(0, 20_000))
    def write_open(self, pair: Pair, content: bytes, at: int) -> None:
        self.both_open(pair, lambda file: os.pwrite(file, content, at))

    @rule(pair=FileHandles, at=st.integers(0, 20_000), count=st.integers(1, 30_000))
    def read_open(self, pair: Pair, at: int, count: int) -> None:
        self.both_open(pair, lambda file: os.pread(file, count, at))

    @rule(pair=FileHandles, size=st.integers(0, 20_000))
    def truncate_open(self, pair: Pair, size: int) -> None:
        self.both_open(pair, lambda file: os.ftruncate(file, size))

    @rule(pair=FileHandles, mode=st.sampled_from([0o600, 0o644]))
    def chmod_open(self, pair: Pair, mode: int) -> None:
        self.both_open(pair, lambda file: os.fchmod(file, mode))

    @rule(pair=FileHandles)
    def fsync(self, pair: Pair) -> None:
        self.both_open(pair, os.fsync)

    # --- what moves meanwhile

    @rule(data=st.data(), verb=st.sampled_from(["promote", "demote"]), to=st.sampled_from(TIERS))
    def move(self, data: st.DataObject, verb: str, to: str) -> None:
        """Any outcome but a broken tree is fine: the block may be open, or there already."""
        path = self.a_path(data)
        try:
            self.order(verb, path, to)
        except BlockNotFound:
            assert not (self.plain / path).exists()

    def order(self, verb: str, path: str, to: str) -> None:
        target = os.fsencode(os.path.relpath(self.mounted / path, self.mount.path))
        self.client.call(verb, {"paths": [target], "to": to}, timeout_s=60)

    @rule()
    def move_by_heat(self) -> None:
        self.client.call("tier_run", {}, timeout_s=60)

    # --- what must hold after each step

    @invariant()
    def trees_are_the_same(self) -> None:
        if hasattr(self, "plain"):
            assert tree_of(self.mounted) == tree_of(self.plain)

    @invariant()
    def open_files_are_the_same(self) -> None:
        for pair in self.open_files:
            assert content_of(pair.mounted) == content_of(pair.plain)


def outcome(operation: Callable[..., object], subject: object) -> Outcome:
    try:
        return ("done", operation(subject))
    except OSError as error:
        return ("errno", errno.errorcode[error.errno or 0])


def content_of(file: int) -> tuple[object, ...]:
    """What an open file, with a name or without, has and is."""
    status = os.fstat(file)
    return (*attributes_of(status), status.st_size, os.pread(file, status.st_size + 1, 0))


def attributes_of(status: os.stat_result) -> tuple[int, object]:
    set_ns = status.st_mtime_ns if status.st_mtime_ns < OLDEST_NOW_NS else "now"
    return status.st_mode, set_ns


def tree_of(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything below a directory: types, modes, times that were set, sizes, bytes, xattrs."""
    tree: dict[str, tuple[object, ...]] = {}
    for parent, directories, names in os.walk(root):
        for name in directories + names:
            path = os.path.join(parent, name)
            status = os.stat(path)
            xattrs = {
                xattr: os.getxattr(path, xattr)
                for xattr in os.listxattr(path)
                if xattr.startswith("user.")
            }
            content: tuple[object, ...] = ()
            if name in names:
                data = Path(path).read_bytes()
                content = (status.st_size, data)
            tree[os.path.relpath(path, root)] = (*attributes_of(status), xattrs, *content)
    return tree


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedKvfs]:
    """Three tiers that never fill, of which the faster ones are always above their watermark."""
    base = tmp_path_factory.mktemp("machine")
    tiers = []
    for name, capacity_bytes in (("nvme", 8 * MIB), ("hdd", 16 * MIB), ("remote", 64 * MIB)):
        (base / name).mkdir()
        tiers.append(
            TierConfig(name=name, path=base / name, medium=name, capacity_bytes=capacity_bytes)  # type: ignore[arg-type] # the names are media
        )
    tiering = TieringConfig(
        interval_s=0.1, half_life_s=5, low_watermark=0.002, high_watermark=0.004,
        promote_heat=1.0, on_full="refuse",
    )  # fmt: skip
    with live(MountedKvfs(base, Config(tuple(tiers), tiering, MountConfig()))) as mounted:
        yield mounted


def test_a_mount_is_a_directory(
    mount: MountedKvfs, tmp_path_factory: pytest.TempPathFactory
) -> None:
    MountAndDirectory.mount = mount
    MountAndDirectory.plain_parent = tmp_path_factory.mktemp("plain")
    with ControlClient(find_mount(mount.path).socket_path) as client:
        MountAndDirectory.client = client
        run_state_machine_as_test(
            MountAndDirectory,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=40,
                # Shrinking on a real mount takes longer than reading the steps that failed.
                phases=[Phase.reuse, Phase.generate],
            ),
        )
        counters = client.call("status")["tiers"]
    assert sum(tier["promotions"] for tier in counters) > 0
    assert sum(tier["demotions"] for tier in counters) > 0
