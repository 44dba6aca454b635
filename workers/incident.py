"""From incidents to reports: what one job met on its way down the ladder, written beside the caller."""

from __future__ import annotations

import datetime as dt
import functools
import importlib.metadata
import logging
import os
import platform
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from crumplezone.errors import ReportError
from crumplezone.reports import text
from crumplezone.reports.redact import VARIABLES, redact, redaction_key
from crumplezone.reports.retention import DEFAULT_RETENTION
from crumplezone.reports.schema import (
    BatchRecord,
    Environment,
    Evidence,
    LadderStep,
    Outcome,
    Report,
    Verdict,
)
from crumplezone.reports.signature import sign
from crumplezone.reports.store import Store, new_id
from crumplezone.reports.storm import Storm
from crumplezone.reports.verdict import from_exit, from_ladder
from crumplezone.sandbox.cell import Incident
from crumplezone.workers import model
from crumplezone.workers.columns import Columns
from crumplezone.workers.journal import Journal
from crumplezone.workers.protocol import CellConfig, CellInfo

_PRUNE_EVERY = 64  # reports
_GOES_ON = "the job goes on"
_OF_THE_JOB = ("ladder", "result", "blamed", "verdict")
_OF_THE_CELL = ("context", "model", "environment")

_log = logging.getLogger("crumplezone")


@dataclass
class _Crash:
    id: str
    incident: Incident
    rung: str
    batch: BatchRecord | None
    config: CellConfig | None
    info: CellInfo | None
    path: str
    command: Sequence[str] = ()


@dataclass
class Case:
    """One job: the rungs it tried, the crashes it met, and how it ended.

    Attributes:
        blamed: Sequences that failed and were seen to crash alone.
        no_cell: Why no safe cell can be had, or an empty string.
        rc: What llama.cpp returned on the native rung, if it did not crash there.
        ended: It was handed over: nothing of it changes any more.
    """

    steps: list[LadderStep] = field(default_factory=list)
    crashes: list[_Crash] = field(default_factory=list)
    blamed: list[int] = field(default_factory=list)
    result: str = ""
    no_cell: str = ""
    rc: int | None = None
    ended: bool = False

    @property
    def reports(self) -> list[str]:
        """Directories of the reports of its crashes, written or to be written."""
        return [crash.path for crash in self.crashes]

    def step(
        self, rung: str, outcome: Outcome, sequences: list[int], detail: str = "", ms: float = 0.0
    ) -> None:
        """Note that a rung was tried."""
        self.steps.append(LadderStep(rung, outcome, sequences, detail, round(ms, 2)))


@functools.cache
def _cpu() -> tuple[str, list[str]]:
    name, flags = "", []
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in {"flags", "Features"}:
                flags = value.split()
                break
    except OSError:
        pass
    return name, flags


def record(
    columns: Columns,
    operation: str,
    *,
    chunk: int = 0,
    embeddings: bool = False,
    journal: Journal | None = None,
) -> BatchRecord:
    """A batch as a report keeps it, with what the memory held before, if there was any."""
    held, held_more = journal.plain() if journal else ([], False)
    counts, begins = np.maximum(columns.n_seq_id, 0).tolist(), columns.begins.tolist()
    flat = columns.seq_ids.tolist()
    several = [i for i, count in enumerate(counts) if count != 1]
    first = [flat[begin] if count else -1 for begin, count in zip(begins, counts, strict=True)]
    return BatchRecord(
        tokens=[-1] * len(columns) if columns.tokens is None else columns.tokens.tolist(),
        positions=columns.positions.tolist(),
        seq_ids=first,
        outputs=columns.outputs.astype(bool).tolist(),
        operation=operation,
        chunk=chunk,
        embeddings=embeddings,
        shared={str(i): flat[begins[i] + 1 : begins[i] + counts[i]] for i in several},
        nulls=sorted(columns.nulls),
        n_embd=0 if columns.embd is None else columns.embd.shape[1],
        held=held,
        held_more=held_more,
    )


def environment(info: CellInfo | None) -> Environment:
    """Versions and CPU of this machine."""
    cpu, flags = _cpu()
    versions = {
        "crumplezone": importlib.metadata.version("crumplezone"),
        "llama-cpp-python": importlib.metadata.version("llama-cpp-python"),
        "llama.cpp": info.llama_cpp if info else "unknown (the model did not load)",
        "python": platform.python_version(),
        "kernel": platform.release(),
    }
    variables = {name: value for name, value in os.environ.items() if VARIABLES.fullmatch(name)}
    return Environment(versions, cpu, flags, info.system_info if info else "", variables)


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
    process meanwhile loses none.

    Args:
        directory: The report store.
        redacted: Whether to keep tokens, prompt text and paths out of the reports.
    """

    def __init__(self, directory: Path, *, redacted: bool = False) -> None:
        self.store = Store(directory)
        self._redacted = redacted
        self._storm = Storm(self.store.has)
        self._written = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="reporter")
        self._pending: list[Future[None]] = []
        self._lock = threading.Lock()  # lanes report from threads of their own

    def add(
        self,
        case: Case,
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
        report_id = new_id(incident.crashed_at)
        path = str(self.store.path(report_id))
        crash = _Crash(report_id, incident, rung, batch, config, info, path, command)
        case.crashes.append(crash)
        self._submit(logging.DEBUG, self._begin, crash, case)
        return path

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
        case = Case(result=result)
        case.step("native", Outcome.CRASHED, list(sequences), doing)
        path = self.add(case, incident, "native", None, config, info)
        self.file(case, config, info)
        return path

    def file_program(self, incident: Incident, command: Sequence[str]) -> str:
        """Report the crash of a program that is no cell; returns where its report will be."""
        case = Case()
        path = self.add(case, incident, "native", None, command=command)
        self.file(case, None, None)
        return path

    def file(self, case: Case, config: CellConfig | None, info: CellInfo | None) -> None:
        """Hand over a case that has ended."""
        case.ended = True
        for crash in case.crashes:
            crash.config, crash.info = crash.config or config, crash.info or info
            self._submit(logging.ERROR, self._end, crash, case)

    def flush(self) -> None:
        """Wait until every report handed over is on disk (or its failure was logged)."""
        with self._lock:
            pending = list(self._pending)
        for future in pending:
            future.result()

    def close(self) -> None:
        """Write what is left and end the thread."""
        self._pool.shutdown(wait=True)

    def _submit(self, level: int, write: Callable[[_Crash, Case], None], crash: _Crash, case: Case) -> None:
        def run() -> None:
            try:
                write(crash, case)
            except Exception as error:  # noqa: BLE001 - a report that fails must not fail the job
                _log.log(level, "the report of crash %s could not be written: %s", crash.id, error)

        with self._lock:
            self._pending = [future for future in self._pending if not future.done()]
            try:
                self._pending.append(self._pool.submit(run))
            except RuntimeError:  # the interpreter ends, and nobody has closed the decoder
                _log.log(level, "the report of crash %s was not written: the program ends", crash.id)

    def _begin(self, crash: _Crash, case: Case) -> None:
        crash.incident.evidence.result()
        if not case.ended:  # else all of it is written at once
            report = _compose(crash, Case(steps=list(case.steps), result=_GOES_ON))
            self._write(self._finish(report, from_exit(report)))

    def _end(self, crash: _Crash, case: Case) -> None:
        report = _compose(crash, case)
        report = self._finish(report, from_ladder(report))
        report = self._update(report) if self.store.has(crash.id) else self._write(report)
        _log.warning("%s Report: %s", text.summary(report), crash.path)

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


def _compose(crash: _Crash, case: Case) -> Report:
    config, info, context = crash.config, crash.info, {}
    if config:
        context = {name: getattr(config, name) for name in config.__struct_fields__ if name != "model"}
    evidence = crash.incident.evidence.result()
    return Report(
        id=crash.id,
        crashed_at=crash.incident.crashed_at.isoformat(),
        written_at=dt.datetime.now(dt.UTC).isoformat(),
        evidence=evidence,
        rung=crash.rung,
        batch=crash.batch,
        context=context,
        model=model.describe(config.model, info.description if info else "") if config else None,
        environment=_outside(evidence) if crash.command else environment(info),
        ladder=case.steps,
        result=case.result,
        blamed=case.blamed,
        caller=crash.incident.caller,
        command=list(crash.command),
    )
