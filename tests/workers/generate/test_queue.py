"""Requests that wait: who comes first, how many may, and what happens when their time is over."""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from crumplezone import Batch, Completion, QueueFullError, Request, Stream
from crumplezone.workers.generate.lanes import deadlines
from crumplezone.workers.generate.lanes.deadlines import Deadlines
from tests.support.decoders import Open
from tests.support.pace import Pace

_END = 60.0


def begun(stream: Stream) -> None:
    """Wait until it is in flight."""
    seen = threading.Event()
    stream._order.shown[0].on_news(seen.set)
    assert seen.wait(_END)


# --- order


def test_who_has_a_higher_priority_comes_first_and_then_who_came_first(
    tiny: Path, make: Open, pace: Pace
) -> None:
    decoder = make(tiny, 1)
    running = decoder.submit_prompt("abc", max_tokens=5)
    pace.go()
    begun(running)
    ended: list[int] = []
    streams = [decoder.submit_prompt("abc", max_tokens=2, priority=p) for p in (0, -1, 7, 0, 7)]
    for number, stream in enumerate(streams):
        stream.add_done_callback(lambda _, number=number: ended.append(number))  # type: ignore[misc]
    pace.go(100)
    assert [stream.result(_END).error for stream in streams] == [None] * 5
    assert ended == [2, 4, 0, 3, 1]


# --- no more than so many


def test_a_full_queue_refuses_and_loses_nothing(tiny: Path, make: Open, pace: Pace) -> None:
    decoder = make(tiny, 1, queue_size=2)
    running = decoder.submit_prompt("abc", max_tokens=5)
    pace.go()
    begun(running)
    waiting = [decoder.submit_prompt("abc", max_tokens=2) for _ in range(2)]
    for ask in (lambda: decoder.submit_prompt("abc"), lambda: decoder.submit(Batch.of([[1]]))):
        with pytest.raises(QueueFullError, match="queue_size is 2") as caught:
            ask()
        assert (caught.value.waiting, caught.value.size) == (2, 2)
    with pytest.raises(QueueFullError, match="no room for 3"):  # never
        decoder.submit_prompt("abc", n=3)
    waiting[0].cancel()  # there is room where nobody wants a place
    last = decoder.submit_prompt("abc", max_tokens=2)
    waiting.pop()
    gc.collect()
    other = decoder.submit_prompt("abc", max_tokens=2)
    pace.go(100)
    assert [each.result(_END).error for each in (running, last, other)] == [None] * 3


def test_generate_waits_for_room(tiny: Path, make: Open, pace: Pace) -> None:
    decoder = make(tiny, 1, queue_size=1)
    running = decoder.submit_prompt("abc", max_tokens=5)
    pace.go()
    begun(running)
    waiting = decoder.submit_prompt("abc", max_tokens=5)
    reading = threading.Event()

    def prompts() -> object:
        reading.set()
        yield from ["abc"] * 3

    completions: Future[list[Completion]] = Future()
    thread = threading.Thread(
        target=lambda: completions.set_result(list(decoder.generate(prompts(), max_tokens=2)))  # type: ignore[arg-type]
    )
    thread.start()
    assert reading.wait(_END)
    pace.go(100)
    assert [each.error for each in completions.result(_END)] == [None] * 3
    thread.join()
    assert running.result(_END).error is waiting.result(_END).error is None


# --- time limits


def test_a_time_limit_holds_in_the_queue_and_in_a_cell_that_stands_still(
    tiny: Path, make: Open, pace: Pace
) -> None:
    decoder = make(tiny, 1)
    pace.go(1 + 3)
    next(decoder.generate(["abc"], max_tokens=1))  # its lane is open
    running = decoder.submit_prompt("abc", max_tokens=50, timeout=5.0)
    begun(running)
    waiting = decoder.submit_prompt("abc", max_tokens=50, timeout=0.1)
    pieces = list(running)  # it ends like any other
    for stream in (waiting, running):
        assert stream.result(_END).finish_reason == "timeout"
        assert stream.result().error is None
    assert (waiting.result().text, waiting.result().tokens) == ("", [])
    assert "".join(pieces) == running.result().text != ""
    assert len(running.result().tokens) < 5
    pace.go(100)
    assert decoder.submit_prompt("abc", max_tokens=3).result(_END).finish_reason == "length"


def test_no_time_at_all(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)
    completion = decoder.submit_prompt("abc", timeout=0, n=2).result(_END)
    assert [choice.finish_reason for choice in completion.choices] == ["timeout", "timeout"]
    given = [Request("abc", timeout=0), Request("abc", max_tokens=2, timeout=1e8)]
    assert [c.finish_reason for c in decoder.generate(given)] == ["timeout", "length"]


class Due:
    """Something with a deadline."""

    def __init__(self) -> None:
        self.over = False
        self.expired = threading.Event()

    def expire(self) -> None:
        self.expired.set()


def test_deadlines_end_who_is_due_and_nobody_else() -> None:
    ends = Deadlines(set())
    late, gone, over, early = Due(), Due(), Due(), Due()
    gone.over = True
    now = time.monotonic()
    for due, seconds in ((late, 1e6), (gone, 0.0), (over, 0.0), (early, -1.0)):
        ends.add(due, now + seconds)
    for due in (over, early):
        assert due.expired.wait(_END)
    assert not late.expired.is_set()
    assert not gone.expired.is_set()
    (thread,) = [each for each in threading.enumerate() if each.name == "deadlines"]
    ends.close()
    thread.join(_END)
    assert not thread.is_alive()
    ends.add(over, now)
    assert not [each for each in threading.enumerate() if each.name == "deadlines"]


def test_deadlines_of_what_is_over_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "_MANY", 8)
    ends = Deadlines(set())
    later = time.monotonic() + 1e6
    kept = [Due() for _ in range(3)]
    for due in kept:
        ends.add(due, later)
    for _ in range(100):
        ends.add(Due(), later)
    assert len(ends._due) <= 2 * 8
    ends.close()


def test_a_decoder_without_time_limits_has_no_thread_for_them(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)
    assert decoder.submit_prompt("abc", max_tokens=2).result(_END).error is None
    assert not [each for each in threading.enumerate() if each.name == "deadlines"]
    assert decoder.submit_prompt("abc", max_tokens=2, timeout=1e6).result(_END).error is None
    (thread,) = [each for each in threading.enumerate() if each.name == "deadlines"]
    decoder.close()
    thread.join(_END)
    assert not thread.is_alive()
