"""Whether cells live: each is asked now, whatever it does."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import psutil

from crumplezone.sandbox.cells.cell import Cell
from crumplezone.sandbox.host.threads import Task

_LOOK = 0.01  # seconds between looks whether a cell that is at work was heard
State = Literal["idle", "busy", "stopped", "ended"]


@dataclass(frozen=True)
class CellHealth:
    """One cell, as it was just now.

    Attributes:
        role: "lane", "memory", "embeddings" or "zygote".
        pid: Its process.
        alive: Whether that has not ended.
        answered: Whether it answered in time: a cell that waits, to a question of its own; one that works, by
            its work.
        silent: Seconds since it was heard last.
        state: "idle"; "busy"; "stopped", by somebody else or because it crashed and is examined; or "ended".
    """

    role: str
    pid: int
    alive: bool
    answered: bool
    silent: float
    state: State


def ask(cells: Iterable[tuple[str, Cell]], seconds: float) -> list[CellHealth]:
    """Ask cells, all of them at once, and wait for their answers.

    Args:
        cells: Each with its role.
        seconds: To wait at most, for all of them.
    """
    end = time.monotonic() + seconds
    asked: list[Task[CellHealth]] = []
    for role, cell in cells:
        asked.append(Task[CellHealth]())
        asked[-1].begin(lambda role=role, cell=cell: _asked(role, cell, end), "health")  # type: ignore[misc]
    return [found for task in asked if (found := task.result())]


def _asked(role: str, cell: Cell, end: float) -> CellHealth:
    begin, busy, nudged = time.monotonic(), False, False
    while cell.alive and cell.heard < begin and (left := end - time.monotonic()) > 0:
        answered = cell.ping(left)
        if answered is not None:
            break
        busy = True
        if not nudged and role == "lane":  # its answer comes as soon as its native call is done
            cell.arena.nudge()
            nudged = True
        time.sleep(min(_LOOK, left))
    heard, state = cell.heard, _state(cell, busy=busy)
    return CellHealth(
        role=role,
        pid=cell.pid,
        alive=state != "ended",
        answered=heard >= begin,
        silent=time.monotonic() - heard,
        state=state,
    )


def _state(cell: Cell, *, busy: bool) -> State:
    try:
        status = psutil.Process(cell.pid).status()
    except (psutil.Error, OSError):  # OSError: there is no descriptor to look with
        status = psutil.STATUS_DEAD
    if status in (psutil.STATUS_DEAD, psutil.STATUS_ZOMBIE):
        return "ended"
    if status == psutil.STATUS_STOPPED or not cell.alive:
        return "stopped"
    return "busy" if busy else "idle"
