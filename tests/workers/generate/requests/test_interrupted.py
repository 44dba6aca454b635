"""A caller whose signal handler raises, anywhere between asking and getting: others are served as before."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from crumplezone import Decoder
from tests.support.decoders import Open
from tests.support.interrupts import interrupted_behind

_END = 60.0  # seconds
_ROUNDS = 40


def ask(decoder: Decoder) -> None:
    stream = decoder.submit_prompt("ab", max_tokens=2, timeout=100.0, stop="zzz")
    list(stream)
    stream.result(_END)


def cancel(decoder: Decoder) -> None:
    stream = decoder.submit_prompt("ab", max_tokens=200, n=2)
    next(iter(stream))
    stream.cancel()
    del stream


def generate(decoder: Decoder) -> None:
    generation = decoder.generate(["ab"] * 5, max_tokens=1)
    next(generation)
    generation.close()
    list(decoder.generate(["ab"] * 2, max_tokens=1))


def run_loop(decoder: Decoder) -> None:
    async def read() -> None:
        async with decoder.submit_prompt("ab", max_tokens=2) as stream:
            [piece async for piece in stream]

    asyncio.run(read())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in the end of a stream
@pytest.mark.parametrize("work", [ask, cancel, generate, run_loop])
def test_whoever_is_interrupted_leaves_nothing_behind(
    work: Callable[[Decoder], None], tiny: Path, make: Open
) -> None:
    decoder = make(tiny, 2, queue_size=8)
    work(decoder)
    events = next(
        n for n in itertools.count(100, 100) if interrupted_behind(n, lambda: work(decoder)) is None
    )
    kept = []
    for at in range(0, events, max(events // _ROUNDS, 1)):
        kept.append(interrupted_behind(at, lambda: work(decoder)))
        last = decoder.submit_prompt("ab", max_tokens=2, n=2).result(_END)
        assert [choice.error for choice in last.choices] == [None, None]
    assert any(kept)
