"""Honest pairs: all sides in turn, in the same run, and the ratio with its spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")
SETTLE = 0.02  # seconds between sides: libgomp's threads of the last one still spin for a moment


@dataclass(frozen=True)
class Box:
    """How long to measure: for so many seconds, but at least and at most so many rounds."""

    seconds: float
    least: int = 3
    most: int = 200


@dataclass(frozen=True)
class Figure:
    """A median with the quartiles that it lies between (of few values: their minimum and maximum)."""

    median: float
    low: float
    high: float


def figure(values: Sequence[float]) -> Figure:
    """The median of some values, and their spread."""
    if len(values) < 4:
        return Figure(statistics.median(values), min(values), max(values))
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Figure(median, low, high)


def one(value: float) -> Figure:
    """A figure that was measured once."""
    return Figure(value, value, value)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Figure:
    """Of the ratios round by round, which no drift can shift or widen."""
    return figure([a / b for a, b in zip(ours, theirs, strict=True)])


def alternate(sides: Sequence[Callable[[], _T]], box: Box) -> list[list[_T]]:
    """Run all sides in turn, each round in the reverse order of the last; returns each side's figures.

    Args:
        sides: Each runs once and returns what it measured itself.
        box: How many rounds.
    """
    figures: list[list[_T]] = [[] for _ in sides]
    end = time.monotonic() + box.seconds
    for number in range(box.most):
        if number >= box.least and time.monotonic() > end:
            break
        order = range(len(sides)) if number % 2 else reversed(range(len(sides)))
        for place in order:
            time.sleep(SETTLE)
            figures[place].append(sides[place]())
    return figures
