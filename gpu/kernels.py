"""CUDA C of the kernels that lay out blocks. `kvfs.gpu.reference` says in numpy what they do."""

from __future__ import annotations

from kvfs.errors import UsageError
from kvfs.gpu.arrays import DeviceMemory
from kvfs.gpu.layout import PagedLayout

WORD_BYTES = 16
"""Scatter and gather move words of this size: pages begin and end at multiples of it."""

THREADS = 256
SCATTER, GATHER, MERGE = "scatter_pages", "gather_pages", "merge_halves"

# A plane is three numbers: its address, words in a page, the word of a block where its page begins.
# Grid: x over the words of a page, y over blocks, z over planes.
SOURCE = r"""
typedef unsigned long long u64;

extern "C" __global__ void scatter_pages(
    const uint4* staged, u64 block_words, const u64* planes, const u64* pages)
{
    const u64* plane = planes + 3 * (u64)blockIdx.z;
    const u64 words = plane[1];
    uint4* page = (uint4*)plane[0] + pages[blockIdx.y] * words;
    const uint4* source = staged + blockIdx.y * block_words + plane[2];
    for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < words;
         i += gridDim.x * (u64)blockDim.x)
        page[i] = source[i];
}

extern "C" __global__ void gather_pages(
    uint4* staged, u64 block_words, const u64* planes, const u64* pages)
{
    const u64* plane = planes + 3 * (u64)blockIdx.z;
    const u64 words = plane[1];
    const uint4* page = (const uint4*)plane[0] + pages[blockIdx.y] * words;
    uint4* target = staged + blockIdx.y * block_words + plane[2];
    for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < words;
         i += gridDim.x * (u64)blockDim.x)
        target[i] = page[i];
}

// Each piece of `piece_bytes` (the last one is shorter) has its even bytes, then its odd ones.
extern "C" __global__ void merge_halves(
    const unsigned char* split, unsigned short* merged, u64 size_bytes, u64 piece_bytes)
{
    for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < size_bytes / 2;
         i += gridDim.x * (u64)blockDim.x) {
        const u64 start = 2 * i / piece_bytes * piece_bytes;
        const u64 rest = size_bytes - start;
        const u64 half = (rest < piece_bytes ? rest : piece_bytes) / 2;
        const u64 place = start + i - start / 2;
        merged[i] = (unsigned short)(split[place] | split[place + half] << 8);
    }
}
"""


def plane_table(layout: PagedLayout) -> list[tuple[int, int, int]]:
    """The planes as the kernels read them. Raises UsageError for pages that are no whole words."""
    rows = []
    for number, plane in enumerate(layout.planes):
        assert isinstance(plane.memory, DeviceMemory)
        address, page_bytes = plane.memory.address, plane.page_bytes
        if address % WORD_BYTES or page_bytes % WORD_BYTES:
            raise UsageError(
                f"plane {number} of the cache: its address or its page size, {page_bytes} bytes, "
                f"is no multiple of {WORD_BYTES}"
            )
        rows.append((address, page_bytes // WORD_BYTES, plane.offset // WORD_BYTES))
    return rows
