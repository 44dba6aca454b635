"""The same figures as pictures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from benchmarks.rows import Grid, Row

mpl.use("Agg")  # files only: there may be no display
from matplotlib import pyplot as plt

_WIDE = [step * 10.0**decade for decade in range(-4, 4) for step in (1, 2, 5)]  # ticks
_NARROW = [0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.5, 2.0]
_MET, _MISSED = "#2a7f62", "#c0392b"


def draw(out: Path, rows: Sequence[Row], grids: Sequence[Grid]) -> list[Path]:
    """Write the plots for which there are figures; returns their paths."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    found = {grid.group: grid for grid in grids}
    plots: dict[str, Callable[[], Any]] = {
        "aims": lambda: _aims(rows),
        "job": lambda: _job(rows),
        "pools": lambda: _pools(rows),
        "matrix": lambda: _matrix(found["matrix"]) if "matrix" in found else None,
        "step": lambda: _step(found["step"]) if "step" in found else None,
    }
    written = []
    for name, plot in plots.items():
        if (picture := plot()) is not None:
            path = out / f"{name}.png"
            picture.savefig(path, dpi=150, bbox_inches="tight")
            plt.close(picture)
            written.append(path)
    return written


def _aims(rows: Sequence[Row]) -> Any:
    """Each figure over its aim: left of 1 is better than the aim, whichever way the aim points."""
    decided = [row for row in rows if row.aim and row.figure and row.aim.limit and row.figure.median > 0][
        ::-1
    ]
    if not decided:
        return None
    picture, axes = plt.subplots(figsize=(9, 0.8 + 0.24 * len(decided)))
    for place, row in enumerate(decided):
        assert row.aim
        assert row.figure
        found = (max(row.figure.low, row.figure.median / 50), row.figure.median, row.figure.high)
        points = np.array(found) / row.aim.limit
        low, middle, high = np.sort(points if row.aim.sign == "<=" else 1 / points)
        color = _MET if row.met else _MISSED
        axes.plot([low, high], [place, place], color=color, linewidth=2, alpha=0.5)
        axes.plot(middle, place, "o", color=color, markersize=5)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(decided)), [f"{row.group}: {row.name}" for row in decided], fontsize=8)
    low, high = axes.get_xlim()
    ticks = [tick for tick in (_WIDE if high / low > 3 else _NARROW) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("of the aim (left of 1: met), median and spread")
    axes.grid(axis="x", alpha=0.3)
    return picture


def _job(rows: Sequence[Row]) -> Any:
    """Tokens/s of every side, a group of bars for each case."""
    cases: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row.group == "job" and row.data:
            cases[row.name.split(": ", 1)[1]].update(row.data)
    names = {"generate": "Decoder.generate", "run": "crumplezone run", "engine": "same engine, in-process"}
    names |= {"server": "llama.cpp's server", "loop": "llama_cpp.Llama in a loop"}
    return _bars(cases, names, "tokens/s") if cases else None


def _pools(rows: Sequence[Row]) -> Any:
    """One panel for each measurement, with a bar for each library."""
    measured = [row for row in rows if row.group == "pools" and row.data]
    if not measured:
        return None
    picture, panels = plt.subplots(1, len(measured), figsize=(3.2 * len(measured), 2.6), squeeze=False)
    for number, (axes, row) in enumerate(zip(panels[0], measured, strict=True)):
        kinds = list(row.data)[::-1]
        values = [row.data[kind] for kind in kinds]
        colors = [_MET if kind == "cells" else "#9aa5b1" for kind in kinds]
        axes.barh(kinds, values, color=colors)
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 3, max(values) * 6)
        axes.set_title(f"{row.name}, {row.unit}", fontsize=9)
        for place, value in enumerate(values):
            axes.text(value * 1.1, place, f"{value:.3g}", va="center", fontsize=8)
        if number:
            axes.set_yticklabels([])
        if row.aim:
            axes.axvline(row.aim.limit, color="black", linestyle=":", linewidth=1)
    return picture


def _bars(cases: dict[str, dict[str, float]], names: dict[str, str], unit: str) -> Any:
    picture, axes = plt.subplots(figsize=(max(5.0, 1.1 * len(cases) + 2), 4))
    width, colors = 0.8 / len(names), [_MET, "#7fc4a8", "#34495e", "#e08e45", "#b5b5b5"]
    for number, (name, label) in enumerate(names.items()):
        places = [place + (number - len(names) / 2 + 0.5) * width for place in range(len(cases))]
        heights = [case.get(name, 0.0) for case in cases.values()]
        axes.bar(places, heights, width, label=label, color=colors[number])
    labels = [name.replace(", ", "\n").replace(" prefix", "\nprefix") for name in cases]
    axes.set_xticks(range(len(cases)), labels, fontsize=8)
    axes.set_ylabel(unit)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, frameon=False, ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return picture


def _matrix(grid: Grid) -> Any:
    """Two maps for each model: what batching gains, and what supervision costs."""
    quants = list(dict.fromkeys(str(entry["quant"]) for entry in grid.data))
    picture, panels = plt.subplots(
        2, len(quants), figsize=(2.9 * len(quants) + 0.6, 4.8), squeeze=False, layout="constrained"
    )
    for column, quant in enumerate(quants):
        mine = [entry for entry in grid.data if entry["quant"] == quant]
        gains = _map(mine, lambda entry: entry["gain"])
        costs = _map(mine, lambda entry: entry["ratio"])
        _heat(panels[0][column], gains, f"{quant}: batched / one at a time", "PRGn", 3.0)
        _heat(panels[1][column], costs, f"{quant}: supervised / native", "PuOr_r", 1.25)
    return picture


_Map = dict[tuple[int, int], float]


def _map(entries: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> _Map:
    return {(entry["length"], entry["batch"]): value(entry) for entry in entries}


def _heat(axes: Any, values: _Map, title: str, colors: str, most: float) -> None:
    lengths, batches = sorted({key[0] for key in values}), sorted({key[1] for key in values})
    cells = np.array([[values.get((length, batch), np.nan) for batch in batches] for length in lengths])
    axes.imshow(np.log(cells), cmap=colors, vmin=-np.log(most), vmax=np.log(most), aspect="auto")
    for (row, column), value in np.ndenumerate(cells):
        text = "-" if np.isnan(value) else f"{value:.2f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(batches)), batches)
    axes.set_yticks(range(len(lengths)), lengths)
    axes.set_xlabel("batch")
    axes.set_ylabel("length")
    axes.set_title(title, fontsize=9)


def _step(grid: Grid) -> Any:
    """The parts of a step beside the native call, stacked in the order in which they happen."""
    parts = [name for name in grid.data[0] if name not in ("n_seq", "llama_decode", "whole step")]
    picture, axes = plt.subplots(figsize=(9, 1.2 + 0.6 * len(grid.data)))
    colors = plt.get_cmap("tab20")(np.linspace(0, 1, len(parts)))
    for place, entry in enumerate(grid.data):
        left = 0.0
        for color, part in zip(colors, parts, strict=True):
            width = float(entry[part] or 0)
            axes.barh(place, width, left=left, color=color, label=part if place == 0 else None)
            if width > 60:
                axes.text(left + width / 2, place, f"{width:.0f}", ha="center", va="center", fontsize=7)
            left += width
    axes.set_yticks(range(len(grid.data)), [f"{entry['n_seq']:g} x 1 token" for entry in grid.data])
    axes.set_xlabel("microseconds of a supervised step beside llama_decode, medians")
    axes.legend(fontsize=7, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.35))
    return picture
