"""What the exerciser does: system calls at random places, each compared with the expectation."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from kvfs.tools.exerciser_check import check_listing, check_status, check_tree, check_xattrs
from kvfs.tools.exerciser_fork import Appends, Child, Step, Stripes
from kvfs.tools.exerciser_handle import PAGE_BYTES, Handle, Mapping
from kvfs.tools.exerciser_model import NEWEST_SET_NS, Mismatch, compare
from kvfs.tools.exerciser_playground import KIB, MAX_FILE_BYTES, MIB, Playground

DIRECTORY_NAMES = ("x", "y")
DEPTH = 2
XATTRS = ("user.crc32c", "user.note")
WEIGHTS = {
    "put": 9, "open_file": 7, "close_file": 5, "reopen": 4,
    "read": 12, "read_whole": 4, "write": 12, "append": 4, "read_direct": 4, "write_direct": 4,
    "two_writers": 2, "truncate": 6, "sync": 3, "map_shared": 4, "map_private": 2,
    "rename": 4, "unlink": 3, "mkdir": 2, "rmdir": 2, "rename_directory": 2, "list_directory": 2,
    "stat": 6, "stat_handle": 4, "set_times": 3, "statvfs": 1,
    "set_xattr": 3, "get_xattrs": 2, "remove_xattr": 1,
    "fork_handles": 2, "fork_stripes": 1, "fork_appends": 1, "fork_mapping": 1,
}  # fmt: skip


class Operations(Playground):
    """One method per kind of operation, drawn by weight."""

    def __init__(self, root: Path, seed: int, *, history: int = 12, forks: bool = True) -> None:
        super().__init__(root, seed, history)
        weights = {name: weight for name, weight in WEIGHTS.items() if forks or "fork" not in name}
        self._names, self._weights = list(weights), list(weights.values())

    def step(self) -> None:
        """One operation. Raises Mismatch, OSError."""
        self.done += 1
        (name,) = self.dice.choices(self._names, self._weights)
        getattr(self, name)()

    def verify(self) -> None:
        """Every handle and every file, byte for byte; closes the handles. Raises Mismatch."""
        self.did("verify")
        while self.handles:
            handle = self.handles.pop()
            if handle.readable and not handle.direct:
                handle.read_at(0, handle.file.size + 1)
            handle.check()
            handle.close()
        check_tree(self.root, self.tree)

    # --- whole files

    def put(self) -> None:
        """As engines do: a temporary name, then rename, also over an existing file."""
        name = self.a_new_name()
        data = self.some_bytes(0)
        self.did(f"put {name} {len(data)}")
        temporary = f"{name}.put.tmp"
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        descriptor = os.open(self.path(temporary), flags, 0o644)
        handle = Handle(descriptor, self.tree.create(temporary), flags)
        for start in range(0, len(data), MIB):
            handle.write_on(data[start : start + MIB])
        if self.chance(0.3):
            os.fsync(descriptor)
        # RELEASE may arrive after the rename, or the file is written on under its name.
        early = self.chance(0.7)
        if early:
            handle.close()
        self.rename_over(temporary, name)
        if not early:
            self.keep(handle)

    def open_file(self) -> None:
        """Every combination of flags that means something, on a name that exists or does not."""
        name = self.a_file() if self.chance(0.6) else self.a_new_name()
        kinds = (os.O_RDONLY, os.O_RDWR, os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_APPEND)
        flags = self.dice.choice(kinds)
        exists = name in self.tree.files
        creation = self.dice.choice((0, os.O_CREAT, os.O_CREAT | os.O_EXCL))
        truncates = flags & os.O_ACCMODE != os.O_RDONLY and self.chance(0.2)
        how = flags | creation | (os.O_TRUNC if truncates else 0)
        self.did(f"open {name} {how:o}")
        if exists and creation & os.O_EXCL:
            self.expect_error(errno.EEXIST, name, lambda: os.open(self.path(name), how, 0o644))
            return
        if not exists and not creation:
            self.expect_error(errno.ENOENT, name, lambda: os.open(self.path(name), how))
            return
        descriptor = os.open(self.path(name), how, 0o644)
        file = self.tree.files[name] if exists else self.tree.create(name)
        if truncates:
            file.resize(0)
        self.keep(Handle(descriptor, file, flags))

    def close_file(self) -> None:
        if self.handles:
            self.close_handle(self.dice.choice(self.handles))

    def reopen(self) -> None:
        """What was written through one handle is there for the next, also after its close."""
        handle = self.a_handle(lambda h: h.file.name in self.tree.files, os.O_RDWR)
        self.close_handle(handle)
        again = self.open_handle(handle.file.name, os.O_RDONLY)
        again.read_at(0, handle.file.size + 1)
        again.check()

    # --- bytes

    def read(self) -> None:
        handle = self.a_handle(lambda h: h.readable and not h.direct, os.O_RDONLY)
        offset, length = self.an_offset(handle.file), self.a_length()
        kind = self.dice.choice(("at", "at", "on", "send"))
        self.did(f"read {kind} {handle} {offset}+{length}")
        if kind == "at":
            handle.read_at(offset, length)
        elif kind == "on":
            handle.read_on(length)
        else:
            handle.send(length)

    def read_whole(self) -> None:
        """In one call, which the kernel splits."""
        name = self.a_file()
        self.did(f"read whole {name}")
        handle = self.opened(name, os.O_RDONLY)
        handle.read_at(0, handle.file.size + 1)
        handle.close()

    def write(self) -> None:
        handle = self.a_handle(lambda h: h.writable and not h.direct and not h.appends, os.O_RDWR)
        at = self.chance(0.7) or handle.position >= MAX_FILE_BYTES
        offset = self.an_offset(handle.file) if at else handle.position
        offset = min(offset, MAX_FILE_BYTES - 1)
        data = self.some_bytes(offset)
        self.did(f"write {handle} {offset}+{len(data)}")
        if at:
            handle.write_at(offset, data)
        else:
            handle.write_on(data)

    def append(self) -> None:
        handle = self.a_handle(lambda h: h.appends, os.O_RDWR | os.O_APPEND)
        if handle.file.size >= MAX_FILE_BYTES:
            return
        data = self.some_bytes(handle.file.size)
        self.did(f"append {handle} {len(data)}")
        handle.write_on(data)

    def read_direct(self) -> None:
        handle = self.a_handle(lambda h: h.direct and h.readable, os.O_RDONLY | os.O_DIRECT)
        if not handle.direct:
            return
        offset, length = self._an_extent(handle)
        self.did(f"read direct {handle} {offset}+{length}")
        if not handle.read_direct(offset, length):
            self.did("EINVAL")

    def write_direct(self) -> None:
        handle = self.a_handle(lambda h: h.direct and h.writable, os.O_RDWR | os.O_DIRECT)
        if not handle.direct:
            return
        offset, length = self._an_extent(handle)
        self.did(f"write direct {handle} {offset}+{length}")
        if not handle.write_direct(offset, self.dice.randbytes(length)):
            self.did("EINVAL")

    def _an_extent(self, handle: Handle) -> tuple[int, int]:
        """Offset and length for O_DIRECT: mostly whole pages."""
        offset = min(self.an_offset(handle.file), MAX_FILE_BYTES)
        length = min(self.a_length(), 512 * KIB)
        if self.chance(0.75):
            offset -= offset % PAGE_BYTES
            length += -length % PAGE_BYTES
        return offset, length

    def two_writers(self) -> None:
        """Two handles of one file in turn; both see all of it."""
        name = self.a_file()
        self.did(f"two writers {name}")
        one, two = (self.opened(name, os.O_RDWR) for _ in range(2))
        for handle in (one, two, one, two):
            offset = min(self.an_offset(handle.file), MAX_FILE_BYTES - 1)
            handle.write_at(offset, self.dice.randbytes(self.dice.randint(1, 9000)))
        for handle in (one, two):
            handle.read_at(0, handle.file.size + 1)
            handle.check()
            handle.close()

    def truncate(self) -> None:
        """By handle or by name, down or up, whoever has it open."""
        if self.chance(0.5):
            handle = self.a_handle(lambda h: h.writable, os.O_RDWR)
            size = min(self.an_offset(handle.file), MAX_FILE_BYTES)
            self.did(f"ftruncate {handle} {size}")
            handle.truncate(size)
            handle.check()
            return
        name = self.a_file()
        file = self.tree.files[name]
        size = min(self.an_offset(file), MAX_FILE_BYTES)
        self.did(f"truncate {name} {size}")
        os.truncate(self.path(name), size)
        file.resize(size)

    def sync(self) -> None:
        handle = self.a_handle(lambda h: True, os.O_RDWR)
        self.did(f"sync {handle}")
        self.dice.choice((os.fsync, os.fdatasync))(handle.descriptor)

    def map_shared(self) -> None:
        """Stores through a mapping, which may outlive its descriptor, are what the file holds."""
        name = self.a_file()
        file = self.tree.files[name]
        if not file.size:
            return
        early, synced = self.chance(0.5), self.chance(0.7)
        self.did(f"map shared {name} {file.size} close first: {early}, msync: {synced}")
        handle = self.opened(name, os.O_RDWR)
        mapping = Mapping(handle.descriptor, file.size, shared=True)
        compare(name, file.content, mapping.load(0, file.size))
        if early:
            handle.close()
        for _ in range(self.dice.randint(1, 4)):
            offset = self.dice.randrange(file.size)
            data = self.dice.randbytes(min(file.size - offset, self.dice.randint(1, 9000)))
            mapping.store(offset, data)
            file.store(offset, data)
        if not early:
            handle.read_at(0, file.size)
        if synced:
            mapping.sync()
        mapping.close()
        if not early:
            handle.check()
            handle.close()

    def map_private(self) -> None:
        """Stores through a private mapping stay in it."""
        name = self.a_file()
        file = self.tree.files[name]
        if not file.size:
            return
        self.did(f"map private {name} {file.size}")
        handle = self.opened(name, os.O_RDONLY)
        mapping = Mapping(handle.descriptor, file.size, shared=False)
        copy = bytearray(file.content)
        offset = self.dice.randrange(file.size)
        data = self.dice.randbytes(min(file.size - offset, 5000))
        mapping.store(offset, data)
        copy[offset : offset + len(data)] = data
        compare(name, copy, mapping.load(0, file.size))
        mapping.close()
        handle.read_at(0, file.size + 1)
        handle.close()

    # --- names

    def rename(self) -> None:
        old, new = self.a_file(), self.a_new_name()
        self.did(f"rename {old} {new}")
        self.rename_over(old, new)

    def unlink(self) -> None:
        name = self.a_file()
        self.did(f"unlink {name}")
        os.unlink(self.path(name))
        self.lose(name)

    def mkdir(self) -> None:
        parent = self.a_directory()
        name = f"{parent}/{self.dice.choice(DIRECTORY_NAMES)}".lstrip("/")
        if name.count("/") >= DEPTH:
            return
        self.did(f"mkdir {name}")
        if name in self.tree.directories:
            self.expect_error(errno.EEXIST, name, lambda: os.mkdir(self.path(name)))
            return
        os.mkdir(self.path(name))
        self.tree.directories.add(name)

    def rmdir(self) -> None:
        name = self.a_directory()
        if not name:
            return
        self.did(f"rmdir {name}")
        if self.tree.children(name):
            self.expect_error(errno.ENOTEMPTY, name, lambda: os.rmdir(self.path(name)))
            return
        os.rmdir(self.path(name))
        self.tree.directories.remove(name)

    def rename_directory(self) -> None:
        """With everything below it, open files too."""
        old, target = self.a_directory(), self.a_directory()
        new = f"{target}/{self.dice.choice(DIRECTORY_NAMES)}".lstrip("/")
        has_some = not self.tree.directories.isdisjoint(self.tree.below(old))
        if not old or new == old or new.count("/") + has_some >= DEPTH:
            return
        self.did(f"rename directory {old} {new}")

        def rename() -> None:
            os.rename(self.path(old), self.path(new))

        if new.startswith(f"{old}/"):
            self.expect_error(errno.EINVAL, old, rename)
        elif self.tree.children(new):
            self.expect_error(errno.ENOTEMPTY, old, rename)
        else:
            rename()
            self.tree.rename_directory(old, new)

    def list_directory(self) -> None:
        name = self.a_directory()
        self.did(f"list {name or '.'}")
        check_listing(self.root, self.tree, name)

    # --- attributes

    def stat(self) -> None:
        name = self.a_file()
        self.did(f"stat {name}")
        check_status(self.root, self.tree.files[name])

    def stat_handle(self) -> None:
        """Also of files without a name."""
        handle = self.a_handle(lambda h: True, os.O_RDONLY)
        self.did(f"fstat {handle}")
        handle.check()

    def set_times(self) -> None:
        """To the past, so that a write that does not move the time is noticed."""
        name = self.a_file()
        mtime_ns = self.dice.randrange(NEWEST_SET_NS)
        self.did(f"utime {name}")
        os.utime(self.path(name), ns=(mtime_ns, mtime_ns))
        self.tree.files[name].set_mtime(mtime_ns)

    def statvfs(self) -> None:
        self.did("statvfs")
        room = os.statvfs(self.root)
        if not 0 < room.f_bfree <= room.f_blocks or room.f_bavail > room.f_blocks:
            raise Mismatch(".", f"statvfs {room}")

    def set_xattr(self) -> None:
        name, key = self.a_file(), self.dice.choice(XATTRS)
        value = self.dice.randbytes(self.dice.randint(0, 64))
        self.did(f"setxattr {name} {key}")
        os.setxattr(self.path(name), key, value)
        self.tree.files[name].xattrs[key] = value

    def get_xattrs(self) -> None:
        name = self.a_file()
        self.did(f"getxattr {name}")
        check_xattrs(self.root, self.tree.files[name])

    def remove_xattr(self) -> None:
        name, key = self.a_file(), self.dice.choice(XATTRS)
        self.did(f"removexattr {name} {key}")
        if self.tree.files[name].xattrs.pop(key, None) is None:
            self.expect_error(errno.ENODATA, name, lambda: os.removexattr(self.path(name), key))
        else:
            os.removexattr(self.path(name), key)

    # --- another process

    def fork_handles(self) -> None:
        """A child writes and reads through handles it inherited, and ends."""
        usable = [h for h in self.handles if h.writable and not h.direct]
        if not usable:
            usable = [self.open_handle(self.a_file(), os.O_RDWR)]
        steps = []
        for handle in self.dice.sample(usable, min(3, len(usable))):
            at = min(self.an_offset(handle.file), MAX_FILE_BYTES - 1)
            on = handle.appends or self.chance(0.5)
            if (handle.file.size if handle.appends else handle.position) < MAX_FILE_BYTES:
                steps.append(Step(handle, self.dice.randbytes(5000), None if on else at))
        self.did(f"fork, in the child {', '.join(map(str, steps))}")

        def play() -> None:
            for step in steps:
                step.play()
                step.look()

        Child(play).wait()
        for step in steps:
            step.mirror()
        for step in steps:
            step.look()

    def fork_stripes(self) -> None:
        """Two processes write one file at once, each its own places."""
        name = self.a_file()
        self.did(f"fork, stripes of {name}")
        handle = self.opened(name, os.O_RDWR)
        Stripes(handle, self.dice.randbytes(5000)).write()
        handle.read_at(0, handle.file.size + 1)
        handle.check()
        handle.close()

    def fork_appends(self) -> None:
        """Two processes append to one file at once: every record is there once and whole."""
        name = self.a_file()
        if self.tree.files[name].size >= MAX_FILE_BYTES:
            return
        self.did(f"fork, appends to {name}")
        handle = self.opened(name, os.O_RDWR | os.O_APPEND)
        Appends(handle).write()
        handle.close()

    def fork_mapping(self) -> None:
        """A child stores through a mapping it inherited."""
        name = self.a_file()
        file = self.tree.files[name]
        if not file.size:
            return
        offset = self.dice.randrange(file.size)
        data = self.dice.randbytes(min(file.size - offset, 5000))
        self.did(f"fork, mapping of {name}, {offset}+{len(data)}")
        handle = self.opened(name, os.O_RDWR)
        mapping = Mapping(handle.descriptor, file.size, shared=True)
        Child(lambda: mapping.store(offset, data)).wait()
        file.store(offset, data)
        compare(name, file.content, mapping.load(0, file.size))
        mapping.close()
        handle.read_at(0, file.size + 1)
        handle.close()
