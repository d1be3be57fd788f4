"""Paged layouts: which bytes of a block lie where; the numpy reference of the kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs.errors import UsageError
from kvfs.gpu.arrays import HostMemory
from kvfs.gpu.layout import PagedLayout
from kvfs.gpu.reference import gather, merge_halves, scatter
from kvfs.gpu.verification import TRUST_SEAL, VERIFY_ALL, Verification
from kvfs.tiers.codec import CHUNK_BYTES

PAGES, HEADS, DIM = 10, 2, 8


def cache(layers: int, seed: int = 0) -> list[Any]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 1000, (PAGES, HEADS, DIM), np.int16) for _ in range(layers)]


def block(layout: PagedLayout, page: int) -> bytes:
    segments = layout.at([page]).segments(0)
    return b"".join(bytes(s.view) for s in segments if isinstance(s, HostMemory))


def test_a_contiguous_block_is_a_page_with_all_layers() -> None:
    whole = np.random.default_rng(0).integers(0, 99, (PAGES, 3, 2, HEADS, DIM), np.int16)
    layout = PagedLayout.contiguous(whole)
    assert layout.block_bytes == whole[0].nbytes
    assert block(layout, 7) == whole[7].tobytes()
    assert layout.at([7]).contiguous


def test_per_layer_a_block_is_the_page_of_each_layer() -> None:
    layers = cache(3)
    layout = PagedLayout.per_layer(layers)
    assert block(layout, 4) == b"".join(layer[4].tobytes() for layer in layers)
    assert not layout.at([4]).contiguous


def test_kv_split_has_keys_and_values_of_a_layer_together() -> None:
    keys, values = cache(2, 1), cache(2, 2)
    layout = PagedLayout.kv_split(keys, values)
    expected = (keys[0][9], values[0][9], keys[1][9], values[1][9])
    assert block(layout, 9) == b"".join(part.tobytes() for part in expected)
    # One tensor with K and V in front, as flash attention's.
    both = np.stack([keys[0], values[0]])
    assert block(PagedLayout.kv_split([both[0]], [both[1]]), 9) == both[:, 9].tobytes()


def test_layers_of_unlike_size() -> None:
    layers = [*cache(1), np.ones((PAGES, 3), np.float64)]
    layout = PagedLayout.per_layer(layers)
    assert block(layout, 1) == layers[0][1].tobytes() + layers[1][1].tobytes()


@given(pages=st.permutations(range(PAGES)), count=st.integers(0, PAGES), layers=st.integers(1, 4))
def test_gather_undoes_scatter(pages: list[int], count: int, layers: int) -> None:
    arrays = cache(layers)
    before = [array.copy() for array in arrays]
    layout = PagedLayout.per_layer(arrays)
    blocks = layout.at(pages[:count])
    staged = np.random.default_rng(3).integers(0, 256, (count, layout.block_bytes + 16), np.uint8)
    scatter(staged, blocks)
    for number, page in enumerate(pages[:count]):
        assert block(layout, page) == staged[number, : layout.block_bytes].tobytes()
    for page in pages[count:]:
        assert all(
            (array[page] == old[page]).all() for array, old in zip(arrays, before, strict=True)
        )
    again = np.zeros_like(staged)
    gather(blocks, again)
    assert (again[:, : layout.block_bytes] == staged[:, : layout.block_bytes]).all()


@given(pairs=st.integers(0, 3 * CHUNK_BYTES // 2))
def test_merging_halves_undoes_the_plane_split(pairs: int) -> None:
    content = np.random.default_rng(pairs).integers(0, 256, 2 * pairs, np.uint8)
    split = np.concatenate(
        [np.zeros(0, np.uint8)]
        + [
            content[start : start + 2 * CHUNK_BYTES][half::2]
            for start in range(0, len(content), 2 * CHUNK_BYTES)
            for half in (0, 1)
        ]
    )
    merged = np.zeros_like(content)
    merge_halves(split, merged)
    assert (merged == content).all()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: PagedLayout([]), "no planes"),
        (lambda: PagedLayout.contiguous(np.zeros((0, 4))), "no pages"),
        (lambda: PagedLayout.per_layer([np.zeros((4, 2)), np.zeros((5, 2))]), "number of pages"),
        (lambda: PagedLayout.kv_split(cache(2), cache(1)), "2 arrays of keys, but 1 of values"),
        (lambda: PagedLayout.per_layer(cache(1)).at([PAGES]), "no page 10: the cache has 10"),
        (lambda: PagedLayout.per_layer(cache(1)).at([-1]), "no page -1"),
        (lambda: PagedLayout.per_layer(cache(1)).at([3, 3]), "share a page"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        make()


def test_which_blocks_are_verified() -> None:
    policy = Verification(small_bytes=1000, one_in=4)
    assert all(policy.wants(1000, number) for number in range(8))
    assert [policy.wants(1001, number) for number in range(8)] == [True, False, False, False] * 2
    assert all(VERIFY_ALL.wants(1 << 30, number) for number in range(8))
    assert not any(TRUST_SEAL.wants(size, n) for size in (1, 1 << 30) for n in range(8))
    with pytest.raises(UsageError):
        Verification(one_in=-1)
