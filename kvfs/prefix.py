"""Prefix hashing: token ids -> the chain of block keys, and the file names that engines give them.

A block's key covers its own tokens and all tokens before it, so two prompts share the keys of their
common prefix. Each engine has its own scheme; the same tokens have other names in another engine.
Pure and streaming: tokens are taken as they come, and no more than one block of them is held.
`Client.match`, `kvfs match` and engines that store through the client library call it.

The schemes are those of vLLM 0.32 (`fs` tier), SGLang 0.5.23 (`file` backend) and LMCache 0.5.6
(`fs://` connector with `sha256_cbor`), and one of our own. docs/engines.md says how to use them.
"""

from __future__ import annotations

import hashlib
import pickle
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, Protocol

import cbor2

from kvfs import layout
from kvfs.errors import UsageError

VLLM_SEED = "vllm-none-hash"
"""What vLLM hashes where PYTHONHASHSEED is not set."""

MAX_TOKEN = 2**63 - 1
_MAX_UINT32 = 2**32 - 1
# What pickle.HIGHEST_PROTOCOL is in every Python that vLLM runs on; it decides the names.
_PICKLE_PROTOCOL = 5
_KEY_HOLE = "{}"
_SGLANG_NAMESPACE = b"sglang-cache-namespace-v1"
_KVFS_DOMAIN = b"kvfs-prefix-v1"

VllmAlgorithm = Literal["sha256", "sha256_cbor"]


class Scheme(Protocol):
    """How one engine names the blocks of a prompt."""

    @property
    def file_tokens(self) -> int:
        """How many tokens a block file covers."""

    def keys(self, tokens: Iterable[int]) -> Iterator[bytes]:
        """The key of each full block file, in order; a rest of tokens has none.

        Raises UsageError for what is no token id.
        """

    def file_name(self, key: bytes) -> bytes:
        """The path of a block's file, relative to the engine's namespace directory."""


def block_paths(scheme: Scheme, namespace: bytes, tokens: Iterable[int]) -> Iterator[bytes]:
    """The path of each full block of a prompt, below `namespace`, in order."""
    for key in scheme.keys(tokens):
        yield layout.join(namespace, scheme.file_name(key))


# --- vLLM -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MediaItem:
    """An image or the like of a multimodal prompt, as vLLM's `mm_features` has it."""

    identifier: str
    offset: int
    tokens: int


@dataclass(frozen=True, slots=True)
class VllmExtras:
    """What besides tokens goes into vLLM's keys: everything that changes a prompt's KV.

    `embeds` has the SHA-256 of the prompt embeddings of a block, by the number of the block.
    """

    lora: tuple[str, str] | None = None
    """Name and path of the adapter."""

    media: tuple[MediaItem, ...] = ()
    cache_salt: str | None = None
    embeds: Mapping[int, bytes] = field(default_factory=dict)

    def of_block(self, number: int, block_tokens: int) -> tuple[Any, ...] | None:
        """The extra keys of one block, in vLLM's order; the salt counts in the first only."""
        start, end = number * block_tokens, (number + 1) * block_tokens
        keys: list[tuple[Any, ...]] = []
        if self.lora is not None:
            keys.append(("lora", *self.lora))
        keys += [
            ("mm", item.identifier, item.offset - start)
            for item in self.media
            if item.offset < end and item.offset + item.tokens > start
        ]
        if number == 0 and self.cache_salt:
            keys.append(("cache_salt", self.cache_salt))
        if number in self.embeds:
            keys.append(("prompt_embeds", self.embeds[number]))
        return tuple(keys) or None


@dataclass(frozen=True, slots=True)
class VllmScheme:
    """vLLM's block hashes and the layout of its `fs` tier.

    The namespace is the directory `MODEL_DIGEST_rRANK`. `seed` is PYTHONHASHSEED of the engine
    where that is set. With `blocks_per_chunk` a file holds several blocks and has the key of the
    last one. A model with several KV cache groups has a file per group.
    """

    block_tokens: int
    algorithm: VllmAlgorithm = "sha256"
    seed: str = VLLM_SEED
    blocks_per_chunk: int = 1
    group: int = 0
    extras: VllmExtras = VllmExtras()

    def __post_init__(self) -> None:
        _check_positive(self.block_tokens, self.blocks_per_chunk)

    @property
    def file_tokens(self) -> int:
        return self.block_tokens * self.blocks_per_chunk

    def keys(self, tokens: Iterable[int]) -> Iterator[bytes]:
        hashed = _hash_pickle if self.algorithm == "sha256" else _hash_cbor
        key = hashed(self.seed)
        for number, block in enumerate(_full_blocks(tokens, self.block_tokens)):
            key = hashed((key, block, self.extras.of_block(number, self.block_tokens)))
            if (number + 1) % self.blocks_per_chunk == 0:
                yield key

    def file_name(self, key: bytes) -> bytes:
        name = key.hex()
        return f"{name[:3]}/{name[3:5]}_g{self.group}/{name}.bin".encode()


def _hash_pickle(value: object) -> bytes:
    return hashlib.sha256(pickle.dumps(value, protocol=_PICKLE_PROTOCOL)).digest()


def _hash_cbor(value: object) -> bytes:
    return hashlib.sha256(cbor2.dumps(value, canonical=True)).digest()


# --- SGLang and LMCache -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SglangScheme:
    """SGLang's page hashes, a chain over little-endian token ids, and its `file` backend.

    The namespace is the storage directory; all pages lie in it under `template`, the key in place
    of `{}`: `{}_MODEL_TPRANK_TPSIZE.bin`. `extra_key` and `cache_salt` are the request's.
    """

    page_tokens: int
    template: str
    extra_key: str | None = None
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        _check_positive(self.page_tokens)
        _check_template(self.template)

    @property
    def file_tokens(self) -> int:
        return self.page_tokens

    def keys(self, tokens: Iterable[int]) -> Iterator[bytes]:
        key = self._namespace_seed()
        for page in _full_blocks(tokens, self.page_tokens):
            key = hashlib.sha256(key + _sglang_page(page)).digest()
            yield key

    def file_name(self, key: bytes) -> bytes:
        return self.template.replace(_KEY_HOLE, key.hex()).encode()

    def _namespace_seed(self) -> bytes:
        """What comes before the first page; nothing where a request has no namespace."""
        if self.extra_key is None and self.cache_salt is None:
            return b""
        parts = (self.extra_key, self.cache_salt)
        marked = (b"\0" if part is None else b"\1" + _counted(part) for part in parts)
        return hashlib.sha256(_SGLANG_NAMESPACE + b"".join(marked)).digest()


def _sglang_page(page: tuple[int, ...]) -> bytes:
    """32 bits a token; 64, and a byte in front, in a page where one needs more."""
    if max(page) > _MAX_UINT32:
        return b"\xff" + struct.pack(f"<{len(page)}Q", *page)
    return _uint32s(page)


@dataclass(frozen=True, slots=True)
class LmcacheScheme:
    """LMCache's chunk hashes with `pre_caching_hash_algorithm: sha256_cbor`, and its `fs://` files.

    It hashes with vLLM's function and seed, but goes on with the first 8 bytes as a number. The
    namespace is the base path; all chunks lie in it under `template`, the key in place of `{}`:
    `MODEL@WORLD@WORKER@{}@DTYPE.data`, with `-SEP-` for each slash.
    """

    chunk_tokens: int
    template: str
    seed: str = VLLM_SEED

    def __post_init__(self) -> None:
        _check_positive(self.chunk_tokens)
        _check_template(self.template)

    @property
    def file_tokens(self) -> int:
        return self.chunk_tokens

    def keys(self, tokens: Iterable[int]) -> Iterator[bytes]:
        key = _hash_cbor(self.seed)[:8]
        for chunk in _full_blocks(tokens, self.chunk_tokens):
            key = _hash_cbor((int.from_bytes(key, "big"), chunk, ()))[:8]
            yield key

    def file_name(self, key: bytes) -> bytes:
        # A number in hexadecimal: without leading zeros.
        number = f"{int.from_bytes(key, 'big'):x}"
        return self.template.replace(_KEY_HOLE, number).encode()


# --- ours -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KvfsScheme:
    """The scheme for whoever has none of his own, and the files `HH/KEY.bin`.

    `fingerprint` names everything that must be equal for one engine's bytes to be of use to
    another: model and revision of its weights, dtype, layout of the block, parallel rank. Blocks
    under another `salt` (of a tenant, say) are never found without it.

    The first key is SHA-256 of the tokens after a seed, each further one of the tokens after the
    key before; tokens are 32 bits, little-endian. The seed is SHA-256 of `kvfs-prefix-v1`, the
    fingerprint and the salt, each of these two as UTF-8 after its length in 64 bits, little-endian.
    """

    block_tokens: int
    fingerprint: str
    salt: str = ""

    def __post_init__(self) -> None:
        _check_positive(self.block_tokens)

    @property
    def file_tokens(self) -> int:
        return self.block_tokens

    def keys(self, tokens: Iterable[int]) -> Iterator[bytes]:
        parts = _counted(self.fingerprint) + _counted(self.salt)
        key = hashlib.sha256(_KVFS_DOMAIN + parts).digest()
        for block in _full_blocks(tokens, self.block_tokens):
            key = hashlib.sha256(key + _uint32s(block)).digest()
            yield key

    def file_name(self, key: bytes) -> bytes:
        name = key.hex()
        return f"{name[:2]}/{name}.bin".encode()


# --- what they share --------------------------------------------------------------------------


def _full_blocks(tokens: Iterable[int], block_tokens: int) -> Iterator[tuple[int, ...]]:
    rest = iter(tokens)
    while len(block := tuple(islice(rest, block_tokens))) == block_tokens:
        for token in block:
            # Not isinstance: a bool, or a number of numpy, would be pickled to another name.
            if type(token) is not int or not 0 <= token <= MAX_TOKEN:
                raise UsageError(f"{token!r} is not a token id: they are whole numbers from 0 up")
        yield block


def _uint32s(tokens: tuple[int, ...]) -> bytes:
    try:
        return struct.pack(f"<{len(tokens)}I", *tokens)
    except struct.error:
        raise UsageError(f"{max(tokens)} is above the largest token id, {_MAX_UINT32}") from None


def _counted(part: str) -> bytes:
    encoded = part.encode()
    return len(encoded).to_bytes(8, "little") + encoded


def _check_positive(*counts: int) -> None:
    if min(counts) < 1:
        raise UsageError("a block has at least one token, and a file at least one block")


def _check_template(template: str) -> None:
    if template.count(_KEY_HOLE) != 1 or "/" in template:
        raise UsageError(f"{template!r} is not a file name with {{}} in place of the key")
