"""Arrays of any library as memory: what is taken, without a copy, and what is refused."""

from __future__ import annotations

import array
import ctypes
import mmap
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as arrays

from kvfs.errors import UsageError
from kvfs.gpu.arrays import DeviceMemory, HostMemory, memory_of, stream_pointer
from kvfs.gpu.blocks import blocks_of
from kvfs.gpu.layout import PagedLayout


class OnDevice:
    """What cupy, numba and torch show of an array, of which nothing is touched here."""

    def __init__(self, shape: tuple[int, ...], typestr: str = "<f2", **more: object) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": typestr, "data": (1 << 20, False), "version": 3, **more,
        }  # fmt: skip


class ByDlpack:
    """torch's CPU tensors: no array interface and no buffer, only DLPack."""

    def __init__(self, held: np.ndarray[Any, Any], device: tuple[int, int] = (1, 0)) -> None:
        self.held = held
        self.device = device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **options: object) -> object:
        self.options = options
        return self.held.__dlpack__()


class ByNewDlpack(ByDlpack):
    """DLPack 1.0, with versions and flags."""

    def __dlpack__(self, **options: Any) -> object:
        return self.held.__dlpack__(**options)


def host(memory: object) -> HostMemory:
    assert isinstance(memory, HostMemory)
    return memory


@given(arrays.arrays(dtype=arrays.scalar_dtypes(), shape=arrays.array_shapes(min_dims=0)))
def test_numpy_arrays_of_any_type_and_shape(made: np.ndarray[Any, Any]) -> None:
    memory = host(memory_of(made, writable=True))
    assert bytes(memory.view) == made.tobytes()
    assert memory.rows == (made.shape[0] if made.shape else 1)
    if memory.size_bytes:
        memory.view[0] ^= 0xFF
        assert bytes(memory.view) == made.tobytes()


@pytest.mark.parametrize("kind", [ByDlpack, ByNewDlpack])
@given(
    made=arrays.arrays(
        dtype=arrays.integer_dtypes(endianness="="),
        shape=arrays.array_shapes(min_dims=1, min_side=1),
    )
)
def test_dlpack(kind: type[ByDlpack], made: np.ndarray[Any, Any]) -> None:
    memory = host(memory_of(kind(made), writable=True))
    assert bytes(memory.view) == made.tobytes()
    assert memory.rows == made.shape[0]
    memory.view[0] ^= 0xFF
    assert bytes(memory.view) == made.tobytes()


def test_dlpack_keeps_what_it_shares() -> None:
    memory = host(memory_of(ByDlpack(np.arange(1000)), writable=False))
    assert bytes(memory.view) == np.arange(1000).tobytes()


def test_dlpack_on_a_gpu_says_which_and_does_not_wait() -> None:
    made = np.zeros((4, 8), np.float32)
    shown = ByDlpack(made, (2, 3))
    memory = memory_of(shown, writable=True)
    assert isinstance(memory, DeviceMemory)
    assert (memory.device, memory.size_bytes, memory.rows) == (3, 128, 4)
    assert memory.address == made.ctypes.data
    assert shown.options["stream"] == -1
    with pytest.raises(UsageError, match="neither the host nor CUDA"):
        memory_of(ByDlpack(made, (10, 0)), writable=True)


def test_read_only_dlpack() -> None:
    made = np.arange(8)
    made.flags.writeable = False
    assert bytes(host(memory_of(ByNewDlpack(made), writable=False)).view) == made.tobytes()
    with pytest.raises(UsageError, match="read-only"):
        memory_of(ByNewDlpack(made), writable=True)
    with pytest.raises(UsageError, match="cannot be shared"):
        memory_of(ByDlpack(made), writable=True)


def test_arrays_on_a_gpu() -> None:
    memory = memory_of(OnDevice((6, 4, 2)), writable=True, device=1)
    assert isinstance(memory, DeviceMemory)
    assert (memory.address, memory.size_bytes, memory.rows) == (1 << 20, 96, 6)
    assert memory.place == 1
    part = memory.part(16, 32)
    assert part.__cuda_array_interface__["data"] == ((1 << 20) + 16, False)
    assert part.__cuda_array_interface__["shape"] == (32,)


def test_bfloat16_is_bytes() -> None:
    # torch says <V2, or has no interface and is taken by DLPack.
    memory = memory_of(OnDevice((3, 5), "<V2"), writable=True)
    assert memory.size_bytes == 30

    class Unnamed(ByDlpack):
        @property
        def __cuda_array_interface__(self) -> dict[str, object]:
            raise TypeError("Got unsupported ScalarType BFloat16")

    assert isinstance(
        memory_of(Unnamed(np.zeros(4, np.uint16), (2, 0)), writable=True), DeviceMemory
    )


@pytest.mark.parametrize(
    "buffer",
    [bytearray(16), mmap.mmap(-1, 16), array.array("h", range(8)), (ctypes.c_char * 16)()],
    ids=["bytearray", "mmap", "array", "ctypes"],
)
def test_buffers(buffer: Any) -> None:
    memory = host(memory_of(buffer, writable=True))
    memory.view[:2] = b"ab"
    assert bytes(memoryview(buffer).cast("B"))[:2] == b"ab"
    assert memory.size_bytes == 16


@pytest.mark.parametrize(
    ("given_array", "why"),
    [
        (np.zeros((4, 4))[:, :2], "not C-contiguous"),
        (np.zeros((4, 4)).T, "not C-contiguous"),
        (memoryview(bytearray(8))[::2], "not C-contiguous"),
        (OnDevice((4, 4), strides=(16, 2)), "not C-contiguous"),
        (ByDlpack(np.zeros((4, 4))[:, :2]), "not C-contiguous"),
        (OnDevice((4,), data=(1, True)), "read-only"),
        (OnDevice((4,), mask=object()), "mask"),
        (b"bytes", "read-only"),
        (np.array(["a", "b"]), "holds no numbers"),
        (np.array([object()]), "holds no numbers"),
        ("text", "is no array"),
        ([1, 2], "is no array"),
        (None, "is no array"),
    ],
)
def test_what_would_need_a_copy_or_is_no_array_is_refused(given_array: object, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        memory_of(given_array, writable=True)


def test_axes_of_one_element_have_no_gaps() -> None:
    made = np.zeros((1, 8, 1), np.uint8)[:, ::1]
    odd = np.lib.stride_tricks.as_strided(made, strides=(999, 1, 77))
    assert memory_of(odd, writable=True).size_bytes == 8


def test_streams_of_all_libraries() -> None:
    class Torch:
        cuda_stream = 11

    class Cupy:
        ptr = 12

    class Numba:
        handle = ctypes.c_void_p(13)

    class Protocol:
        def __cuda_stream__(self) -> tuple[int, int]:
            return (0, 14)

    pointers = [stream_pointer(s) for s in (None, 10, Torch(), Cupy(), Numba(), Protocol())]
    assert pointers == [0, 10, 11, 12, 13, 14]
    with pytest.raises(UsageError, match="no CUDA stream"):
        stream_pointer("main")


def test_arrays_of_two_places_are_refused() -> None:
    with pytest.raises(UsageError, match="another device"):
        blocks_of([np.zeros(4), OnDevice((4,))], 2, writable=True)
    with pytest.raises(UsageError, match="differ in number of pages or in device"):
        PagedLayout.per_layer([np.zeros((4, 4)), OnDevice((4, 4))])
