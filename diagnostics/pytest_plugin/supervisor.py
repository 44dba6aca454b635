"""Supervisor side of ``--crumple``: pytest's own process starts the cell of a test, and tells its end."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import sys
import threading
import time
import warnings
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest

from crumplezone.diagnostics.pytest_plugin.child import Birth, live
from crumplezone.diagnostics.pytest_plugin.failure import Phase, failed, left, reported, story
from crumplezone.diagnostics.pytest_plugin.logs import LogTail
from crumplezone.diagnostics.pytest_plugin.notes import Ended, Left, Note, Notes, Reported, Warned
from crumplezone.diagnostics.pytest_plugin.options import TIMEOUT
from crumplezone.errors import InputError, UsageError, check_integer, check_number
from crumplezone.reports.records.report import Frame
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.guest import Guest
from crumplezone.sandbox.child.loop import ForkedChild
from crumplezone.sandbox.process.drain import OutputTail
from crumplezone.sandbox.process.launch import launch
from crumplezone.sandbox.process.lines import Ends
from crumplezone.sandbox.process.log_relay import LogRelay
from crumplezone.sandbox.process.process import Child, children_kept, reap_own

_TIMEOUT_MAX = 1e6  # seconds
_MEMORY_MAX = 1 << 24  # MiB
_WARNED = pytest.StashKey[bool]()


class _Limits(NamedTuple):
    timeout: float | None  # seconds
    memory: int | None  # bytes


class _TestOutput(OutputTail):
    """The standard error of a test. Where pytest does not capture it, it is passed on as it comes."""

    def __init__(self, config: pytest.Config) -> None:
        super().__init__()
        self._capture = config.pluginmanager.get_plugin("capturemanager")
        self._captured: tuple[str, str] | None = None

    def add(self, data: bytes) -> None:
        super().add(data)
        with contextlib.suppress(OSError):
            os.write(2, data)

    def captured(self) -> tuple[str, str]:
        """Standard output and error since the last report of the cell. Call it when the cell is dead."""
        if self._captured is None:
            # The cell wrote into the file that this process reads: a fork shares it.
            self._captured = tuple(self._capture.read_global_capture()) if self._capture else ("", "")
        return self._captured

    def text(self) -> str:
        return super().text() + self.captured()[1][-65536:]


@dataclass
class _Ran:
    """What is known of a test that ran in a cell.

    Attributes:
        began: Seconds since 1970.
        reports: What the cell reported.
        end: How the test ended, if it did.
        stack: Where it called os._exit, if it did.
        incident: How the cell was lost, if it was.
    """

    said: _TestOutput
    logs: LogTail
    relay: LogRelay
    began: float = field(default_factory=time.time)
    reports: list[pytest.TestReport] = field(default_factory=list)
    end: Ended | None = None
    stack: list[Frame] = field(default_factory=list)
    incident: Incident | None = None


def run(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Run a test in a cell, and log its reports.

    Raises:
        pytest.exit.Exception, KeyboardInterrupt: The test ended the session.
    """
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    ran, problem = None, ""
    try:
        ran = _run_cell(item, _limits(item))
    except (InputError, UsageError, Warning) as error:
        problem = str(error)
    except ValueError as error:
        problem = f"the cell of this test told what cannot be used: {error}"
    except (OSError, RuntimeError, MemoryError) as error:
        problem = (
            f"no cell for this test ({error}): more processes or descriptors (ulimit -u, -n), or more memory"
        )
    end = (ran and ran.end) or Ended()
    for report in _reports(item, ran) if ran else [failed(item, "setup", problem)]:
        item.ihook.pytest_runtest_logreport(report=report)
    if end.by == "exit":
        pytest.exit(end.why, end.status)
    if end.by == "interrupt":
        raise KeyboardInterrupt
    _tear_down_own(item, nextitem)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)


def _limits(item: pytest.Item) -> _Limits:
    mark = item.get_closest_marker("crumple")
    given = dict(mark.kwargs) if mark else {}
    timeout, memory = given.pop("timeout", None), given.pop("memory", None)
    if mark and (mark.args or given):
        takes = "takes timeout= (seconds) and memory= (MiB), by name"
        raise InputError("@pytest.mark.crumple", [*mark.args, *given], takes)
    if timeout is not None:
        check_number("timeout of @pytest.mark.crumple", timeout, 0.001, _TIMEOUT_MAX)
    if memory is not None:
        check_integer("memory of @pytest.mark.crumple", memory, 1, _MEMORY_MAX, " MiB")
    limits = [limit for limit in (timeout, item.stash.get(TIMEOUT, None)) if limit is not None]
    limit = min(*limits, _TIMEOUT_MAX) if limits else None
    return _Limits(limit, None if memory is None else memory << 20)


def _run_cell(item: pytest.Item, limits: _Limits) -> _Ran:
    """Start the cell, wait for its end, and take in what it told."""
    config = item.config
    _warn_of_threads(config)
    if "tmp_path_factory" in getattr(item, "fixturenames", ()):
        # Each cell would make a base directory of its own, and leave its lock in there.
        config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]  # noqa: SLF001 - no fixture yet
    with contextlib.ExitStack() as stack:
        notes = Notes()
        stack.callback(notes.close)
        plugin = config.pluginmanager.get_plugin("logging-plugin")
        logs = LogTail(plugin.formatter if plugin else logging.Formatter(logging.BASIC_FORMAT))
        relay = LogRelay("crumple-log", logs)
        stack.callback(relay.close)
        ran = _Ran(_TestOutput(config), logs, relay)
        ignored = stack.enter_context(children_kept())
        guest = _start(item, limits, notes, ran, ignored=ignored)
        stack.callback(guest.close)
        relay.leave_sending()
        outcome = guest.wait(limits.timeout)
        if isinstance(outcome, Incident):
            outcome.evidence.result()  # only then it is dead
        relay.close()
        try:
            for note in notes.read():
                _take(item, ran, note)
        except ValueError:  # of a cell that was lost, its death is what counts
            if not isinstance(outcome, Incident):
                raise
        if isinstance(outcome, Incident):
            ran.incident = outcome
        elif outcome or not ran.end:
            ran.incident = left(guest.pid, outcome, ran.said.text(), ran.stack)
        return ran


def _start(item: pytest.Item, limits: _Limits, notes: Notes, ran: _Ran, *, ignored: bool) -> Guest:
    _flush(item.config)
    supervisor = os.getpid()
    # In the fork, what a signal's handler raises before it is a cell would be raised into the rest of pytest.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    birth: Birth | None = None
    try:
        guest = Guest(lambda _: launch(_fork), memory_limit=limits.memory, stderr=ran.said)
    except ForkedChild as fork:  # what `launch` opened for the supervisor was closed on the way
        birth = Birth(Ends(*fork.ends), supervisor, mask, ignored)
    finally:
        if not birth:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if birth:
        live(item, birth, notes, ran.relay)
    return guest


def _fork(ends: Ends) -> Child:
    """Fork. Python 3.12+ warns of a fork with threads, as what they hold stays locked in there (fork(2)).

    Our only one waits for what this cell will log (`LogRelay`), and so holds nothing; those of earlier cells
    have ended (`Guest.close`). glibc and OpenBLAS see to their own in forks (pthread_atfork(3)), Python and
    its logging likewise. Of those of plugins and tests `_warn_of_threads` tells, with their names.
    """
    with contextlib.ExitStack() as copies:
        own = []  # a fork closes what `launch` has made
        for end in ends:
            own.append(os.dup(end))
            copies.callback(os.close, own[-1])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"This process .*is multi-threaded", DeprecationWarning)
            pid = os.fork()
        if not pid:
            copies.pop_all()
            raise ForkedChild(own)
    try:
        os.setpgid(pid, pid)  # both do so: it is a group before anybody needs to kill it
        pidfd = os.pidfd_open(pid)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    return Child(pid, pidfd, functools.partial(reap_own, pidfd))


def _flush(config: pytest.Config) -> None:
    """Write what this process has buffered: the cell would write it once more."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if config.pluginmanager.has_plugin("terminalreporter"):
        config.get_terminal_writer().flush()


def _warn_of_threads(config: pytest.Config) -> None:
    """Once: a fork has one thread, and what the others held stays locked in there (fork(2))."""
    if _WARNED in config.stash:
        return
    config.stash[_WARNED] = True
    names = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    if names:
        what = (
            f"pytest forks the cells of tests, and has other threads ({', '.join(names)}): they do not run in"
            " there, and a lock that one holds stays locked. Start them in fixtures of tests that need them."
        )
        warnings.warn(pytest.PytestWarning(what), stacklevel=2)


def _take(item: pytest.Item, ran: _Ran, note: Note) -> None:
    """Take one note in.

    Raises:
        ValueError: It is none of this test.
    """
    if isinstance(note, Warned):
        kind = getattr(sys.modules.get(note.module), note.category, None)
        if not (isinstance(kind, type) and issubclass(kind, Warning)):
            kind = UserWarning
        message = warnings.WarningMessage(note.text, kind, note.file, note.line)
        item.ihook.pytest_warning_recorded.call_historic(
            kwargs={"warning_message": message, "nodeid": item.nodeid, "when": "runtest", "location": None}
        )
    elif isinstance(note, Reported):
        ran.reports.append(_restored(item, note))
    elif isinstance(note, Left):
        ran.stack = note.stack
    else:
        ran.end = note


def _restored(item: pytest.Item, note: Reported) -> pytest.TestReport:
    """A report as it was before it became JSON, which has no tuples."""
    try:
        report = item.config.hook.pytest_report_from_serializable(config=item.config, data=note.report)
        report.location = item.location
        report.sections = [(str(title), str(content)) for title, content in report.sections]
        report.user_properties = [tuple(each) for each in report.user_properties]
        if isinstance(report.longrepr, list):
            report.longrepr = tuple(report.longrepr)
    except Exception as error:
        raise ValueError(f"a report that pytest cannot read ({error!r})") from error
    if not isinstance(report, pytest.TestReport) or report.nodeid != item.nodeid:
        raise ValueError("a report of something else")
    return report


def _reports(item: pytest.Item, ran: _Ran) -> list[pytest.TestReport]:
    """What the cell reported, and what it could not report itself."""
    if ran.incident:
        return [*ran.reports, _lost(item, ran, ran.incident)]
    if ran.end and ran.end.by == "error":
        return [*ran.reports, failed(item, "teardown", ran.end.why)]
    if ran.end and not ran.end.by and not _is_whole(item, ran.reports):
        return [*ran.reports, failed(item, "teardown", "its cell did not tell how all of it ended")]
    return ran.reports


def _is_whole(item: pytest.Item, reports: list[pytest.TestReport]) -> bool:
    """Whether there is a report of each phase: a test passes by what its cell tells, not by its silence."""
    phases = {report.when: report for report in _phases(reports)}
    called = "call" in phases or item.config.getoption("setuponly", False)
    return "teardown" in phases and "setup" in phases and (called or not phases["setup"].passed)


def _phases(reports: list[pytest.TestReport]) -> list[pytest.TestReport]:
    return [report for report in reports if type(report) is pytest.TestReport]  # not those of subtests


def _lost(item: pytest.Item, ran: _Ran, incident: Incident) -> pytest.TestReport:
    """The report of a test whose cell was lost, with all that it said until then."""
    phases = _phases(ran.reports)
    when: Phase = "teardown"
    if not phases:
        when = "setup"
    elif phases[-1].when == "setup" and phases[-1].passed:
        when = "call"
    since = phases[-1].stop if phases else ran.began
    path, line, what = story(item, incident, ran.logs.plain())
    out, err = ran.said.captured()
    for name, content in (("stdout", out), ("stderr", err), ("log", "\n".join(ran.logs.since(since)))):
        item.add_report_section(when, name, content)
    report = failed(item, when, what, place=(path, line), began=since)
    if phases:
        report.sections[:0] = phases[-1].sections
    return report


def _tear_down_own(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Tear down what tests without a cell had set up in this process, and the next test does not need."""
    state = item.session._setupstate  # noqa: SLF001 - pytest's own way is the teardown of a test, and that was elsewhere
    if not state.stack:
        return
    call = pytest.CallInfo.from_call(lambda: state.teardown_exact(nextitem), "teardown")
    if call.excinfo:
        item.ihook.pytest_runtest_logreport(report=reported(item, call))
