"""`generate` over a source of prompts that blocks, breaks, or gives more than anybody can hold."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from crumplezone import Decoder
from crumplezone.errors import UsageError
from crumplezone.workers.generate.requests import complete
from tests.support.decoders import Open, fork, wait_for_end

_END = 60.0


class Source:
    """Gives prompts until it blocks, and goes on when it is told."""

    def __init__(self, *before: str) -> None:
        self._before = before
        self.blocks, self.go_on = threading.Event(), threading.Event()
        self.ended = threading.Event()

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._before
            self.blocks.set()
            assert self.go_on.wait(_END)
            yield "late"
        finally:
            self.ended.set()


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prompts"]


@pytest.fixture(autouse=True)
def no_reader_is_left() -> Iterator[None]:
    yield
    for thread in readers():
        thread.join(_END)
    assert readers() == []


@pytest.mark.parametrize("ordered", [True, False])
def test_a_source_that_blocks_holds_back_nothing_that_is_done(ordered: bool, tiny: Path, make: Open) -> None:
    source = Source("abc", "def")
    completions = make(tiny, 2).generate(source, max_tokens=2, ordered=ordered)
    seen = [next(completions).index, next(completions).index]
    assert sorted(seen) == [0, 1]
    assert not source.ended.is_set()
    source.go_on.set()
    assert [c.prompt for c in completions] == ["late"]


def test_closing_does_not_wait_for_a_source_that_blocks(tiny: Path, make: Open) -> None:
    source = Source("abc")
    with contextlib.closing(make(tiny, 1).generate(source, max_tokens=2)) as completions:
        next(completions)
        assert source.blocks.wait(_END)
    source.go_on.set()  # only now
    assert source.ended.wait(_END)


def test_who_waits_for_a_source_that_blocks_is_told_that_the_decoder_was_closed(
    tiny: Path, make: Open
) -> None:
    source, decoder = Source("abc"), make(tiny, 1)
    completions = decoder.generate(source, max_tokens=2)
    next(completions)
    assert source.blocks.wait(_END)
    closing = threading.Thread(target=decoder.close)
    closing.start()
    with pytest.raises(UsageError, match="closed"):
        next(completions)
    closing.join()
    source.go_on.set()


def test_completions_that_wait_for_an_earlier_one_are_bounded(
    tiny: Path, make: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(complete, "_EARLY_MAX", 5)
    read: list[int] = []

    def prompts() -> Iterator[str]:
        yield "abc"
        for n in itertools.count():
            read.append(n)
            yield ""  # over at once

    with contextlib.closing(make(tiny, 1).generate(prompts(), max_tokens=60)) as completions:
        assert next(completions).error is None
        assert len(read) <= 5 + 2 + 2
        assert [next(completions).index for _ in range(100)] == list(range(1, 101))


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_what_the_source_raises_comes_last(kind: type[BaseException], tiny: Path, make: Open) -> None:
    def prompts() -> Iterator[str]:
        yield from ["abc", "def"]
        raise kind("the source is broken")

    seen: list[int] = []
    with pytest.raises(kind, match="the source is broken"):
        seen.extend(c.index for c in make(tiny, 2).generate(prompts(), max_tokens=2))
    assert seen == [0, 1]


def test_the_source_may_use_the_decoder(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)

    def prompts(decoder: Decoder) -> Iterator[str]:
        yield "abc"
        inner = decoder.submit_prompt("abc", max_tokens=3).result(_END)
        yield inner.text or "nothing"
        yield next(decoder.generate(["x"], max_tokens=1)).prompt  # type: ignore[misc]

    assert [c.error for c in decoder.generate(prompts(decoder), max_tokens=2)] == [None] * 3


def test_in_a_fork_nobody_waits_for_the_reader(tiny: Path, make: Open) -> None:
    source = Source("abc")
    completions = make(tiny, 1).generate(source, max_tokens=2)
    next(completions)
    assert source.blocks.wait(_END)
    if not (pid := fork()):
        try:
            next(completions)
        except UsageError as error:
            os._exit(0 if "before a fork" in str(error) else 1)
        os._exit(2)
    assert wait_for_end(pid)
    assert os.waitpid(pid, 0)[1] == 0
    source.go_on.set()
    assert [c.prompt for c in completions] == ["late"]
