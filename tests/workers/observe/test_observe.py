"""Numbers that add up and events in order, through kills and crashes; listeners that are in nobody's way."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import Counter, defaultdict
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crumplezone import (
    Batch,
    CellLost,
    FirstToken,
    NewTokens,
    ReportWritten,
    RequestAdmitted,
    RequestFinished,
    RequestQueued,
    RequestResumed,
    Stats,
)
from crumplezone.errors import InputError, QueueFullError, UsageError
from crumplezone.reports.records.report import Exit
from crumplezone.reports.store.store import Store
from crumplezone.sandbox.host.errands import DELIVERY
from crumplezone.workers.observe import ear
from crumplezone.workers.observe.events import Event
from crumplezone.workers.observe.observer import Observer
from crumplezone.workers.observe.trace import Trace
from crumplezone.workers.protocol.generate.messages import Progress
from tests.support.decoders import PROMPTS, Dose, Open, fork, outcome, read_all
from tests.support.native.decode_poison import Poison
from tests.workers.observe.conftest import Heard


def adds_up(stats: Stats) -> bool:
    return stats.submitted == stats.queued + stats.running + sum(stats.finished.values())


def test_numbers_add_up_over_fifty_prompts_and_three_kills(tiny: Path, make: Open, store: Store) -> None:
    decoder = make(tiny)
    prompts = [f"{n} and {'x' * (n % 7)}" for n in range(50)]
    undisturbed = list(decoder.generate(prompts, max_tokens=30))
    first = decoder.stats()
    assert first.places == 4
    assert (first.crashes, first.kills, first.recoveries, first.reports) == (0, 0, 0, 0)
    done, killed = [], 0
    for completion in decoder.generate(prompts, max_tokens=30, ordered=False):
        done.append(completion)
        stats = decoder.stats()
        assert adds_up(stats)
        assert stats.running <= 4
        if len(done) in (5, 15, 30):
            os.kill(decoder.processes["lanes"][0], signal.SIGKILL)
            killed += 1
            decoder.flush_reports()
    assert outcome(sorted(done, key=lambda c: c.index)) == outcome(undisturbed)
    decoder.flush_reports()
    stats = decoder.stats()
    assert (stats.submitted, stats.queued, stats.running) == (100, 0, 0)
    assert stats.finished == Counter(c.finish_reason for c in [*undisturbed, *done])
    assert stats.generated_tokens == 2 * sum(len(c.tokens) for c in undisturbed)
    assert stats.prompt_tokens == 2 * sum(c.prompt_tokens for c in undisturbed)
    assert (stats.kills, stats.crashes, stats.reports) == (killed, 0, len(read_all(store)))
    assert stats.recoveries <= 4 * killed
    assert stats.native_calls >= stats.generated_tokens / 4
    assert 0 < stats.native_seconds < 600
    decoder.close()
    assert decoder.stats() == stats


def test_events_come_in_order_and_complete_with_a_crash_in_between(
    tiny: Path, make: Open, dose: Dose, heard: Heard, tmp_path: Path
) -> None:
    dose(Poison(position=30, once=str(tmp_path / "crashed")))
    decoder = make(tiny)
    decoder.add_listener(heard)
    completions = list(decoder.generate(PROMPTS, max_tokens=40))
    heard.wait(lambda: len(heard.of(RequestFinished)) == 8 and bool(heard.of(ReportWritten)))
    times = [event.at for event in heard.events]
    assert times == sorted(times)
    (lost,), (written,) = heard.of(CellLost), heard.of(ReportWritten)
    assert isinstance(lost, CellLost)
    assert isinstance(written, ReportWritten)
    assert lost.report == written.report == completions[lost.requests[0] - 1].reports[0]
    assert (written.exit, written.verdict) == ("signal", "flaky")
    assert "SIGSEGV" in written.title
    by_request = defaultdict[int, list[Any]](list)
    for event in heard.events:
        if not isinstance(event, CellLost | ReportWritten):
            by_request[event.request].append(event)
    assert set(by_request) == set(range(1, 9))
    for request, events in by_request.items():
        completion = completions[events[0].index]
        kinds = [type(event) for event in events]
        assert kinds[:4] == [RequestQueued, RequestAdmitted, FirstToken, NewTokens]
        assert kinds[-1] is RequestFinished
        resumed = kinds.count(RequestResumed)
        assert resumed == (request in lost.requests) == bool(completion.reports)
        assert set(kinds[4:-1]) <= {NewTokens, RequestResumed}
        new = [event for event in events if isinstance(event, NewTokens)]
        assert [event.total for event in new] == [
            sum(e.tokens for e in new[: i + 1]) for i in range(len(new))
        ]
        end = events[-1]
        assert (end.reason, end.tokens) == (completion.finish_reason, len(completion.tokens))
        assert new[-1].total == end.tokens
        assert (end.prompt_tokens, end.reports) == (completion.prompt_tokens, completion.reports)
    assert decoder.stats().crashes == 1


def test_choices_of_a_request_have_events_of_their_own(tiny: Path, make: Open, heard: Heard) -> None:
    decoder = make(tiny)
    decoder.add_listener(heard)
    streams = [decoder.submit_prompt(prompt, max_tokens=5, n=3, temperature=1.0) for prompt in PROMPTS[:2]]
    for stream in streams:
        stream.result(60)
    heard.wait(lambda: len(heard.of(RequestFinished)) == 6)
    ends = [event for event in heard.events if isinstance(event, RequestFinished)]
    assert sorted((e.request, e.choice) for e in ends) == [(s.id, c) for s in streams for c in range(3)]
    assert [stream.id for stream in streams] == [1, 2]


def test_what_is_cancelled_or_refused_is_counted(tiny: Path, make: Open, heard: Heard) -> None:
    decoder = make(tiny, 1, queue_size=1)
    decoder.add_listener(heard)
    running = decoder.submit_prompt("abc", max_tokens=200)
    next(iter(running))
    waiting = decoder.submit_prompt("abc", max_tokens=200)
    with pytest.raises(QueueFullError):
        decoder.submit_prompt("abc")
    assert running.cancel()
    assert waiting.cancel()
    with pytest.raises(CancelledError):
        running.result()
    heard.wait(lambda: len(heard.of(RequestFinished)) == 3)
    stats = decoder.stats()
    assert stats.finished == {"refused": 1, "cancelled": 2}
    assert adds_up(stats)
    (tiny_error,) = decoder.generate(["x" * 400])
    assert tiny_error.error
    assert decoder.stats().finished["error"] == 1


def test_batches_are_no_requests(tiny: Path, make: Open) -> None:
    decoder = make(tiny)
    decoder.submit(Batch.of([[1, 2, 3]])).result(60)
    stats = decoder.stats()
    assert (stats.submitted, dict(stats.finished)) == (0, {})
    assert stats.native_calls >= 1


# --- listeners that misbehave


def test_a_listener_that_blocks_for_ever_delays_nobody(tiny: Path, make: Open, heard: Heard) -> None:
    decoder = make(tiny)
    blocked, free = threading.Event(), threading.Event()

    def block(_: Event) -> None:
        blocked.set()
        free.wait()

    decoder.add_listener(block)
    decoder.add_listener(heard)
    try:
        assert all(c.finish_reason for c in decoder.generate(PROMPTS, max_tokens=20))
        assert blocked.wait(60)
        heard.wait(lambda: len(heard.of(RequestFinished)) == 8)
        assert decoder.drain(60)
        decoder.close()
    finally:
        free.set()


def test_a_listener_that_raises_is_told_of_the_next(
    tiny: Path, make: Open, heard: Heard, caplog: pytest.LogCaptureFixture
) -> None:
    decoder = make(tiny)

    def fail(event: Event) -> None:
        heard(event)
        raise SystemExit if isinstance(event, RequestQueued) else ValueError("no")

    decoder.add_listener(fail)
    with caplog.at_level(logging.ERROR, "crumplezone"):
        decoder.submit_prompt("abc", max_tokens=4).result(60)
        heard.wait(lambda: bool(heard.of(RequestFinished)))
        assert DELIVERY.wait(60)
    assert "a listener raised" in caplog.text


def test_events_beyond_what_waits_are_counted(
    tiny: Path, make: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ear, "_WAITING_MAX", 5)
    free, blocked = threading.Event(), threading.Event()

    def block(_: Event) -> None:
        blocked.set()
        free.wait()

    decoder = make(tiny)
    decoder.add_listener(block)
    try:
        decoder.submit_prompt("a", max_tokens=1)
        assert blocked.wait(60)
        list(decoder.generate(PROMPTS, max_tokens=4))
        assert decoder.stats().unheard >= 8 * 4 - 5
        unheard = decoder.stats().unheard
        decoder.remove_listener(block)
        assert decoder.stats().unheard == unheard
    finally:
        free.set()


def test_a_listener_may_use_the_decoder_and_close_it(tiny: Path, make: Open, heard: Heard) -> None:
    decoder = make(tiny)

    def ask(event: Event) -> None:
        if isinstance(event, RequestFinished) and event.request == 1:
            decoder.submit_prompt("def", max_tokens=4).result(60)
            decoder.close()
        heard(event)

    decoder.add_listener(ask)
    decoder.submit_prompt("abc", max_tokens=4).result(60)
    heard.wait(lambda: len(heard.of(RequestFinished)) == 2)
    with pytest.raises(UsageError, match="closed"):
        decoder.submit_prompt("abc")


def test_adding_and_removing(tiny: Path, make: Open, heard: Heard) -> None:
    decoder = make(tiny)
    decoder.add_listener(heard)
    for wrong in (heard, 7):
        with pytest.raises(InputError, match="listener"):
            decoder.add_listener(wrong)  # type: ignore[arg-type]
    decoder.remove_listener(heard)
    with pytest.raises(InputError, match="is none: add it first"):
        decoder.remove_listener(heard)
    decoder.submit_prompt("abc", max_tokens=4).result(60)
    assert heard.events == []


def test_stats_in_a_fork(tiny: Path, make: Open) -> None:
    decoder = make(tiny)
    if (pid := fork()) == 0:
        code = 1
        try:
            decoder.stats()
        except UsageError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


# --- the rule


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from("baptfrl"))))
def test_numbers_add_up_whatever_comes(steps: list[tuple[int, str]]) -> None:
    observer, heard = Observer(), list[Event]()
    observer.add(heard.append)
    traces = [Trace(None if n == 5 else n) for n in range(6)]  # one is a batch
    begun: set[int] = set()
    for n, step in steps:
        trace = traces[n]
        if step == "b" and n not in begun:
            begun.add(n)
            with observer.taking([trace]):
                pass
        elif n not in begun and step == "r":
            begun.add(n)
            with pytest.raises(ValueError), observer.taking([trace]):  # noqa: PT011
                raise ValueError
        elif step == "a" and n != 5:
            trace.admit(3)
        elif step in "pt" and n != 5:
            trace.progress(Progress(0, [7] * (step == "t"), b"", cached=2))
        elif step == "f":
            trace.finish("stop")
        elif step == "l":
            observer.lost("here")
            observer.explained(Exit.KILLED)
        assert adds_up(observer.stats(4))
    for trace in traces:
        trace.finish("stop")
    stats = observer.stats(4)
    assert stats.submitted == sum(stats.finished.values()) == len(begun - {5})
    assert stats.cached_tokens <= stats.prompt_tokens
    assert observer.drain(0)
    observer.close()
    ends = Counter(e.request for e in heard if isinstance(e, RequestFinished))
    assert set(ends.values()) <= {1}
    assert len(ends) == stats.submitted
    assert stats.recoveries == sum(isinstance(e, RequestResumed) for e in heard)
    assert stats.kills == sum(isinstance(e, CellLost) for e in heard)
    last = {e.request: i for i, e in enumerate(heard) if isinstance(e, RequestFinished)}
    assert all(
        i <= last[e.request] for i, e in enumerate(heard) if not isinstance(e, CellLost | ReportWritten)
    )
