"""One case of a diagnostic run: a shape, tried in a fresh cell and compared with the safe path."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from crumplezone.diagnostics.ci.probe import Difference, Probe, Said, Texts, batch, context, difference, probe
from crumplezone.errors import CellRefused, ContextError, CrumplezoneError, InputError, ReportError
from crumplezone.reports.analysis.signature import sign
from crumplezone.reports.records.report import Evidence, Exit, Report
from crumplezone.reports.records.run import CaseRecord, Ending, Shape
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.process.procfs import sizes
from crumplezone.workers.batch.call import RefusedError
from crumplezone.workers.batch.columns import Columns, Float32
from crumplezone.workers.batch.results import Rung
from crumplezone.workers.incidents.attempt import Attempt
from crumplezone.workers.incidents.job import JobRecord
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.model.limits import Limits

_ENDINGS = {  # of all others, it is a crash
    Exit.HANG: Ending.HANG,
    Exit.OOM: Ending.OOM,
    Exit.KILLED: Ending.ERROR,
    Exit.FAILED_START: Ending.ERROR,
}


class Case(msgspec.Struct, frozen=True):
    """What is to be tried.

    Attributes:
        id: The same in every run; it names the case in baselines.
        model: Path of a GGUF file.
        shape: What is asked of llama.cpp.
        deadline: Seconds until a native call, or the start of a cell, counts as hung.
        memory: Bytes of resident memory above which a cell is killed, or None.
    """

    id: str
    model: Path
    shape: Shape
    deadline: float = 60.0
    memory: int | None = None


def run_case(case: Case, store: Path) -> CaseRecord:
    """Try a shape in a fresh cell, without a ladder, and compare what it gives with the safe path.

    Whatever the model, the shape or llama.cpp do is an ending, not an exception.

    Args:
        case: What to try.
        store: Directory of the report store that a crash, a hang or an OOM is reported in.
    """
    begin, reporter = time.perf_counter(), Reporter(store)
    trial = _Trial(case, reporter)
    try:
        trial.run()
    finally:
        trial.file()
        reporter.close()
    ms = round((time.perf_counter() - begin) * 1000, 1)
    return msgspec.structs.replace(trial.record(), ms=ms)


class _Trial:
    """A case on its way.

    Args:
        case: What to try.
        reporter: Where crashes go.
    """

    def __init__(self, case: Case, reporter: Reporter) -> None:
        self._case, self._reporter, self._job = case, reporter, JobRecord()
        self._ending, self._detail = Ending.PASS, ""
        self._evidence: Evidence | None = None  # of the first cell that was lost
        self._peak: int | None = None
        self._columns: Columns | None = None
        self._native: Sequence[Said | Float32] = []
        self._texts: list[str] = []
        self._safe_texts: list[str] = []

    def run(self) -> None:
        """Try it natively, and on the safe path if there is anything to learn from that."""
        case, shape = self._case, self._case.shape
        try:
            limits = Limits(case.deadline, case.memory)
            native, safe = (context(case.model, shape, safe=safe) for safe in (False, True))
        except InputError as error:
            self._end(Ending.REFUSED, str(error))
            return
        except CrumplezoneError as error:
            self._end(Ending.ERROR, str(error))
            return
        if shape.path != "safe":
            self._natively(probe(shape, native, limits, safe=False))
        died_decoding = self._ending in (Ending.CRASH, Ending.HANG) and self._columns is not None
        if self._ending is Ending.PASS or died_decoding:
            self._safely(probe(shape, safe, limits, safe=True))

    def file(self) -> None:
        """Hand the crashes over to be reported."""
        if crashes := self._job.crashes:
            self._job.result = f"the case {self._case.id!a} ends as {self._ending.value}"
            assert crashes[0].config is not None
            self._reporter.file(self._job, crashes[0].config, crashes[0].info)

    def record(self) -> CaseRecord:
        """What came of it. The reporter must have been closed."""
        signature = sign(Report("", "", self._evidence)) if self._evidence else None
        report, verdict = self._reported()
        return CaseRecord(
            id=self._case.id,
            model=self._case.model.name,
            shape=self._case.shape,
            ending=self._ending,
            detail="; ".join(filter(None, [self._detail, verdict])),
            signature=None if self._ending is Ending.ERROR else signature,
            report=report,
            peak_rss=self._peak,
            text="\n".join(self._texts),
            safe_text="\n".join(self._safe_texts) if self._safe_texts != self._texts else "",
        )

    def _natively(self, native: Probe) -> None:
        every = list(range(self._case.shape.sequences))
        with contextlib.closing(native.client):
            with self._attempt(Rung.NATIVE, every, native) as tried:
                columns = batch(self._case.shape, native.tokenize(), native.client.info)
                self._columns = columns
                self._native = native.ask(columns)
                self._peak = _peak(native.client.pid)
            self._judge(tried, Rung.NATIVE)

    def _safely(self, safe: Probe) -> None:
        """One sequence at a time, until one fails."""
        differences = dict[int, Difference]()
        with contextlib.closing(safe.client):
            for seq_id in range(self._case.shape.sequences):
                with self._attempt(Rung.SAFE, [seq_id], safe) as tried:
                    if self._columns is None:
                        self._columns = batch(self._case.shape, safe.tokenize(), safe.client.info)
                    (answer,) = safe.ask(self._columns.alone(seq_id).renamed(0))
                    if self._native and (found := difference(self._native[seq_id], answer)):
                        differences[seq_id] = found
                    self._say(safe, seq_id, answer)
                if not tried.ok:
                    if tried.died and safe.sent:
                        self._job.blamed.append(seq_id)
                    self._judge(tried, Rung.SAFE)
                    return
            self._peak = self._peak or _peak(safe.client.pid)
        if differences:
            seq_id = max(differences, key=lambda seq_id: differences[seq_id].size)
            ending = Ending.MISMATCH if differences[seq_id].size > 1 else Ending.PASS
            self._end(ending, f"sequence {seq_id}: {differences[seq_id].what}")

    def _say(self, safe: Probe, seq_id: int, answer: Said | Float32) -> None:
        """Keep the texts of a sequence, a line each."""
        if not (isinstance(safe, Texts) and isinstance(answer, Said)):
            return
        native = self._native[seq_id] if self._native else answer
        assert isinstance(native, Said)
        texts = safe.client.detokenize([native.tokens, answer.tokens])
        one, other = (text.replace("\\", "\\\\").replace("\n", "\\n") for text in texts)
        self._texts.append(one)
        self._safe_texts.append(other)

    def _attempt(self, rung: Rung, seq_ids: list[int], probe: Probe) -> Attempt:
        return Attempt(self._reporter, self._job, probe.client, rung, seq_ids, lambda: probe.sent)

    def _judge(self, tried: Attempt, rung: Rung) -> None:
        """What a rung that failed makes of the case."""
        if tried.died:
            evidence = Incident.of(tried.died).evidence.result()
            title = sign(Report("", "", evidence)).title
            detail = f"{title} ({evidence.detail})" if evidence.detail else title
            self._end(_ENDINGS.get(evidence.exit, Ending.CRASH), detail, rung)
            if self._evidence is None:
                self._evidence, self._peak = evidence, self._peak or evidence.peak_rss
        elif not tried.ok:
            refused = isinstance(tried.error, RefusedError | CellRefused | InputError | ContextError)
            self._end(Ending.REFUSED if refused else Ending.ERROR, tried.problem, rung)

    def _end(self, ending: Ending, detail: str, rung: Rung = Rung.NATIVE) -> None:
        """The first failure is what the case comes to."""
        if self._ending is Ending.PASS:
            compared = rung is Rung.SAFE and self._case.shape.path != "safe"
            self._ending, self._detail = ending, f"on the safe path: {detail}" if compared else detail

    def _reported(self) -> tuple[str, str]:
        """The id of the first crash's report, and the verdict in it."""
        if not self._job.reports:
            return "", ""
        name = Path(self._job.reports[0]).name
        try:
            verdict = self._reporter.store.read(name).verdict
        except ReportError as error:
            return "", f"its report is lost: {error}"
        return name, f"{verdict.kind}: {verdict.because}" if verdict else ""


def _peak(pid: int | None) -> int | None:
    """Most resident memory that a living cell had, bytes."""
    with contextlib.suppress(OSError):
        return sizes(pid).get("VmHWM") if pid else None
    return None
