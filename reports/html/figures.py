"""The pictures of a report: the timeline up to the crash, the batch, and the ladder.

Each is a table or a list whose words say what the picture shows. Each is bounded: a row of at most
`_COLUMNS` columns, and a fixed number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

from markupsafe import Markup

from crumplezone.reports.html.markup import (
    EMPTY,
    Child,
    box,
    count,
    duration,
    join,
    mebibytes,
    strip,
    tag,
    text,
)
from crumplezone.reports.records.report import BatchRecord, LadderStep, Outcome, Phase, Report, Sample

_COLUMNS = 240  # of the batch picture; more positions than that share columns
_CELL = 12  # pixels of a position, where there is room
_SEQUENCES = 32
_WIDTH = 1000  # units of the timeline
_HEIGHT = 32
_LEAST_BAR = 3
_PHASES = 256
_LANES = 8
_SAMPLES = 256
_CHIPS = 32
_STEPS = 2048
_RUNGS = 16
_SIGNS = {Outcome.OK: "✓", Outcome.CRASHED: "✗", Outcome.REFUSED: "-", Outcome.SKIPPED: "↷"}


def timeline(samples: Sequence[Sample], flight: Sequence[Phase]) -> Markup:
    """Memory, processor and phases up to the end, on a logarithmic time: the last millisecond can be seen."""
    samples = sorted(_sane_samples(samples)[-_SAMPLES:], key=lambda sample: -sample.ms)
    phases = _sane_phases(flight)[-_PHASES:]
    moments = [sample.ms for sample in samples] + [phase.ms for phase in phases]
    if not moments:
        return EMPTY
    clock = _Clock(max(*moments, 1.0))
    rows = [*_memory(samples, clock), *_processor(samples, clock), *_lanes(phases, clock)]
    return tag("table", tag("tbody", *rows, _axis(clock)), class_="strips timeline")


@dataclass(frozen=True)
class _Clock:
    """Where a moment is drawn.

    Attributes:
        span: Milliseconds from the left edge to the end.
    """

    span: float

    def x(self, ms: float) -> float:
        """A moment before the end, in units from the left edge."""
        within = min(max(ms, 0.0), self.span)
        return _WIDTH * (1 - math.log1p(within) / math.log1p(self.span))

    def ticks(self) -> list[int]:
        """Milliseconds: the powers of ten that are not too near to the edges."""
        return [power for n in range(7) if (power := 10**n) < 0.7 * self.span]


def _sane_samples(samples: Iterable[Sample]) -> list[Sample]:
    return [each for each in samples if math.isfinite(each.ms) and math.isfinite(each.cpu)]


def _sane_phases(flight: Iterable[Phase]) -> list[Phase]:
    return [each for each in flight if math.isfinite(each.ms) and math.isfinite(each.took or 0.0)]


def _strip_row(name: Child, drawn: Markup, note: Child, kind: str = "") -> Markup:
    cells = (tag("th", name, scope="row"), tag("td", drawn, class_="drawn"), tag("td", note, class_="note"))
    return tag("tr", *cells, class_=kind or None)


def _area(points: Sequence[tuple[float, float]], most: float) -> str:
    """What lies under a line, as path data. Its last value holds to the right edge."""
    top = [f"L{x:.5g} {_HEIGHT * (1 - min(max(y / most, 0.0), 1.0)):.4g}" for x, y in points]
    return f"M{points[0][0]:.5g} {_HEIGHT}{''.join(top)}H{_WIDTH}V{_HEIGHT}z"


def _memory(samples: Sequence[Sample], clock: _Clock) -> list[Markup]:
    if not samples:
        return []
    most = max(sample.rss for sample in samples)
    last = f"{mebibytes(samples[-1].rss)} at the end"
    points = [(clock.x(sample.ms), float(sample.rss)) for sample in samples]
    drawn = _graph(_area(points, max(most, 1)), clock, f"memory, at most {mebibytes(most)}, {last}")
    note = last if most == samples[-1].rss else f"{last}, at most {mebibytes(most)}"
    return [_strip_row("memory", drawn, note, "graph")]


def _processor(samples: Sequence[Sample], clock: _Clock) -> list[Markup]:
    busy = [
        (clock.x(before.ms), 1000 * (after.cpu - before.cpu) / (before.ms - after.ms))
        for before, after in pairwise(samples)
        if before.ms > after.ms
    ]
    if not busy:
        return []
    most = max(share for _, share in busy)
    note = f"at most {max(most, 0):.1f} cores"
    drawn = _graph(_area(busy, max(most, 1.0)), clock, f"processor, {note}")
    return [_strip_row("processor", drawn, note, "graph")]


def _graph(area: str, clock: _Clock, label: str) -> Markup:
    return strip(_WIDTH, _HEIGHT, [("grid", _grid(clock, _HEIGHT)), ("area", area)], label)


def _grid(clock: _Clock, height: int) -> str:
    return "".join(f"M{clock.x(tick):.5g} 0v{height}" for tick in clock.ticks())


def _lanes(phases: Sequence[Phase], clock: _Clock) -> list[Markup]:
    """A row per kind of phase, the last ones only, in the order in which they first came."""
    names = list(dict.fromkeys(phase.name for phase in reversed(phases)))[:_LANES]
    first = dict.fromkeys(phase.name for phase in phases)
    return [_lane([p for p in phases if p.name == name], clock) for name in first if name in names]


def _lane(phases: Sequence[Phase], clock: _Clock) -> Markup:
    bars: dict[str, list[str]] = {"grid": [_grid(clock, 10)], "took": [], "open": []}
    for phase in phases:
        left = clock.x(phase.ms)
        right = _WIDTH if phase.took is None else clock.x(phase.ms - phase.took)
        width = max(right - left, _LEAST_BAR)
        kind = "open" if phase.took is None else "took"
        bars[kind].append(box(min(left, _WIDTH - width), 1, width, 8))
    last = phases[-1]
    if last.took is None:
        note = f"{last.count:,} in hand, {duration(last.ms)}, did not end"
    else:
        note = f"{count(len(phases), 'time')}, {duration(sum(p.took or 0.0 for p in phases))}"
    paths = [(kind, "".join(data)) for kind, data in bars.items()]
    drawn = strip(_WIDTH, 10, paths, f"{last.name[:80]}: {note}")
    return _strip_row(text(last.name, 24), drawn, note, "crashed" if last.took is None else "")


def _axis(clock: _Clock) -> Markup:
    labels = [
        tag(
            "text", _tick(ms), x=f"{clock.x(ms) / _WIDTH:.1%}", y="11", class_="minor" if n % 2 == 0 else None
        )
        for n, ms in enumerate(clock.ticks())
    ]
    labels.append(tag("text", "end", x="100%", y="11", class_="end"))
    drawn = tag("svg", *labels, class_="axis", role="img", aria_label="time before the end")
    return _strip_row("before the end", drawn, "", "axis")


def _tick(ms: int) -> str:
    return f"{ms} ms" if ms < 1000 else f"{ms // 1000} s"


@dataclass
class _SequenceRow:
    """One sequence of the batch.

    Attributes:
        positions: Of its tokens in the batch.
        outputs: Those positions whose result was asked for.
        held: Positions that the memory held before.
    """

    positions: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)


def batch(record: BatchRecord, blamed: Collection[int]) -> Markup:
    """Sequences x positions: tokens, those with an output, what the memory held, and who is blamed.

    Args:
        record: Its lists may lie about their lengths.
        blamed: Sequences shown to crash alone.
    """
    rows = _rows(record)
    if not rows:
        return EMPTY
    shown = sorted(sorted(rows, key=lambda seq: (seq not in blamed, seq))[:_SEQUENCES])
    places = [place for seq in shown for place in (*rows[seq].positions, *rows[seq].held)]
    low, span = min(places), max(places) - min(places) + 1
    drawn = [_sequence(seq, rows[seq], low, span, seq in blamed) for seq in shown]
    notes = [f"{record.operation}: {count(len(record.positions), 'token')} in {count(len(rows), 'sequence')}"]
    if len(rows) > len(shown):
        notes.append(f"{count(len(rows) - len(shown), 'sequence')} not drawn")
    if record.cut:
        notes.append(f"{count(record.cut, 'token')} of its middle not recorded")
    if len({len(column) for column in (record.positions, record.seq_ids, record.outputs)}) > 1:
        notes.append("damaged: its lists differ in length, and what they share is drawn")
    if len(record.passes) > 1:
        notes.append(f"compute passes of {', '.join(map(str, record.passes[:12]))} tokens")
    table = tag("table", tag("tbody", *drawn), class_="strips batch")
    return join([tag("p", "; ".join(notes), class_="quiet"), table, _legend(rows, blamed)])


def _rows(record: BatchRecord) -> dict[int, _SequenceRow]:
    rows: dict[int, _SequenceRow] = {}
    columns = zip(record.seq_ids, record.positions, record.outputs, strict=False)
    for index, (seq_id, position, output) in enumerate(columns):
        for seq in {seq_id, *record.shared.get(str(index), ())}:
            row = rows.setdefault(seq, _SequenceRow())
            row.positions.append(position)
            if output:
                row.outputs.append(position)
    for held in record.held:
        if held.positions:
            rows.setdefault(held.seq_id, _SequenceRow()).held += held.positions
    for each in record.generating:  # the memory has it, but for the tokens of this batch
        row = rows.setdefault(each.seq_id, _SequenceRow())
        row.held += range(min(min(row.positions, default=len(each.tokens)), len(each.tokens)))
    return {seq: row for seq, row in rows.items() if row.positions or row.held}


def _sequence(seq: int, row: _SequenceRow, low: int, span: int, blamed: bool) -> Markup:
    columns = min(span, _COLUMNS)
    kinds = {"held": row.held, "token": row.positions, "output": row.outputs}
    paths = [
        (kind, _cells({(place - low) * columns // span for place in places}, kind, single=columns == span))
        for kind, places in kinds.items()
    ]
    inside = row.positions or row.held
    where = f"{min(inside)} to {max(inside)}" if len(inside) > 1 else f"at {inside[0]}"
    outputs = f", {count(len(row.outputs), 'output')}" if row.outputs else ""
    held = f", {len(row.held):,} in memory" if row.held else ""
    note = f"{count(len(row.positions), 'token')} {where}{outputs}{held}"
    drawn = strip(columns, 10, paths, f"sequence {seq}: {note}", min(columns * _CELL, 4 * _COLUMNS))
    name = join([str(seq), tag("b", " blamed")]) if blamed else str(seq)
    return _strip_row(name, drawn, note, "blamed" if blamed else "")


def _cells(columns: set[int], kind: str, *, single: bool) -> str:
    """Path data of cells: apart if each is one position, else joined where they touch."""
    top, height = (3.5, 3) if kind == "output" else (0.5, 9)
    if single:
        inset = 0.3 if kind == "output" else 0.06
        return "".join(box(at + inset, top, 1 - 2 * inset, height) for at in sorted(columns))
    runs: list[list[int]] = []
    for at in sorted(columns):
        if runs and runs[-1][1] == at:
            runs[-1][1] = at + 1
        else:
            runs.append([at, at + 1])
    return "".join(box(start, top, end - start, height) for start, end in runs)


def _legend(rows: dict[int, _SequenceRow], blamed: Collection[int]) -> Markup:
    known = [
        ("token", "token", any(row.positions for row in rows.values())),
        ("output", "output asked for", any(row.outputs for row in rows.values())),
        ("held", "in memory before", any(row.held for row in rows.values())),
        ("token blamed", "crashes alone: blamed", any(seq in rows for seq in blamed)),
    ]
    keys = [
        tag(
            "li",
            tag("svg", tag("rect", class_=kind, width="10", height="10"), width=10, height=10),
            " ",
            name,
        )
        for kind, name, seen in known
        if seen
    ]
    return tag("ul", *keys, tag("li", "left to right: position"), class_="legend")


def ladder(report: Report) -> Markup:
    """The rungs as steps downwards, each with what became of every sequence."""
    rungs = [list(steps) for _, steps in groupby(report.ladder[:_STEPS], lambda step: step.rung)]
    if not rungs:
        return EMPTY
    drawn = [_rung(steps, min(depth, 4)) for depth, steps in enumerate(rungs[:_RUNGS])]
    if report.result:
        drawn.append(
            tag("li", tag("span", report.result, class_="result"), class_=f"depth{min(len(rungs), 4)}")
        )
    return tag("ol", *drawn, class_="ladder")


def _rung(steps: Sequence[LadderStep], depth: int) -> Markup:
    same = [list(group) for _, group in groupby(steps, lambda step: step.outcome)]
    chips = [_chip(group) for group in same[:_CHIPS]]
    if len(same) > _CHIPS:
        chips.append(tag("span", f"and {len(same) - _CHIPS} more", class_="quiet"))
    details = list(dict.fromkeys(step.detail for step in steps if step.detail))[:4]
    took = duration(sum(step.ms for step in steps))
    head = (tag("b", text(steps[0].rung, 24)), tag("span", took, class_="quiet"))
    said = [tag("div", text(detail), class_="quiet") for detail in details]
    return tag("li", tag("div", *head, *chips, class_="rung"), *said, class_=f"depth{depth}")


def _chip(steps: Sequence[LadderStep]) -> Markup:
    """What became of some sequences, one after another or together."""
    outcome = steps[0].outcome
    word = "" if outcome is Outcome.OK else f" {outcome.value}"
    shown = _ranges([seq for step in steps for seq in step.sequences])
    title = f"{outcome.value}, {duration(sum(step.ms for step in steps))}"
    return tag("span", f"{_SIGNS[outcome]}{word} {shown}", class_=f"chip {outcome.value}", title=title)


def _ranges(numbers: Sequence[int]) -> str:
    """Sequences in short: "0-7, 12"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers[:_STEPS])):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in runs[:8]]
    return ", ".join(shown) + (", \N{HORIZONTAL ELLIPSIS}" if len(runs) > 8 else "")
