"""A stream of `Llama` whose cell is killed three times: the worst gap between two chunks.

The same stream undisturbed runs beside it. A kill comes while the stream waits between two chunks, so all of
the recovery is in the next gap: the new cell, its saved state, and what has to be computed again. How long it
computed again is read from the flight recorder of the new cell.
"""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

from benchmarks.models import model
from benchmarks.pairing import alternate, figure
from benchmarks.rows import STREAM_GAP, Plan, Row, Yield
from crumplezone import Llama

_QUANT = "Q4_1"
_N_CTX = 1024
_TOKENS, _KILLS = 24, (6, 12, 18)  # few enough for the ring of the flight recorder
_PROMPT = "The sea is wide and the ship is small. " * 60  # so long that its state is saved
_READY = 30.0  # seconds for a spare
_SIDES: dict[str, dict[str, Any]] = {
    "with a spare": {"spares": 1},
    "without a spare": {"spares": 0},
    "without a spare, spawned": {"start": "spawn"},
}


def rows(plan: Plan) -> Iterator[Yield]:
    """The worst gap of each way to start cells, also less what was computed again; and undisturbed."""
    with ExitStack() as stack:
        sides = {name: _side(_llama(plan, stack, options), _KILLS) for name, options in _SIDES.items()}
        sides["undisturbed"] = _side(_llama(plan, stack, {"spares": 0}), ())
        found = dict(zip(sides, alternate(list(sides.values()), plan.box(90, least=3, most=20)), strict=True))
    data = {name: statistics.median(gap for gap, _ in pairs) * 1000 for name, pairs in found.items()}
    for name, pairs in found.items():
        note = "" if name == "undisturbed" else "killed three times"
        gap = figure([gap * 1000 for gap, _ in pairs])
        yield Row("recovery", f"Llama's stream, worst gap, {name}", gap, "ms", None, note, data)
    for name in _SIDES:
        aim = STREAM_GAP if name == "with a spare" else None
        rest = figure([(gap - computed) * 1000 for gap, computed in found[name]])
        note = "less what the new cell computed until its first chunk"
        yield Row("recovery", f"Llama's stream, recovery, {name}", rest, "ms", aim, note)


def _llama(plan: Plan, stack: ExitStack, options: dict[str, Any]) -> Llama:
    reports = stack.enter_context(tempfile.TemporaryDirectory())
    path, threads = str(model(_QUANT, plan.cache)), plan.threads
    llama = Llama(
        path,
        n_ctx=_N_CTX,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
        reports=reports,
        **options,
    )
    return stack.enter_context(closing(llama))


def _side(llama: Llama, kills: tuple[int, ...]) -> Callable[[], tuple[float, float]]:
    """The worst gap after the first chunk, and how much of it the cell computed, seconds."""

    def side() -> tuple[float, float]:
        llama.reset()
        gaps = []
        stream = llama.create_completion(_PROMPT, max_tokens=_TOKENS, temperature=0.8, seed=1, stream=True)
        last = time.perf_counter()
        for i, _ in enumerate(stream):
            gap = time.perf_counter() - last
            if i:
                gaps.append((gap, _computed(llama) if i - 1 in kills else 0.0))
            if i in kills:
                _kill(llama)
            last = time.perf_counter()
        return max(gaps)

    return side


def _computed(llama: Llama) -> float:
    """Seconds that the running cell, a new one, was in native code."""
    cell = llama._session.runner.client.cell  # noqa: SLF001 - what is measured has no public name
    assert cell is not None
    phases = cell.arena.flight(time.monotonic_ns())
    return sum(each.took or 0.0 for each in phases if each.name in {"decode", "sample"}) / 1000


def _kill(llama: Llama) -> None:
    llama.flush_reports()  # what is examined of the last one has ended
    llama._session.wait_for_spares(_READY)  # noqa: SLF001 - as above
    pid = llama.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
