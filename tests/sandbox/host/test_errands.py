"""What is done beside its giver: in order, by whomever there is, and with nobody waiting who need not."""

from __future__ import annotations

import gc
import logging
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType

import pytest

from crumplezone.sandbox.host.errands import DELIVERY, BesideLog, Errands
from tests.support.interrupts import interrupted_behind
from tests.support.processes.constrained import on_x86_64

BOUND = 30  # seconds for anything


@pytest.fixture
def errands() -> Iterator[Errands]:
    made = Errands("errands of a test")
    yield made
    made.end()
    assert "errands of a test" not in {thread.name for thread in threading.enumerate()}


def test_tasks_are_done_in_order_on_another_thread(errands: Errands) -> None:
    done: list[tuple[int, bool]] = []
    here = threading.current_thread()
    for n in range(50):
        errands.put(partial(lambda n: done.append((n, threading.current_thread() is here)), n))
    assert errands.wait(BOUND)
    assert done == [(n, False) for n in range(50)]


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_a_task_that_raises_costs_only_itself(errands: Errands, error: type[BaseException]) -> None:
    done = threading.Event()

    def fail() -> None:
        raise error

    errands.put(fail)
    errands.put(done.set)
    assert errands.wait(BOUND)
    assert done.is_set()


def test_a_task_does_not_wait_for_itself(errands: Errands) -> None:
    told: list[bool] = []

    def ask() -> None:
        told.extend([errands.mine, errands.wait()])
        errands.put(lambda: told.append(errands.mine))
        errands.hurry()

    errands.put(ask)
    assert errands.wait(BOUND)
    assert errands.wait(BOUND)
    assert told == [True, False, True]
    assert not errands.mine


def test_who_waits_is_told_when_it_takes_too_long(errands: Errands) -> None:
    go = threading.Event()
    errands.put(lambda: go.wait(BOUND))
    assert not errands.wait(0.01)
    go.set()
    assert errands.wait(BOUND)


class Interrupt(Exception):
    """What a signal handler raises."""


def test_an_interrupt_at_the_start_of_the_thread_costs_no_task(errands: Errands) -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature of handlers
        raise Interrupt

    def look(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code is threading.Thread.start.__code__:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGUSR1)

    done: list[int] = []
    before = signal.signal(signal.SIGUSR1, interrupt)
    sys.setprofile(look)
    try:
        with pytest.raises(Interrupt):
            errands.put(lambda: done.append(1))
    finally:
        sys.setprofile(None)
        signal.signal(signal.SIGUSR1, before)
    assert errands.wait(BOUND)
    errands.put(lambda: done.append(2))
    assert errands.wait(BOUND)
    assert done == [1, 2]


def keep(errands: Errands, seconds: float, task: Callable[[], object]) -> None:
    errands.put(lambda: errands.keep(task, seconds))
    assert errands.wait(BOUND)


def test_what_is_kept_is_done_when_it_is_due(errands: Errands) -> None:
    done = threading.Event()
    keep(errands, 0.05, done.set)
    assert done.wait(BOUND)


def test_what_is_kept_is_done_in_a_hurry_or_never(errands: Errands) -> None:
    done: list[str] = []
    keep(errands, 3600, lambda: done.append("hurried"))
    assert done == []
    errands.hurry()
    assert errands.wait(BOUND)
    assert done == ["hurried"]
    keep(errands, 3600, lambda: done.append("dropped"))
    errands.drop()
    errands.hurry()
    assert errands.wait(BOUND)
    assert done == ["hurried"]


NO_THREADS = """
import errno, threading
from crumplezone.sandbox.host.errands import Errands
from tests.support.services import refuse

refuse.system_call(435, errno.ENOSYS)  # clone3(2)
refuse.system_call(56, errno.EAGAIN, 0, 0x10000)  # clone(2), CLONE_THREAD
errands, done = Errands("tasks"), []

def first():
    errands.put(lambda: done.append(2))
    done.append(1)
    errands.keep(lambda: done.append(3), 60)

errands.put(first)
print(done, errands.wait(1), errands.mine)
errands.hurry()
print(done, threading.active_count())
try:
    errands.put(lambda: 1 / 0)
    errands.put(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
except KeyboardInterrupt:
    errands.put(lambda: done.append(4))
print(done, errands.mine)
"""


@on_x86_64
def test_where_there_is_no_thread_the_giver_does_it() -> None:
    done = subprocess.run([sys.executable, "-c", NO_THREADS], capture_output=True, text=True, timeout=BOUND)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["[1, 2] True False", "[1, 2, 3] 1", "[1, 2, 3, 4] False"]


def test_a_fork_begins_anew(errands: Errands) -> None:
    go, done = threading.Event(), threading.Event()
    errands.put(lambda: go.wait(BOUND))
    before = errands._doer
    errands.reset()
    errands.put(done.set)
    assert done.wait(BOUND)
    go.set()
    assert before is not None
    before.join(BOUND)


class Stuck(logging.Handler):
    """Holds the thread that logs until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.here, self.go, self.lines = threading.Event(), threading.Event(), list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        self.here.set()
        self.go.wait(BOUND)
        self.lines.append(f"{record.funcName} {record.threadName} {record.getMessage()}")


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    handler = Stuck()
    logger = logging.getLogger("stuck")
    logger.addHandler(handler)
    logger.propagate = False
    yield handler
    handler.go.set()
    assert DELIVERY.wait(BOUND)
    logger.removeHandler(handler)


def test_nobody_waits_for_a_logging_handler_but_once(stuck: Stuck) -> None:
    log = BesideLog(logging.getLogger("stuck"))
    log.warning("one of %d", 2)
    assert stuck.here.wait(BOUND)
    log.log(logging.ERROR, "two")
    assert not DELIVERY.wait(0.01)
    begin = time.monotonic()
    assert [DELIVERY.wait() for _ in range(BOUND)] == [False] * BOUND  # it is known to be stuck
    assert time.monotonic() - begin < BOUND / 2
    stuck.go.set()
    assert DELIVERY.wait(BOUND)
    where = f"test_nobody_waits_for_a_logging_handler_but_once {threading.current_thread().name}"
    assert stuck.lines == [f"{where} one of 2", f"{where} two"]


def test_a_line_keeps_no_error_alive(stuck: Stuck) -> None:
    class Arena:
        pass

    arena = Arena()
    gone = weakref.ref(arena)
    log = BesideLog(logging.getLogger("stuck"))
    try:
        held, arena = arena, Arena()
        raise ValueError(f"bad {type(held).__name__}")
    except ValueError as error:
        log.warning("%s", error)
    del held
    assert stuck.here.wait(BOUND)
    gc.collect()
    assert gone() is None
    stuck.go.set()
    assert DELIVERY.wait(BOUND)
    assert stuck.lines[0].endswith("bad Arena")


def test_the_lines_that_wait_have_a_bound(stuck: Stuck) -> None:
    record = logging.makeLogRecord({"name": "stuck", "levelno": logging.ERROR, "msg": "x"})
    assert DELIVERY.put(record, 2)
    assert stuck.here.wait(BOUND)
    assert [DELIVERY.put(record, 2) for _ in range(3)] == [True, True, False]


def test_an_interrupt_anywhere_holds_up_nobody_else(errands: Errands) -> None:
    def give_and_wait() -> None:
        errands.put(lambda: None)
        errands.hurry()
        errands.wait(BOUND)

    kept: list[BaseException] = []
    while error := interrupted_behind(len(kept), give_and_wait):
        kept.append(error)
        done = threading.Event()
        other = threading.Thread(target=lambda done=done: errands.put(done.set), daemon=True)
        other.start()
        assert done.wait(BOUND), f"after an interrupt: {error}"
        other.join(BOUND)
    assert len(kept) > 20
