"""Cells against the pools that people use: one worker each, the same chores, each in a script of its own."""

from __future__ import annotations

import contextlib
import functools
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import psutil

from benchmarks import rows as aims
from benchmarks.pairing import alternate, figure, one, ratio
from benchmarks.peer import Peer, PeerError
from benchmarks.rows import Aim, Plan, Row, Unit, Yield
from benchmarks.side_pool import JOBS, KINDS, LIMIT

OURS = "cells"
_CALLS: tuple[tuple[str, str, int, Unit, Aim], ...] = (
    ("trivial call", "nothing", 200, "us", aims.TRIVIAL_CALL),
    ("600 kB result", "payload", 50, "ms", aims.PAYLOAD),
)
_PACKAGE = {"loky": ("loky",), "pebble": ("pebble",)}
_ORPHANS_S = 2.0  # how long after the supervisor's death a process counts as an orphan

_ANSWER_S = 30.0  # a pool that takes longer hangs

Seconds = dict[str, list[float]]


class Side:
    """A pool's script. One that hangs (some do, now and then, after a crash) is ended and started anew.

    Raises:
        PeerError: Its package is missing.
    """

    def __init__(self, stack: ExitStack, kind: str) -> None:
        self._kind = kind
        self.hangs = 0
        self.peer = self._started()
        stack.callback(lambda: self.peer.close())

    def _started(self) -> Peer:
        peer = Peer("side_pool", self._kind, needs=_PACKAGE.get(self._kind.split()[0], ()))
        try:
            peer.ask("descendants", _ANSWER_S)  # it is up
        except BaseException:
            peer.close()
            raise
        return peer

    def ask(self, method: str, otherwise: Any, **arguments: Any) -> Any:
        """Its answer; ``otherwise`` if it hangs. We must not."""
        try:
            return self.peer.ask(method, _ANSWER_S, **arguments)
        except PeerError:
            if self._kind == OURS:
                raise
            self.hangs += 1
            self.peer.close()
            self.peer = self._started()
            return otherwise


Sides = dict[str, Side]


def rows(plan: Plan) -> Iterator[Yield]:
    """Ours with its aim, then the ratio to each of the others."""
    with ExitStack() as stack:
        sides: Sides = {}
        for kind in KINDS:
            try:
                sides[kind] = Side(stack, kind)
            except PeerError as error:
                yield Row("pools", kind, None, "x", note=str(error))
        yield from _calls(plan, sides)
        yield from _crashes(plan, sides)
        yield _counted(
            "innocents lost of 100", {kind: side.ask("innocents", JOBS) for kind, side in sides.items()}
        )
        yield _idle(sides)
        yield _hang(sides)
        yield _orphans(sides)
        yield _counted(
            "times that a pool stopped answering", {kind: side.hangs for kind, side in sides.items()}
        )


def _calls(plan: Plan, sides: Sides) -> Iterator[Row]:
    for name, chore, count, unit, aim in _CALLS:
        ask = [
            functools.partial(side.ask, "calls", _ANSWER_S, chore=chore, count=count)
            for side in sides.values()
        ]
        found = dict(zip(sides, alternate(ask, plan.box(5)), strict=True))
        yield from _against(name, found, unit, aim)


def _crashes(plan: Plan, sides: Sides) -> Iterator[Row]:
    ask = [functools.partial(side.ask, "crash", (_ANSWER_S, _ANSWER_S)) for side in sides.values()]
    pairs = dict(zip(sides, alternate(ask, plan.box(10, least=4, most=12)), strict=True))
    raised = {kind: [first for first, _ in found] for kind, found in pairs.items()}
    yield from _against("SIGSEGV -> exception", raised, "ms", aims.CRASH)
    after = {kind: [second for _, second in found] for kind, found in pairs.items()}
    yield from _against("SIGSEGV -> next result", after, "ms", aims.NEXT_RESULT)


def _against(name: str, found: Seconds, unit: Unit, aim: Aim) -> Iterator[Row]:
    scale = {"us": 1e6, "ms": 1e3}[unit]
    data = {kind: statistics.median(seconds) * scale for kind, seconds in found.items()}
    yield Row("pools", name, figure([each * scale for each in found[OURS]]), unit, aim, data=data)
    for kind, seconds in found.items():
        if kind != OURS:
            note = f"{data[OURS]:.3g} / {data[kind]:.3g} {unit}"
            yield Row("pools", f"{name}: cells / {kind}", ratio(found[OURS], seconds), "x", note=note)


def _counted(name: str, counts: dict[str, int], note: str = "") -> Row:
    others = ", ".join(f"{kind} {count}" for kind, count in counts.items() if kind != OURS)
    return Row("pools", name, one(counts[OURS]), "", aims.NONE, note or others)


def _idle(sides: Sides) -> Row:
    said = {kind: side.ask("idle_killed", "a hang") for kind, side in sides.items()}
    others = ", ".join(f"{kind} {word or 'unseen'}" for kind, word in said.items() if kind != OURS)
    counts = {kind: int(bool(word)) for kind, word in said.items()}
    return _counted("idle worker killed: calls that notice", counts, others)


def _hang(sides: Sides) -> Row:
    """Past the limit, in ms. Pools that only stop waiting have not ended what hangs."""
    words, ours = [], 0.0
    for kind, side in sides.items():
        seconds, ended = side.ask("hang", (_ANSWER_S, False))
        past = (seconds - LIMIT) * 1000
        if kind == OURS:
            ours = past
        else:
            words.append(f"{kind} {past:.0f} ms{'' if ended else ', its worker hangs on'}")
    return Row("pools", "hang with a 1 s limit, past it", one(ours), "ms", aims.HANG, "; ".join(words))


def _orphans(sides: Sides) -> Row:
    """Last: it kills the scripts."""
    counts = {kind: _orphans_of(side) for kind, side in sides.items()}
    return _counted("orphans of a killed supervisor", counts)


def _orphans_of(side: Side) -> int:
    below = []
    for pid in side.ask("descendants", None) or side.peer.ask("descendants"):
        with contextlib.suppress(psutil.NoSuchProcess):
            below.append(psutil.Process(pid))
    side.peer.kill()
    end = time.monotonic() + _ORPHANS_S
    while _alive(below) and time.monotonic() < end:
        time.sleep(0.01)
    orphans = _alive(below)
    for orphan in orphans:
        with contextlib.suppress(psutil.NoSuchProcess):
            orphan.send_signal(signal.SIGKILL)
    return len(orphans)


def _alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    alive = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive
