"""Prefix keys against what the engines themselves compute, and what every scheme promises.

The vectors come from the engines' own code: vLLM 0.32.0 (`get_request_block_hasher`, and a run of
`make engine-demo`), SGLang 0.5.23 (`hash_binding.cpp`, compiled), LMCache 0.5.6
(`ChunkedTokenDatabase`, `FSConnector`).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs.errors import UsageError
from kvfs.prefix import (
    VLLM_SEED,
    KvfsScheme,
    LmcacheScheme,
    MediaItem,
    Scheme,
    SglangScheme,
    VllmAlgorithm,
    VllmExtras,
    VllmScheme,
    block_paths,
)

# Every width that pickle and CBOR have for a number, three blocks of 4 and a rest.
TOKENS = [1, 255, 256, 65535, 65536, 128000, 2**32 - 1, 0, 7, 7, 7, 7, 2, 3]
LORA = ("sql", "/adapters/sql")
MEDIA = (MediaItem("img-1", 2, 4), MediaItem("img-2", 7, 1))
# SHA-256 of rows 4n to 4n + 3 of `torch.arange(28, dtype=float32).reshape(14, 2)`.
EMBEDS = {
    0: bytes.fromhex("0571cfe42be5c7b95de9afc7c7ba1286fb7a2ef10a9035f8d6b87d21a3bc8387"),
    1: bytes.fromhex("45701da4b3c9bd087207d34d5ec61fe12c9ed32fe2f5b509dd7ea08799a9a8e8"),
    2: bytes.fromhex("9b06c638288d1c3792a12fe41901ae67d25668183dfebbe1b248bf2319d06f4d"),
}


def keys_of(scheme: Scheme, tokens: list[int] = TOKENS) -> list[str]:
    return [key.hex() for key in scheme.keys(tokens)]


# --- vLLM -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        (
            "sha256",
            [
                "64b05b8b7de237b04310cce9899c2c3b4100aeafbf1bb53c1ba4e55e6b925b31",
                "eec725b42d3c880afb821640c66bfd9b7b768a5a2dad45fc6876f5e2f2109eb2",
                "f4e71777f64987cae32896b9e7c0f6c9af4a763d1bf5278a9758b6753dd9114c",
            ],
        ),
        (
            "sha256_cbor",
            [
                "7cbf2a43da7e3bf7f6605fca21778e2d3e48b5d8abe1898b841db47bb22759ba",
                "5d70aad0b51cc1a8f6766c84572b501e06d740d25f21336ba99038ea94bdb014",
                "61cf0a1f7b167857315992468bd4492c724b38ef24d41a1099af7900427a6596",
            ],
        ),
    ],
)
def test_vllm_blocks(algorithm: VllmAlgorithm, expected: list[str]) -> None:
    assert keys_of(VllmScheme(4, algorithm)) == expected


# The third key: through the chain it depends on the two before.
@pytest.mark.parametrize(
    ("algorithm", "seed", "extras", "expected"),
    [
        (
            "sha256",
            "0",
            VllmExtras(),
            "001f6cd68bbe081c00d026bca90a2c770f458a5a8e089b1f5001546416cf5a52",
        ),
        (
            "sha256",
            VLLM_SEED,
            VllmExtras(cache_salt="tenant A"),
            "70b8601e3331153992e8410f6e17c1b6af73bbcdaaa5202f903dd5dfb07645a6",
        ),
        (
            "sha256",
            VLLM_SEED,
            VllmExtras(LORA),
            "c48f0531dcc093d00b509bed2e2f416156b88bbc74e1b63ceeda9379605b481e",
        ),
        (
            "sha256",
            VLLM_SEED,
            VllmExtras(LORA, MEDIA, "tenant A"),
            "7c746e598c0b01feb93ac0c79aa4d53a9527fdc08983fa4b1795e8760599f1f8",
        ),
        (
            "sha256",
            VLLM_SEED,
            VllmExtras(cache_salt="s", embeds=EMBEDS),
            "b964c167f53585d69652d886fbc0c0a8c2bae9453e50582795e06c12408738da",
        ),
        (
            "sha256_cbor",
            "0",
            VllmExtras(),
            "4fd0c50083df2f695d920dba0f8da8738a3ac4fa320427824c339ad58185c0d1",
        ),
        (
            "sha256_cbor",
            VLLM_SEED,
            VllmExtras(cache_salt="tenant A"),
            "a802ee4a5e9ad1f4a097c9152d8202f75c82e1b7c4ce4cbb41fb2144f95e1c93",
        ),
        (
            "sha256_cbor",
            VLLM_SEED,
            VllmExtras(LORA),
            "a7ef1c854df1c6052214c1a21f84beb3ba9d060ac4885e7027ba7af9249589e5",
        ),
        (
            "sha256_cbor",
            VLLM_SEED,
            VllmExtras(LORA, MEDIA, "tenant A"),
            "b0b5de4f81d214a17f14f68aa93da1649261e669946e81dcb070d45c95332092",
        ),
        (
            "sha256_cbor",
            VLLM_SEED,
            VllmExtras(cache_salt="s", embeds=EMBEDS),
            "f75650fefa9056104d88406dd35071e00af854f79bfb59f7fe404db82d60e186",
        ),
    ],
)
def test_vllm_seeds_and_extra_keys(
    algorithm: VllmAlgorithm, seed: str, extras: VllmExtras, expected: str
) -> None:
    assert keys_of(VllmScheme(4, algorithm, seed=seed, extras=extras))[-1] == expected


def real_prompt() -> list[int]:
    """The prompt of tools/engine/run_vllm.py in the ids of its tokenizer, one a byte."""
    question = " How many boxes are left in aisle 7?"
    aisles = (f"Aisle {n} holds {n * n % 97} boxes of part {n * 7 % 31}. " for n in range(60))
    text = "".join(aisles)[: 1512 - len(question)] + question
    # GPT-2's alphabet: printable bytes are themselves, the others begin at 256; ids sort by it.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = itertools.count(256)
    characters = {byte: byte if byte in printable else next(others) for byte in range(256)}
    order = sorted(characters.values())
    return [order.index(characters[byte]) for byte in text.encode()]


def test_vllm_names_of_a_real_run() -> None:
    namespace = b"tiny-llama_2f5cb9e49457_r0"
    paths = list(block_paths(VllmScheme(32), namespace, real_prompt()))
    assert len(paths) == 47
    first = "ea2c6459d5fba66c7694a1454104152663cb05c946d7775b1d5956f30ca88a81"
    last = "3dfe16f299cc9bca8847d15f736bccd4f3b13a2e4f5262e6cb12b553febc1c86"
    assert paths[0] == namespace + f"/ea2/c6_g0/{first}.bin".encode()
    assert paths[-1] == namespace + f"/3df/e1_g0/{last}.bin".encode()


def test_vllm_chunk_has_the_key_of_its_last_block() -> None:
    blocks = keys_of(VllmScheme(4), list(range(47)))
    chunks = VllmScheme(4, blocks_per_chunk=4)
    assert chunks.file_tokens == 16
    assert keys_of(chunks, list(range(47))) == blocks[3::4]
    assert len(blocks[3::4]) == 2


def test_vllm_groups_have_files_of_their_own() -> None:
    key = bytes.fromhex("ab" * 32)
    assert VllmScheme(4, group=2).file_name(key) == b"aba/ba_g2/" + b"ab" * 32 + b".bin"


def test_vllm_extra_keys_of_a_block() -> None:
    extras = VllmExtras(LORA, MEDIA, "tenant A", {1: b"digest"})
    lora = ("lora", "sql", "/adapters/sql")
    assert extras.of_block(0, 4) == (lora, ("mm", "img-1", 2), ("cache_salt", "tenant A"))
    second = (lora, ("mm", "img-1", -2), ("mm", "img-2", 3), ("prompt_embeds", b"digest"))
    assert extras.of_block(1, 4) == second
    assert extras.of_block(2, 4) == (lora,)
    assert VllmExtras(cache_salt="tenant A").of_block(1, 4) is None


# --- SGLang and LMCache -----------------------------------------------------------------------

SGLANG_NAME = "{}_org-tiny_0_1.bin"


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (
            SglangScheme(4, SGLANG_NAME),
            "d5228bd3d79366cb1b1b754be942bdc04f0a170c3b0008f63568f58cf9de1cf7",
        ),
        (
            SglangScheme(4, SGLANG_NAME, extra_key="lora-7"),
            "11a1f104c095de8c8362d3480bdadf0575248bd794fe4f587441d48de6f5c770",
        ),
        (
            SglangScheme(4, SGLANG_NAME, cache_salt="tenant Ä"),
            "58e33865a5f8e4346a179c06f051b84485be0442bbe3ab444b7e7e608f9e00e4",
        ),
        (
            SglangScheme(4, SGLANG_NAME, extra_key="", cache_salt="s"),
            "98c2aed4ed8e6a2fea345d49077c87bd99dcd734ba93c22d1e3580ec0c1bcb07",
        ),
    ],
)
def test_sglang_pages(scheme: SglangScheme, expected: str) -> None:
    assert keys_of(scheme)[-1] == expected


def test_sglang_pages_with_ids_that_need_64_bits() -> None:
    tokens = [5, 6, 7, 8, 9, 2**32, 2**63 - 1, 3, 1, 2, 3, 4]
    assert keys_of(SglangScheme(4, SGLANG_NAME), tokens) == [
        "f3e0813c89d0991f07fbb5027a68c0cb809e1effc0c1e8974664bd2e57b50024",
        "04d0dce82839201c3d134369bb8afd2dcb465899db34ce803916ad13af20b052",
        "4b1c2e5991192e68760d698a1289ffea13fdc3b2c2ff556d89d86203849d4b85",
    ]


def test_sglang_names() -> None:
    assert list(block_paths(SglangScheme(4, SGLANG_NAME), b"sglang", TOKENS[:4])) == [
        b"sglang/5fcc617f0c8057384c6c9f9b8e25c0401ac5ab7413154716bb7889b832670405_org-tiny_0_1.bin"
    ]


LMCACHE_NAME = "org-SEP-tiny-llama@2@1@{}@bfloat16.data"


def test_lmcache_names() -> None:
    assert list(block_paths(LmcacheScheme(4, LMCACHE_NAME), b"", TOKENS)) == [
        b"org-SEP-tiny-llama@2@1@64dc021522e0a3e9@bfloat16.data",
        b"org-SEP-tiny-llama@2@1@b8f947480f1dba16@bfloat16.data",
        b"org-SEP-tiny-llama@2@1@54f33063e3198cf6@bfloat16.data",
    ]
    seeded = LmcacheScheme(4, LMCACHE_NAME, seed="0")
    assert [path.split(b"@")[3] for path in block_paths(seeded, b"", TOKENS)] == [
        b"cb353b543bd841dd",
        b"4a8ba796ba1c90f7",
        b"ed491e3790d218e",
    ]
    # The 17th key of this prompt has a leading zero, which the name has not.
    paths = list(block_paths(LmcacheScheme(4, LMCACHE_NAME), b"", range(400)))
    assert paths[16] == b"org-SEP-tiny-llama@2@1@74f3263ad781d34@bfloat16.data"


# --- ours -------------------------------------------------------------------------------------


def test_the_default_scheme_is_what_its_docstring_says() -> None:
    seed = (
        b"kvfs-prefix-v1"
        + (5).to_bytes(8, "little")
        + b"model"
        + (2).to_bytes(8, "little")
        + "é".encode()
    )
    first = hashlib.sha256(hashlib.sha256(seed).digest() + bytes([1, 0, 0, 0, 2, 1, 0, 0])).digest()
    second = hashlib.sha256(first + bytes([3, 0, 0, 0, 255, 255, 255, 255])).digest()
    scheme = KvfsScheme(2, "model", "é")
    assert list(scheme.keys([1, 258, 3, 2**32 - 1, 9])) == [first, second]
    assert scheme.file_name(first) == f"{first.hex()[:2]}/{first.hex()}.bin".encode()


def test_fingerprint_and_salt_do_not_run_together() -> None:
    schemes = [KvfsScheme(4, "ab", "c"), KvfsScheme(4, "a", "bc"), KvfsScheme(4, "abc")]
    assert len({keys_of(scheme)[0] for scheme in schemes}) == 3


# --- what every scheme promises ---------------------------------------------------------------

MAKERS: list[Callable[[int], Scheme]] = [
    VllmScheme,
    lambda tokens: VllmScheme(tokens, "sha256_cbor"),
    lambda tokens: SglangScheme(tokens, SGLANG_NAME),
    lambda tokens: LmcacheScheme(tokens, LMCACHE_NAME),
    lambda tokens: KvfsScheme(tokens, "model"),
]
makers = st.sampled_from(MAKERS)
prompts = st.lists(st.integers(0, 2**32 - 1), max_size=60)


@given(makers, st.integers(1, 9), prompts, prompts)
def test_prompts_share_the_keys_of_their_common_prefix_and_no_other(
    make: Callable[[int], Scheme], block_tokens: int, one: list[int], other: list[int]
) -> None:
    scheme = make(block_tokens)
    keys = [list(scheme.keys(tokens)) for tokens in (one, one + other, other)]
    assert [len(each) for each in keys] == [
        len(tokens) // block_tokens for tokens in (one, one + other, other)
    ]
    assert keys[1][: len(keys[0])] == keys[0]
    assert len(set(keys[1])) == len(keys[1])
    for number, (left, right) in enumerate(zip(keys[0], keys[2], strict=False), 1):
        same = one[: number * block_tokens] == other[: number * block_tokens]
        assert (left == right) == same


@pytest.mark.parametrize("make", MAKERS)
def test_tokens_are_taken_as_keys_are_asked_for(make: Callable[[int], Scheme]) -> None:
    taken = 0

    def endless() -> Iterator[int]:
        nonlocal taken
        while True:
            taken += 1
            yield taken

    keys = make(16).keys(endless())
    first = next(keys)
    assert taken == 16
    assert len(list(itertools.islice(keys, 8192))) == 8192
    assert taken == 16 * 8193
    assert next(make(16).keys(range(1, 17))) == first


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("token", [-1, 2**63, True, 1.0, "1", None])
def test_what_is_no_token_is_refused(make: Callable[[int], Scheme], token: object) -> None:
    with pytest.raises(UsageError, match="is not a token id"):
        list(make(2).keys([1, token]))  # type: ignore[list-item] # what callers get wrong


def test_a_token_of_more_than_32_bits_is_refused_where_there_is_no_room_for_it() -> None:
    with pytest.raises(UsageError, match="above the largest token id"):
        list(KvfsScheme(2, "model").keys([1, 2**32]))


@pytest.mark.parametrize("make", MAKERS)
def test_a_block_has_tokens(make: Callable[[int], Scheme]) -> None:
    with pytest.raises(UsageError, match="at least one token"):
        make(0)


@pytest.mark.parametrize("template", ["", "name.bin", "{}-{}.bin", "a/{}.bin"])
def test_a_template_has_one_place_for_the_key(template: str) -> None:
    with pytest.raises(UsageError, match="in place of the key"):
        SglangScheme(4, template)
    with pytest.raises(UsageError, match="in place of the key"):
        LmcacheScheme(4, template)
