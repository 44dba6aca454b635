"""``crumplezone ci``: run a matrix of cases; tell the terminal, a directory and GitHub what broke."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from crumplezone.cli.output import is_quiet
from crumplezone.errors import InputError
from crumplezone.reports.formats import summary
from crumplezone.reports.printable import printable
from crumplezone.reports.records.run import CaseRecord, Ending, News, RunRecord, grouped

if TYPE_CHECKING:
    from crumplezone.diagnostics.ci.run import Watch

_MAX_GROUPS = 64  # failures that the terminal is told of in the end; index.html has more


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
    from crumplezone.diagnostics.ci import matrix as matrices
    from crumplezone.diagnostics.ci import run as diagnostic
    from crumplezone.sandbox.process.cgroup import available_memory
    from crumplezone.workers.model.file import embedded_model

    if update_baseline and baseline is None:
        raise InputError("--update-baseline", True, "needs --baseline FILE.json, the file that it writes")
    every = matrices.plan(
        matrices.read(matrix) if matrix else matrices.default(), model or [embedded_model()]
    )
    chosen = matrices.choose(every, only, shard)
    memory = available_memory() // jobs
    job = diagnostic.Job(chosen, out, baseline, update_baseline, shard, resume, jobs, memory)
    try:
        with _interrupted_by_sigterm(), _progress(len(chosen)) as watch:
            run = diagnostic.run(job, watch)
    except KeyboardInterrupt:  # before the first case, after the last, or while the results are written
        _echo("crumplezone: interrupted; the same command with --resume goes on.", err=True)
        raise typer.Exit(diagnostic.INTERRUPTED) from None
    _tell(run, out)
    _tell_github(run)
    raise typer.Exit(diagnostic.exit_code(run, update=update_baseline))


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """By SIGTERM a CI system ends a job that takes too long; then it takes what lies there."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
        disable=is_quiet() or not console.is_terminal,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as progress:
        task = progress.add_task("cases", total=total)

        def watch(case: CaseRecord) -> None:
            if is_quiet():
                return
            if not console.is_terminal:
                _echo(_line(case), err=True)
            elif case.ending is not Ending.PASS:
                console.print(_line(case), markup=False)
            progress.advance(task)

        yield watch


def _line(case: CaseRecord) -> str:
    """One case, in one line."""
    news = case.news.value if case.news in {News.NEW, News.KNOWN, News.FIXED} else ""
    cause = case.detail and f": {case.detail}"
    said = f"{case.ending.value:8} {news:5} {case.ms / 1000:5.1f} s  {case.id}{cause}"
    return printable(said)


def _tell(run: RunRecord, out: Path) -> None:
    """The judgement, each new failure and each fixed one, and where to read more."""
    lines = [summary.headline(run)]
    groups = grouped(case for case in run.cases if case.news in {News.NEW, News.UNKNOWN})
    for group in groups[:_MAX_GROUPS]:
        first, more = group[0], f" and {len(group) - 1} more" if len(group) > 1 else ""
        report = f"; report {first.report}" if first.report else ""
        kind = "new" if first.news is News.NEW else "not known"
        lines.append(f"{kind}: {first.ending.value}: {first.id}{more}: {first.detail}{report}")
    lines += [f"and {len(groups) - _MAX_GROUPS} more"] if len(groups) > _MAX_GROUPS else []
    lines += [f"fixed: {fixed.title}: {', '.join(fixed.cases)}" for fixed in run.fixed[:_MAX_GROUPS]]
    lines.append(f"results: {out}/index.html")
    if not run.complete:
        lines.append(
            f"{len(run.cases)} of {run.planned} cases are kept: the same command with --resume goes on"
        )
    _echo("\n".join(map(printable, lines)))


def _tell_github(run: RunRecord) -> None:
    """Annotations on stdout, and the summary of the job, where GitHub asks for them."""
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in summary.annotations(run):
            _echo(line)
    if path := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with open(path, "a", encoding="utf-8", opener=_at_once) as file:
                file.write(summary.render(run))
        except OSError as error:  # the run itself is not at fault
            said = f"GITHUB_STEP_SUMMARY {path} cannot be written: {error.strerror}"
            _echo(printable(said), err=True)


def _at_once(path: str, flags: int) -> int:
    """A pipe that nobody reads is an error, and not waited for (fifo(7))."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def _echo(text: str, *, err: bool = False) -> None:
    """Say it. If nobody reads it any more, the run goes on, and its exit code stays what it is."""
    try:
        typer.echo(text, err=err)
    except BrokenPipeError:  # what is still buffered must not fail again when the interpreter ends
        with open(os.devnull, "w") as nobody:
            os.dup2(nobody.fileno(), 2 if err else 1)
