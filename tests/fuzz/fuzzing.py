"""What the fuzz targets share: their corpus, inputs made from it, and how many they try.

`corpus/TARGET/` holds inputs that once showed something, or lead deep into the code. Each of them
is tried on each run; Hypothesis tries others, by itself and by damaging those. `make soak` tries a
hundred times as many. What it finds goes into the corpus.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st

from tests.soak import longer

CORPUS = Path(__file__).parent / "corpus"
# Longer inputs are tried as they are: damaged ones would say nothing more.
LONG_BYTES = 4096

Test = TypeVar("Test", bound=Callable[..., Any])


def corpus(target: str) -> list[bytes]:
    """The inputs of a target, in the order of their names."""
    inputs = [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]
    assert inputs, f"no corpus for {target}"
    return inputs


def replay(target: str) -> pytest.MarkDecorator:
    """Run the test with each input of the target as `data`."""
    names = [path.name for path in sorted((CORPUS / target).iterdir())]
    return pytest.mark.parametrize("data", corpus(target), ids=names)


def fuzz(examples: int, *, costly: bool = False) -> Callable[[Test], Test]:
    """So many inputs in `make test`, and many times as many in `make soak`.

    What is found with costly ones is not made smaller: that would take minutes.
    """
    phases = [phase for phase in Phase if not (costly and phase in (Phase.shrink, Phase.explain))]

    def decorate(test: Test) -> Test:
        pytest.mark.soak(test)
        return settings(max_examples=longer(examples), phases=phases)(test)

    return decorate


@st.composite
def damaged(draw: st.DrawFn, inputs: list[bytes], splices: tuple[bytes, ...] = ()) -> bytes:
    """An input with some places cut, doubled, overwritten, or with something put in between."""
    data = bytearray(draw(st.sampled_from([data for data in inputs if len(data) < LONG_BYTES])))
    junk = st.binary(min_size=1, max_size=8)
    if splices:
        junk |= st.sampled_from(splices)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 40)))
        kind = draw(st.sampled_from(["cut", "double", "overwrite", "insert", "flip", "truncate"]))
        if kind == "cut":
            del data[start:end]
        elif kind == "double":
            data[start:start] = data[start:end]
        elif kind == "truncate":
            del data[start:]
        elif kind == "flip" and start < len(data):
            data[start] ^= 1 << draw(st.integers(0, 7))
        else:
            data[start : end if kind == "overwrite" else start] = draw(junk)
    return bytes(data)


def check_message(error: Exception, *words: str) -> None:
    """What a user gets to read: one line of characters that a terminal just shows."""
    message = str(error)
    assert message.isprintable(), message
    for word in words:
        assert word in message
