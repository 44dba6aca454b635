"""The table on the terminal, and the same as JSON."""

from __future__ import annotations

import datetime as dt
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.rows import Grid, Row

_PACKAGES = ("llama-cpp-python", "xllamacpp", "loky", "pebble", "numpy")
_DIGITS = {"x": 3, "us": 1, "ms": 2, "MiB": 1, "": 0}


class Machine(msgspec.Struct):
    """Where a run was made."""

    when: str
    processor: str
    cores: int
    memory_gib: float
    system: str
    python: str
    packages: dict[str, str]
    load_before: float  # of one minute; well below 1 for a run that is to decide anything


def machine() -> Machine:
    """This one, now."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")]
    return Machine(
        when=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        processor=models[0] if models else platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(pages / 2**30, 1),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        packages={name: _version(name) for name in _PACKAGES},
        load_before=round(os.getloadavg()[0], 2),
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _number(value: float, unit: str) -> str:
    return f"{value:.{_DIGITS[unit]}f}"


def measured(row: Row) -> str:
    """The figure with its unit."""
    if row.figure is None:
        return "-"
    return f"{_number(row.figure.median, row.unit)} {row.unit}".rstrip()


def spread(row: Row) -> str:
    """From where to where the figure went."""
    if row.figure is None or row.figure.low == row.figure.high:
        return ""
    return f"{_number(row.figure.low, row.unit)}-{_number(row.figure.high, row.unit)}"


def aim(row: Row) -> str:
    """What is wanted, in the row's unit."""
    return f"{row.aim.sign} {row.aim.limit:g} {row.unit}".rstrip() if row.aim else ""


def verdict(row: Row) -> str:
    """Met, MISSED, or nothing where there is nothing to decide."""
    if row.figure is None:
        return "not run"
    return {True: "met", False: "MISSED", None: ""}[row.met]


def table(rows: Sequence[Row]) -> Table:
    """All rows, aim and measured side by side."""
    shown = Table(title="Aims and measurements", title_justify="left")
    for name in ("group", "what", "aim", "measured", "spread", "", "absolute, and what to know"):
        shown.add_column(name, overflow="fold", no_wrap=name in ("aim", "measured", "spread"))
    group = ""
    for row in rows:
        if row.group != group:
            shown.add_section()
        style = {"MISSED": "bold red", "met": "green", "not run": "yellow"}.get(verdict(row), "")
        cells = [row.group if row.group != group else "", row.name, aim(row), measured(row), spread(row)]
        shown.add_row(*cells, Text(verdict(row), style), Text(row.note, "dim"))
        group = row.group
    return shown


def grid_table(grid: Grid) -> Table:
    """One grid."""
    shown = Table(*grid.columns, title=grid.title, title_justify="left")
    for line in grid.lines:
        shown.add_row(*line)
    return shown


def write_json(path: Path, where: Machine, rows: Sequence[Row], grids: Sequence[Grid]) -> None:
    """Everything, for a program."""
    lines = [{**msgspec.to_builtins(row), "met": row.met} for row in rows]
    content = {"machine": where, "rows": lines, "grids": grids}
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1))


def print_all(console: Console, where: Machine, rows: Sequence[Row], grids: Sequence[Grid]) -> None:
    """The table, then the grids."""
    packages = ", ".join(f"{name} {found}" for name, found in where.packages.items())
    console.print(
        f"{where.when}: {where.processor}, {where.cores} cores, {where.memory_gib} GiB, {where.system}, "
        f"Python {where.python}, load {where.load_before}; {packages}",
        highlight=False,
    )
    console.print(table(rows))
    for grid in grids:
        console.print(grid_table(grid))
    verdicts = [verdict(row) for row in rows]
    counted = {name: verdicts.count(name) for name in ("met", "MISSED", "not run")}
    console.print(", ".join(f"{count} {name}" for name, count in counted.items()), highlight=False)
