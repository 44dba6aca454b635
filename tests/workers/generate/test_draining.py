"""Draining: nothing new is taken, and what was taken is done, through kills too."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from crumplezone import Batch, Completion
from crumplezone.errors import InputError, UsageError
from tests.support.decoders import PROMPTS, Open, kill
from tests.support.pace import Pace


def test_what_was_taken_is_done_and_nothing_new_is_taken(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 2)
    streams = [decoder.submit_prompt(prompt, max_tokens=30) for prompt in PROMPTS]
    batch = decoder.submit(Batch.of([[1, 2, 3]]))
    assert decoder.drain(60) is True
    assert batch.done()
    assert all(stream.done() for stream in streams)
    assert [stream.result().finish_reason for stream in streams] == ["length"] * 8
    for new in (
        lambda: decoder.submit_prompt("abc"),
        lambda: decoder.submit(Batch.of([[1, 2]])),
        lambda: list(decoder.generate(["abc"])),
    ):
        with pytest.raises(UsageError, match="is draining"):
            new()
    assert decoder.drain(0) is True
    stats = decoder.stats()
    assert stats.submitted == 8  # what is not taken is not counted
    assert decoder.decode(Batch.of([[1, 2, 3]])).logits(0).shape == (128,)


def test_it_waits_no_longer_than_it_is_told(tiny: Path, make: Open, pace: Pace) -> None:
    decoder = make(tiny, 2)
    stream = decoder.submit_prompt("abc", max_tokens=20)
    assert decoder.drain(0.05) is False
    assert not stream.done()
    with pytest.raises(UsageError, match="is draining"):
        decoder.submit_prompt("abc")
    pace.go(100)
    assert decoder.drain(60) is True
    assert stream.done()


def test_what_is_in_flight_outlives_a_kill_while_it_drains(tiny: Path, make: Open, pace: Pace) -> None:
    decoder = make(tiny, 4)
    streams = [decoder.submit_prompt(prompt, max_tokens=20) for prompt in PROMPTS]
    pace.go(8)
    next(iter(streams[0]))
    with ThreadPoolExecutor(1) as pool:
        drained = pool.submit(decoder.drain, 120)
        kill(decoder.processes["lanes"][0])
        pace.go(2000)
        assert drained.result(120) is True
    assert [stream.result().finish_reason for stream in streams] == ["length"] * 8


def test_a_generator_yields_what_it_has_read(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 2)
    completions: list[Completion] = []

    def read() -> None:
        for completion in decoder.generate(f"number {n}" for n in itertools.count()):
            completions.append(completion)
            if len(completions) == 3:
                decoder.drain(0)

    with pytest.raises(UsageError, match="is draining"):
        read()
    assert [completion.index for completion in completions] == list(range(len(completions)))
    assert all(completion.error is None for completion in completions)
    assert decoder.drain(60) is True
    assert decoder.stats().submitted == len(completions)
    assert decoder.stats().finished == {"length": len(completions)}


def test_on_a_thread_of_the_decoder_it_does_not_wait(tiny: Path, make: Open, pace: Pace) -> None:
    decoder = make(tiny, 2)
    found: list[bool] = []
    told = threading.Event()
    streams = [decoder.submit_prompt("abc", max_tokens=n) for n in (1, 40)]

    def ask(_: object) -> None:
        found.append(decoder.drain())
        told.set()

    streams[0].add_done_callback(ask)
    pace.go(5)
    assert told.wait(60)
    assert found == [False]
    pace.go(200)
    assert decoder.drain(60) is True


def test_a_signal_that_interrupts_it(tiny: Path, make: Open, pace: Pace) -> None:
    decoder = make(tiny, 2)
    decoder.submit_prompt("abc", max_tokens=4).add_done_callback(print)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        decoder.drain(60)
    pace.go(50)
    assert decoder.drain(60) is True


def test_bad_timeouts(tiny: Path, make: Open) -> None:
    decoder = make(tiny, awake=False)
    for ask in (decoder.drain, decoder.health):
        for wrong in (-1, float("nan"), "soon"):
            with pytest.raises(InputError, match="timeout"):
                ask(wrong)  # type: ignore[arg-type]
