"""Whatever is interrupted between two of its steps, nothing is left of it; closing again finishes."""

from __future__ import annotations

import itertools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pytest

from crumplezone import Batch, Decoder, Llama, SafeBatchProcessor
from tests.support.decoders import collect, descriptors, opened_since
from tests.support.paths import ROOT

Made = Decoder | Llama | SafeBatchProcessor
BATCH = Batch.of([[3, 4]])
_END = 30.0  # seconds
_STEPS_MAX = 100_000
_ROUNDS = 8  # of what has thousands of steps


class Interrupt(Exception):
    """What a signal handler raises."""


class At:
    """A trace function: interrupts this thread at one of the lines that it runs in this package."""

    def __init__(self, line: int) -> None:
        self.left = line

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:  # noqa: ARG002 - as trace functions are
        if not frame.f_code.co_filename.startswith((f"{ROOT}/src", f"{ROOT}/workers", f"{ROOT}/sandbox")):
            return None
        if event == "line":
            self.left -= 1
            if self.left < 0:
                raise Interrupt
        return self


def interrupted(at: int, work: Callable[[], object]) -> bool:
    """Whether something was interrupted at a line; False if it ended before."""
    trace = At(at)
    sys.settrace(trace)
    try:
        work()
    except Interrupt:
        return True
    finally:
        sys.settrace(None)
    return trace.left < 0  # somebody has logged it, as a finalizer does


def lines_of(work: Callable[[], object]) -> int:
    """How many lines something runs in this package."""
    trace = At(_STEPS_MAX)
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return _STEPS_MAX - trace.left


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    collect()
    threads, opened = set(threading.enumerate()), descriptors()
    yield
    collect()
    for thread in set(threading.enumerate()) - threads:
        thread.join(_END)
    psutil.wait_procs(psutil.Process().children(recursive=True), timeout=_END)
    assert psutil.Process().children(recursive=True) == []
    assert [thread.name for thread in set(threading.enumerate()) - threads] == []
    assert opened_since(opened) == []


def decoder(tiny: Path, store: Path) -> Decoder:
    made = Decoder(tiny, n_ctx=512, n_seq_max=2, n_threads=1, reports=store)
    made.decode(BATCH)
    return made


def busy_decoder(tiny: Path, store: Path) -> Decoder:
    made = decoder(tiny, store)
    list(made.generate(["ab"], max_tokens=2))
    made.embed(["ab"])
    made.submit_prompt("ab", max_tokens=200)
    return made


def llama(tiny: Path, store: Path) -> Llama:
    made = Llama(str(tiny), n_ctx=64, n_threads=1, reports=store)
    made("a", max_tokens=1)
    return made


def processor(tiny: Path, store: Path) -> SafeBatchProcessor:
    made = SafeBatchProcessor(tiny, n_ctx=64, n_threads=1, reports=store)
    made.decode(BATCH)
    return made


Make = Callable[[Path, Path], Made]


@pytest.mark.parametrize(("make", "step"), [(decoder, 1), (llama, 7), (processor, 7)])
def test_a_close_that_is_interrupted_anywhere_is_finished_by_the_next(
    make: Make, step: int, tiny: Path, tmp_path: Path
) -> None:
    for at in itertools.count(step=step):
        made = make(tiny, tmp_path)
        again = interrupted(at, made.close)
        made.close()
        assert psutil.Process().children(recursive=True) == []
        if not again:
            break
    assert at > 10


@pytest.mark.parametrize("make", [busy_decoder, llama])
def test_a_close_that_is_interrupted_by_a_timer_is_finished_by_the_next(
    make: Make, tiny: Path, tmp_path: Path
) -> None:
    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature of handlers
        raise Interrupt

    before = signal.signal(signal.SIGALRM, handle)
    hit = 0
    try:
        for n in range(_ROUNDS):
            made = make(tiny, tmp_path)
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0005 * 1.6**n)
                made.close()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupt:
                hit += 1
            made.close()
            assert psutil.Process().children(recursive=True) == []
    finally:
        signal.signal(signal.SIGALRM, before)
    assert hit


@pytest.mark.parametrize("make", [decoder, llama, processor])
def test_a_making_that_is_interrupted_leaves_nothing(make: Make, tiny: Path, tmp_path: Path) -> None:
    made: list[Made] = []
    steps = lines_of(lambda: made.append(make(tiny, tmp_path)))
    made.pop().close()
    for at in range(0, steps, steps // _ROUNDS):
        interrupted(at, lambda: made.append(make(tiny, tmp_path)))
        while made:
            made.pop().close()


def test_a_call_that_is_interrupted_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    made = decoder(tiny, tmp_path)

    def call() -> None:
        made.decode(BATCH)
        made.memory.clear()

    steps = lines_of(call)
    for at in range(0, steps, steps // _ROUNDS):
        assert interrupted(at, call)
        made.memory.clear()
        call()
    made.close()
