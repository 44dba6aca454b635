"""Where the microseconds of one supervised step go: generation, one token per sequence.

The child's phases come from its flight recorder, the supervisor's from the channel, both by CLOCK_MONOTONIC.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from benchmarks.models import model
from benchmarks.overhead import N_CTX_SEQ, Supervised
from benchmarks.rows import Grid, Plan, Yield
from crumplezone import Batch
from crumplezone.sandbox.cells.cell import Cell
from crumplezone.sandbox.ipc.channel import Channel

SEQUENCES = (1, 16)
_WARM_UP = 8

# Each part ends at a mark; a mark is a time in ns. "x" and "x.": begin and end of a phase of the child.
PARTS = (
    ("check the batch, fill the arena", "call"),
    ("encode the request", "send"),
    ("send", "send."),
    ("wake the child, which decodes the frame", "validate"),
    ("child: decode the request", "validate."),
    ("child: reach the arrays", "build"),
    ("child: build the batch", "build."),
    ("child: make the llama_batch", "decode"),
    ("llama_decode", "decode."),
    ("child: find the outputs", "copy"),
    ("child: copy the rows into the arena", "copy."),
    ("child: reply, and wake the supervisor", "receive"),
    ("receive and decode the frame", "receive."),
    ("decode the reply", "call."),
    ("check the rows and copy them out, note what was done", "end"),
)


class Marks:
    """Times of the latest call: of the supervisor as it goes, of the child from its recorder."""

    def __init__(self) -> None:
        self.cell: Cell | None = None
        self.at: dict[str, int] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note when the supervisor's calls begin and end."""
        with ExitStack() as stack:
            for owner, name in ((Cell, "call"), (Channel, "send"), (Channel, "receive")):
                original = getattr(owner, name)
                setattr(owner, name, self._noting(name, original))
                stack.callback(setattr, owner, name, original)
            yield

    def _noting(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def noting(target: Any, *args: Any, **kwargs: Any) -> Any:
            self.at[name] = time.monotonic_ns()
            result = original(target, *args, **kwargs)
            self.at[f"{name}."] = time.monotonic_ns()
            if name == "call":
                self.cell = target
            return result

        return noting

    def add_child(self) -> None:
        """Add the phases of the child's latest call."""
        assert self.cell
        now = time.monotonic_ns()
        for phase in self.cell.arena.flight(now):  # oldest first: what counts is the last of each name
            began = now - int(phase.ms * 1e6)
            self.at[phase.name] = began
            self.at[f"{phase.name}."] = began + int((phase.took or 0) * 1e6)
        self.at["send."] = min(self.at["send."], self.at["validate"])  # it may wake before the sender goes on


def profile(supervised: Supervised, n_seq: int, steps: int) -> dict[str, float]:
    """Microseconds of each part, medians over the steps, and of the whole."""
    marks, parts = Marks(), {name: list[float]() for name, _ in PARTS}
    whole = []
    supervised.decoder.memory.clear()
    with marks.watching():
        for step in range(_WARM_UP + steps):
            batch = Batch.of(np.full((n_seq, 1), 1 + step, np.int32))
            start = time.monotonic_ns()
            result = supervised.decoder.decode(batch)
            for seq_id in range(n_seq):
                result.logits(seq_id)
            marks.at["end"] = time.monotonic_ns()
            marks.add_child()
            if step >= _WARM_UP:
                whole.append((marks.at["end"] - start) / 1000)
                previous = start
                for name, mark in PARTS:
                    parts[name].append((marks.at[mark] - previous) / 1000)
                    previous = marks.at[mark]
    medians = {name: statistics.median(values) for name, values in parts.items()}
    return medians | {"whole step": statistics.median(whole)}


def rows(plan: Plan) -> Iterator[Yield]:
    """One grid: a line for each part, a column for each number of sequences."""
    found = {}
    for n_seq in SEQUENCES:
        supervised = Supervised(model("Q4_1", plan.cache), n_seq, N_CTX_SEQ, plan.threads)
        try:
            found[n_seq] = profile(supervised, n_seq, 20 if plan.quick else 100)
        finally:
            supervised.close()
    names = [*(name for name, _ in PARTS), "whole step"]
    columns = ["part", *(f"{n_seq} sequence{'s' * (n_seq > 1)}, us" for n_seq in SEQUENCES)]
    lines = [[name, *(f"{found[n_seq][name]:.0f}" for n_seq in SEQUENCES)] for name in names]
    yield Grid(
        "step",
        "One supervised generation step, Q4_1, medians",
        columns,
        lines,
        [{"n_seq": n_seq, **parts} for n_seq, parts in found.items()],
    )
