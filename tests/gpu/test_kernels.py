"""The kernels compile, and do what the numpy reference does: run as C, and on a GPU."""

from __future__ import annotations

import ctypes
import shutil
from typing import Any

import numpy as np
import pytest

from kvfs.gpu import kernels
from kvfs.gpu.layout import PagedLayout
from kvfs.gpu.probe import probe
from kvfs.gpu.reference import gather, merge_halves, scatter
from kvfs.tiers.codec import CHUNK_BYTES
from tests.gpu.kernels_on_host import KernelsOnHost

ARCHITECTURES = ("compute_80", "compute_90", "compute_100")


def nvrtc() -> ctypes.CDLL:
    """NVIDIA's compiler library, which needs no GPU."""
    for name in ("libnvrtc.so.13", "libnvrtc.so.12"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            pass
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return ctypes.CDLL(load_nvidia_dynamic_lib("nvrtc").abs_path)
    except (ImportError, RuntimeError):
        pytest.skip("needs NVRTC: `pip install nvidia-cuda-nvrtc cuda-pathfinder` (150 MB)")


def compile_source(library: ctypes.CDLL, source: str, architecture: str) -> tuple[int, str]:
    """NVRTC's status and log."""
    program = ctypes.c_void_p()
    text = source.encode()
    assert library.nvrtcCreateProgram(ctypes.byref(program), text, b"k.cu", 0, None, None) == 0
    options = (ctypes.c_char_p * 1)(f"--gpu-architecture={architecture}".encode())
    status = int(library.nvrtcCompileProgram(program, 1, options))
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return status, log.value.decode()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile(architecture: str) -> None:
    library = nvrtc()
    assert compile_source(library, kernels.SOURCE, architecture) == (0, "")
    status, log = compile_source(library, kernels.SOURCE + "int broken(", architecture)
    assert status != 0
    assert "error" in log


def test_every_kernel_has_its_name() -> None:
    for name in (kernels.SCATTER, kernels.GATHER, kernels.MERGE):
        assert f"__global__ void {name}(" in kernels.SOURCE


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> KernelsOnHost:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    return KernelsOnHost(tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize(("layers", "words", "grid_x"), [(1, 1, 1), (3, 40, 2), (5, 700, 3)])
def test_kernels_run_as_c_do_what_numpy_does(
    on_host: KernelsOnHost, layers: int, words: int, grid_x: int
) -> None:
    random = np.random.default_rng(words)
    sizes = [kernels.WORD_BYTES * (words + layer) for layer in range(layers)]
    held = [random.integers(0, 256, (9, size), np.uint8) for size in sizes]
    expected = [array.copy() for array in held]
    layout, wanted = PagedLayout.per_layer(held), PagedLayout.per_layer(expected)
    pages = [7, 0, 3, 8]
    staged = random.integers(0, 256, (4, layout.block_bytes + 64), np.uint8)
    scatter(staged, wanted.at(pages))
    rows = [
        (array.ctypes.data, size // kernels.WORD_BYTES, plane.offset // kernels.WORD_BYTES)
        for array, size, plane in zip(held, sizes, layout.planes, strict=True)
    ]
    planes, numbers = np.array(rows, np.uint64), np.array(pages, np.uint64)
    stride = staged.shape[1] // kernels.WORD_BYTES
    launch = ((grid_x, 4, layers), 32, staged.ctypes.data, stride, planes.ctypes.data)
    on_host.launch(kernels.SCATTER, *launch, numbers.ctypes.data)
    for array, other in zip(held, expected, strict=True):
        assert (array == other).all()
    again, other = np.zeros_like(staged), np.zeros_like(staged)
    on_host.launch(kernels.GATHER, *launch[:2], again.ctypes.data, *launch[3:], numbers.ctypes.data)
    gather(wanted.at(pages), other)
    assert (again == other).all()


@pytest.mark.parametrize("size_bytes", [2, 4096, 131_072, 131_074, 400_000])
def test_merging_run_as_c_does_what_numpy_does(on_host: KernelsOnHost, size_bytes: int) -> None:
    split = np.random.default_rng(size_bytes).integers(0, 256, size_bytes, np.uint8)
    merged, expected = np.zeros_like(split), np.zeros_like(split)
    addresses = (split.ctypes.data, merged.ctypes.data)
    on_host.launch(kernels.MERGE, (2, 1, 1), 32, *addresses, size_bytes, 2 * CHUNK_BYTES)
    merge_halves(split, expected)
    assert (merged == expected).all()


@pytest.fixture(scope="module")
def runtime() -> Any:
    if not probe().usable:
        pytest.skip(f"needs a GPU: {probe().problem}")
    from kvfs.gpu.cupy_runtime import CupyRuntime

    return CupyRuntime(0)


@pytest.mark.gpu
def test_the_contract_is_held_against_a_gpu_as_well() -> None:
    """One line instead of one for each test of the contract, where there is none."""
    if not probe().usable:
        pytest.skip(f"test_contract.py needs a GPU: {probe().problem}")


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [1, 3, 64])
def test_pages_on_a_gpu_are_as_in_numpy(runtime: Any, layers: int) -> None:
    import cupy

    random = np.random.default_rng(layers)
    held = [random.integers(0, 256, (40, 4096), np.uint8) for _ in range(layers)]
    shown = [cupy.asarray(array) for array in held]
    pages = random.permutation(40)[:17].tolist()
    on_host, on_gpu = PagedLayout.per_layer(held), PagedLayout.per_layer(shown)
    staged = random.integers(0, 256, (17, on_host.block_bytes), np.uint8)
    scatter(staged, on_host.at(pages))
    with runtime.current():
        memory = runtime.allocate(staged.nbytes)
        content = runtime.pinned(staged.nbytes)
        content.view[:] = staged.tobytes()
        runtime.copy_in(content, memory)
        runtime.scatter(memory, on_gpu.block_bytes, on_gpu.at(pages))
        runtime.synchronize()
        for array, expected in zip(shown, held, strict=True):
            assert (array.get() == expected).all()
        runtime.gather(on_gpu.at(pages[::-1]), memory, on_gpu.block_bytes)
        runtime.copy_out(memory, content)
        runtime.synchronize()
    again = np.zeros_like(staged)
    gather(on_host.at(pages[::-1]), again)
    assert bytes(content.view) == again.tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("size_bytes", [2, 131_072, 131_074, 400_000])
def test_merging_halves_on_a_gpu_is_as_in_numpy(runtime: Any, size_bytes: int) -> None:
    split = np.random.default_rng(size_bytes).integers(0, 256, size_bytes, np.uint8)
    expected = np.zeros_like(split)
    merge_halves(split, expected)
    with runtime.current():
        source, target = runtime.allocate(size_bytes), runtime.allocate(size_bytes)
        content = runtime.pinned(size_bytes)
        content.view[:] = split.tobytes()
        runtime.copy_in(content, source)
        runtime.merge_halves(source, target)
        runtime.copy_out(target, content)
        runtime.synchronize()
    assert bytes(content.view) == expected.tobytes()


@pytest.mark.gpu
def test_work_is_in_order_with_the_callers_stream(runtime: Any) -> None:
    """A long kernel on the caller's stream, then ours, then the caller's again."""
    import cupy

    size = 64 << 20
    stream = cupy.cuda.Stream(non_blocking=True)
    ours = runtime.allocate(size)
    with stream:
        theirs = cupy.zeros(size, cupy.uint8)
        for _ in range(50):
            theirs += 1
    with runtime.current():
        runtime.follow(stream.ptr)
        from kvfs.gpu.arrays import DeviceMemory, memory_of

        memory = memory_of(theirs, writable=True)
        assert isinstance(memory, DeviceMemory)
        runtime.copy(memory, ours)
        runtime.precede(stream.ptr)
    with stream:
        theirs += 1
        seen = cupy.asarray(ours)
        assert int(seen.min()) == int(seen.max()) == 50
