"""Requests of an inference service, as chains of block hashes: read from a trace, or generated.

Owns the request type and the two places requests come from: a trace in Mooncake's published format
(JSON lines, plain or zstd-compressed, read as a stream) and a seeded multi-turn chat workload.
Never touches a block. Called by the replay and demo commands and by benchmarks.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import zstandard

from kvfs.errors import UsageError

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
CHUNK_BYTES = 64 << 10
# A 1M-token prompt has 2,048 ids: a longer line than this is not a request.
LINE_MAX_BYTES = 16 << 20
TOKENS_PER_BLOCK = 512

Tokens = Annotated[int, msgspec.Meta(ge=0)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0)]


class Request(msgspec.Struct, frozen=True, gc=False):
    """One prompt: equal leading `hash_ids` of two requests mean an equal leading text.

    Each id stands for one block of tokens *and* everything before it.
    """

    timestamp_ms: Milliseconds = msgspec.field(name="timestamp")
    input_length: Tokens
    output_length: Tokens
    hash_ids: tuple[int, ...]


class TraceSummary(msgspec.Struct, frozen=True):
    """What a trace holds, known only after every line was found readable."""

    requests: int
    blocks: int
    duration_s: float


def read_trace(path: Path, limit: int | None = None) -> Iterator[Request]:
    """Yield the first `limit` requests of the trace (all, if None), in the file's order."""
    decoder = msgspec.json.Decoder(Request)
    numbered = ((n, line) for n, line in enumerate(_lines(path), start=1) if line.strip())
    for number, line in itertools.islice(numbered, limit):
        try:
            yield decoder.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise UsageError(f"{path}: line {number} is not a trace request: {error}") from None


def check_trace(path: Path, limit: int | None = None) -> TraceSummary:
    """Read what a replay is going to read, so that a corrupt line is refused before it starts."""
    requests = blocks = 0
    last_ms = 0.0
    for request in read_trace(path, limit):
        requests += 1
        blocks += len(request.hash_ids)
        last_ms = max(last_ms, request.timestamp_ms)
    if not requests:
        raise UsageError(f"{path}: the trace holds no request")
    return TraceSummary(requests=requests, blocks=blocks, duration_s=last_ms / 1000)


def _lines(path: Path) -> Iterator[bytes]:
    rest = b""
    for chunk in _chunks(path):
        *complete, rest = (rest + chunk).split(b"\n")
        yield from complete
        if len(rest) > LINE_MAX_BYTES:
            raise UsageError(f"{path}: a line is longer than {LINE_MAX_BYTES} bytes: not a trace")
    if rest:
        yield rest


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            first = file.read(CHUNK_BYTES)
            chunks = itertools.chain([first], iter(lambda: file.read(CHUNK_BYTES), b""))
            if first.startswith(ZSTD_MAGIC):
                yield from _decompress(path, chunks)
            else:
                yield from chunks
    except OSError as error:
        raise UsageError(f"cannot read the trace {path}: {error.strerror}") from None


def _decompress(path: Path, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Decompress a file of one or more frames; a frame that is cut off is an error, not an end."""
    context = zstandard.ZstdDecompressor()
    frame = context.decompressobj()
    inside_frame = False
    try:
        for chunk in chunks:
            data = chunk
            while data:
                yield frame.decompress(data)
                inside_frame = not frame.eof
                data = b""
                if frame.eof:
                    data = frame.unused_data
                    frame = context.decompressobj()
    except zstandard.ZstdError as error:
        raise UsageError(f"{path}: not a readable zstd file: {error}") from None
    if inside_frame:
        raise UsageError(f"{path}: the zstd file is cut off before its end")


def chat_workload(
    seed: int,
    sessions: int,
    *,
    turns: int = 6,
    system_tokens: int = 2048,
    user_tokens: int = 700,
    reply_tokens: int = 350,
    arrival_s: float = 2.0,
    think_s: float = 20.0,
) -> tuple[Request, ...]:
    """Generate conversations that all start with one system prompt, ordered by time.

    Every turn's prompt is the whole conversation so far, so its leading blocks repeat those of the
    turn before. A fifth of the pauses are ten times as long: those users come back to cold blocks.
    `turns`, `user_tokens`, `reply_tokens`, `arrival_s` and `think_s` are means.
    """
    if sessions < 1:
        raise UsageError(f"a workload needs at least one session, not {sessions}")
    rng = random.Random(seed)
    fresh_ids = itertools.count()
    shared = tuple(itertools.islice(fresh_ids, system_tokens // TOKENS_PER_BLOCK))
    requests: list[Request] = []
    start_s = 0.0
    for _ in range(sessions):
        start_s += rng.expovariate(1 / arrival_s)
        now_s = start_s
        tokens = system_tokens
        ids = list(shared)
        for _ in range(1 + round(rng.expovariate(1 / max(turns - 1, 1e-9)))):
            tokens += 1 + round(rng.expovariate(1 / user_tokens))
            # Only a full block has a hash: a prompt's tail gets one when a later turn fills it.
            ids += itertools.islice(fresh_ids, tokens // TOKENS_PER_BLOCK - len(ids))
            reply = 1 + round(rng.expovariate(1 / reply_tokens))
            requests.append(Request(round(now_s * 1000), tokens, reply, tuple(ids)))
            tokens += reply
            pause_s = think_s * (10 if rng.random() < 0.2 else 1)
            now_s += rng.expovariate(1 / pause_s)
    return tuple(sorted(requests, key=lambda request: request.timestamp_ms))
