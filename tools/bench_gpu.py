"""How fast blocks come into a GPU: more rows of `make bench`, and of `make test-gpu`.

`Onboarder` with `CudaDevice` against kvikio alone on the same files with the same settings; beside
them what a copy from pinned memory of the host reaches, and what one core decompresses. It needs a
GPU, and neither FUSE nor a daemon: the blocks are files in a scratch directory.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
import xxhash

from kvfs.errors import DeviceError, KvfsError, exit_code_of
from kvfs.gpu.device import Load
from kvfs.gpu.layout import PagedLayout
from kvfs.gpu.onboarder import Onboarder
from kvfs.gpu.opening import open_device
from kvfs.gpu.probe import probe
from kvfs.gpu.source import BackingFiles
from kvfs.gpu.verification import TRUST_SEAL, Verification
from kvfs.tiers.codec import compress_file
from kvfs.tiers.seal import SEAL_XATTR, Seal
from kvfs.tools.bench_codec import bfloat16_block, measure_codec
from kvfs.tools.bench_mounts import scratch_directory
from kvfs.tools.bench_onboard import OnboardRow, Shape, onboard_table
from kvfs.tools.render import json_text, show

MIB = 1 << 20
SHAPE = Shape(2 * MIB, 64, 0.95)
LAYERS = 32
ROUNDS = 5
COPY_BYTES = 256 * MIB


def measure_gpu(scratch: Path | None, rounds: int) -> list[OnboardRow]:
    """Every row, and on stdout which way the bytes took. Raises DeviceError without a GPU."""
    answer = probe()
    if not answer.usable:
        raise DeviceError(f"there is no GPU to measure: {answer.problem}")
    with scratch_directory(scratch) as root, open_device(0) as device:
        raw, packed = root / "raw", root / "packed"
        names = _write(raw, compressed=False)
        _write(packed, compressed=True)
        bench = _Bench(raw, packed, names, rounds)
        rows = bench.rows(device)
        typer.echo(f"{', '.join(answer.devices)}, CUDA {answer.cuda}, libraries {answer.libraries}")
        typer.echo(f"by kvikio's counters: {device.route()}")
        with (raw / names[0]).open("rb") as file:
            proof = device.prove(Load(b"trial", file.fileno(), SHAPE.block_bytes))
        typer.echo(f"by a trial read: {proof}")
    return rows


def _write(directory: Path, *, compressed: bool) -> list[str]:
    """Blocks with seal records, as they lie on a tier."""
    directory.mkdir()
    names = [f"{number:04d}.bin" for number in range(SHAPE.blocks)]
    content = bytearray(bfloat16_block(SHAPE.block_bytes))
    for number, name in enumerate(names):
        content[:8] = number.to_bytes(8, "little")
        path = directory / name
        path.write_bytes(content)
        if compressed:
            source = path.rename(path.with_suffix(".raw"))
            with source.open("rb") as read, path.open("w+b") as write:
                compress_file(read.fileno(), write.fileno(), plane_split=True)
            source.unlink()
        checksum = xxhash.xxh3_128_digest(content)
        seal = Seal(2, 1, len(content), checksum, 0o644, 0, 0, 0, codec=int(compressed))
        os.setxattr(path, SEAL_XATTR, seal.encode())
    os.sync()
    return names


class _Bench:
    """The loads, on one device. Owned by the main thread."""

    def __init__(self, raw: Path, packed: Path, names: list[str], rounds: int) -> None:
        self._raw = raw
        self._packed = packed
        self._names = names
        self._rounds = rounds

    def rows(self, device: Any) -> list[OnboardRow]:
        import cupy

        total = SHAPE.blocks * SHAPE.block_bytes
        array = cupy.empty((SHAPE.blocks, SHAPE.block_bytes), cupy.uint8)
        page_bytes = SHAPE.block_bytes // (2 * LAYERS)
        planes = [cupy.empty((SHAPE.blocks, page_bytes), cupy.uint8) for _ in range(2 * LAYERS)]
        pages = PagedLayout.per_layer(planes).at(range(SHAPE.blocks))

        def onboard(
            directory: Path, into: object, verification: Verification
        ) -> Callable[[], None]:
            loader = Onboarder(BackingFiles(directory), device, verification)

            def run() -> None:
                loader.read(self._names, into).check()
                cupy.cuda.runtime.deviceSynchronize()

            return run

        alone = self._kvikio_alone(array)
        what = f"{SHAPE.title}, GPU"
        straight = onboard(self._raw, array, TRUST_SEAL)
        paged = onboard(self._raw, pages, TRUST_SEAL)
        decoded = onboard(self._packed, array, TRUST_SEAL)
        ceiling = total / COPY_BYTES * self._copy_s()
        core_s = total / next(
            row.decompress_bytes_per_s for row in measure_codec(1) if row.plane_split
        )
        return [
            self._against(f"{what}, arrays", straight, "kvikio alone", alone, SHAPE.bar),
            self._against(f"{what}, {2 * LAYERS} planes", paged, "kvikio alone", alone, None),
            self._fixed(f"{what}, arrays", straight, "copy from pinned memory", ceiling),
            self._fixed(f"{what}, zstd", decoded, "zstandard, one core", core_s),
        ]

    def _kvikio_alone(self, array: Any) -> Callable[[], None]:
        """All files opened and read at once; the device has made kvikio's settings."""
        import kvikio

        def run() -> None:
            files = [kvikio.CuFile(self._raw / name, "r") for name in self._names]
            futures = [
                file.pread(array[number], SHAPE.block_bytes) for number, file in enumerate(files)
            ]
            for future in futures:
                future.get()
            for file in files:
                file.close()

        return run

    def _copy_s(self) -> float:
        """One copy of COPY_BYTES from pinned memory."""
        import cupy

        pinned = cupy.cuda.alloc_pinned_memory(COPY_BYTES)
        array = cupy.empty(COPY_BYTES, cupy.uint8)
        stream = cupy.cuda.Stream(non_blocking=True)

        def copy() -> None:
            array.data.copy_from_host_async(pinned.ptr, COPY_BYTES, stream)
            stream.synchronize()

        copy()
        return median(_seconds(copy) for _ in range(self._rounds))

    def _against(
        self, what: str, ours: Callable[[], None], base: str, other: Callable[[], None],
        bar: float | None,
    ) -> OnboardRow:  # fmt: skip
        ours()
        other()
        laps = [(_seconds(ours), _seconds(other)) for _ in range(self._rounds)]
        return _row(what, [o for o, _ in laps], base, [b for _, b in laps], bar)

    def _fixed(self, what: str, ours: Callable[[], None], base: str, base_s: float) -> OnboardRow:
        ours()
        return _row(what, [_seconds(ours) for _ in range(self._rounds)], base, [base_s], None)


def _row(
    what: str, ours: Sequence[float], base: str, other: Sequence[float], bar: float | None
) -> OnboardRow:
    total = SHAPE.blocks * SHAPE.block_bytes
    ratio = median(other) / median(ours)
    return OnboardRow(what, total / median(ours), base, total / median(other), ratio, bar)


def _seconds(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in turn.")] = ROUNDS,
    scratch: Annotated[
        Path | None, typer.Option(metavar="DIR", help="On the disk to measure.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there.")
    ] = None,
) -> None:
    """Speed of blocks into the GPU of this machine, and which way they take."""
    try:
        rows = measure_gpu(scratch, rounds)
    except KvfsError as error:
        sys.stderr.write(f"bench: {error}\n")
        raise typer.Exit(exit_code_of(error)) from None
    show(onboard_table(rows))
    if json_file is not None:
        json_file.write_text(json_text([row.document() for row in rows]) + "\n")


if __name__ == "__main__":
    typer.run(main)
