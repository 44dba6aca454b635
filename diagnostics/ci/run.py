"""A diagnostic run: the cases of a matrix, each in fresh cells, judged against a baseline."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from crumplezone.diagnostics.ci import baseline
from crumplezone.diagnostics.ci.baseline import Baseline
from crumplezone.diagnostics.ci.case import Case
from crumplezone.diagnostics.ci.output import Output
from crumplezone.diagnostics.ci.pool import run_all
from crumplezone.errors import CrumplezoneError
from crumplezone.reports.records.report import Environment, ModelRecord
from crumplezone.reports.records.run import CaseRecord, News, RunRecord
from crumplezone.workers.cells.decode_client import DecodeClient
from crumplezone.workers.incidents.environment import environment
from crumplezone.workers.model.file import describe
from crumplezone.workers.model.limits import Limits
from crumplezone.workers.model.settings import configure

AS_EXPECTED, NEW_FAILURES, INFRASTRUCTURE, INTERRUPTED = 0, 1, 3, 130

Watch = Callable[[CaseRecord], None]


@dataclass(frozen=True)
class Job:
    """What a run is to do.

    Attributes:
        cases: In the order in which they are begun.
        out: Its directory.
        baseline: What is known to fail, or None.
        update: Have the baseline, which may be a new file, expect what this run shows, if it is complete.
        shard: What part of the matrix this is, for the record.
        resume: Go on with the run that was interrupted in this directory.
        jobs: How many cases run at once.
        memory: Bytes of resident memory of one cell where the matrix has no limit; None: no limit there.
    """

    cases: Sequence[Case]
    out: Path
    baseline: Path | None = None
    update: bool = False
    shard: str = ""
    resume: bool = False
    jobs: int = 1
    memory: int | None = None


def run(job: Job, watch: Watch) -> RunRecord:
    """Run the cases and write the directory.

    ctrl-C ends it early: the record is then not complete, and holds what was finished.

    Args:
        job: What is to be done.
        watch: Called with each case, as it ends, with those first that an interrupted run had finished.

    Raises:
        InputError: The baseline cannot be used, or the directory cannot be written.
        CrumplezoneError: The machine has no process for it.
    """
    expected = baseline.read(job.baseline, missing_ok=job.update) if job.baseline else Baseline()
    if job.update and job.baseline:
        baseline.check_writable(job.baseline)
    begun = RunRecord(_now(), len(job.cases), shard=job.shard, baseline=_text(job.baseline))
    output = Output(job.out, begun, digest(job), resume=job.resume)
    with contextlib.closing(output), _logged(output.log):
        begun = msgspec.structs.replace(begun, started_at=output.started_at)
        ended, complete = _run_cases(job, output, expected, watch)
        records = expected.resolved([ended[case.id] for case in job.cases if case.id in ended])
        models, place = _describe(job) if complete else ([], environment(None))
        record = msgspec.structs.replace(
            begun,
            cases=records,
            ended_at=_now(),
            complete=complete,
            models=models,
            environment=place,
            fixed=expected.fixed(records),
        )
        output.render(record, output.reports(record))
    if job.update and job.baseline and complete:
        baseline.write(job.baseline, expected.updated(records))
    return record


def exit_code(run: RunRecord, *, update: bool) -> int:
    """What `crumplezone ci` exits with. What a baseline was just updated with is not new."""
    news = {case.news for case in run.cases}
    if not run.complete:
        return INTERRUPTED
    if News.NEW in news and not update:
        return NEW_FAILURES
    return INFRASTRUCTURE if News.UNKNOWN in news else AS_EXPECTED


def digest(job: Job) -> str:
    """Of what the results depend on: two runs of one digest may share them.

    Without `Job.memory`, which is what the machine has free just then.
    """
    files = {case.model: _stamp(case.model) for case in job.cases}
    cases = [[case.id, str(case.model), case.shape, case.deadline, case.memory] for case in job.cases]
    versions = environment(None).versions
    plan = [cases, sorted(files.values()), versions]
    return hashlib.sha256(json.dumps(msgspec.to_builtins(plan)).encode()).hexdigest()


def _stamp(model: Path) -> list[int]:
    try:
        found = model.stat()
    except OSError:  # its cases will say so
        return []
    return [found.st_size, found.st_mtime_ns]


def _run_cases(
    job: Job, output: Output, expected: Baseline, watch: Watch
) -> tuple[dict[str, CaseRecord], bool]:
    """The records by id, and whether all are there."""
    ended: dict[str, CaseRecord] = {}

    def end(record: CaseRecord) -> None:
        ended[record.id] = judged = msgspec.structs.replace(record, news=expected.judge(record))
        watch(judged)

    for case in job.cases:
        if case.id in output.done:
            end(output.done[case.id])
    todo = [
        msgspec.structs.replace(case, memory=case.memory or job.memory)
        for case in job.cases
        if case.id not in ended
    ]
    running = run_all(todo, job.jobs, output.store.directory, output.log)
    try:
        with contextlib.closing(running):
            for record in running:
                output.append(record)
                end(record)
    except KeyboardInterrupt:
        return ended, False
    return ended, True


def _describe(job: Job) -> tuple[list[ModelRecord], Environment]:
    """The models, and llama.cpp as a cell that has loaded one of them shows it."""
    models, found = [], environment(None)
    for path, case in {case.model: case for case in job.cases}.items():
        description = ""
        with contextlib.suppress(CrumplezoneError):  # its cases tell why
            config = configure(path, n_ctx=1, n_batch=1, n_threads=1)
            limits = Limits(case.deadline, case.memory or job.memory)
            with contextlib.closing(DecodeClient(config, limits, reporter=None)) as runner:
                description = runner.info.description
                found = environment(runner.info)
        models.append(describe(str(path), description))
    return models, found


@contextlib.contextmanager
def _logged(log: logging.Handler) -> Iterator[None]:
    """Have this process's records in the log of the run, too."""
    root = logging.getLogger()
    root.addHandler(log)
    try:
        yield
    finally:
        root.removeHandler(log)


def _text(path: Path | None) -> str:
    """A path may be no UTF-8, but what names it must be."""
    return os.fsencode(path).decode(errors="replace") if path else ""


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
