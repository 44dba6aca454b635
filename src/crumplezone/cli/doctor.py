"""``crumplezone doctor``: what this machine allows, and what each lack costs."""

from __future__ import annotations

from pathlib import Path

import msgspec
import typer

from crumplezone.cli.output import print_json
from crumplezone.diagnostics.doctor.check import Check, State
from crumplezone.diagnostics.doctor.doctor import examine, lacking
from crumplezone.reports.printable import printable


def show(model: Path | None, reports: Path | None, *, as_json: bool) -> bool:
    """Print every check; returns whether anything is lacking that costs evidence or work."""
    checks = examine(model, reports)
    if as_json:
        print_json({"lacking": lacking(checks), "checks": msgspec.to_builtins(checks)})
        return lacking(checks)
    width = max(len(check.name) for check in checks)
    for check in checks:
        typer.echo("\n".join(_lines(check, width)))
    missing = sum(check.state is State.LACK and bool(check.costs) for check in checks)
    typer.echo(f"{missing} of {len(checks)} lack something." if missing else "Nothing is lacking.")
    return lacking(checks)


def _lines(check: Check, width: int) -> list[str]:
    indent = " " * (width + 10)
    lines = [f"{check.state.value:<8}{printable(check.name):<{width}}  {printable(check.found)}"]
    if check.costs:
        lines.append(f"{indent}costs:  {printable(check.costs)}")
    if check.remedy:
        lines.append(f"{indent}remedy: {printable(check.remedy)}")
    return lines
