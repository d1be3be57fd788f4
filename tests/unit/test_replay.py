"""The replay against plain directories: what it stores, compares and calls a failure."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from kvfs.errors import DaemonUnavailable, MountpointError, UsageError
from kvfs.tools import replay_cmd
from kvfs.tools.mount_stats import activity, read_stats, stats_file
from kvfs.tools.replay import (
    BlockDirectory,
    BlockMismatch,
    BlockPattern,
    Replay,
    ReplaySettings,
    Tally,
)
from kvfs.tools.trace import Request, chat_workload

# More than one piece of a comparison, and the last one is not full.
BLOCK_BYTES = (128 << 10) + 4096
CHAIN = (10, 11, 12, 13)


def requests_of(*chains: tuple[int, ...]) -> list[Request]:
    return [Request(0, 512 * len(chain), 1, chain) for chain in chains]


def play(root: Path, *chains: tuple[int, ...], **options: Any) -> tuple[Tally, Replay]:
    replay = Replay(
        BlockDirectory(root, BLOCK_BYTES),
        requests_of(*chains),
        ReplaySettings(**{"workers": 1, **options}),
    )
    return replay.run(), replay


def block_path(root: Path, hash_id: int) -> Path:
    return Path(BlockDirectory(root, BLOCK_BYTES).path_of(hash_id))


def leftovers(root: Path) -> list[Path]:
    return list(root.rglob("*.tmp"))


@pytest.mark.parametrize("block_bytes", [4096, 65536, 69632, 262144])
def test_content_is_a_function_of_id_and_size(block_bytes: int) -> None:
    pattern = BlockPattern(block_bytes)
    blocks = [pattern.content(hash_id) for hash_id in range(200)]
    assert {len(block) for block in blocks} == {block_bytes}
    again = BlockPattern(block_bytes)
    assert blocks == [again.content(hash_id) for hash_id in range(200)]
    pages = [block[at : at + 4096] for block in blocks for at in range(0, block_bytes, 4096)]
    assert len(set(pages)) == len(pages)


@pytest.mark.parametrize("block_bytes", [0, 100, 5000, -4096])
def test_a_block_size_that_is_not_whole_pages_is_refused(tmp_path: Path, block_bytes: int) -> None:
    with pytest.raises(UsageError, match="multiple of 4096"):
        BlockDirectory(tmp_path, block_bytes)


def test_a_root_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MountpointError):
        BlockDirectory(tmp_path / "missing", BLOCK_BYTES)


def test_first_run_stores_second_run_loads(tmp_path: Path) -> None:
    first, _ = play(tmp_path, CHAIN)
    assert (first.blocks, first.hits, first.loaded, first.stored) == (4, 0, 0, 4)
    assert first.bytes_written == 4 * BLOCK_BYTES
    second, replay = play(tmp_path, CHAIN)
    assert (second.hits, second.loaded, second.stored, second.present) == (4, 4, 0, 0)
    assert second.bytes_read == second.bytes_compared == 4 * BLOCK_BYTES
    assert (second.failures, replay.first_failure, replay.stop_reason) == (0, None, "end of trace")
    assert not leftovers(tmp_path)


def test_the_layout_is_vllms(tmp_path: Path) -> None:
    play(tmp_path, (5,))
    [block] = tmp_path.rglob("*.bin")
    model, three, two, name = block.relative_to(tmp_path).parts
    digest = name.removesuffix(".bin")
    assert len(digest) == 64
    assert (three, two) == (digest[:3], f"{digest[3:5]}_g0")
    assert model.endswith("_r0")
    assert (tmp_path / model.removesuffix("_r0") / "config.json").is_file()
    assert block.read_bytes() == BlockPattern(BLOCK_BYTES).content(5)


def test_loading_stops_at_the_first_miss_and_stores_only_what_is_missing(tmp_path: Path) -> None:
    play(tmp_path, CHAIN)
    block_path(tmp_path, CHAIN[1]).unlink()
    tally, _ = play(tmp_path, CHAIN)
    assert (tally.hits, tally.loaded, tally.stored, tally.present) == (1, 1, 1, 2)


@settings(max_examples=30, deadline=None)
@given(offset=st.integers(0, BLOCK_BYTES - 1), flip=st.integers(1, 255))
def test_one_wrong_byte_anywhere_is_a_failure(
    tmp_path_factory: pytest.TempPathFactory, offset: int, flip: int
) -> None:
    root = tmp_path_factory.mktemp("flip")
    play(root, CHAIN)
    path = block_path(root, CHAIN[2])
    data = bytearray(path.read_bytes())
    data[offset] ^= flip
    path.write_bytes(data)
    tally, replay = play(root, CHAIN)
    assert (tally.failures, tally.loaded) == (1, 2)
    assert tally.bytes_read == tally.bytes_compared == 3 * BLOCK_BYTES
    assert replay.first_failure is not None
    assert replay.first_failure.path == str(path)
    assert f"offset {offset} " in replay.first_failure.reason


def test_the_content_of_another_block_is_a_failure(tmp_path: Path) -> None:
    play(tmp_path, CHAIN)
    other = block_path(tmp_path, CHAIN[1]).read_bytes()
    block_path(tmp_path, CHAIN[0]).write_bytes(other)
    tally, _ = play(tmp_path, CHAIN)
    assert tally.failures == 1


@pytest.mark.parametrize("length", [0, 4096, BLOCK_BYTES - 1])
def test_a_short_read_is_a_failure(tmp_path: Path, length: int) -> None:
    play(tmp_path, CHAIN)
    os.truncate(block_path(tmp_path, CHAIN[0]), length)
    tally, replay = play(tmp_path, CHAIN)
    assert (tally.failures, tally.bytes_compared, tally.bytes_read) == (1, 0, length)
    assert replay.first_failure is not None
    assert "short read" in replay.first_failure.reason


def test_bytes_of_an_earlier_load_do_not_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(tmp_path, CHAIN)
    directory = BlockDirectory(tmp_path, BLOCK_BYTES)
    buffer = directory.new_buffer()
    assert directory.load(CHAIN[0], buffer)
    monkeypatch.setattr(os, "readv", lambda _file, buffers: len(buffers[0]))
    with pytest.raises(BlockMismatch, match="wrong bytes"):
        directory.load(CHAIN[0], buffer)


def failing(
    call: Callable[..., Any], number: int, applies: Callable[..., bool]
) -> Callable[..., Any]:
    """`call`, except that it fails with `number` where `applies` says so."""

    def instead(*args: Any, **kwargs: Any) -> Any:
        if applies(*args):
            raise OSError(number, os.strerror(number))
        return call(*args, **kwargs)

    return instead


def reads_block(path: object, flags: int, *_: object) -> bool:
    return str(path).endswith(".bin") and not flags & os.O_WRONLY


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE])
def test_a_block_evicted_after_the_lookup_is_a_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    play(tmp_path, CHAIN)
    monkeypatch.setattr(os, "open", failing(os.open, number, reads_block))
    tally, _ = play(tmp_path, CHAIN)
    assert (tally.hits, tally.lost, tally.loaded, tally.failures) == (4, 1, 0, 0)


def test_an_io_error_on_load_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(tmp_path, CHAIN)
    monkeypatch.setattr(os, "open", failing(os.open, errno.EIO, reads_block))
    tally, replay = play(tmp_path, CHAIN)
    assert (tally.failures, tally.bytes_compared) == (1, 0)
    assert replay.first_failure is not None
    assert replay.first_failure.reason == os.strerror(errno.EIO)


@pytest.mark.parametrize("name", ["write", "rename"])
def test_a_store_without_space_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def is_block(*args: Any) -> bool:
        return name == "rename" or len(args[1]) == BLOCK_BYTES

    monkeypatch.setattr(os, name, failing(getattr(os, name), errno.ENOSPC, is_block))
    tally, replay = play(tmp_path, CHAIN, max_written_bytes=BLOCK_BYTES)
    assert (tally.refused, tally.stored, tally.failures, tally.bytes_written) == (4, 0, 0, 0)
    assert replay.stop_reason == "end of trace"
    assert not leftovers(tmp_path)


def test_a_short_write_is_refused_and_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", lambda _file, data: len(data) // 2)
    tally, _ = play(tmp_path, CHAIN)
    assert (tally.refused, tally.stored, tally.failures) == (4, 0, 0)
    assert not list(tmp_path.rglob("*.bin"))


def test_any_other_error_on_store_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "rename", failing(os.rename, errno.EIO, lambda *_: True))
    tally, replay = play(tmp_path, CHAIN)
    assert (tally.failures, tally.stored) == (4, 0)
    assert replay.first_failure is not None
    assert replay.first_failure.path == str(block_path(tmp_path, CHAIN[0]))


def test_refused_direct_io_falls_back_to_buffered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def direct(_path: object, flags: int, *_: object) -> bool:
        return bool(flags & os.O_DIRECT)

    monkeypatch.setattr(os, "open", failing(os.open, errno.EINVAL, direct))
    tally, replay = play(tmp_path, CHAIN, CHAIN)
    assert not replay.directory.direct
    assert (tally.stored, tally.loaded, tally.failures) == (4, 4, 0)
    assert not leftovers(tmp_path)


def test_workers_that_store_one_block_at_once_all_succeed(tmp_path: Path) -> None:
    directory = BlockDirectory(tmp_path, BLOCK_BYTES)
    directory.prepare()
    together = threading.Barrier(8)

    def store() -> None:
        with directory.new_buffer() as buffer:
            together.wait()
            for hash_id in range(20):
                directory.store(hash_id, buffer)

    with ThreadPoolExecutor(8) as pool:
        for worker in [pool.submit(store) for _ in range(8)]:
            worker.result()
    assert len(list(tmp_path.rglob("*.bin"))) == 20
    assert not leftovers(tmp_path)
    with directory.new_buffer() as buffer:
        assert all(directory.load(hash_id, buffer) for hash_id in range(20))


def test_a_workload_with_several_workers_compares_every_byte(tmp_path: Path) -> None:
    requests = chat_workload(3, 12)
    run = Replay(BlockDirectory(tmp_path, BLOCK_BYTES), requests, ReplaySettings(workers=4))
    tally = run.run()
    assert tally.requests == len(requests)
    assert tally.blocks == sum(len(request.hash_ids) for request in requests)
    assert tally.loaded + tally.stored + tally.present == tally.blocks
    assert tally.bytes_compared == tally.bytes_read == tally.loaded * BLOCK_BYTES > 0


def test_the_byte_budget_is_never_exceeded(tmp_path: Path) -> None:
    budget = 5 * BLOCK_BYTES + 1
    tally, replay = play(
        tmp_path, *[(n, n + 1000) for n in range(20)], workers=4, max_written_bytes=budget
    )
    assert replay.stop_reason == "byte budget"
    assert tally.bytes_written == 5 * BLOCK_BYTES
    assert len(list(tmp_path.rglob("*.bin"))) == 5


def test_the_time_budget_ends_a_wait_for_the_next_request(tmp_path: Path) -> None:
    requests = [Request(0, 512, 1, (1,)), Request(3_600_000, 512, 1, (2,))]
    options = ReplaySettings(workers=2, speed_up=1.0, max_seconds=0.05)
    replay = Replay(BlockDirectory(tmp_path, BLOCK_BYTES), requests, options)
    assert replay.run().requests == 1
    assert replay.stop_reason == "time budget"


def test_a_speed_up_keeps_requests_apart(tmp_path: Path) -> None:
    requests = [Request(0, 512, 1, (1,)), Request(100_000, 512, 1, (2,))]
    options = ReplaySettings(workers=1, speed_up=1000.0)
    replay = Replay(BlockDirectory(tmp_path, BLOCK_BYTES), requests, options)
    assert replay.run().requests == 2
    assert replay.elapsed_s >= 0.1


def test_an_error_in_the_trace_ends_all_workers(tmp_path: Path) -> None:
    def broken() -> Iterator[Request]:
        yield from requests_of(CHAIN)
        raise UsageError("line 2 is not a trace request")

    replay = Replay(BlockDirectory(tmp_path, BLOCK_BYTES), broken(), ReplaySettings(workers=4))
    with pytest.raises(UsageError, match="line 2"):
        replay.run()


def test_an_interrupt_stops_the_workers(tmp_path: Path) -> None:
    def interrupted(tally: Tally, elapsed_s: float) -> None:
        raise KeyboardInterrupt

    endless = (Request(0, 512, 1, (1,)) for _ in iter(int, 1))
    replay = Replay(BlockDirectory(tmp_path, BLOCK_BYTES), endless, ReplaySettings(workers=2))
    with pytest.raises(KeyboardInterrupt):
        replay.run(interrupted, every_s=0.01)
    assert replay.stop_reason == "stopped"


@pytest.mark.parametrize("options", [{"workers": 0}, {"speed_up": 0.0}, {"speed_up": -2.0}])
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, options: Any) -> None:
    with pytest.raises(UsageError):
        play(tmp_path, CHAIN, **options)


# The command


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    line = {"timestamp": 0, "input_length": 2048, "output_length": 1, "hash_ids": CHAIN}
    path.write_text("".join(json.dumps(line) + "\n" for _ in range(3)))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    path.mkdir()
    return path


def invoke(*arguments: str | Path) -> Any:
    app = typer.Typer()
    app.callback()(lambda: None)
    replay_cmd.register(app)
    return CliRunner().invoke(app, ["replay", *map(str, arguments), "--workers", "1"])


def test_command_reports_json_on_a_plain_directory(trace: Path, root: Path) -> None:
    result = invoke(trace, root, "--block-size", str(BLOCK_BYTES), "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert (report["kind"], report["tiers"], report["passed"]) == ("plain directory", [], True)
    assert (report["requests"], report["loaded"], report["stored"]) == (3, 8, 4)
    assert report["bytes_compared"] == report["bytes_read"] == 8 * BLOCK_BYTES


def test_command_takes_the_first_requests_only(trace: Path, root: Path) -> None:
    result = invoke(trace, root, "--requests", "2", "--speed-up", "10", "--no-direct", "--json")
    report = json.loads(result.stdout)
    assert (report["requests"], report["direct"]) == (2, False)


def test_command_fails_and_prints_the_first_failing_path(trace: Path, root: Path) -> None:
    invoke(trace, root, "--block-size", str(BLOCK_BYTES))
    path = block_path(root, CHAIN[1])
    path.write_bytes(bytes(BLOCK_BYTES))
    result = invoke(trace, root, "--block-size", str(BLOCK_BYTES))
    assert result.exit_code == 1
    assert str(path) in result.stdout
    assert result.stdout.splitlines()[-1] == "FAIL"


def test_command_refuses_a_corrupt_trace_before_it_writes(trace: Path, root: Path) -> None:
    with trace.open("a") as file:
        file.write("{\n")
    result = invoke(trace, root)
    assert isinstance(result.exception, UsageError)
    assert "line 4" in str(result.exception)
    assert not list(root.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        ("--block-size", "much"),
        ("--block-size", "5000"),
        ("--speed-up", "fast"),
        ("--speed-up", "0"),
        ("--max-bytes", "-1"),
        ("--full", "--requests", "3"),
    ],
)
def test_command_refuses_wrong_options_before_it_writes(
    trace: Path, root: Path, options: tuple[str, ...]
) -> None:
    assert isinstance(invoke(trace, root, *options).exception, UsageError)
    assert not list(root.iterdir())


# The statistics of a mount


def tier(name: str, **counters: int) -> dict[str, Any]:
    numbers = (
        "capacity_bytes used_bytes reserved_bytes held_bytes blocks opens promotions demotions "
        "evictions bytes_read bytes_written moved_in_bytes moved_out_bytes"
    )
    return {"name": name, "medium": name, **dict.fromkeys(numbers.split(), 0), **counters}


def write_stats(root: Path, *tiers: dict[str, Any]) -> None:
    (root / ".kvfs").mkdir(exist_ok=True)
    document = {"version": 1, "tiers": tiers, "moves": {"running": [], "queued": 0}}
    (root / ".kvfs" / "stats").write_text(json.dumps(document))


def test_activity_is_the_difference_of_two_readings(tmp_path: Path) -> None:
    write_stats(tmp_path, tier("nvme", opens=10, evictions=1), tier("hdd", opens=5, blocks=7))
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    file = stats_file(below)
    assert file is not None
    before = read_stats(file)
    write_stats(
        tmp_path,
        tier("nvme", opens=40, evictions=1, reserved_bytes=3, held_bytes=4),
        tier("hdd", opens=15, blocks=9, moved_in_bytes=100),
    )
    nvme, hdd = activity(before, read_stats(file))
    assert (nvme.opens, nvme.hit_share, nvme.evictions, nvme.claimed_bytes) == (30, 0.75, 0, 7)
    assert (hdd.opens, hdd.hit_share, hdd.blocks, hdd.moved_in_bytes) == (10, 0.25, 9, 100)


def test_a_directory_without_statistics_is_a_plain_one(tmp_path: Path) -> None:
    assert stats_file(tmp_path) is None


def test_unreadable_statistics_are_an_error(tmp_path: Path) -> None:
    write_stats(tmp_path)
    file = tmp_path / ".kvfs" / "stats"
    file.write_text("{")
    with pytest.raises(DaemonUnavailable, match="cannot read"):
        read_stats(file)


def test_command_reports_the_tiers_of_a_mount(trace: Path, root: Path) -> None:
    write_stats(root, tier("nvme", blocks=3, capacity_bytes=1 << 20))
    result = invoke(trace, root)
    assert result.exit_code == 0
    assert "nvme" in result.stdout
    assert json.loads(invoke(trace, root, "--json").stdout)["kind"] == "kvfs"
