"""Work on threads of its own: done once, whoever asks, and whatever interrupts who waits."""

from __future__ import annotations

import gc
import signal
import threading
import weakref
from collections.abc import Callable
from types import FrameType

import pytest

from crumplezone.sandbox.host.threads import Task, apart, caller, serves

_END = 30.0  # seconds


class Interrupt(Exception):
    """What a signal handler raises."""


class Thing:
    """What work has made."""


def interrupt_while(work: Callable[[threading.Event], object]) -> None:
    """Have a signal handler interrupt this thread while it waits for work that has begun."""

    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature of handlers
        if not handled.is_set():
            handled.set()
            raise Interrupt

    begun, handled = threading.Event(), threading.Event()

    def signal_it() -> None:
        begun.wait(_END)
        ident = threading.main_thread().ident
        assert ident is not None
        signal.pthread_kill(ident, signal.SIGUSR1)
        while not handled.wait(0.05):  # one that comes just before it waits does not wake it
            signal.pthread_kill(ident, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handle)
    thread = threading.Thread(target=signal_it)
    thread.start()
    try:
        with pytest.raises(Interrupt):
            work(begun)
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, before)


def test_it_is_done_once_however_often_it_is_asked_for() -> None:
    task, done = Task[int](), list[str]()

    def work() -> int:
        done.append(threading.current_thread().name)
        assert serves()
        return 7

    askers = [threading.Thread(target=task.begin, args=(work, "own")) for _ in range(8)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert task.result() == task.result() == 7
    assert done == ["own"]
    assert "own" not in [thread.name for thread in threading.enumerate()]
    assert not serves()


def test_who_waits_is_told_what_it_raised() -> None:
    task = Task[None]()
    task.begin(lambda: [][1], "own")
    with pytest.raises(IndexError):
        task.result()
    task.begin(lambda: None, "own")  # is not done again
    assert task.result() is None


def test_waiting_can_be_interrupted_and_begun_again() -> None:
    task, go = Task[int](), threading.Event()

    def work(begun: threading.Event) -> None:
        def seven() -> int:
            begun.set()
            go.wait(_END)
            return 7

        task.begin(seven, "own")
        task.wait()

    interrupt_while(work)
    assert not task.wait(0)
    go.set()
    assert task.result() == 7


def test_what_nobody_waits_for_any_more_is_made_and_dropped() -> None:
    go, dropped = threading.Event(), threading.Event()

    def work(begun: threading.Event) -> None:
        def make() -> Thing:
            begun.set()
            go.wait(_END)
            thing = Thing()
            weakref.finalize(thing, dropped.set)
            return thing

        apart(make)

    interrupt_while(work)
    gc.collect()
    go.set()
    assert dropped.wait(_END)


def test_what_is_done_apart_is_the_callers() -> None:
    assert apart(lambda: (caller(), threading.get_ident())) != (threading.get_ident(),) * 2
    assert apart(caller) == caller() == threading.get_ident()


def test_what_is_taken_over_is_never_done(capsys: pytest.CaptureFixture[str]) -> None:
    task = Task[None]()
    assert task.take_over()
    assert not task.take_over()
    task.begin(lambda: print("done"), "own")
    assert task.result() is None
    assert capsys.readouterr().out == ""


def test_without_a_thread_it_is_done_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:  # noqa: ARG001 - the signature of `start`
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    task = Task[int]()
    task.begin(threading.get_ident, "own")
    assert task.result() == threading.get_ident()
    assert not serves()


def test_who_waits_for_what_somebody_else_takes_over_goes_on() -> None:
    task, came = Task[int](), list[int | None]()
    waiting = threading.Thread(target=lambda: came.append(task.result()), daemon=True)
    waiting.start()
    while not task._latches and waiting.is_alive():  # it waits
        pass
    assert task.take_over()
    waiting.join(_END)
    assert came == [None]
