"""Whose call an engine is at: whoever was interrupted, wherever, holds up nobody else."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from crumplezone.workers.cells.turn import Turn
from crumplezone.workers.llama.calls.lock import CallLock
from tests.support.interrupts import interrupted_behind

BOUND = 30.0  # seconds


class Call:
    has_turn = False


def of_turn() -> Callable[[], object]:
    turn = Turn("thing")
    return lambda: turn.run(int)


def of_lock() -> Callable[[], object]:
    lock = CallLock()
    return lambda: lock.run(Call(), int)


@pytest.mark.parametrize("made", [of_turn, of_lock])
def test_an_interrupt_anywhere_leaves_the_turn_to_others(made: Callable[[], Callable[[], object]]) -> None:
    call = made()
    kept: list[BaseException] = []  # as a notebook does with the latest error, and with its frames
    while error := interrupted_behind(len(kept), call):
        kept.append(error)
        done: list[object] = []
        other = threading.Thread(target=lambda done=done: done.append(call()), daemon=True)
        other.start()
        other.join(BOUND)
        assert done == [0], f"after an interrupt: {error}"
        assert call() == 0
    assert len(kept) > 5
