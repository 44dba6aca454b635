"""Cases of a diagnostic run."""

from __future__ import annotations

from pathlib import Path

from crumplezone.diagnostics.ci.case import Case
from crumplezone.reports.records.run import Shape


def some(count: int) -> list[Case]:
    return [Case(f"case {n}", Path("m.gguf"), Shape(tokens=n)) for n in range(1, count + 1)]
