"""The command: its errors and exit codes, and what it shows of given answers of a daemon."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvfs import __version__, control, mount_table
from kvfs.control import Message, Progress, Reply, Request, error_answer
from kvfs.errors import BlockNotFound, KvfsError, NotPermitted
from kvfs.prefix import KvfsScheme, block_paths
from kvfs.tools.cli import app, run
from kvfs.tools.status_cmd import problems
from tests.fake_daemon import FakeDaemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Results = dict[str, Any]

MATCH = ("match", "/missing", "--namespace", "/elsewhere", "--block-tokens", "4", "--scheme")


def tier(name: str, **changes: Any) -> dict[str, Any]:
    document = {
        "name": name,
        "medium": name,
        "path": f"/tiers/{name}",
        "uuid": "6f1c",
        "capacity_bytes": 2 * 2**40,
        "used_bytes": 2**40,
        "reserved_bytes": 0,
        "held_bytes": 0,
        "quarantine_bytes": 0,
        "quarantine_files": 0,
        "saved_bytes": 0,
        "free_bytes": 2**40,
        "blocks": 12345,
        "state": "online",
        "last_error": "",
        "opens": 10,
        "hit_share": 0.996,
        "bytes_read": 3 * 2**30,
        "bytes_written": 0,
        "promotions": 11,
        "demotions": 22,
        "evictions": 33,
        "moved_in_bytes": 0,
        "moved_out_bytes": 0,
    }
    return document | changes


def scrub_of(name: str, **changes: Any) -> dict[str, Any]:
    never = {"after": 0, "blocks": 0, "size_bytes": 0, "bad": 0, "started_s": 0, "finished_s": 0}
    return {"tier": name, **never, **changes}


def stats(**changes: Any) -> dict[str, Any]:
    document = {
        "version": 1,
        "mountpoint": "/mnt/kv",
        "pid": 4711,
        "started_at": 0.0,
        "uptime_s": 3725.0,
        "state": "ok",
        "socket": "/run/kvfs/x.sock",
        "on_full": "evict",
        "half_life_s": 120.0,
        "blocks": 24690,
        "directories": 17,
        "unsealed": 3,
        "tiers": [tier("nvme"), tier("hdd", hit_share=0.004)],
        "moves": {"running": [], "queued": 0},
        "scrub": {"at": "", "rate": 0, "passes": [scrub_of("nvme"), scrub_of("hdd")]},
        "counters": {"seals": 5},
    }
    return document | changes


BLOCK = {
    "path": b"m/\xff\n.bin",
    "size_bytes": 2 * 2**20,
    "tier": "nvme",
    "replicas": ["nvme", "hdd"],
    "codecs": ["raw", "zstd"],
    "heat": 1.75,
    "state": "sealed",
    "pinned": True,
    "last_access": 0.0,
    "kind": "block",
    "pin": "nvme",
    "ttl_s": None,
    "generation": 3,
    "checksum": "ab" * 16,
    "why": "hotter than the coldest block of nvme",
}


class Mounted:
    """A mount at `mountpoint` as far as mountinfo tells, and a daemon that answers `results`."""

    def __init__(self, mountpoint: Path, socket_path: Path) -> None:
        self.mountpoint = mountpoint
        self.results: dict[str, Results | KvfsError | Callable[[Request], Results]] = {}
        self.progress: list[Results] = []
        self.daemon = FakeDaemon(socket_path, self._answer)

    def _answer(self, request: Request) -> list[Message]:
        result = self.results[request.verb]
        if isinstance(result, KvfsError):
            return [error_answer(request.id, result)]
        steps: list[Message] = [Progress(request.id, step) for step in self.progress]
        return [*steps, Reply(request.id, result(request) if callable(result) else result)]

    @property
    def asked(self) -> list[tuple[str, Results]]:
        return [(request.verb, request.args) for request in self.daemon.requests]


def claim_mounts(monkeypatch: pytest.MonkeyPatch, *mountpoints: Path) -> None:
    entries = [
        mount_table.MountEntry(os.fsencode(mountpoint), b"/", control.FSTYPE)
        for mountpoint in mountpoints
    ]
    monkeypatch.setattr(mount_table, "entries", lambda: entries)


@pytest.fixture(autouse=True)
def no_mounts(monkeypatch: pytest.MonkeyPatch) -> None:
    claim_mounts(monkeypatch)
    monkeypatch.delenv(control.SOCKET_ENV, raising=False)


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mounted]:
    mountpoint = tmp_path / "mnt"
    socket_path = tmp_path / "control"
    claim_mounts(monkeypatch, mountpoint)
    monkeypatch.setenv(control.SOCKET_ENV, str(socket_path))
    mount = Mounted(mountpoint, socket_path)
    yield mount
    mount.daemon.stop()


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# --- wrong use and errors ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["bogus"], 2, "No such command 'bogus': see `kvfs --help`"),
        (["status", "--bogus"], 2, "No such option: --bogus: see `kvfs status --help`"),
        (["info"], 2, "Missing argument 'PATH': see `kvfs info --help`"),
        (["heat", "-n", "0"], 2, "--limit"),
        (["umount", "m", "--timeout", "soon"], 2, "--timeout: 'soon' is not a time"),
        (["fsck", "--rebuild"], 2, "--rebuild works on unmounted tiers"),
        (["fsck", "m", "--config", "c"], 2, "exclude each other"),
        (["scrub", "--rate", "fast"], 2, "--rate: "),
        (["doctor", "m", "--config", "c"], 2, "exclude each other"),
        (["mount", "m", "--config", "c", "--tier", "nvme=/a"], 2, "exclude each other"),
        (["mount", "m", "--foreground", "--log-file", "l"], 2, "leave out --log-file"),
        (["mount", "m", "--tier", "nvme"], 3, "--tier nvme: write for example"),
        (["mount", "m", "--tier", "nvme=/a,capacity=-1"], 3, "capacity"),
        (["mount", "/a/m", "--tier", "nvme=/a,capacity=1MiB"], 3, "contains the mountpoint"),
        (["mount", "m", "--config", "/missing/c"], 3, "/missing/c: cannot be read"),
        (["config", "check", "/missing/c"], 3, "/missing/c: cannot be read"),
        (["info", "/elsewhere"], 5, "/elsewhere is not inside a kvfs mount"),
        (["pin", "/elsewhere"], 5, "/elsewhere is not inside a kvfs mount"),
        (["match", "-", "--scheme", "rot13"], 2, "--scheme"),
        ([*MATCH, "vllm-sha256", "--block-tokens", "0"], 2, "--block-tokens"),
        ([*MATCH, "vllm-sha256", "--name", "{}"], 2, "--name means nothing to --scheme vllm"),
        ([*MATCH, "sglang", "--name", "{}", "--blocks-per-chunk", "2"], 2, "--blocks-per-chunk"),
        ([*MATCH, "sglang"], 2, "--name is missing; for example {}_MODEL_0_1.bin"),
        ([*MATCH, "lmcache", "--name", "a.data"], 2, "'a.data' is not a file name with {}"),
        ([*MATCH, "kvfs"], 2, "--fingerprint is missing"),
        ([*MATCH, "vllm-sha256", "--lora", "sql"], 2, "--lora: write NAME=PATH"),
        ([*MATCH, "vllm-sha256"], 5, "/elsewhere is not inside a kvfs mount"),
        (["evict", "/else\nwhere"], 5, r"/else\nwhere is not inside a kvfs mount"),
        (["status", "/elsewhere"], 5, "/elsewhere is not inside a kvfs mount"),
        (["tier", "init", "/missing/tier"], 4, "/missing/tier: no such directory"),
        (["status"], 6, "there is no kvfs mount: `kvfs mount MOUNTPOINT` makes one"),
        (["tier", "run"], 6, "there is no kvfs mount"),
    ],
)
def test_errors_are_one_line_with_their_exit_code(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("kvfs: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err


def test_an_unknown_key_is_refused_with_file_and_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "kvfs.toml"
    file.write_text('[[tier]]\nname="a"\npath="/a"\nmedium="nvme"\ncapacity="1TiB"\ncolour="red"\n')
    assert run(["config", "check", str(file)]) == 3
    shown = capsys.readouterr().err
    assert str(file) in shown
    assert "tier[0].colour" in shown


def test_a_right_file_is_called_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "kvfs.toml"
    file.write_text('[[tier]]\nname="a"\npath="/a"\nmedium="nvme"\ncapacity="1TiB"\n')
    assert run_json(capsys, "config", "check", str(file)) == {
        "file": str(file),
        "ok": True,
        "tiers": ["a"],
    }
    assert run(["config", "check", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: right, 1 tiers (a)\n"


@pytest.mark.parametrize(
    ("error", "code"), [(BlockNotFound("m/x: no such block"), 8), (NotPermitted("not yours"), 9)]
)
def test_the_daemons_error_is_the_commands(
    mounted: Mounted, error: KvfsError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    mounted.results["info"] = error
    assert run(["info", f"{mounted.mountpoint}/m/x"]) == code
    assert capsys.readouterr().err == f"kvfs: {error}\n"


def test_a_daemon_that_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    claim_mounts(monkeypatch, tmp_path)
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(stale))
    monkeypatch.setenv(control.SOCKET_ENV, str(stale))
    assert run(["status", str(tmp_path)]) == 6
    assert "no daemon answers; is it mounted? `kvfs mount MOUNTPOINT`" in capsys.readouterr().err


def test_several_mounts_must_be_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    claim_mounts(monkeypatch, tmp_path / "a", tmp_path / "b")
    assert run(["tier", "list"]) == 2
    assert f"name one of them: {tmp_path}/a, {tmp_path}/b" in capsys.readouterr().err


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Path | None) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvfs.tools.tier_cmd.socket_of", interrupted)
    assert run(["tier", "list"]) == 130


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"kvfs {__version__}\n"
    assert run([]) == 2
    assert "Usage: kvfs" in capsys.readouterr().out
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert {command.name for command in app.registered_commands} == {
        *("mount", "umount", "status", "info", "ls", "heat", "pin", "unpin", "promote", "demote"),
        *("evict", "fsck", "scrub", "quarantine", "replay", "doctor", "match", "serve"),
    }
    for verb in [command.name for command in app.registered_commands] + ["tier", "config"]:
        assert f" {verb} " in shown
    assert "Exit codes: 0 done;" in shown


@pytest.mark.parametrize("group", ["tier", "config"])
def test_a_group_alone_shows_its_help(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([group]) == 2
    assert f"kvfs {group}" in capsys.readouterr().out


def test_the_command_runs_as_a_process_without_pyfuse3() -> None:
    script = (
        "import sys\n"
        "sys.modules['pyfuse3'] = None\n"
        "from kvfs.tools.cli import main\n"
        "sys.argv = ['kvfs', *sys.argv[1:]]\n"
        "main()\n"
    )
    asked = subprocess.run(
        [sys.executable, "-c", script, "info", b"/a\xff"], capture_output=True, check=False
    )
    assert asked.returncode == 5
    assert asked.stderr == rb"kvfs: /a\xff is not inside a kvfs mount" + b"\n"


def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    script = "import sys; from kvfs.tools.cli import main; sys.argv = ['kvfs', '--help']; main()"
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run(
        [sys.executable, "-c", script], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert ran.returncode == 1
    assert ran.stderr == b""


# --- status -----------------------------------------------------------------------------------


def test_status_json_is_the_document(mounted: Mounted, capsys: pytest.CaptureFixture[str]) -> None:
    mounted.results["status"] = stats()
    assert run_json(capsys, "status", str(mounted.mountpoint)) == stats()
    assert run_json(capsys, "status") == stats()
    assert run_json(capsys, "tier", "list") == {"tiers": stats()["tiers"]}


def test_status_shows_the_numbers(mounted: Mounted, capsys: pytest.CaptureFixture[str]) -> None:
    move = {
        "kind": "demote",
        "path": b"m/\x1b[31mx",
        "source": "nvme",
        "target": "hdd",
        "size_bytes": 4096,
        "done_bytes": 1024,
    }
    mounted.results["status"] = stats(moves={"running": [move], "queued": 7})
    assert run(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "/mnt/kv  ok  pid 4711, up 1h 2m"
    assert lines[1] == "24,690 blocks (3 unsealed), 17 directories"
    by_start = [line.split() for line in lines]
    nvme = ["nvme", "nvme", "online", "████████░░░░░░░░", "50%", "1", "TiB", "2", "TiB", "12,345"]
    assert [*nvme, "99.6%"] in by_start
    moved = ["nvme", "11", "22", "33", "3", "GiB", *(["0", "B"] * 3), "/tiers/nvme"]
    assert moved in by_start
    assert "1 moves running, 7 queued" in lines
    assert ["demote", "nvme", "hdd", "4", "KiB", "25.0%", r"m/\x1b[31mx"] in by_start
    assert all(line == line.rstrip() for line in lines)
    assert not any(line.startswith("!") for line in lines)


def test_paths_of_tiers_stay_whole_on_a_narrow_terminal(
    mounted: Mounted, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "dumb", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    path = "/mnt/disk-of-nvme/kvfs-tier"
    mounted.results["status"] = stats(tiers=[tier("nvme", path=path)])
    assert run(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["nvme", path] in [line.split() for line in lines]
    assert run(["tier", "list"]) == 0
    lines += capsys.readouterr().out.splitlines()
    assert lines[-1].split()[-1] == path
    assert all(len(line) <= 80 for line in lines)


def test_a_name_in_an_error_is_shown_as_in_a_table(
    mounted: Mounted, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["info", "/nowhere/a\nb\udcff"]) == 5
    assert capsys.readouterr().err == "kvfs: /nowhere/a\\nb\\xff is not inside a kvfs mount\n"


def test_status_shows_quarantine_and_scrubs(
    mounted: Mounted, capsys: pytest.CaptureFixture[str]
) -> None:
    tiers = [tier("nvme"), tier("hdd", quarantine_files=2, quarantine_bytes=2**20)]
    passes = [
        scrub_of("nvme", blocks=1234, started_s=1.0, finished_s=2.0),
        scrub_of("hdd", blocks=5, bad=1, started_s=1.0),
    ]
    shown = []
    for at in ("", "hdd"):
        scrub = {"at": at, "rate": 0, "passes": passes}
        mounted.results["status"] = stats(tiers=tiers, scrub=scrub)
        assert run(["status"]) == 0
        shown.append(capsys.readouterr().out.splitlines())
    assert "quarantine of hdd: 2 files, 1 MiB" in shown[0]
    finished = "scrub of nvme: 1,234 blocks, 0 bad, finished "
    assert any(line.startswith(finished) for line in shown[0])
    assert "scrub of hdd: 5 blocks, 1 bad, not finished" in shown[0]
    assert "scrub of hdd: 5 blocks, 1 bad, under way" in shown[1]
    assert not any("quarantine of nvme" in line for line in shown[0])
    assert run(["tier", "list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert "Quarantine" in listed[0].split()
    assert listed[2].split()[-6:-4] == ["1", "MiB"]


def test_status_says_what_compression_saves(
    mounted: Mounted, capsys: pytest.CaptureFixture[str]
) -> None:
    mounted.results["status"] = stats(tiers=[tier("nvme"), tier("hdd", saved_bytes=3 * 2**30)])
    assert run(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "compression" in line] == ["compression on hdd saves 3 GiB"]


def test_status_says_first_what_is_wrong(
    mounted: Mounted, capsys: pytest.CaptureFixture[str]
) -> None:
    tiers = [tier("nvme", used_bytes=3 * 2**40), tier("hdd", state="offline", last_error="EIO")]
    mounted.results["status"] = stats(tiers=tiers, counters={"replicas_lost": 2})
    assert run(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:5] == [
        "! tier hdd is offline (EIO): blocks that only it has answer EIO",
        "! tier nvme is 1 TiB over its capacity",
        "! 2 replicas were gone from their tier: run `kvfs fsck`",
    ]


def test_problems_of_states_and_of_refusing_when_full() -> None:
    assert problems(stats()) == []
    assert "compares its tiers" in problems(stats(state="recovering"))[0]
    assert problems(stats(tiers=[tier("hdd", state="degraded")])) == ["tier hdd is degraded"]
    full = [tier("nvme"), tier("hdd", used_bytes=2 * 2**40)]
    assert problems(stats(tiers=full)) == []
    assert "ENOSPC" in problems(stats(tiers=full, on_full="refuse"))[0]


def test_status_lists_several_mounts(
    mounted: Mounted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dead = mounted.mountpoint.parent / "zombie"
    claim_mounts(monkeypatch, mounted.mountpoint, dead)
    monkeypatch.delenv(control.SOCKET_ENV)

    def getxattr(path: bytes, _: str) -> bytes:
        if os.fsdecode(path) == str(dead):
            raise OSError(107, "Transport endpoint is not connected")
        return os.fsencode(mounted.daemon.path)

    monkeypatch.setattr(os, "getxattr", getxattr)
    mounted.results["status"] = stats()
    documents = run_json(capsys, "status")["mounts"]
    assert documents[0] == stats()
    assert documents[1]["state"] == "dead"
    assert "kvfs umount" in documents[1]["error"]
    assert run(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["ok", "2", "TiB", "4", "TiB", "24,690", "/mnt/kv"]
    assert lines[2].startswith("dead")
    assert f"the mount at {dead} is dead" in lines[2]


# --- blocks -----------------------------------------------------------------------------------


def test_info_json_has_the_documented_fields_first(
    mounted: Mounted, capsys: pytest.CaptureFixture[str]
) -> None:
    mounted.results["info"] = BLOCK
    name = os.fsdecode(b"m/\xff\n.bin")
    document = run_json(capsys, "info", f"{mounted.mountpoint}/{name}")
    assert list(document)[:9] == [
        *("path", "size_bytes", "tier", "replicas", "heat"),
        *("state", "pinned", "last_access", "why"),
    ]
    assert os.fsencode(document["path"]) == BLOCK["path"]
    assert {key: document[key] for key in BLOCK if key != "path"} == {
        key: value for key, value in BLOCK.items() if key != "path"
    }
    assert mounted.asked == [("info", {"path": BLOCK["path"]})]


def test_info_shows_a_name_that_no_terminal_can(
    mounted: Mounted, capsys: pytest.CaptureFixture[str]
) -> None:
    mounted.results["info"] = BLOCK
    assert run(["info", f"{mounted.mountpoint}/x"]) == 0
    shown = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    cells = {name: value.strip() for name, value in shown.items()}
    assert cells["path"] == r"m/\xff\n.bin"
    assert cells["replicas"] == "nvme, hdd (zstd)"
    assert cells["pinned"] == "to nvme"
    assert cells["why"] == BLOCK["why"]


def test_info_of_a_directory(mounted: Mounted, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = dict.fromkeys(("tier", "heat", "state", "pin", "checksum"))
    without = {"kind": "directory", "replicas": [], "codecs": [], "path": b""}
    directory = BLOCK | nothing | without
    mounted.results["info"] = directory
    assert run(["info", str(mounted.mountpoint)]) == 0
    assert "by a directory above it" in capsys.readouterr().out
    assert mounted.asked == [("info", {"path": b""})]


def test_ls_reads_every_page(mounted: Mounted, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"block{number:04}".encode() for number in range(2500)]

    def page(request: Request) -> Results:
        start, limit = request.args["after"] or 0, request.args["limit"]
        entries = [BLOCK | {"name": name} for name in names[start : start + limit]]
        end = start + len(entries)
        return {"entries": entries, "next": end if end < len(names) else None}

    mounted.results["ls"] = page
    directory = f"{mounted.mountpoint}/m"
    document = run_json(capsys, "ls", directory)
    assert document["path"] == "m"
    assert [entry["name"].encode() for entry in document["entries"]] == names
    assert len(run_json(capsys, "ls", directory, "--limit", "1200")["entries"]) == 1200
    assert run(["ls", directory]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(names)
    assert {line.index("block") for line in lines[1:]} == {lines[0].index("Name")}


def test_ls_of_an_empty_directory(mounted: Mounted, capsys: pytest.CaptureFixture[str]) -> None:
    mounted.results["ls"] = {"entries": [], "next": None}
    assert run_json(capsys, "ls", str(mounted.mountpoint)) == {"path": "", "entries": []}


def test_heat_lists_blocks(mounted: Mounted, capsys: pytest.CaptureFixture[str]) -> None:
    mounted.results["heat"] = {"blocks": [BLOCK]}
    assert run(["heat", str(mounted.mountpoint / "m"), "--coldest", "-n", "3"]) == 0
    assert mounted.asked == [("heat", {"path": b"m", "limit": 3, "coldest": True})]
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split()[:4] == ["2", "MiB", "1.75", "nvme,hdd"]
    assert line.endswith(r"m/\xff\n.bin")


def test_pin_and_unpin(mounted: Mounted, capsys: pytest.CaptureFixture[str]) -> None:
    mounted.results |= {"pin": {"changed": 2}, "unpin": {"changed": 1}}
    root = mounted.mountpoint
    assert run_json(capsys, "pin", f"{root}/a", f"{root}/b", "--tier", "nvme") == {"changed": 2}
    assert run(["unpin", f"{root}/a"]) == 0
    assert capsys.readouterr().out == "unpinned 1 of 1\n"
    assert mounted.asked == [
        ("pin", {"paths": [b"a", b"b"], "tier": "nvme"}),
        ("unpin", {"paths": [b"a"], "tier": None}),
    ]


def test_moves_report_what_they_did(mounted: Mounted, capsys: pytest.CaptureFixture[str]) -> None:
    done = {"moved": 3, "bytes": 6 * 2**20, "skipped": [], "skipped_count": 0}
    mounted.results |= {"promote": done, "demote": done}
    mounted.progress = [{"done": 1, "total": 3, "bytes": 2**21, "path": b"m/\xff"}]
    assert run(["promote", f"{mounted.mountpoint}/m", "--to", "nvme"]) == 0
    assert capsys.readouterr().out == "promoted 3 blocks (6 MiB)\n"
    assert run_json(capsys, "demote", f"{mounted.mountpoint}/m") == done
    assert mounted.asked == [
        ("promote", {"paths": [b"m"], "to": "nvme"}),
        ("demote", {"paths": [b"m"], "to": None}),
    ]


def test_skipped_blocks_are_named_and_fail(
    mounted: Mounted, capsys: pytest.CaptureFixture[str]
) -> None:
    skipped = [{"path": f"b{number}".encode(), "reason": "open"} for number in range(7)]
    mounted.results["evict"] = {"evicted": 1, "bytes": 10, "skipped": skipped, "skipped_count": 7}
    assert run(["evict", f"{mounted.mountpoint}/m"]) == 1
    shown = capsys.readouterr()
    assert shown.out == "evicted 1 block (10 B), 7 skipped\n"
    lines = shown.err.splitlines()
    assert lines[0] == "kvfs: skipped b0: open"
    assert len(lines) == 6
    assert lines[5].startswith("kvfs: skipped 2 more")


# --- match ------------------------------------------------------------------------------------


@pytest.fixture
def cached(mounted: Mounted) -> Path:
    """A directory of the mount with blocks 0, 1, 2 and 4 of the prompt 0, 1, 2, ... 21."""
    directory = mounted.mountpoint / "mine"
    paths = block_paths(KvfsScheme(4, "model"), os.fsencode(directory), range(22))
    for number, path in enumerate(paths):
        if number != 3:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Path(os.fsdecode(path)).touch()
            if number != 1:
                os.setxattr(path, "user.kvfs.tier", b"hdd" if number else b"nvme")

    def lookup(request: Request) -> Results:
        there = [os.path.exists(mounted.mountpoint / os.fsdecode(p)) for p in request.args["paths"]]
        found = [*there, False].index(False)
        at = bytes([0, 1, 1, 1, 1][:found])
        return {"found": found, "stopped": "missing", "tiers": ["nvme", "hdd"], "at": at}

    mounted.results["lookup"] = lookup
    return directory


def matching(namespace: Path, tokens: Path | str) -> list[str]:
    options = ["--scheme", "kvfs", "--fingerprint", "model", "--block-tokens", "4"]
    return ["match", str(tokens), "--namespace", str(namespace), *options]


@pytest.mark.parametrize("text", ["[{}]", "{}\n", " {},\n"])
def test_match_ends_at_the_first_block_that_is_missing(
    cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    file = tmp_path / "tokens"
    separator = " " if text.endswith("}\n") else ", "
    file.write_text(text.format(separator.join(map(str, range(22)))))
    fourth = list(block_paths(KvfsScheme(4, "model"), b"mine", range(22)))[3]
    document = run_json(capsys, *matching(cached, file))
    assert document == {
        "scheme": "kvfs",
        "namespace": "mine",
        "block_tokens": 4,
        "tokens": 22,
        "blocks": 5,
        "hit_tokens": 12,
        "hit_blocks": 3,
        "tiers": [
            {"tier": "nvme", "blocks": 1, "tokens": 4},
            {"tier": "hdd", "blocks": 2, "tokens": 8},
        ],
        "first_missing": fourth.decode(),
    }
    assert run(matching(cached, file)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "12 of 22 tokens are cached: 3 of 5 blocks of 4 tokens"
    assert [line.split() for line in lines[2:4]] == [["nvme", "1", "4"], ["hdd", "2", "8"]]
    assert lines[4] == f"the first that is not: {fourth.decode()}"


def test_match_looks_for_the_files_where_the_daemon_cannot_be_asked(
    cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, expect_log: list[str],
) -> None:  # fmt: skip
    expect_log.append("plain files of .* are used instead")
    monkeypatch.setenv(control.SOCKET_ENV, str(tmp_path / "nowhere"))
    file = tmp_path / "tokens"
    file.write_text(" ".join(map(str, range(22))))
    found = run_json(capsys, *matching(cached, file))
    assert [row["tier"] for row in found["tiers"]] == ["nvme", None, "hdd"]
    assert found["hit_blocks"] == 3


def test_match_of_nothing_and_of_everything(
    cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tokens"
    file.write_text("1 2 3 4")
    assert run(matching(cached, file)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "0 of 4 tokens are cached: 0 of 1 blocks of 4 tokens"
    assert len(lines) == 2
    file.write_text("0 1 2 3 9")
    assert run_json(capsys, *matching(cached, file))["first_missing"] is None
    file.write_text("")
    assert run_json(capsys, *matching(cached, file))["blocks"] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 two 3", "'two' is not a token id"),
        ("1 -2", "'-2' is not a token id"),
        ("1 2.0", "'2.0' is not a token id"),
        ("9" * 5000, f"'{'9' * 40}' is not a token id"),
        ("[1, 2", "begins like a JSON list"),
        ("[" * 100_000, "begins like a JSON list"),
        ('[1, "2", 3, 4]', "'2' is not a token id"),
        ("[1, 2, 3, 4294967296]", "above the largest token id"),
    ],
)
def test_match_refuses_what_are_no_tokens(
    cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    file = tmp_path / "tokens"
    file.write_text(text)
    assert run(matching(cached, file)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_match_needs_a_directory_and_a_file(
    cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(matching(cached / "missing", tmp_path / "tokens")) == 8
    assert run(matching(cached, tmp_path / "tokens")) == 8
    (tmp_path / "mnt/file").touch()
    assert run(matching(tmp_path / "mnt/file", tmp_path / "tokens")) == 2
    assert [line.split(": ")[-1] for line in capsys.readouterr().err.splitlines()] == [
        "No such file or directory",
        "No such file or directory",
        "name the directory of the engine's blocks",
    ]


def test_match_reads_tokens_from_stdin(
    cached: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"0 1 2 3 4")))
    assert run_json(capsys, *matching(cached, "-"))["hit_tokens"] == 4


# --- tiers, fsck, configuration ---------------------------------------------------------------


def test_tier_run_shows_the_plan(mounted: Mounted, capsys: pytest.CaptureFixture[str]) -> None:
    move = {
        "kind": "evict",
        "path": b"m/x",
        "size_bytes": 2**20,
        "source": "hdd",
        "target": None,
        "reason": "coldest",
    }
    mounted.results["tier_run"] = {"moves": [move], "notes": ["hdd stays full"], "planning_s": 0.01}
    assert run(["tier", "run", "--dry-run"]) == 0
    assert mounted.asked == [("tier_run", {"dry_run": True})]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["evict", "hdd", "1", "MiB", "coldest", "m/x"]
    assert lines[2:] == ["hdd stays full", "1 moves planned, 1 MiB, in 10.0 ms"]


def test_tier_run_sums_up_a_longer_plan(
    mounted: Mounted, capsys: pytest.CaptureFixture[str]
) -> None:
    move = {"path": b"m/x", "size_bytes": 2**20, "reason": "coldest"}
    down = {**move, "kind": "demote", "source": "nvme", "target": "hdd"}
    gone = {**move, "kind": "drop", "source": "nvme", "target": None}
    mounted.results["tier_run"] = {"moves": [down, gone, down], "notes": [], "planning_s": 0.01}
    assert run(["tier", "run", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[4:6] == ["demote nvme -> hdd: 2, 2 MiB", "drop nvme: 1, 1 MiB"]


def test_drain_fails_while_blocks_remain(
    mounted: Mounted, capsys: pytest.CaptureFixture[str]
) -> None:
    mounted.results["tier_drain"] = {"moved": 5, "bytes": 2**20, "remaining": 2, "skipped": []}
    assert run(["tier", "drain", "hdd"]) == 1
    shown = capsys.readouterr()
    assert shown.out == "moved 5 blocks (1 MiB) off hdd\n"
    assert "2 blocks left on hdd" in shown.err
    mounted.results["tier_drain"] = {"moved": 2, "bytes": 2**19, "remaining": 0, "skipped": []}
    assert run(["tier", "drain", "hdd"]) == 0


def test_tier_init_makes_a_tier_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old.bin").write_bytes(b"x")
    assert run(["tier", "init", str(tmp_path)]) == 4
    assert "--adopt" in capsys.readouterr().err
    assert run(["tier", "init", str(tmp_path), "--adopt"]) == 0
    assert (tmp_path / ".kvfs" / "tier.json").exists()
    assert run(["tier", "init", str(tmp_path)]) == 4


def test_fsck_exit_codes(mounted: Mounted, capsys: pytest.CaptureFixture[str]) -> None:
    finding = {"kind": "lost", "path": b"m/x", "tier": "hdd", "detail": "gone", "repaired": False}
    mounted.results["fsck"] = {"findings": [], "checked": 1234}
    assert run(["fsck"]) == 0
    assert capsys.readouterr().out == "checked 1,234: clean\n"
    mounted.results["fsck"] = {"findings": [finding], "checked": 1}
    assert run(["fsck"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["lost", "hdd", "no", "gone", "m/x"]
    mounted.results["fsck"] = {"findings": [finding | {"repaired": True}], "checked": 1}
    assert run(["fsck", "--repair"]) == 0
    assert [args for _, args in mounted.asked] == [
        {"repair": False},
        {"repair": False},
        {"repair": True},
    ]


SCRUBBED = {
    "checked": 1234, "bytes": 2**30, "bad": 0, "unreadable": 0, "resumed": False, "named": [],
    "offline": [],
}  # fmt: skip


def test_scrub_says_what_it_found(mounted: Mounted, capsys: pytest.CaptureFixture[str]) -> None:
    mounted.results["scrub"] = SCRUBBED
    assert run(["scrub"]) == 0
    assert capsys.readouterr().out == "scrubbed 1,234 copies, read 1 GiB: all sound\n"
    named = [{"path": b"m/x", "tier": "hdd", "what": "it has not the checksum"}]
    found = {"bad": 1, "unreadable": 2, "resumed": True, "named": named, "offline": ["remote"]}
    mounted.results["scrub"] = SCRUBBED | found
    assert run(["scrub", str(mounted.mountpoint / "m")]) == 1
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[1].split() == ["hdd", "it", "has", "not", "the", "checksum", "m/x"]
    assert lines[2].startswith("scrubbed 1,234 copies (with what an earlier scrub had checked)")
    assert "1 bad: `kvfs quarantine` lists them, 2 unreadable: check the disk" in lines[2]
    assert shown.err == "kvfs: tier remote is offline: not scrubbed\n"


@pytest.mark.parametrize(
    ("options", "args"),
    [
        ([], {"tier": None, "rate": 0, "restart": False}),
        (["--rate", "100MiB/s"], {"tier": None, "rate": 100 * 2**20, "restart": False}),
        (["--rate", "5000"], {"tier": None, "rate": 5000, "restart": False}),
        (["--tier", "hdd", "--restart"], {"tier": "hdd", "rate": 0, "restart": True}),
    ],
)
def test_scrub_asks_for_what_was_given(
    mounted: Mounted, options: list[str], args: dict[str, Any]
) -> None:
    mounted.results["scrub"] = SCRUBBED
    assert run(["scrub", str(mounted.mountpoint / "m/x"), *options, "--json"]) == 0
    assert mounted.asked == [("scrub", {**args, "path": b"m/x"})]


def test_the_quarantine_is_listed_and_purged(
    mounted: Mounted, capsys: pytest.CaptureFixture[str]
) -> None:
    file = {"tier": "hdd", "name": b"1.size.x", "path": b"m/x", "reason": "size",
            "size_bytes": 4096, "at": 0.0}  # fmt: skip
    mounted.results["quarantine"] = {"files": [file], "bytes": 4096}
    assert run(["quarantine"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[0] == "hdd"
    assert lines[1].split()[-4:] == ["size", "4", "KiB", "m/x"]
    assert lines[2] == "1 files, 4 KiB"
    assert run(["quarantine", "--tier", "hdd", "--purge"]) == 0
    assert capsys.readouterr().out.endswith("1 files, 4 KiB removed\n")
    assert [args for _, args in mounted.asked] == [
        {"tier": None, "purge": False},
        {"tier": "hdd", "purge": True},
    ]


def test_config_show_uses_the_units_of_the_file(
    mounted: Mounted, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "source": "kvfs.toml",
        "tier": [
            {
                "name": "nvme",
                "path": "/a",
                "medium": "nvme",
                "capacity": 2**41,
                "concurrency": 8,
                "deadline": 5.0,
            }
        ],
        "tiering": {"half_life": 120.0, "promote_bandwidth": 2**28, "keep": ["a", "b"]},
        "mount": {"allow_other": True, "entry_timeout": 3600.0, "catalog": None},
    }
    mounted.results["config"] = config
    assert run_json(capsys, "config", "show") == config
    assert run(["config", "show"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["nvme", "nvme", "2", "TiB", "8", "5s", "/a"] in rows
    assert ["half_life", "2m"] in rows
    assert ["promote_bandwidth", "256", "MiB"] in rows
    assert ["allow_other", "true"] in rows


def test_config_reload_says_what_waits(
    mounted: Mounted, capsys: pytest.CaptureFixture[str]
) -> None:
    mounted.results["reload"] = {"applied": ["tiering.keep"], "needs_remount": ["mount.fsname"]}
    assert run(["config", "reload"]) == 0
    assert capsys.readouterr().out == "applied: tiering.keep\nneeds a new mount: mount.fsname\n"
