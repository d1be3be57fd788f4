"""The pure parts of the benchmark: shares, medians, ratios, bars and the table."""

from __future__ import annotations

import json
import os
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from kvfs.errors import KvfsError
from kvfs.tools.bench import drop_caches, filesystem_of, operations
from kvfs.tools.bench_codec import codec_table, measure_codec
from kvfs.tools.bench_load import LOOPS, Lap, Share, Workers, shares_of, wall_s
from kvfs.tools.bench_mounts import Target, resident_bytes
from kvfs.tools.bench_report import (
    Operation,
    Sample,
    Samples,
    cpu_table,
    document,
    ratio_text,
    speed_table,
    targets_of,
)
from kvfs.tools.bench_scale import Measured, Scale, block_name, write_config

READ = Operation("read", "warm read", 2 << 20, 8, 100)
CHECK = Operation("access_known", "access of a known name", 0, 1, 1000)


def samples(operation: Operation, **rounds: list[tuple[float, float]]) -> Samples:
    made = Samples(operation)
    for target, pairs in rounds.items():
        for wall, cpu in pairs:
            made.add(target, Sample(wall, cpu))
    return made


def text_of(view: object) -> str:
    out = StringIO()
    Console(file=out, width=200).print(view)
    return out.getvalue()


def test_a_ratio_compares_within_each_round() -> None:
    # The machine was ten times slower in the second round, for both.
    measured = samples(
        READ, raw=[(1.0, 0), (10.0, 0), (1.0, 0)], kvfs=[(2.0, 0), (20.0, 0), (2.5, 0)]
    )
    assert measured.ratio("kvfs") == pytest.approx(0.5)
    assert measured.ratio("raw") == 1.0


def test_the_median_forgets_one_disturbed_round() -> None:
    measured = samples(READ, raw=[(1.0, 0)] * 3, kvfs=[(1.25, 0), (100.0, 0), (1.25, 0)])
    assert measured.ratio("kvfs") == pytest.approx(0.8)
    assert measured.wall_s("kvfs") == 1.25


def test_what_was_not_measured_has_no_ratio() -> None:
    measured = samples(READ, raw=[(1.0, 0.1)])
    assert measured.ratio("bindfs") is None
    assert measured.cpu_ms("bindfs") is None


def test_cpu_is_per_block_in_milliseconds() -> None:
    measured = samples(READ, raw=[(1.0, 0.2), (1.0, 0.4), (1.0, 0.3)])
    assert measured.cpu_ms("raw") == pytest.approx(3.0)


def test_speed_is_bytes_where_bytes_move_and_time_where_not() -> None:
    assert samples(READ, raw=[(0.1, 0)]).speed_text("raw") == "2,097 MB/s"
    assert samples(CHECK, raw=[(0.002, 0)]).speed_text("raw") == "2.0 µs"


def test_small_ratios_keep_two_digits() -> None:
    assert ratio_text(0.984) == "0.98"
    assert ratio_text(0.0391) == "0.039"
    assert ratio_text(None) == "-"


def test_the_tables_have_a_row_an_operation_and_a_column_a_target() -> None:
    results = [
        samples(READ, raw=[(0.1, 0.1)], kvfs=[(0.2, 0.3)], bindfs=[(0.4, 0.5)]),
        samples(CHECK, raw=[(0.002, 0.002)], kvfs=[(0.004, 0.004)], bindfs=[(0.1, 0.1)]),
    ]
    assert targets_of(results) == ["raw", "kvfs", "bindfs"]
    speed = text_of(speed_table(results)).splitlines()
    assert speed[0].split() == ["Operation", "raw", "kvfs", "bindfs"]
    assert " ".join(speed[1].split()) == "warm read, 2 MiB, 8 at a time 2,097 MB/s 0.50 0.25"
    assert speed[2].split()[-2:] == ["0.50", "0.020"]
    cpu = text_of(cpu_table(results)).splitlines()
    assert cpu[1].split()[-3:] == ["1.000", "3.000", "5.000"]


def test_the_document_keeps_every_round() -> None:
    results = [samples(READ, raw=[(0.1, 0.1), (0.2, 0.1)], kvfs=[(0.2, 0.3), (0.2, 0.3)])]
    made = json.loads(json.dumps(document(results, {"cores": 2})))
    (row,) = made["operations"]
    assert row["name"] == "read_2048k_x8"
    assert row["targets"]["kvfs"]["wall_s"] == [0.2, 0.2]
    assert row["targets"]["kvfs"]["ratio"] == pytest.approx(0.75)
    assert made["machine"] == {"cores": 2}


@pytest.mark.parametrize("quick", [False, True])
def test_every_row_names_a_loop_and_has_its_own_key(quick: bool) -> None:
    rows = operations(quick=quick)
    assert {row.loop for row in rows} == set(LOOPS)
    assert len({row.key for row in rows}) == len(rows)
    assert all(row.count >= row.workers for row in rows)


def test_shares_deal_every_path_out_once() -> None:
    paths = [str(number) for number in range(21)]
    shares = shares_of("read", paths, 8, 64)
    assert len(shares) == 8
    assert sorted(path for share in shares for path in share.paths) == sorted(paths)
    assert len(shares_of("read", paths[:3], 8)) == 3


def test_wall_time_runs_from_the_first_start_to_the_last_end() -> None:
    assert wall_s([Lap(1.0, 3.0, 0), Lap(0.5, 2.0, 0)]) == 2.5


def test_loops_do_what_they_say(tmp_path: Path) -> None:
    paths = tuple(str(tmp_path / f"{number}.bin") for number in range(3))
    size = (1 << 20) + 4096
    LOOPS["put"](Share("put", paths, size))
    assert [Path(path).stat().st_size for path in paths] == [size] * 3
    assert len(list(tmp_path.iterdir())) == 3
    for loop in ("read", "access_known", "open_close"):
        LOOPS[loop](Share(loop, paths, size))
    with pytest.raises(KvfsError, match="should not exist"):
        LOOPS["access_unknown"](Share("access_unknown", paths))
    with pytest.raises(KvfsError, match=r"read \d+ bytes instead of"):
        LOOPS["read"](Share("read", paths, size + 1))


def test_workers_report_laps_and_failures(tmp_path: Path) -> None:
    path = str(tmp_path / "block.bin")
    with Workers(2) as workers:
        (lap,) = workers.run([Share("put", (path,), 4096)])
        assert lap.end_s >= lap.start_s
        laps = workers.run([Share("access_known", (path,)), Share("read", (path,), 4096)])
        assert len(laps) == 2
        with pytest.raises(KvfsError, match="access_known"):
            workers.run([Share("access_known", (path + "x",)), Share("read", (path,), 4096)])
        assert len(workers.run([Share("open_close", (path,))])) == 1


def test_dropping_caches_keeps_the_bytes(tmp_path: Path) -> None:
    block = tmp_path / "4096" / "000000.bin"
    block.parent.mkdir()
    block.write_bytes(b"k" * 4096)
    drop_caches(Target("raw", tmp_path, tmp_path), [str(block)])
    assert block.read_bytes() == b"k" * 4096


def test_facts_of_the_machine(tmp_path: Path) -> None:
    assert filesystem_of(tmp_path)
    assert filesystem_of(Path("/proc/self")) == "proc"
    assert resident_bytes(os.getpid()) > 1 << 20


def test_bars() -> None:
    assert Measured("mount", 4.9, "s", 5).verdict == "ok"
    assert Measured("mount", 5.1, "s", 5).verdict == "NOT MET"
    rate = Measured("ls -f", 24_999, "names/s", 25_000, at_least=True)
    assert (rate.verdict, rate.bar_text) == ("NOT MET", ">= 25,000 names/s")
    assert Measured("find", 3.0, "s").verdict == ""


def test_both_tiers_are_fuller_than_their_watermark(tmp_path: Path) -> None:
    scale = Scale(blocks=1000, listed=100)
    text = write_config(tmp_path, scale, at_rest=False).read_text()
    assert "high_watermark = 0.95" in text
    used = 200 * (16 << 10) + 100 * (4 << 10)
    assert 0.96 < used / scale.nvme_bytes < 0.98
    assert 0.96 < 800 * (16 << 10) / scale.hdd_bytes < 0.98


def test_names_are_as_long_as_a_hash_and_differ() -> None:
    names = {block_name(number) for number in range(10_000)}
    assert len(names) == 10_000
    assert {len(name) for name in names} == {36}


def test_the_codec_has_a_row_with_and_without_planes() -> None:
    rows = measure_codec(1)
    assert [row.plane_split for row in rows] == [False, True]
    assert 1.2 < rows[0].ratio < 1.35 < rows[1].ratio < 1.5
    assert all(min(row.compress_bytes_per_s, row.decompress_bytes_per_s) > 0 for row in rows)
    assert codec_table(rows).row_count == 2
    assert rows[1].document()["plane_split"] is True
