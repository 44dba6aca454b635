"""`make bench`: every aim beside what was measured. One table, JSON beside it, plots as PNG.

Run it on an idle machine: a spread wider than the distance to the aim means that the run cannot decide.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from benchmarks import plots, show
from benchmarks.rows import Grid, Plan, Row, Yield

GROUPS = ("overhead", "step", "job", "matrix", "pools", "recovery", "evidence", "memory")
HERE = Path(__file__).parent
_PIPE_WIDTH = 150  # columns, where there is no terminal to ask


def main() -> int:
    """Measure, print and write; 130 if it was interrupted."""
    plan, groups = _options()
    logging.getLogger("crumplezone").setLevel(logging.CRITICAL)  # crashes are the subject
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that everything started is ended
    console, where = Console(stderr=True), show.machine()
    done: list[Yield] = []
    status = 0
    try:
        for group in groups:
            with console.status(f"{group} ..."):
                start = time.monotonic()
                done += _measure(group, plan)
                console.print(f"{group}: {time.monotonic() - start:.0f} s", style="dim")
    except KeyboardInterrupt:
        console.print("interrupted: what there is so far")
        status = 130
    rows = [each for each in done if isinstance(each, Row)]
    grids = [each for each in done if isinstance(each, Grid)]
    plan.out.mkdir(parents=True, exist_ok=True)
    show.write_json(plan.out / "bench.json", where, rows, grids)
    pictures = plots.draw(plan.out, rows, grids)
    out = Console()
    show.print_all(out if out.is_terminal else Console(width=_PIPE_WIDTH), where, rows, grids)
    console.print(f"written: {', '.join(str(path) for path in [plan.out / 'bench.json', *pictures])}")
    return status


def _measure(group: str, plan: Plan) -> Iterator[Yield]:
    """What a group yields; a failure ends the group and becomes a row."""
    try:
        yield from importlib.import_module(f"benchmarks.{group}").rows(plan)
    except Exception as error:  # noqa: BLE001 - shown in the table, and the other groups go on
        yield Row(group, "the rest of this group", None, "", note=f"{type(error).__name__}: {error}")


def _options() -> tuple[Plan, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.add_argument("--only", action="append", choices=GROUPS, help="only this group; may be repeated")
    parser.add_argument("--quick", action="store_true", help="a few minutes: wide spreads, no verdict")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="default: %(default)s")
    options = parser.parse_args()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crumplezone" / "bench"
    plan = Plan(options.quick, options.out, cache, len(os.sched_getaffinity(0)))
    return plan, options.only or list(GROUPS)


if __name__ == "__main__":
    sys.exit(main())
