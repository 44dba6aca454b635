"""Interrupts as signal handlers raise them: between any two calls, in this package or in what it calls."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from types import FrameType

from tests.support.paths import ROOT

_OURS = tuple(f"{ROOT}/{room}/" for room in ("src", "workers", "sandbox", "reports"))
_CALLERS = 3  # frames of others between one of this package's and the interrupt


class Interrupt(Exception):
    """What a signal handler raises."""


class _At:
    """A profile function: interrupts this thread behind a call, or where a function begins.

    There Python runs signal handlers, and there what they raise comes from (Python/ceval.c, the checks of
    eval_breaker). A trace function cannot tell: it is called in front of lines and instructions. Not where
    a thread is being started: one that is interrupted there may never begin (threading.Thread.start).
    """

    def __init__(self, event: int) -> None:
        self.left = event
        self.where = ""

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:  # noqa: ARG002 - as these are
        generates = frame.f_code.co_flags & inspect.CO_GENERATOR and event != "c_return"
        if self.where or generates or event not in {"c_return", "call", "return"}:
            return
        if frame.f_code.co_name in {"__del__", "_remove"}:  # of the collector, which drops what they raise
            return
        caller: FrameType | None = frame
        for _ in range(_CALLERS):
            if caller is None or caller.f_code.co_filename.startswith(_OURS):
                break
            if caller.f_code is threading.Thread.start.__code__:
                return
            caller = caller.f_back
        if caller is None or not caller.f_code.co_filename.startswith(_OURS):
            return
        self.left -= 1
        if self.left < 0:
            self.where = f"{event} in {frame.f_code.co_name}, {frame.f_code.co_filename}:{frame.f_lineno}"
            sys.setprofile(None)
            raise Interrupt(self.where)


def interrupted_behind(event: int, work: Callable[[], object]) -> BaseException | None:
    """What came of something that was interrupted at one of its events; None: it ended before.

    Keep it, as notebooks and debuggers do: its frames live as long, and what only they would release.
    """
    profile = _At(event)
    sys.setprofile(profile)
    try:
        work()
    except BaseException as error:  # noqa: BLE001 - whatever it was made of the interrupt
        return error
    finally:
        sys.setprofile(None)
    return Interrupt(profile.where) if profile.where else None
