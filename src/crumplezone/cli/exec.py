"""``crumplezone exec``: run a program armed and supervised."""

from __future__ import annotations

from typing import Annotated

import typer

from crumplezone.cli.output import Reports, open_store


def execute(
    command: Annotated[list[str], typer.Argument(metavar="-- PROGRAM [ARGUMENTS]...", show_default=False)],
    timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds until it is ended, with its children.")
    ] = None,
    memory: Annotated[
        int | None, typer.Option(min=1, help="MiB of resident memory above which a Python of it is ended.")
    ] = None,
    reports: Reports = None,
) -> None:
    """Run a Python program as it is; if it crashes, hold it, examine it and report it.

    Input, output, arguments, directory and exit status are the program's own (128 + n after signal n).
    """
    from crumplezone.diagnostics.exec.run import ProgramLimits, run

    limits = ProgramLimits(timeout, memory << 20 if memory else None)
    raise typer.Exit(run(command, limits, open_store(reports).directory))
