"""Signal handlers, callbacks and iterators in the middle of a call: closing ends it, all else is refused."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import psutil
import pytest

from crumplezone import Batch, Decoder, Llama, SafeBatchProcessor, lowlevel
from crumplezone.errors import UsageError
from tests.support.decoders import Dose, Open, Plant
from tests.support.native import llama_poison
from tests.support.native.decode_poison import Poison

BATCH = Batch.of([[3, 4]])
GREEDY: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0}
_END = 60.0  # seconds


@pytest.fixture
def meet(dose: Dose, plant: Plant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Have cells wait in the middle of their first native call, until they are met at this pipe."""
    fifo, once = tmp_path / "fifo", str(tmp_path / "once")
    os.mkfifo(fifo)
    os.mkfifo(f"{fifo}.go")
    dose(Poison(min_tokens=2, how="meet", once=once, fifo=str(fifo)))
    plant("llama", llama_poison.TARGET)
    given = llama_poison.Poison(min_tokens=2, how="meet", once=once, fifo=str(fifo))
    monkeypatch.setenv(llama_poison.VARIABLE, msgspec.json.encode(given).decode())
    with open(f"{fifo}.go", "w+b", 0):  # what is written there stays there
        yield fifo


@contextmanager
def handled_after(event: Callable[[], object], work: Callable[[], object]) -> Iterator[list[object]]:
    """Have a signal handler of this thread do something once something has come on another one."""
    came: list[object] = []

    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature of handlers
        try:
            came.append(work())
        except UsageError as error:
            came.append(error)

    def signal_it() -> None:
        event()
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handle)
    thread = threading.Thread(target=signal_it)
    thread.start()
    try:
        yield came
    finally:
        thread.join(_END)
        signal.signal(signal.SIGUSR1, before)


def handled_at(fifo: Path, work: Callable[[], object]) -> AbstractContextManager[list[object]]:
    """As `handled_after`: when a cell waits at a pipe. It goes on after that."""

    def work_and_go_on() -> object:
        try:
            return work()
        finally:
            with open(f"{fifo}.go", "wb", 0) as go:
                go.write(b".")

    return handled_after(fifo.read_text, work_and_go_on)


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


CALLS: dict[str, Callable[[Decoder], object]] = {
    "decode": lambda d: d.decode(BATCH),
    "encode": lambda d: d.encode(BATCH),
    "tokenize": lambda d: d.tokenize("a"),
    "embed": lambda d: d.embed(["a"]),
    "memory": lambda d: d.memory.clear(),
    "resize": lambda d: d.resize(n_ctx=1024),
    "llama_decode": lambda d: lowlevel.llama_decode(d, BATCH),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_signal_handler_may_not_call_in_the_middle_of_a_call(
    call: str, tiny: Path, make: Open, meet: Path
) -> None:
    decoder = make(tiny, 2)
    with handled_at(meet, lambda: CALLS[call](decoder)) as came:
        assert decoder.decode(BATCH).errors == {}
    (error,) = came
    assert isinstance(error, UsageError)
    assert "after that call" in str(error)
    assert decoder.memory.pos_max(0) == 1


def gone(close: Callable[[], None]) -> list[psutil.Process]:
    close()
    return children()


def test_a_signal_handler_may_close_in_the_middle_of_a_call(tiny: Path, make: Open, meet: Path) -> None:
    once = meet.parent / "once"
    once.touch()
    decoder = make(tiny, 2, workers=2)
    list(decoder.generate(["a"], max_tokens=2))
    once.unlink()
    with (
        handled_at(meet, lambda: gone(decoder.close)) as came,
        pytest.raises(UsageError, match="closed in the middle of this call"),
    ):
        decoder.decode(BATCH)
    assert came == [[]]
    decoder.close()


def test_a_signal_handler_may_close_a_safe_processor(tiny: Path, tmp_path: Path, meet: Path) -> None:
    safe = SafeBatchProcessor(tiny, n_ctx=64, n_threads=1, reports=tmp_path)
    with handled_at(meet, lambda: safe.decode(BATCH)) as came:
        assert safe.decode(BATCH).errors == {}
    assert isinstance(came[0], UsageError)
    (meet.parent / "once").unlink()
    with (
        handled_at(meet, lambda: gone(safe.close)) as came,
        pytest.raises(UsageError, match="closed in the middle of this call"),
    ):
        safe.decode(BATCH)
    assert came == [[]]


def test_a_signal_handler_may_only_close_a_llama(tiny: Path, tmp_path: Path, meet: Path) -> None:
    once = meet.parent / "once"
    once.touch()
    llama = Llama(str(tiny), n_ctx=64, n_threads=1, reports=tmp_path)
    whole: Any = llama("abc", **GREEDY)
    for call in (lambda: llama("x", max_tokens=1), lambda: llama.tokenize(b"x"), lambda: llama.reset()):
        once.unlink()
        llama.reset()
        with handled_at(meet, call) as came:
            again: Any = llama("abc", **GREEDY)
        assert again["choices"] == whole["choices"]
        assert isinstance(came[0], UsageError)
    once.unlink()
    llama.reset()
    with (
        handled_at(meet, lambda: gone(llama.close)) as came,
        pytest.raises(UsageError, match="closed in the middle of this call"),
    ):
        llama("abc", max_tokens=1)
    assert came == [[]]


def test_a_signal_handler_may_close_in_the_middle_of_a_generation(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 2)

    def event() -> None:
        next(iter(decoder.submit_prompt("abc", max_tokens=2)))

    with (
        handled_after(event, lambda: gone(decoder.close)) as came,
        pytest.raises(UsageError, match="closed"),
    ):
        list(decoder.generate(["abc"] * 9, max_tokens=200))
    assert came == [[]]


def test_a_callback_of_a_llama_may_close_it(tiny: Path, tmp_path: Path) -> None:
    llama = Llama(str(tiny), n_ctx=64, n_threads=1, reports=tmp_path)
    left: list[object] = []

    def process(ids: Any, logits: Any) -> Any:  # noqa: ARG001 - the signature of logits processors
        assert len(llama.tokenize(b"ab")) > 1
        left.append(gone(llama.close))
        return logits

    with pytest.raises(UsageError, match="closed in the middle of this call"):
        llama.create_completion("abc", max_tokens=3, logits_processor=[process])
    assert left == [[]]


def test_the_iterator_of_prompts_may_close(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)

    def prompts() -> Iterator[str]:
        yield from ["abc"] * 3
        decoder.close()
        yield "abc"

    with pytest.raises(UsageError, match="closed"):
        list(decoder.generate(prompts(), max_tokens=200))
    decoder.close()  # it was begun on another thread
    assert children() == []


WAITS: dict[str, Callable[[Decoder], object]] = {
    "generate": lambda d: list(d.generate(["x"], max_tokens=2)),
    "result": lambda d: d.submit(Batch.of([[1]])).result(),
    "exception": lambda d: d.submit_prompt("x", max_tokens=2).exception(),
    "stream": lambda d: list(d.submit_prompt("x", max_tokens=2)),
}


@pytest.mark.parametrize("waits", WAITS)
def test_a_callback_of_a_future_may_not_wait_for_its_own_thread(waits: str, tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)
    came = in_callback(decoder, lambda: WAITS[waits](decoder))
    assert isinstance(came, UsageError)
    assert "another thread" in str(came)
    assert decoder.submit_prompt("x", max_tokens=2).result(_END).error is None


def test_a_callback_of_a_future_may_do_all_else(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)

    def work() -> object:
        decoder.decode(BATCH)
        return decoder.submit_prompt("x", max_tokens=2)

    came = in_callback(decoder, work)
    assert isinstance(came, Future)
    assert came.result(_END).error is None
    assert decoder.memory.pos_max(0) == 1


def test_a_callback_of_a_future_may_close(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)
    in_callback(decoder, decoder.close)
    decoder.close()
    assert children() == []


class Calling(logging.Handler):
    """Does something with the first record."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__()
        self._work = work
        self.came = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002 - the signature of handlers
        if not self.came.is_set():
            self._work()
            self.came.set()


HANDLERS: dict[str, Callable[[Decoder], object]] = {
    "flush_reports": Decoder.flush_reports,
    "close": Decoder.close,
    "decode": lambda d: d.decode(BATCH),
}


@pytest.mark.parametrize("work", HANDLERS)
def test_a_logging_handler_that_calls_hangs_nobody(work: str, tiny: Path, make: Open) -> None:
    decoder = make(tiny, 2, preflight=False)
    handler = Calling(lambda: HANDLERS[work](decoder))
    logger = logging.getLogger("crumplezone")
    logger.addHandler(handler)
    try:
        assert decoder.encode(BATCH).errors == {}  # it crashes, and the report of that is logged
        decoder.flush_reports()
        assert handler.came.wait(_END)
        decoder.close()
    finally:
        logger.removeHandler(handler)
    assert children() == []


def in_callback(decoder: Decoder, work: Callable[[], object]) -> object:
    """What came of something that a callback did on the lane's thread."""
    came: Future[object] = Future()

    def call(_: object) -> None:
        try:
            came.set_result(work())
        except UsageError as error:
            came.set_result(error)

    decoder.submit_prompt("abc", max_tokens=200).add_done_callback(call)
    return came.result(_END)


@contextmanager
def handled_under_lock(work: Callable[[], object]) -> Iterator[list[object]]:
    """Have a signal handler do something where this thread next holds a condition's lock in this package."""
    condition = threading.Condition
    held = {each.__code__ for each in (condition.notify, condition.notify_all, condition.wait_for)}
    came: list[object] = []

    def look(frame: FrameType, event: str, _: object) -> None:
        called = frame.f_back and frame.f_back.f_globals.get("__name__")
        if event == "call" and frame.f_code in held and str(called).startswith("crumplezone."):
            sys.setprofile(None)
            signal.raise_signal(signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda *_: came.append(work()))
    sys.setprofile(look)
    try:
        yield came
    finally:
        sys.setprofile(None)
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.timeout(60)  # or it would wait for itself for ever
@pytest.mark.parametrize("passing", ["submit", "flush_reports"])
def test_a_signal_handler_may_close_where_its_thread_holds_a_lock(
    passing: str, tiny: Path, make: Open
) -> None:
    decoder = make(tiny, 1)
    decoder.submit(BATCH).result(_END)
    with handled_under_lock(decoder.close) as came:
        if passing == "submit":
            with pytest.raises(UsageError, match="closed"):
                decoder.submit(BATCH).result(_END)
        else:
            decoder.flush_reports()
    assert came == [None]
    decoder.close()
    assert children() == []


@pytest.mark.timeout(60)
def test_a_signal_handler_may_close_a_llama_where_its_thread_holds_a_lock(tiny: Path, tmp_path: Path) -> None:
    llama = Llama(str(tiny), n_ctx=64, n_threads=1, reports=tmp_path)
    with handled_under_lock(llama.close) as came:
        llama("abc", **GREEDY)  # whose end tells who waits
    assert came == [None]
    llama.close()
    assert children() == []
