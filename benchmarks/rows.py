"""What a benchmark yields: rows with an aim beside the measured figure, and grids of plain figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.pairing import Box, Figure

Unit = Literal["x", "us", "ms", "MiB", ""]


@dataclass(frozen=True)
class Aim:
    """What is wanted of a figure, in the row's own unit."""

    sign: Literal["<=", ">="]
    limit: float

    def met(self, value: float) -> bool:
        """Whether a figure is as wanted."""
        return value <= self.limit if self.sign == "<=" else value >= self.limit


TRIVIAL_CALL = Aim("<=", 60)  # us, control round trip
PAYLOAD = Aim("<=", 0.25)  # ms, 600 kB result
OVERHEAD = Aim("<=", 1.015)  # supervised / in-process, where a call takes 5 ms or more
OVERHEAD_FROM_MS = 5.0
JOB_ENGINE = Aim(">=", 0.99)  # tokens/s against the same engine in-process
JOB_SERVER = Aim(">=", 1.0)
JOB_LLAMA = Aim(">=", 1.0)  # against llama_cpp.Llama in a loop, at any width
JOB_LLAMA_WIDE = Aim(">=", 3.5)  # ... on Q4_0 and F16 at 16 sequences
CRASH = Aim("<=", 3)  # ms, SIGSEGV to exception
NEXT_RESULT = Aim("<=", 10)  # ms, SIGSEGV to next result with a spare, less the decode itself
STREAM_GAP = Aim("<=", 50)  # ms, of a Llama's stream with a spare, less what is computed again
HANG = Aim("<=", 50)  # ms past the limit
NONE = Aim("<=", 0)  # innocents lost, calls that notice a killed idle worker, orphans
FURTHER_CELL = Aim("<=", 1.0)  # its PSS / its KV cache, compute and output buffers


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        group: The part of the benchmark.
        name: What was measured.
        figure: Median and spread; None if it could not be measured, and ``note`` says why.
        unit: Of the figure and the aim; "x" for ratios.
        aim: What is wanted, or None for what is only shown for comparison.
        note: Absolute figures, as colour, and what differs between the sides.
        data: The absolute figures of each side, for the JSON and the plots.
    """

    group: str
    name: str
    figure: Figure | None
    unit: Unit
    aim: Aim | None = None
    note: str = ""
    data: dict[str, float] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the aim is met; None if there is none, or no figure."""
        return self.aim.met(self.figure.median) if self.aim and self.figure else None


@dataclass(frozen=True)
class Grid:
    """Figures with more than one dimension: printed below the table, drawn as a picture, kept in the JSON."""

    group: str
    title: str
    columns: list[str]
    lines: list[list[str]]
    data: list[dict[str, float | str | None]] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """How to run.

    Attributes:
        quick: A few minutes in all: fewer shapes and rounds, so wide spreads.
        out: Where results go.
        cache: Where models are kept that are made from the embedded one.
        threads: Compute threads of every side.
    """

    quick: bool
    out: Path
    cache: Path
    threads: int

    def box(self, seconds: float, least: int = 3, most: int = 200) -> Box:
        """The time for one row; a quick run takes a tenth, and two rounds at least."""
        return Box(seconds / 10, min(2, least), most) if self.quick else Box(seconds, least, most)


Yield = Row | Grid
