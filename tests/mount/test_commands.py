"""The installed command against a real mount: exit codes, field names, and what orders do."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvfs.prefix import VllmScheme, block_paths
from tests.mount.live import MIB, below, call, publish, replicas, wait_sealed
from tests.mounting import MountedKvfs, run_kvfs, wait_until

STATUS_FIELDS = {
    "version", "mountpoint", "pid", "started_at", "uptime_s", "state", "socket", "on_full",
    "half_life_s", "blocks", "directories", "unsealed", "tiers", "moves", "seal",
    "scrub", "counters",
}  # fmt: skip
TIER_FIELDS = {
    "name", "medium", "path", "uuid", "capacity_bytes", "used_bytes", "reserved_bytes",
    "held_bytes", "quarantine_bytes", "quarantine_files", "saved_bytes", "free_bytes", "blocks",
    "state", "opens", "hit_share", "bytes_read",
    "bytes_written", "promotions", "demotions", "evictions", "moved_in_bytes", "moved_out_bytes",
}  # fmt: skip
INFO_FIELDS = [
    "path", "size_bytes", "tier", "replicas", "heat", "state", "pinned", "last_access", "why",
]  # fmt: skip


def shown(*arguments: object) -> Any:
    """What a read verb prints with `--json`."""
    return json.loads(run_kvfs(*arguments, "--json").stdout)


def refused(code: int, *arguments: object) -> str:
    """The one line that a refused command says."""
    done = run_kvfs(*arguments, check=False)
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.semantics("S-command-1")
def test_field_names_of_the_read_verbs(shared: MountedKvfs, there: Path) -> None:
    path = publish(there / "block", os.urandom(MIB))
    wait_sealed(path)
    status = shown("status", shared.path)
    assert set(status) >= STATUS_FIELDS
    assert all(set(tier) >= TIER_FIELDS for tier in status["tiers"])
    assert set(status) == set(json.loads((shared.path / ".kvfs/stats").read_bytes()))
    block = shown("info", path)
    assert list(block)[: len(INFO_FIELDS)] == INFO_FIELDS
    assert block["path"] == f"{there.name}/block"
    assert block["size_bytes"] == MIB
    assert block["replicas"] == ["nvme"]
    assert block["why"]
    listed = shown("ls", there)
    assert [entry["name"] for entry in listed["entries"]] == ["block"]
    assert set(INFO_FIELDS) - {"why"} <= set(listed["entries"][0])
    assert [block["path"] for block in shown("heat", there)["blocks"]] == [f"{there.name}/block"]
    assert [tier["name"] for tier in shown("tier", "list", shared.path)["tiers"]] == [
        "nvme", "hdd", "remote",
    ]  # fmt: skip
    assert set(shown("tier", "run", shared.path, "--dry-run")) == {"moves", "notes", "planning_s"}
    assert set(shown("fsck", shared.path)) == {"findings", "checked"}


@pytest.mark.semantics("S-command-2")
def test_orders_do_what_they_say(shared: MountedKvfs, there: Path) -> None:
    blocks = [publish(there / f"{n}", os.urandom(1000)) for n in range(3)]
    moved = shown("demote", there, "--to", "remote")
    assert (moved["moved"], moved["bytes"] > 0, moved["skipped"]) == (3, True, [])
    assert all(replicas(path) == ["remote"] for path in blocks)
    assert shown("promote", blocks[0])["moved"] == 1
    assert replicas(blocks[0]) == ["hdd", "remote"]
    assert shown("promote", blocks[0], "--to", "nvme")["moved"] == 1
    assert replicas(blocks[0]) == ["nvme", "hdd", "remote"]
    assert shown("pin", blocks[1], "--tier", "hdd") == {"changed": 1}
    assert "hdd" in replicas(blocks[1])
    assert os.getxattr(blocks[1], "user.kvfs.pin") == b"hdd"
    kept = run_kvfs("evict", there, "--json", check=False)
    assert kept.returncode == 1
    assert json.loads(kept.stdout)["evicted"] == 2
    assert "it is pinned" in kept.stderr
    assert os.listdir(there) == ["1"]
    run_kvfs("unpin", blocks[1])
    assert shown("evict", blocks[1])["evicted"] == 1
    wait_until(lambda: os.listdir(there) == [], "all gone")


def test_match_says_what_a_prompt_would_hit(
    shared: MountedKvfs, there: Path, tmp_path: Path
) -> None:
    """Names as vLLM gives them: three of four chunks are there, one of them on another tier."""
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps(list(range(35))))
    scheme = VllmScheme(4, "sha256_cbor", seed="7", blocks_per_chunk=2)
    paths = list(block_paths(scheme, below(shared, there), range(35)))
    for path in (paths[0], paths[1], paths[3]):
        block = shared.path / os.fsdecode(path)
        block.parent.mkdir(parents=True)
        wait_sealed(publish(block, os.urandom(1000)))
    run_kvfs("demote", shared.path / os.fsdecode(paths[1]), "--to", "hdd")
    question = [
        *("match", tokens, "--scheme", "vllm-sha256_cbor", "--namespace", there, "--seed", "7"),
        *("--block-tokens", "4", "--blocks-per-chunk", "2"),
    ]
    assert shown(*question) == {
        "scheme": "vllm-sha256_cbor",
        "namespace": there.name,
        "block_tokens": 8,
        "tokens": 35,
        "blocks": 4,
        "hit_tokens": 16,
        "hit_blocks": 2,
        "tiers": [{"tier": tier, "blocks": 1, "tokens": 8} for tier in ("nvme", "hdd")],
        "first_missing": os.fsdecode(paths[2]),
    }
    assert shown(*question, "--salt", "a tenant's")["hit_blocks"] == 0
    assert call(shared, "info", path=paths[0])["heat"] <= 1  # asking is no access


@pytest.mark.semantics("S-command-3")
def test_exit_codes_of_bad_paths(shared: MountedKvfs, there: Path) -> None:
    missing = there / "missing"
    assert "no such block" in refused(8, "info", missing)
    assert "no such block" in refused(8, "ls", missing)
    assert "no such block" in refused(8, "pin", missing)
    assert "no such block" in refused(8, "demote", missing)
    assert "no such block" in refused(8, "evict", missing)
    for verb in ("info", "pin", "status"):
        assert "not inside a kvfs mount" in refused(5, verb, shared.path.parent)
    assert "no tier is called" in refused(4, "demote", there, "--to", "tape")
    assert "no tier is called" in refused(4, "tier", "drain", "tape", shared.path)
    assert "no tier is called" in refused(4, "scrub", shared.path, "--tier", "tape")
    assert "no such block" in refused(8, "scrub", missing)
    assert refused(2, "status", "--no-such-option")
    assert refused(3, "config", "check", there)
    assert "no such directory" in refused(4, "tier", "init", shared.path.parent / "missing")
    assert "is a kvfs tier already" in refused(4, "tier", "init", shared.tiers["hdd"])


@pytest.mark.semantics("S-command-3")
def test_a_stranger_may_ask_but_not_order(shared: MountedKvfs, there: Path) -> None:
    path = publish(there / "block", b"x")
    wait_sealed(path)
    script = (
        "import os, sys\n"
        "from kvfs.control import ControlClient\n"
        "from kvfs.errors import KvfsError\n"
        "from pathlib import Path\n"
        "os.setgid(54321); os.setgroups([]); os.setuid(54321)\n"
        "with ControlClient(Path(sys.argv[1])) as client:\n"
        "    assert client.call('info', {'path': sys.argv[2].encode()})['state'] == 'sealed'\n"
        "    for verb in ('evict', 'pin', 'demote'):\n"
        "        try: client.call(verb, {'paths': [sys.argv[2].encode()]})\n"
        "        except KvfsError as error: assert error.exit_code == 9, error\n"
        "        else: sys.exit(f'{verb} was allowed')\n"
        "    for verb, args in (('tier_drain', {'name': 'nvme'}), ('reload', {}), ('fsck', {}),\n"
        "                       ('scrub', {}), ('quarantine', {})):\n"
        "        try: client.call(verb, args)\n"
        "        except KvfsError as error: assert error.exit_code == 9, error\n"
        "        else: sys.exit(f'{verb} was allowed')\n"
    )
    name = os.fsdecode(below(shared, path))
    command = [sys.executable, "-c", script, call(shared, "status")["socket"], name]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert path.exists()


# --- the control socket

RESPONSE_S = 10.0


@pytest.fixture
def connection(shared: MountedKvfs) -> Iterator[socket.socket]:
    """A connection to the daemon, without our own client's manners."""
    path = os.getxattr(shared.path, "user.kvfs.socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as made:
        made.settimeout(RESPONSE_S)
        made.connect(path)
        yield made


MALFORMED = [
    b"\x00",
    b"not msgpack at all",
    b"\xff" * 60_000,
    msgspec.msgpack.encode([1, 2, 3]),
    msgspec.msgpack.encode({"v": 99, "id": 1, "verb": "status", "args": {}}),
    msgspec.msgpack.encode({"v": 1, "id": 1, "verb": "status", "args": {}, "extra": 1}),
    msgspec.msgpack.encode({"v": 1, "id": "one", "verb": "status", "args": {}}),
    msgspec.msgpack.encode({"v": 1, "id": 1, "result": {}}),
    msgspec.msgpack.encode({"v": 1, "body_bytes": 1 << 40}),
]


@pytest.mark.semantics("S-control-4")
@pytest.mark.parametrize("message", MALFORMED)
def test_a_malformed_message_costs_only_its_connection(
    shared: MountedKvfs, connection: socket.socket, message: bytes
) -> None:
    connection.send(message)
    answer = msgspec.msgpack.decode(connection.recv(1 << 16))
    assert answer["error"]["exit_code"] == 2
    assert connection.recv(1 << 16) == b""
    assert call(shared, "status")["state"] == "ok"


@pytest.mark.semantics("S-control-4")
def test_an_oversized_message_costs_only_its_connection(
    shared: MountedKvfs, connection: socket.socket
) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    connection.send(b"x" * (150 << 10))
    answer = msgspec.msgpack.decode(connection.recv(1 << 16))
    assert answer["error"]["exit_code"] == 2
    assert connection.recv(1 << 16) == b""
    assert call(shared, "status")["state"] == "ok"


@pytest.mark.semantics("S-control-4")
def test_a_descriptor_nobody_asked_for_is_refused_and_closed(
    shared: MountedKvfs, connection: socket.socket
) -> None:
    pid = int(call(shared, "status")["pid"])
    before = len(os.listdir(f"/proc/{pid}/fd"))
    message = msgspec.msgpack.encode({"v": 1, "id": 1, "verb": "status", "args": {}})
    with open("/dev/null", "rb") as file:
        rights = struct.pack("i", file.fileno())
        connection.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    assert "error" in msgspec.msgpack.decode(connection.recv(1 << 16))
    connection.close()
    wait_until(lambda: len(os.listdir(f"/proc/{pid}/fd")) <= before, "descriptors closed")


@pytest.mark.semantics("S-control-4")
@pytest.mark.parametrize(
    ("verb", "args"),
    [
        ("info", {}), ("info", {"path": 7}), ("info", {"path": None}),
        ("ls", {"path": b"", "limit": "x"}), ("pin", {"paths": 3}),
        ("demote", {"paths": [b""], "to": 9}), ("nonsense", {}), ("__init__", {}),
        ("tier_drain", {}),
    ],
)  # fmt: skip
def test_bad_arguments_are_answered_and_the_connection_goes_on(
    connection: socket.socket, verb: str, args: dict[str, object]
) -> None:
    for request in ({"verb": verb, "args": args}, {"verb": "status", "args": {}}):
        connection.send(msgspec.msgpack.encode({"v": 1, "id": 5, **request}))
        answer = msgspec.msgpack.decode(connection.recv(1 << 16))
        assert answer["id"] == 5
    assert answer["result"]["state"] == "ok"
