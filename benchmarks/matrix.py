"""The reference matrix, batch x length x quantisation: tokens/s native, supervised, one sequence at a time.

One native call for a whole batch, from empty memory, on either side. A batch of one, one at a time, is
the same thing measured twice: how far its ratio is from 1 is the noise of this machine. A quick run leaves
calls out that would take too long, to judge by the speed of the smaller ones, and shows them as such.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from benchmarks import gpu
from benchmarks.models import QUANTS, model
from benchmarks.overhead import Pair
from benchmarks.pairing import Box, Figure, figure, one, ratio
from benchmarks.rows import OVERHEAD, OVERHEAD_FROM_MS, Grid, Plan, Row, Yield
from benchmarks.shape import peak_mib

BATCHES = (1, 2, 4, 8, 16)
LENGTHS = (1, 16, 128, 512)
LONG_S = 10.0  # predicted: such a call is compared once
QUICK_S = 0.5  # predicted: a longer call is left out of a quick run
SEQUENTIAL_S = 0.25


@dataclass(frozen=True)
class Entry:
    """One cell of the matrix: tokens/s; supervised time / native time, time one at a time / native time."""

    quant: str
    batch: int
    length: int
    native: float
    supervised: float
    sequential: float
    overhead: Figure
    gain: Figure

    @property
    def native_ms(self) -> float:
        """Of one call."""
        return self.batch * self.length / self.native * 1000


def rows(plan: Plan) -> Iterator[Yield]:
    """Rows for each quantisation, and a grid of everything."""
    entries: list[Entry] = []
    left_out: dict[tuple[str, int, int], float] = {}
    quants = QUANTS[:1] if plan.quick else QUANTS
    for quant in quants:
        with ExitStack() as stack:
            pair = Pair(stack, model(quant, plan.cache), BATCHES[-1], LENGTHS[-1], plan.threads)
            mine = list(_entries(plan, pair, quant, left_out))
            yield from _summary(quant, mine, pair)
        entries += mine
    if plan.quick:
        others = ", ".join(QUANTS[1:])
        yield Row("matrix", f"supervised / native: {others}", None, "x", note="left out of a quick run")
    yield Row("matrix", "GPU use", None, "MiB", note=gpu.absence()) if gpu.absence() else gpu.row(plan)
    yield _grid(quants, entries, left_out)


def _entries(
    plan: Plan, pair: Pair, quant: str, left_out: dict[tuple[str, int, int], float]
) -> Iterator[Entry]:
    speed = 0.0  # tokens/s of the latest prompt
    for length in LENGTHS:
        for batch in BATCHES:
            predicted = batch * length / speed if speed and length > 1 else 0.0
            if plan.quick and predicted > QUICK_S:
                left_out[quant, batch, length] = predicted
                continue
            box = plan.box(4, least=1 if predicted > LONG_S else 3, most=24)
            entry = _entry(box, pair, quant, batch, length)
            speed = entry.native
            yield entry


def _entry(box: Box, pair: Pair, quant: str, batch: int, length: int) -> Entry:
    calls = 8 if length == 1 else 1
    one_by_one = partial(pair.bare.ask, "sequential", n_seq=batch, n_tokens=length, seconds=SEQUENTIAL_S)
    ours, theirs, single = pair.compare(batch, length, calls, box, one_by_one)
    native, supervised, sequential = (batch * length / statistics.median(s) for s in (theirs, ours, single))
    gain = ratio(single, theirs)
    return Entry(quant, batch, length, native, supervised, sequential, ratio(ours, theirs), gain)


def _summary(quant: str, entries: list[Entry], pair: Pair) -> Iterator[Row]:
    long = [each for each in entries if each.native_ms >= OVERHEAD_FROM_MS]
    if long:
        note = f"{len(long)} shapes whose call takes {OVERHEAD_FROM_MS:g} ms or more; median and quartiles"
        ratios = figure([each.overhead.median for each in long])
        yield Row("matrix", f"supervised / native: {quant}", ratios, "x", OVERHEAD, note)
    gains = figure([each.gain.median for each in entries if each.batch > 1])
    best = max(entries, key=lambda each: each.gain.median)
    note = f"best: {best.batch} x {best.length}, {best.native:.0f} / {best.sequential:.0f} tokens/s"
    yield Row("matrix", f"batched / one at a time, both native: {quant}", gains, "x", note=note)
    pid = pair.supervised.decoder.pid
    assert pid is not None
    ours, theirs = peak_mib(pid), pair.bare.ask("peak_mib")
    note, data = f"in-process {theirs:.0f} MiB", {"cell": ours, "in-process": theirs}
    yield Row("matrix", f"peak memory of the cell: {quant}", one(ours), "MiB", note=note, data=data)


def _grid(quants: tuple[str, ...], entries: list[Entry], left_out: dict[tuple[str, int, int], float]) -> Grid:
    found = {(each.quant, each.batch, each.length): each for each in entries}
    lines = []
    for quant in quants:
        for length in LENGTHS:
            cells = []
            for batch in BATCHES:
                each = found.get((quant, batch, length))
                if each:
                    cells.append(f"{each.native:.0f} / {each.supervised:.0f} / {each.sequential:.0f}")
                else:
                    cells.append(f"left out: {left_out[quant, batch, length]:.0f} s a call")
            lines.append([quant, str(length), *cells])
    data: list[dict[str, float | str | None]] = [
        {
            "quant": each.quant,
            "batch": each.batch,
            "length": each.length,
            "native": each.native,
            "supervised": each.supervised,
            "sequential": each.sequential,
            "ratio": each.overhead.median,
            "gain": each.gain.median,
        }
        for each in entries
    ]
    columns = ["model", "length", *(f"batch {batch}" for batch in BATCHES)]
    return Grid("matrix", "Tokens/s: native / supervised / one at a time", columns, lines, data)
