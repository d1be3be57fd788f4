"""`kvfs match`: how much of a prompt is cached in an engine's directory of a mount, and where.

Owns the verb's options and its report. Names are made by `kvfs.prefix`; the client library asks
what is there.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kvfs import layout
from kvfs.client import Client
from kvfs.control import Mount, find_mount
from kvfs.errors import UsageError
from kvfs.prefix import (
    VLLM_SEED,
    KvfsScheme,
    LmcacheScheme,
    Scheme,
    SglangScheme,
    VllmAlgorithm,
    VllmExtras,
    VllmScheme,
)
from kvfs.tools.render import UNKNOWN, count_text, name_text, print_json, show, table

STDIN = "-"
# Of a prompt of ten million tokens.
MAX_TOKENS_FILE_BYTES = 64 << 20

SchemeName = Literal["vllm-sha256", "vllm-sha256_cbor", "sglang", "lmcache", "kvfs"]

_WORDS = re.compile(r"[\s,]+")
_NUMBER = re.compile(r"[0-9]+", re.ASCII)


def register(app: typer.Typer) -> None:
    app.command("match")(match)


def match(
    tokens: Annotated[
        str,
        typer.Argument(
            metavar="TOKENS",
            help="A file with the prompt's token ids, as a JSON list or as numbers; -: stdin.",
        ),
    ],
    scheme: Annotated[
        SchemeName,
        typer.Option(
            metavar="SCHEME", help="vllm-sha256, vllm-sha256_cbor, sglang, lmcache or kvfs."
        ),
    ],
    namespace: Annotated[
        Path, typer.Option(metavar="DIR", help="The engine's directory of blocks in a mount.")
    ],
    block_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a block, page or chunk.")],
    seed: Annotated[
        str | None, typer.Option(help="vllm, lmcache: the engine's PYTHONHASHSEED.")
    ] = None,
    salt: Annotated[
        str | None, typer.Option(help="vllm, sglang, kvfs: the request's cache salt.")
    ] = None,
    lora: Annotated[
        str | None, typer.Option(metavar="NAME=PATH", help="vllm: the request's adapter.")
    ] = None,
    blocks_per_chunk: Annotated[
        int | None, typer.Option(min=1, help="vllm: blocks in a file, as configured.")
    ] = None,
    group: Annotated[int | None, typer.Option(min=0, help="vllm: KV cache group.")] = None,
    extra_key: Annotated[str | None, typer.Option(help="sglang: the request's extra key.")] = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="TEMPLATE", help="sglang, lmcache: a file's name with {} for the hash."
        ),
    ] = None,
    fingerprint: Annotated[
        str | None, typer.Option(help="kvfs: what names model and layout.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show how much of a prompt is cached: its longest prefix of blocks, and their tiers."""
    given = {
        "seed": seed, "salt": salt, "lora": lora, "blocks_per_chunk": blocks_per_chunk,
        "group": group, "extra_key": extra_key, "name": name, "fingerprint": fingerprint,
    }  # fmt: skip
    naming = scheme_of(scheme, block_tokens, given)
    mount = directory_in_mount(namespace)
    prompt = read_tokens(tokens)
    found = look_up(naming, namespace, prompt)
    if as_json:
        print_json(found.document(scheme, mount))
    else:
        found.show(mount)


# --- the scheme -------------------------------------------------------------------------------

Given = dict[str, Any]


def scheme_of(name: SchemeName, block_tokens: int, options: Given) -> Scheme:
    """The scheme as the options describe it. Raises UsageError for one that it does not have."""
    given = {option: value for option, value in options.items() if value is not None}
    takes, make = _SCHEMES[name]
    for option in given:
        if option not in takes:
            raise UsageError(f"{_flag(option)} means nothing to --scheme {name}")
    return make(block_tokens, given)


def _vllm(algorithm: VllmAlgorithm) -> Callable[[int, Given], Scheme]:
    def make(block_tokens: int, given: Given) -> Scheme:
        adapter = None
        if "lora" in given:
            adapter_name, equals, path = given["lora"].partition("=")
            if not equals:
                raise UsageError("--lora: write NAME=PATH, as the engine was given it")
            adapter = (adapter_name, path)
        return VllmScheme(
            block_tokens,
            algorithm,
            seed=given.get("seed", VLLM_SEED),
            blocks_per_chunk=given.get("blocks_per_chunk", 1),
            group=given.get("group", 0),
            extras=VllmExtras(lora=adapter, cache_salt=given.get("salt")),
        )

    return make


def _sglang(page_tokens: int, given: Given) -> Scheme:
    template = _required(given, "name", "{}_MODEL_0_1.bin")
    return SglangScheme(page_tokens, template, given.get("extra_key"), given.get("salt"))


def _lmcache(chunk_tokens: int, given: Given) -> Scheme:
    template = _required(given, "name", "MODEL@1@0@{}@bfloat16.data")
    return LmcacheScheme(chunk_tokens, template, given.get("seed", VLLM_SEED))


def _kvfs(block_tokens: int, given: Given) -> Scheme:
    fingerprint = _required(given, "fingerprint", "MODEL:REVISION:DTYPE")
    return KvfsScheme(block_tokens, fingerprint, given.get("salt", ""))


def _required(given: Given, option: str, example: str) -> str:
    if option not in given:
        raise UsageError(f"{_flag(option)} is missing; for example {example}")
    return str(given[option])


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


_OF_VLLM = frozenset({"seed", "salt", "lora", "blocks_per_chunk", "group"})
_SCHEMES: dict[SchemeName, tuple[frozenset[str], Callable[[int, Given], Scheme]]] = {
    "vllm-sha256": (_OF_VLLM, _vllm("sha256")),
    "vllm-sha256_cbor": (_OF_VLLM, _vllm("sha256_cbor")),
    "sglang": (frozenset({"name", "salt", "extra_key"}), _sglang),
    "lmcache": (frozenset({"name", "seed"}), _lmcache),
    "kvfs": (frozenset({"fingerprint", "salt"}), _kvfs),
}


# --- the prompt -------------------------------------------------------------------------------


def read_tokens(source: str) -> list[int]:
    """The token ids in a file or on stdin. Raises UsageError, OSError."""
    if source == STDIN:
        data = sys.stdin.buffer.read(MAX_TOKENS_FILE_BYTES + 1)
    else:
        with open(source, "rb") as file:
            data = file.read(MAX_TOKENS_FILE_BYTES + 1)
    shown = "stdin" if source == STDIN else source
    if len(data) > MAX_TOKENS_FILE_BYTES:
        raise UsageError(f"{shown}: more than {MAX_TOKENS_FILE_BYTES >> 20} MiB of token ids")
    text = data.decode("utf-8", "replace").strip()
    if text.startswith("["):
        try:
            tokens: list[int] = json.loads(text)
        except (ValueError, RecursionError):
            raise UsageError(f"{shown}: begins like a JSON list, but is none") from None
        return tokens
    return [_token(word, shown) for word in _WORDS.split(text) if word]


def _token(word: str, shown: str) -> int:
    if not _NUMBER.fullmatch(word) or len(word) > 20:
        raise UsageError(f"{shown}: {word[:40]!r} is not a token id")
    return int(word)


# --- the answer -------------------------------------------------------------------------------


def directory_in_mount(namespace: Path) -> Mount:
    """Raises MountpointError, DaemonUnavailable, OSError, UsageError."""
    mount = find_mount(namespace)
    if not stat.S_ISDIR(os.stat(namespace).st_mode):
        raise UsageError(f"{namespace} is a file: name the directory of the engine's blocks")
    return mount


@dataclass(frozen=True, slots=True)
class Found:
    """The longest cached prefix of a prompt: the tier of each of its blocks, None if not known."""

    tokens: int
    blocks: int
    block_tokens: int
    tiers: tuple[str | None, ...]
    first_missing: bytes | None

    def by_tier(self) -> list[dict[str, Any]]:
        return [
            {"tier": tier, "blocks": blocks, "tokens": blocks * self.block_tokens}
            for tier, blocks in Counter(self.tiers).items()
        ]

    def document(self, scheme: str, mount: Mount) -> dict[str, Any]:
        """Everything, with stable names; paths are those of the mount."""
        return {
            "scheme": scheme,
            "namespace": mount.relative,
            "block_tokens": self.block_tokens,
            "tokens": self.tokens,
            "blocks": self.blocks,
            "hit_tokens": len(self.tiers) * self.block_tokens,
            "hit_blocks": len(self.tiers),
            "tiers": self.by_tier(),
            "first_missing": self._missing_path(mount),
        }

    def show(self, mount: Mount) -> None:
        hits = len(self.tiers)
        typer.echo(
            f"{hits * self.block_tokens:,} of {self.tokens:,} tokens are cached: "
            f"{hits:,} of {self.blocks:,} blocks of {self.block_tokens:,} tokens"
        )
        if hits:
            view = table("Tier", ">Blocks", ">Tokens", "")
            for row in self.by_tier():
                cells = count_text(row["blocks"]), count_text(row["tokens"])
                view.add_row(row["tier"] or UNKNOWN, *cells, "")
            show(view)
        missing = self._missing_path(mount)
        if missing is not None:
            typer.echo(f"the first that is not: {name_text(missing)}")

    def _missing_path(self, mount: Mount) -> bytes | None:
        if self.first_missing is None:
            return None
        return layout.join(mount.relative, self.first_missing)


def look_up(scheme: Scheme, namespace: Path, tokens: list[int]) -> Found:
    """Ask for the blocks of a prompt in order, up to the first that is not there."""
    names = [scheme.file_name(key) for key in scheme.keys(tokens)]
    tiers = leading_tiers(namespace, names)
    missing = names[len(tiers)] if len(tiers) < len(names) else None
    return Found(len(tokens), len(names), scheme.file_tokens, tiers, missing)


def leading_tiers(namespace: Path, names: Sequence[bytes]) -> tuple[str | None, ...]:
    """The fastest tier of each block, up to the first name that is none or cannot be read now.

    Asking changes no heat. Where the daemon cannot be asked, the tier of a block that the caller
    may not read is not known.
    """
    with Client(namespace) as client:
        return client.lookup(names).tiers
