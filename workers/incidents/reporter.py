"""From incidents to reports: what one job met on its way down the ladder, written beside the caller."""

from __future__ import annotations

import atexit
import datetime as dt
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from crumplezone.errors import ReportError
from crumplezone.reports.analysis.redact import redact
from crumplezone.reports.analysis.signature import sign
from crumplezone.reports.analysis.verdict import from_exit, from_ladder
from crumplezone.reports.formats import text
from crumplezone.reports.records.report import (
    BatchRecord,
    Environment,
    Evidence,
    Exit,
    Outcome,
    Report,
    Verdict,
)
from crumplezone.reports.store.redaction_key import redaction_key
from crumplezone.reports.store.retention import DEFAULT_RETENTION
from crumplezone.reports.store.store import Store, new_id
from crumplezone.reports.store.storm import Storm
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.host.errands import DELIVERY, BesideLog, Errands
from crumplezone.workers.incidents.blame import Blame
from crumplezone.workers.incidents.environment import environment
from crumplezone.workers.incidents.job import JobRecord, _Crash
from crumplezone.workers.model import file as model
from crumplezone.workers.observe.observer import Observer
from crumplezone.workers.protocol.config import CellConfig, CellInfo

_PRUNE_EVERY = 64  # reports
_KEPT = 2.0  # seconds: who ends our children first, and then us, does so within them
_EXIT_MAX = 20.0  # seconds for the last reports of a program that ends
_GOES_ON = "the job goes on"
_OF_THE_JOB = ("ladder", "result", "blamed", "verdict")
_OF_THE_CELL = ("context", "model", "environment")

_log = BesideLog(logging.getLogger("crumplezone"))


def _outside(evidence: Evidence) -> Environment:
    """That of a program, which may have another Python and llama.cpp than this process."""
    here = environment(None)
    versions = {name: here.versions[name] for name in ("crumplezone", "kernel")}
    library = next((each.path for each in evidence.maps if "/llama_cpp/lib/libllama.so" in each.path), None)
    if library:
        for found in Path(library).parents[2].glob("llama_cpp_python-*.dist-info"):
            versions["llama-cpp-python"] = found.name.removesuffix(".dist-info").partition("-")[2]
    return msgspec.structs.replace(here, versions=versions)


class Reporter:
    """Writes reports on a thread of its own, in order, signed and with the ladder's verdict.

    A report is written as soon as its evidence is there, and again when its job has ended: who kills this
    process meanwhile loses none. They are written until this process ends, be its main thread done or not.

    Who ends this process may end its children first. So what was killed while nothing was asked of it is
    reported a little later, unless this process has ended, or closes this, by then.

    Args:
        directory: The report store.
        redacted: Whether to keep tokens, prompt text and paths out of the reports.

    Attributes:
        blame: The prompts that are known to crash alone.
        observer: Told of crashes and of reports; what else happens is told to it by whoever has this.
    """

    def __init__(self, directory: Path, *, redacted: bool = False) -> None:
        self.store = Store(directory)
        self.blame = Blame(self.store)
        self._redacted = redacted
        self._storm = Storm(self.store.has)
        self._written = 0
        self._errands = Errands("reporter")
        self.observer = Observer()
        self._closed = False
        _reporters.add(self)

    def add(
        self,
        case: JobRecord,
        incident: Incident,
        rung: str,
        batch: BatchRecord | None,
        config: CellConfig | None = None,
        info: CellInfo | None = None,
        command: Sequence[str] = (),
    ) -> str:
        """Note a crash in a case; returns where its report will be.

        Args:
            case: The job.
            incident: The crash.
            rung: That crashed.
            batch: What it was decoding.
            config: Of the cell that crashed; None: the case's, as given to `file`.
            info: Likewise.
            command: The arguments of a program that crashed; it has neither batch nor config.
        """
        crash = self._noted(case, incident, rung, config)
        crash.batch, crash.info, crash.command = batch, info, command
        self._submit(logging.DEBUG, self._begin, crash, case)
        return crash.path

    def file_lone(
        self,
        incident: Incident,
        doing: str,
        result: str,
        config: CellConfig,
        info: CellInfo | None,
        sequences: Sequence[int] = (),
    ) -> str:
        """Report a crash outside any batch (loading, tokenising); returns where its report will be."""
        case = JobRecord(result=result)
        case.step("native", Outcome.CRASHED, list(sequences), doing)
        path = self.add(case, incident, "native", None, config, info)
        self.file(case, config, info)
        return path

    def file_unasked(self, incident: Incident, doing: str, result: str, config: CellConfig) -> None:
        """Report the death of a process that had no job: in a while, if somebody killed it."""
        case = JobRecord(result=result, ended=True)
        case.step("native", Outcome.CRASHED, [], doing)
        crash = self._noted(case, incident, "native", config)
        # Not waited for, even where this process ends: this may be the thread whose autopsy it awaits.
        self._errands.put(partial(_told, logging.ERROR, self._end_unasked, crash, case))

    def file_program(self, incident: Incident, command: Sequence[str]) -> str:
        """Report the crash of a program that is no cell; returns where its report will be."""
        case = JobRecord()
        path = self.add(case, incident, "native", None, command=command)
        self.file(case, None, None)
        return path

    def file(
        self, case: JobRecord, config: CellConfig | None, info: CellInfo | None, *, failed: bool = False
    ) -> None:
        """Hand over a case that has ended.

        Args:
            case: The job.
            config: For the crashes that were added without one.
            info: Likewise.
            failed: Whether its caller gets an error. That may name a report, so it comes after all of them.
        """
        case.ended = True
        for crash in case.crashes:
            crash.config, crash.info = crash.config or config, crash.info or info
            self._submit(logging.ERROR, self._end, crash, case)
        if failed:
            self.flush()

    def flush(self, *, kept: bool = False) -> None:
        """Wait until every report handed over is on disk (or has failed). Not in the thread that writes them.

        Args:
            kept: Also those of what was killed while nothing was asked of it.
        """
        self._errands.wait()
        if kept:
            self._errands.hurry()
            self._errands.wait()

    def written(self, path: str | None) -> str | None:
        """The path of a report, for an error to name, once it is there; None if it could not be written."""
        if path is not None:
            self.flush()
        return self.there(path)

    def there(self, path: str | None) -> str | None:
        """As `written`, of what nobody waits for: None if it is not there yet, too."""
        return path if path and self.store.has(Path(path).name) else None

    def tell(self, told: Callable[[], object]) -> None:
        """Call something when all that was handed over is on disk, or has failed; it must not wait."""
        self._errands.put(told)

    def close(self) -> None:
        """Write what is left, and end the thread. Log records are waited for, but not for long."""
        self._closed = True
        self._errands.end()
        self.observer.close()
        DELIVERY.wait()

    def leave(self, seconds: float) -> None:
        """The interpreter ends: as `close`, within so many seconds."""
        self._closed = True
        self._errands.drop()
        self._errands.wait(seconds)

    def _noted(self, case: JobRecord, incident: Incident, rung: str, config: CellConfig | None) -> _Crash:
        report_id = new_id(incident.crashed_at)
        path = str(self.store.path(report_id))
        crash = _Crash(report_id, incident, rung, None, config, None, path)
        case.crashes.append(crash)
        self.observer.lost(path)
        return crash

    def _submit(
        self, level: int, write: Callable[[_Crash, JobRecord], None], crash: _Crash, case: JobRecord
    ) -> None:
        self._errands.put(partial(_told, level, write, crash, case))
        if _ending.is_set():  # nobody else waits for it any more
            self._errands.wait(_EXIT_MAX)

    def _end_unasked(self, crash: _Crash, case: JobRecord) -> None:
        if not _killed(crash):
            self._end(crash, case)
        elif not self._closed:
            self._errands.keep(partial(_told, logging.ERROR, self._end, crash, case), _KEPT)

    def _begin(self, crash: _Crash, case: JobRecord) -> None:
        crash.incident.evidence.result()
        if not case.ended and not _dropped(crash):  # else all of it is written at once
            report = _compose(crash, JobRecord(steps=list(case.steps), result=_GOES_ON))
            self._write(self._finish(report, from_exit(report)))

    def _end(self, crash: _Crash, case: JobRecord) -> None:
        if _dropped(crash):
            return
        report = _compose(crash, case)
        report = self._finish(report, from_ladder(report))
        self.observer.explained(report.evidence.exit)
        report = self._update(report) if self.store.has(crash.id) else self._write(report)
        _log.warning("%s Report: %s", text.summary(report), crash.path)
        self.observer.written(report, crash.path)

    def _write(self, report: Report) -> Report:
        report = self._storm.admit(report)
        self.store.write(report, text.render(report))
        self._storm.count(report)
        if self._written % _PRUNE_EVERY == 0:
            self._prune()
        self._written += 1
        return report

    def _update(self, report: Report) -> Report:
        """Add what the rest of the job has shown to a report that is written."""
        known = self.store.read(report.id)
        fields = _OF_THE_JOB if known.same_as else _OF_THE_JOB + _OF_THE_CELL
        report = msgspec.structs.replace(known, **{name: getattr(report, name) for name in fields})
        self.store.update(report)
        return report

    def _finish(self, report: Report, verdict: Verdict | None) -> Report:
        report = msgspec.structs.replace(report, signature=sign(report), verdict=verdict)
        return redact(report, redaction_key(self.store.directory)) if self._redacted else report

    def _prune(self) -> None:
        try:
            self.store.prune(DEFAULT_RETENTION)
        except ReportError as error:  # another process is pruning, or may not
            _log.debug("the store was not pruned: %s", error)


def _told(level: int, write: Callable[[_Crash, JobRecord], None], crash: _Crash, case: JobRecord) -> None:
    try:
        write(crash, case)
    except Exception as error:  # noqa: BLE001 - a report that fails must not fail the job
        _log.log(level, "the report of crash %s could not be written: %s", crash.id, error)


def _killed(crash: _Crash) -> bool:
    return crash.incident.evidence.result().exit == Exit.KILLED


def _dropped(crash: _Crash) -> bool:
    """Whether this process ends, and its cells with it: that is no crash."""
    return _ending.is_set() and _killed(crash)


_reporters: weakref.WeakSet[Reporter] = weakref.WeakSet()
_ending = threading.Event()


def _finish() -> None:
    """At the end of the interpreter, before the finalizers that end the cells."""
    _ending.set()
    end = time.monotonic() + _EXIT_MAX
    for reporter in list(_reporters):
        reporter.leave(max(end - time.monotonic(), 0.0))
    DELIVERY.wait()


# Handlers are called in the reverse order (atexit), and the first finalizer registers that of all others.
weakref.finalize(_ending, lambda: None)
atexit.register(_finish)


def _compose(crash: _Crash, case: JobRecord) -> Report:
    config, info = crash.config, crash.info
    evidence = crash.incident.evidence.result()
    return Report(
        id=crash.id,
        crashed_at=crash.incident.crashed_at.isoformat(),
        written_at=dt.datetime.now(dt.UTC).isoformat(),
        evidence=evidence,
        rung=crash.rung,
        batch=crash.batch,
        context=config.parameters() if config else {},
        model=model.describe(config.model, info.description if info else "") if config else None,
        environment=_outside(evidence) if crash.command else environment(info),
        ladder=case.steps,
        result=case.result,
        blamed=case.blamed,
        caller=crash.incident.caller,
        command=list(crash.command),
    )
