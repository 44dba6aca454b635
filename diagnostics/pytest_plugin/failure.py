"""From the death of a test's cell to the report in the store, and to the failure that pytest shows."""

from __future__ import annotations

import datetime as dt
import time
from concurrent.futures import Future
from itertools import takewhile
from pathlib import Path
from typing import Literal, NoReturn

import msgspec
import pytest
from _pytest.skipping import evaluate_xfail_marks, xfailed_key  # a crash can be an expected failure

from crumplezone.errors import InputError, ReportError
from crumplezone.reports.analysis.signature import sign
from crumplezone.reports.analysis.stack import crashed_thread
from crumplezone.reports.formats.text import sections
from crumplezone.reports.records.report import Evidence, Exit, Frame, Report, Thread
from crumplezone.reports.store.store import default_directory
from crumplezone.sandbox.autopsy.classify import classify, fault_of
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.workers.incidents.reporter import Reporter

Phase = Literal["setup", "call", "teardown"]

_SHOWN = ("Summary", "Native stack", "Python stack")
_REPORTER = pytest.StashKey[Reporter]()


def left(pid: int, code: int, stderr: str, stack: list[Frame]) -> Incident:
    """The incident of a cell that came to its end in the middle of its test, as programs do.

    Args:
        pid: Its process id.
        code: Its return code, as in subprocess.
        stderr: What it said.
        stack: Where it called os._exit, if it did.
    """
    fault = fault_of(code)
    kind, why = Exit.NATIVE_EXIT, f"{'os.' if stack else ''}_exit({code}) in the middle of the test"
    if fault:
        kind, why = classify(code, fault, "run", ({}, {}), pid)
    evidence: Future[Evidence] = Future()
    threads = [Thread(pid, python=stack)] if stack else []
    found = Evidence(kind, pid, "run", code, fault, threads=threads, stderr_tail=stderr, detail=why)
    evidence.set_result(found)
    return Incident("run", dt.datetime.now(dt.UTC), evidence, [])


def story(item: pytest.Item, incident: Incident, logged: list[str]) -> tuple[str, int, str]:
    """Have a death reported, and tell it.

    Args:
        item: The test.
        incident: The death of its cell.
        logged: What it logged last.

    Returns:
        The file and line of the test's code where it happened, and the story; its first line says it all.
    """
    evidence = msgspec.structs.replace(incident.evidence.result(), log_tail=logged)
    known: Future[Evidence] = Future()
    known.set_result(evidence)
    command = ["pytest", "--crumple", item.nodeid]
    written = _file(item.config, Incident(incident.phase, incident.crashed_at, known, []), command)
    report = Report(Path(written).name, incident.crashed_at.isoformat(), evidence, command=command)
    headline = sign(report).title  # of all of it: it is to be found under this in the store
    path = str(item.path)
    threads = [_innermost(thread, path) for thread in evidence.threads]
    report = msgspec.structs.replace(report, evidence=msgspec.structs.replace(evidence, threads=threads))
    found = dict(sections(report))
    detail = f" ({evidence.detail})" if evidence.detail else ""
    lines = [f"{headline}{detail}; {written}"]
    for title in _SHOWN:
        lines += ["", f"{title}:", *(found[title] or ["(not recorded)"])]
    thread = crashed_thread(report)
    places = (frame.line for frame in (thread.python if thread else []) if frame.file == path)
    return path, next(places, (item.location[1] or 0) + 1), "\n".join(lines)


def _innermost(thread: Thread, path: str) -> Thread:
    """Without the frames of the interpreter, and those below the test's own file, which are pytest's."""
    own = [n for n, frame in enumerate(thread.python) if frame.file == path]
    python = thread.python[: own[-1] + 1] if own else thread.python
    native = list(takewhile(lambda frame: not frame.symbol.startswith("_PyEval_"), thread.native))
    return msgspec.structs.replace(thread, native=native, python=python)


def _file(config: pytest.Config, incident: Incident, command: list[str]) -> str:
    """Write the report; where it is, or why it is nowhere."""
    try:
        if _REPORTER not in config.stash:
            config.stash[_REPORTER] = reporter = Reporter(default_directory())
            config.add_cleanup(reporter.close)
        reporter = config.stash[_REPORTER]
        path = reporter.file_program(incident, command)
        reporter.flush()
        written = reporter.store.has(Path(path).name)
    except (ReportError, InputError, OSError, RuntimeError) as error:
        return f"no report: {error}"
    return f"report: {path}" if written else "no report: set CRUMPLEZONE_REPORTS to a writable directory"


def failed(
    item: pytest.Item,
    when: Phase,
    what: str,
    *,
    place: tuple[str, int] | None = None,
    began: float | None = None,
) -> pytest.TestReport:
    """A report that a test failed, as pytest makes it: expected failures and other plugins have their say.

    Args:
        item: The test.
        when: What of it failed.
        what: Why; its first line is what summaries show.
        place: File and line.
        began: When it began, seconds since 1970.
    """

    def fail() -> NoReturn:
        # Where marks are evaluated otherwise, in the setup of the test, only its cell has been.
        item.stash[xfailed_key] = evaluate_xfail_marks(item)
        raise pytest.fail.Exception(what, pytrace=False)

    call = pytest.CallInfo.from_call(fail, when)
    if began is not None:
        call.start, call.duration = began, time.time() - began
    report = reported(item, call)
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:  # it names this file
        crash.path, crash.lineno = place or (str(item.path), (item.location[1] or 0) + 1)
        crash.message = what.partition("\n")[0]
    return report


def reported(item: pytest.Item, call: pytest.CallInfo[None]) -> pytest.TestReport:
    """The report of a call that this process has made of a test, whose setup only a cell has seen.

    A plugin can want what that setup leaves: pytest-rerunfailures does, and hooks that ask for
    ``item.funcargs``. They would end the session; without them it is still the report that pytest makes.
    """
    try:
        report: pytest.TestReport = item.ihook.pytest_runtest_makereport(item=item, call=call)
    except Exception:  # noqa: BLE001 - whatever a plugin raises
        manager = item.config.pluginmanager
        others = [plugin for plugin in manager.get_plugins() if not _is_pytests(plugin)]
        make = manager.subset_hook_caller("pytest_runtest_makereport", others)
        report = make(item=item, call=call)
    return report


def _is_pytests(plugin: object) -> bool:
    return str(getattr(plugin, "__name__", type(plugin).__module__)).startswith("_pytest.")
