"""The KV blocks of a prompt: stored by one engine, found by the next, and loaded.

    python docs/examples/onboard.py MOUNTPOINT

Runs without a GPU, against any mount: `make demo HOLD=1` keeps one until Enter is pressed. On a
node with a GPU the arrays are cupy's or torch's, and `open_device()` takes the GPU.
"""

from __future__ import annotations

import random
import sys

from kvfs.client import Client
from kvfs.gpu.layout import PagedLayout
from kvfs.gpu.offloader import Offloader
from kvfs.gpu.onboarder import Onboarder
from kvfs.gpu.opening import open_device
from kvfs.prefix import KvfsScheme, block_paths

LAYERS, PAGES, PAGE_BYTES = 4, 64, 16 << 10
BLOCK_TOKENS = 16
NAMESPACE = b"example"

Arrays = list[memoryview]


def new_cache() -> tuple[Arrays, Arrays]:
    """What an engine allocates once: keys and values of each layer, page by page."""

    def array() -> memoryview:
        return memoryview(bytearray(PAGES * PAGE_BYTES)).cast("B", (PAGES, PAGE_BYTES))

    return [array() for _ in range(LAYERS)], [array() for _ in range(LAYERS)]


def page_of(cache: tuple[Arrays, Arrays], page: int) -> list[bytes]:
    """What a page holds in each array."""
    start = page * PAGE_BYTES
    return [bytes(array.cast("B")[start : start + PAGE_BYTES]) for half in cache for array in half]


def main(mountpoint: str) -> None:
    # The fingerprint names all that must be equal for the bytes to be of use: model, dtype, layout.
    scheme = KvfsScheme(BLOCK_TOKENS, fingerprint="example-model:1:bfloat16:kv-split")
    system_prompt = list(range(1000, 1000 + 20 * BLOCK_TOKENS))
    first_prompt = system_prompt + [7] * 5 * BLOCK_TOKENS
    second_prompt = system_prompt + [8] * 9 * BLOCK_TOKENS

    with Client(mountpoint) as client, open_device("host") as device:
        # One engine has computed the first prompt: page n of its cache has the n-th block.
        cache = new_cache()
        computed = random.Random(1)
        for half in cache:
            for array in half:
                array.cast("B")[:] = computed.randbytes(array.nbytes)
        paths = list(block_paths(scheme, NAMESPACE, first_prompt))
        layout = PagedLayout.kv_split(*cache)
        stored = Offloader(client, device).write(paths, layout.at(range(len(paths))))
        stored.check()
        print(f"stored {stored.stored} blocks of {layout.block_bytes:,} bytes")

        # The next one asks what its prompt would hit, and has these pages free.
        match = client.match(second_prompt, scheme, NAMESPACE)
        print(f"{match.tokens} of {len(second_prompt)} tokens are cached, on {set(match.tiers)}")
        free_pages = range(PAGES - 1, PAGES - 1 - len(match), -1)
        other_cache = new_cache()
        into = PagedLayout.kv_split(*other_cache).at(free_pages)
        onboarder = Onboarder(client, device)
        loaded = onboarder.read(match.paths, into)
        loaded.check()
        print(f"loaded {loaded.loaded} blocks: {onboarder.describe().why}")

        for number, page in enumerate(free_pages[: loaded.loaded]):
            if page_of(other_cache, page) != page_of(cache, number):
                sys.exit(f"block {number} is not what was stored")
    print(f"all {loaded.loaded_bytes:,} bytes are what was stored")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/examples/onboard.py MOUNTPOINT")
    main(sys.argv[1])
