"""Where an array lies: the memory of any library's array, without that library and without a copy.

`memory_of` takes what has `__cuda_array_interface__` (cupy, numba, torch), `__array_interface__`
(numpy), DLPack (torch, jax, also with bfloat16) or the buffer protocol. All of it is bytes here. An
array that would have to be copied, because it has gaps or may not be written, is refused.

Pure, but for reading the structures that a DLPack capsule points to. Nothing here has state.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvfs.errors import UsageError

_CUDA_KINDS = frozenset({2, 13})  # kDLCUDA, kDLCUDAManaged
_HOST_KINDS = frozenset({1, 3})  # kDLCPU, kDLCUDAHost
_DLPACK_MAX_VERSION = (1, 0)
_READ_ONLY, _IS_COPIED = 1, 2
# Of an array interface: booleans, numbers, times, and bytes without a type (bfloat16).
_ITEM = re.compile(r"[<>|=][biufcVmM](\d+)(?:\[.*\])?")
# "Do not synchronize": the caller of onboarder and offloader says which stream counts.
_NO_STREAM = -1


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes of the host. `rows` is the length of the array's first axis; `owner` keeps it alive."""

    view: memoryview
    rows: int = 1
    owner: object = None

    @property
    def size_bytes(self) -> int:
        return len(self.view)

    @property
    def writable(self) -> bool:
        return not self.view.readonly

    @property
    def place(self) -> int | None:
        """The CUDA device; None is the host."""
        return None

    def part(self, offset: int, size_bytes: int) -> HostMemory:
        """`size_bytes` of it."""
        return HostMemory(self.view[offset : offset + size_bytes], 1, self.owner)


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of CUDA device number `device`. CUDA libraries take it as an array of bytes."""

    address: int
    size_bytes: int
    device: int
    rows: int = 1
    owner: object = None
    writable: bool = True

    @property
    def place(self) -> int | None:
        """The CUDA device; None is the host."""
        return self.device

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self.size_bytes,),
            "typestr": "|u1",
            "data": (self.address, not self.writable),
            "strides": None,
            "version": 3,
        }

    def part(self, offset: int, size_bytes: int) -> DeviceMemory:
        """`size_bytes` of it."""
        address = self.address + offset
        return DeviceMemory(address, size_bytes, self.device, 1, self.owner, self.writable)


Memory = HostMemory | DeviceMemory


def memory_of(array: object, *, writable: bool, device: int = 0) -> Memory:
    """The bytes of an array, in its own memory.

    `device` is where an array lies that has only `__cuda_array_interface__`: it does not say.
    Raises UsageError for what is no array, is not C-contiguous, or is read-only but to be written.
    """
    if isinstance(array, (HostMemory, DeviceMemory)):
        memory: Memory | None = array
    else:
        memory = (
            _from_cuda_interface(array, device)
            or _from_array_interface(array)
            or _from_dlpack(array)
            or _from_buffer(array)
        )
    if memory is None:
        raise UsageError(
            f"{_kind(array)} is no array: it has neither __cuda_array_interface__ nor "
            "__array_interface__ nor __dlpack__ nor a buffer"
        )
    if writable and not memory.writable:
        raise UsageError(f"{_kind(array)} is read-only and cannot be loaded into")
    return memory


def stream_pointer(stream: object) -> int:
    """The cudaStream_t of a stream of any library; None is the default stream.

    Raises UsageError for what is no stream.
    """
    if stream is None:
        return 0
    if isinstance(stream, int):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    for name in ("cuda_stream", "ptr", "handle"):  # torch, cupy, numba
        value = getattr(stream, name, None)
        value = getattr(value, "value", value)
        if isinstance(value, int):
            return value
    raise UsageError(f"{_kind(stream)} is no CUDA stream")


def _from_cuda_interface(array: Any, device: int) -> DeviceMemory | None:
    try:
        interface = array.__cuda_array_interface__
    except (AttributeError, KeyError, TypeError):
        # torch has none for what is on the host, and for dtypes that numpy lacks.
        return None
    except RuntimeError as error:
        raise UsageError(f"{_kind(array)} cannot be shared: {error}") from None
    if hasattr(array, "__dlpack_device__"):
        device = array.__dlpack_device__()[1]
    size_bytes, rows = _extent(array, interface)
    address, read_only = interface["data"]
    return DeviceMemory(address, size_bytes, device, rows, array, not read_only)


def _from_array_interface(array: Any) -> HostMemory | None:
    interface = getattr(array, "__array_interface__", None)
    if interface is None:
        return None
    size_bytes, rows = _extent(array, interface)
    if not isinstance(interface.get("data"), tuple):
        raise UsageError(f"{_kind(array)} does not say where its bytes are")
    address, read_only = interface["data"]
    return HostMemory(_view(address, size_bytes, read_only=read_only), rows, array)


def _extent(array: object, interface: dict[str, Any]) -> tuple[int, int]:
    """Bytes and rows of what an array interface describes, which must be without gaps."""
    shape = tuple(interface["shape"])
    item = _ITEM.fullmatch(interface["typestr"])
    if item is None:
        raise UsageError(f"{_kind(array)} holds no numbers: {interface['typestr']}")
    item_bytes = int(item[1])
    if interface.get("mask") is not None:
        raise UsageError(f"{_kind(array)} has a mask")
    strides = interface.get("strides")
    if strides is not None:
        _check_no_gaps(array, shape, strides, item_bytes)
    return math.prod(shape) * item_bytes, shape[0] if shape else 1


def _check_no_gaps(
    array: object, shape: Sequence[int], strides: Sequence[int], item: int
) -> None:  # `strides` in the unit of `item`
    expected = item
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length == 0:
            return
        if length != 1 and stride != expected:
            raise UsageError(
                f"{_kind(array)} of shape {tuple(shape)} is not C-contiguous: it would have to be "
                "copied"
            )
        expected *= length


def _from_buffer(array: Any) -> HostMemory | None:
    try:
        view = memoryview(array)
    except (TypeError, ValueError, BufferError):
        return None
    if not view.c_contiguous:
        raise UsageError(f"{_kind(array)} is not C-contiguous: it would have to be copied")
    rows = view.shape[0] if view.shape else 1
    return HostMemory(view.cast("B") if view.nbytes else memoryview(b""), rows, array)


def _view(address: int, size_bytes: int, *, read_only: bool) -> memoryview:
    if size_bytes == 0:
        return memoryview(b"")
    view = memoryview((ctypes.c_char * size_bytes).from_address(address)).cast("B")
    return view.toreadonly() if read_only else view


# --- DLPack -----------------------------------------------------------------------------------


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("number", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    """DLManagedTensor, of DLPack before 1.0."""

    _fields_ = (("tensor", _Tensor),)


class _ManagedVersioned(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_pointer_in = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_in.restype = ctypes.c_void_p
_pointer_in.argtypes = (ctypes.py_object, ctypes.c_char_p)
_has_name = ctypes.pythonapi.PyCapsule_IsValid
_has_name.restype = ctypes.c_int
_has_name.argtypes = (ctypes.py_object, ctypes.c_char_p)


def _from_dlpack(array: Any) -> Memory | None:
    if not hasattr(array, "__dlpack__"):
        return None
    kind, number = array.__dlpack_device__()
    # The capsule is kept, not consumed: it then frees what it holds when it goes.
    capsule = _capsule_of(array, on_cuda=kind in _CUDA_KINDS)
    tensor, flags = _tensor_in(capsule)
    if flags & _IS_COPIED:
        raise UsageError(f"{_kind(array)} gave a copy of itself")
    shape = tensor.shape[: tensor.ndim]
    bits = tensor.dtype.bits * tensor.dtype.lanes
    if bits % 8:
        raise UsageError(f"{_kind(array)} has items of {bits} bits")
    if tensor.strides:
        _check_no_gaps(array, shape, tensor.strides[: tensor.ndim], 1)
    size_bytes = math.prod(shape) * bits // 8
    rows = shape[0] if shape else 1
    address = (tensor.data or 0) + tensor.byte_offset
    read_only = bool(flags & _READ_ONLY)
    if kind in _CUDA_KINDS:
        return DeviceMemory(address, size_bytes, number, rows, (array, capsule), not read_only)
    if kind in _HOST_KINDS:
        view = _view(address, size_bytes, read_only=read_only)
        return HostMemory(view, rows, (array, capsule))
    raise UsageError(f"{_kind(array)} is on a device that is neither the host nor CUDA")


def _capsule_of(array: Any, *, on_cuda: bool) -> object:
    stream = {"stream": _NO_STREAM} if on_cuda else {}
    try:
        try:
            return array.__dlpack__(**stream, max_version=_DLPACK_MAX_VERSION, copy=False)
        except TypeError:  # a library from before DLPack 1.0
            return array.__dlpack__(**stream)
    except (BufferError, RuntimeError, ValueError) as error:
        raise UsageError(f"{_kind(array)} cannot be shared: {error}") from None


def _tensor_in(capsule: object) -> tuple[_Tensor, int]:
    if _has_name(capsule, b"dltensor_versioned"):
        address = _pointer_in(capsule, b"dltensor_versioned")
        versioned = _ManagedVersioned.from_address(address)
        if versioned.major != _DLPACK_MAX_VERSION[0]:
            raise UsageError(f"DLPack {versioned.major}.{versioned.minor} is not known here")
        return versioned.tensor, versioned.flags
    return _Managed.from_address(_pointer_in(capsule, b"dltensor")).tensor, 0


def _kind(array: object) -> str:
    kind = type(array)
    return f"{kind.__module__}.{kind.__qualname__}"
