"""The shortest way through everything: write, rename, read, demote, remount, read."""

from __future__ import annotations

import os

from tests.mounting import MountedKvfs, run_kvfs


def test_a_block_is_written_demoted_and_read_after_a_remount(mounted: MountedKvfs) -> None:
    data = os.urandom(3 << 20)
    directory = mounted.path / "ns" / "ab"
    directory.mkdir(parents=True)
    (directory / "x.tmp").write_bytes(data)
    (directory / "x.tmp").rename(directory / "x.bin")
    assert (directory / "x.bin").read_bytes() == data
    mounted.wait_sealed()
    run_kvfs("demote", directory / "x.bin", "--to", "hdd")
    assert mounted.info("ns/ab/x.bin")["replicas"] == ["hdd"]
    assert (mounted.tiers["hdd"] / "ns/ab/x.bin").read_bytes() == data
    mounted.remount()
    assert (directory / "x.bin").read_bytes() == data
