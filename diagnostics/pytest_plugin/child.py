"""Child side: a fork of pytest that runs one test, armed, and tells of it in its notes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Generator
from typing import NamedTuple, NoReturn

import pytest
from _pytest.runner import runtestprotocol  # what plugins that run tests themselves have always used

from crumplezone.diagnostics.pytest_plugin.notes import Ended, Left, Notes, Reported, Warned
from crumplezone.reports.records.report import Frame
from crumplezone.sandbox.child.arm import FATAL, die_with, hold_on_fault, stand_down
from crumplezone.sandbox.ipc.exit_marks import ExitMarks
from crumplezone.sandbox.process.lines import Ends
from crumplezone.sandbox.process.log_relay import LogRelay


class Inherited:
    """Fixtures that pytest's own process has set up, for tests without a cell. A cell uses them too."""

    NAME = "crumple-inherited"

    def __init__(self) -> None:
        self._made: set[pytest.FixtureDef[object]] = set()

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[object]) -> None:
        """Note one."""
        self._made.add(fixturedef)

    def disown(self, session: pytest.Session) -> None:
        """In a cell: forget how to tear them down; their temporary files and servers are not the cell's."""
        for fixture in self._made:
            fixture._finalizers.clear()  # noqa: SLF001 - no other way; the same in every pytest since 3
        for finalizers, _ in session._setupstate.stack.values():  # noqa: SLF001 - likewise
            finalizers.clear()


class _Told(Exception):
    """A report was noted: no other plugin of the cell is to hear of it."""


class _Scribe:
    """In the cell: the only plugin that hears of reports. The others hear of them in pytest's own process."""

    def __init__(self, config: pytest.Config, notes: Notes) -> None:
        self._config, self._notes = config, notes

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        hook = self._config.hook
        self._notes.write(Reported(hook.pytest_report_to_serializable(config=self._config, report=report)))
        raise _Told

    @pytest.hookimpl(specname="pytest_runtest_logreport", wrapper=True, trylast=True)
    def pytest_runtest_logreport_told(self) -> Generator[None, list[object], list[object]]:
        try:
            return (yield)
        except _Told:
            return []

    @pytest.hookimpl(tryfirst=True)
    def pytest_enter_pdb(self) -> None:
        pytest.fail("a debugger needs the terminal, and a cell has none: leave out --crumple", pytrace=False)


class Birth(NamedTuple):
    """What a fork needs to be a cell: its ends of the lines, its supervisor's process id and signals.

    Attributes:
        mask: Those that were blocked.
        ignored: Whether SIGCHLD was ignored, as the test is to find it.
    """

    ends: Ends
    supervisor: int
    mask: set[int | signal.Signals]
    ignored: bool


def live(item: pytest.Item, birth: Birth, notes: Notes, relay: LogRelay) -> NoReturn:
    """Be the cell of a test. Signals are blocked when this is called.

    Args:
        item: The test.
        birth: Lines and supervisor.
        notes: Where to tell of the test.
        relay: Where to log.
    """
    status, leave = 1, os._exit
    try:
        notes.begin()
        os.setpgid(0, 0)
        die_with(birth.ends.parent)
        hold_on_fault(birth.ends.fault, birth.supervisor)
        os.register_at_fork(after_in_child=stand_down)  # what the test forks dies as it would anywhere
        marks = ExitMarks(birth.ends.arena)
        _settle(item.config, birth.ends)
        relay.take_over()
        if inherited := item.config.pluginmanager.get_plugin(Inherited.NAME):
            inherited.disown(item.session)
        item.config.pluginmanager.register(_Scribe(item.config, notes))
        _note_exits(notes)
        if birth.ignored:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, birth.mask - {*FATAL})
        _perform(item, notes)
        status = 0
        marks.finished()
    except BaseException:  # noqa: BLE001 - whatever it is: nothing may return into the rest of pytest
        why = traceback.format_exc()
        try:
            notes.write(Ended("error", why))
            status = 0
        except OSError:  # the test has closed what is not its own
            os.write(2, why.encode("utf-8", "backslashreplace"))
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        leave(status)


def _settle(config: pytest.Config, ends: Ends) -> None:
    """Make descriptors and environment those of a cell."""
    # In a process group of its own it would be stopped when it reads from the terminal.
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    if config.getoption("capture", "no") != "fd":  # else what it writes lies in pytest's own file
        os.dup2(ends.output, 2)
    os.close(ends.output)
    os.environ["GGML_NO_BACKTRACE"] = "1"  # an abort would fork gdb and flood stderr


def _note_exits(notes: Notes) -> None:
    """Have os._exit, which leaves no trace, tell first where it was called."""
    leave = os._exit

    def told(status: int) -> NoReturn:
        try:
            stack = traceback.extract_stack(sys._getframe(1), limit=64)  # noqa: SLF001 - as traceback itself does
            notes.write(Left([Frame(f.name, file=f.filename, line=f.lineno or 0) for f in reversed(stack)]))
        finally:  # whatever the test has done to descriptors and modules
            leave(status)

    os._exit = told


def _perform(item: pytest.Item, notes: Notes) -> None:
    """Run the test, from its setup to the teardown of all that was set up for it."""
    end = Ended()
    with warnings.catch_warnings(record=item.config.pluginmanager.has_plugin("warnings")) as raised:
        try:
            runtestprotocol(item, nextitem=None)
        except pytest.exit.Exception as stop:
            end = Ended("exit", str(stop.msg), stop.returncode)
        except KeyboardInterrupt:
            end = Ended("interrupt")
    for each in raised or ():
        kind = each.category
        notes.write(Warned(str(each.message), kind.__module__, kind.__qualname__, each.filename, each.lineno))
    notes.write(end)
