"""``crumplezone ci``: run a matrix of cases; tell the terminal, a directory and GitHub what broke."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from crumplezone.errors import InputError
from crumplezone.reports import summary
from crumplezone.reports.runs import CaseRecord, Ending, News, RunRecord, grouped
from crumplezone.reports.text import printable

if TYPE_CHECKING:
    from crumplezone.diagnostics.case import Case
    from crumplezone.diagnostics.ci import Watch
    from crumplezone.diagnostics.matrix import Matrix


def ci(
    matrix: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml", help="The cases. [default: the reference matrix]", show_default=False
        ),
    ] = None,
    model: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="GGUF file; may be repeated. [default: the embedded SmolLM2]",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the results go.")] = Path("crumplezone-ci"),
    baseline: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="What is known to fail.", show_default=False)
    ] = None,
    update_baseline: Annotated[
        bool, typer.Option("--update-baseline", help="Have the baseline expect what this run shows.")
    ] = False,
    shard: Annotated[str, typer.Option(metavar="I/N", help="Only every Nth case, from the Ith on.")] = "",
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run that was interrupted in DIR, if there is one."),
    ] = False,
    only: Annotated[
        str, typer.Option(metavar="PATTERN", help="Only cases with this in their id; * and ? as in a shell.")
    ] = "",
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Cases that run at once.")] = 1,
) -> None:
    """Find the batch shapes that llama.cpp breaks on, each tried in a cell of its own.

    Exit codes: 0 as expected; 1 new failures; 2 bad usage or input; 3 the machine or a model failed, and
    nothing else is new; 130 interrupted (--resume goes on).
    """
    from crumplezone.diagnostics import ci as diagnostic
    from crumplezone.diagnostics import matrix as matrices

    if update_baseline and baseline is None:
        raise InputError("--update-baseline", True, "needs --baseline FILE.json, the file that it writes")
    chosen = matrices.choose(
        _cases(matrices.read(matrix) if matrix else matrices.default(), model, jobs), only, shard
    )
    job = diagnostic.Job(chosen, out, baseline, update_baseline, shard, resume, jobs)
    with _progress(len(chosen)) as watch:
        run = diagnostic.run(job, watch)
    _tell(run, out)
    _tell_github(run)
    raise typer.Exit(diagnostic.exit_code(run, update=update_baseline))


def _cases(matrix: Matrix, models: list[Path] | None, jobs: int) -> list[Case]:
    import psutil

    from crumplezone.diagnostics.matrix import plan
    from crumplezone.workers.model import embedded_model

    return plan(matrix, models or [embedded_model()], psutil.virtual_memory().available // jobs)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Watch]:
    """A bar on a terminal, with the failures above it; else a line for each case."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Nothing redirected: a forked runner that ends would flush into the parent's console.
    with Progress(
        *columns,
        console=console,
        disable=not console.is_terminal,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as progress:
        task = progress.add_task("cases", total=total)

        def watch(case: CaseRecord) -> None:
            if case.ending is not Ending.PASS or not console.is_terminal:
                console.print(_line(case), markup=False)
            progress.advance(task)

        yield watch


def _line(case: CaseRecord) -> str:
    """One case, in one line."""
    news = case.news.value if case.news in {News.NEW, News.KNOWN, News.FIXED} else ""
    cause = case.signature.title if case.signature else case.detail
    said = f"{case.ending.value:8} {news:5} {case.ms / 1000:5.1f} s  {case.id}{cause and f': {cause}'}"
    return printable(said)


def _tell(run: RunRecord, out: Path) -> None:
    """The judgement, each new failure and each fixed one, and where to read more."""
    lines = [summary.headline(run)]
    for group in grouped(case for case in run.cases if case.news in {News.NEW, News.UNKNOWN}):
        first, more = group[0], f" and {len(group) - 1} more" if len(group) > 1 else ""
        cause = first.signature.title if first.signature else first.detail
        report = f"; report {first.report}" if first.report else ""
        kind = "new" if first.news is News.NEW else "not known"
        lines.append(f"{kind}: {first.ending.value}: {first.id}{more}: {cause}{report}")
    lines += [f"fixed: {fixed.title}: {', '.join(fixed.cases)}" for fixed in run.fixed]
    lines.append(f"results: {out}/index.html")
    if not run.complete:
        lines.append(
            f"{len(run.cases)} of {run.planned} cases are kept: the same command with --resume goes on"
        )
    typer.echo("\n".join(map(printable, lines)))


def _tell_github(run: RunRecord) -> None:
    """Annotations on stdout, and the summary of the job, where GitHub asks for them."""
    if os.environ.get("GITHUB_ACTIONS") == "true":
        typer.echo("".join(f"{line}\n" for line in summary.annotations(run)), nl=False)
    if path := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(summary.render(run))
        except OSError as error:  # the run itself is not at fault
            said = f"GITHUB_STEP_SUMMARY {path} cannot be written: {error.strerror}"
            typer.echo(printable(said), err=True)
