"""The runner processes of a diagnostic run. One that dies takes its case along and nothing else."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import subprocess
from collections import deque
from collections.abc import Generator, Sequence
from multiprocessing.connection import wait
from pathlib import Path

import msgspec

from crumplezone.diagnostics.ci.case import Case
from crumplezone.diagnostics.ci.runner import unknown
from crumplezone.errors import CrumplezoneError
from crumplezone.reports.records.run import CaseRecord
from crumplezone.sandbox.host.scarcity import remedy
from crumplezone.sandbox.host.surroundings import Surroundings
from crumplezone.sandbox.ipc.channel import ProtocolError, decoded
from crumplezone.sandbox.process.launch import run_python
from crumplezone.sandbox.process.log_relay import LogRelay

TARGET = "crumplezone.diagnostics.ci.case:run_case"
_GRACE = 5.0  # seconds in which an idle runner ends by itself

_log = logging.getLogger("crumplezone.ci")


def run_all(
    cases: Sequence[Case], jobs: int, store: Path, log: logging.Handler, do: str = TARGET
) -> Generator[CaseRecord, None, None]:
    """Run cases, each in one of several processes; yields their records as they come.

    When it is closed, the runners are killed, and with them their cells.

    Args:
        cases: They are begun in this order.
        jobs: How many run at once.
        store: Directory of the crash reports.
        log: Is given the log records of all runners.
        do: What a runner does with a case: names a `crumplezone.diagnostics.ci.runner.Do`.

    Raises:
        CrumplezoneError: No process could be had, and none is running.
    """
    waiting, runners, started = deque(cases), list[_Runner](), 0
    try:
        while waiting or runners:
            while waiting and len(runners) < jobs:
                started += 1
                try:
                    runners.append(_Runner(f"runner-{started}", store, log, do))
                except OSError as error:
                    if not runners:
                        what = f"no runner could be started ({error}): {remedy(error)}; go on with --resume"
                        raise CrumplezoneError(what) from error
                    jobs = len(runners)  # then fewer at once
                else:
                    runners[-1].give(waiting.popleft())
            ready = wait([runner.line for runner in runners])
            for runner in [each for each in runners if each.line in ready]:
                yield runner.take()
                if waiting and not runner.dead:
                    runner.give(waiting.popleft())
                else:
                    runners.remove(runner)
                    runner.close()
    finally:
        with contextlib.ExitStack() as stack:  # each is closed, whatever the others raise
            for runner in runners:
                stack.callback(runner.close)


class _Runner:
    """One process. Each has a log relay of its own: it may die in the middle of a record.

    It is no fork: numpy and the handlers have threads here, and what they hold would stay locked in there.
    """

    def __init__(self, name: str, store: Path, log: logging.Handler, do: str) -> None:
        self.dead = False
        self._case: Case | None = None
        with contextlib.ExitStack() as opened, contextlib.ExitStack() as theirs:
            self._relay = LogRelay(name, log)
            opened.callback(self._relay.close)
            self.line, line = multiprocessing.Pipe()
            opened.callback(self.line.close)
            theirs.callback(line.close)
            parent, self._parent = os.pipe()  # closed, or left by a run that is killed, it kills the runner
            opened.callback(os.close, self._parent)
            theirs.callback(os.close, parent)
            fds = line.fileno(), self._relay.sender.fileno(), parent
            self._process = _start(fds, [name, do, str(store)])
            self._opened = opened.pop_all()
        self._relay.leave_sending()

    def give(self, case: Case) -> None:
        """Have it run a case. If it is dead by now, `take` says so."""
        self._case = case
        self._send(case)

    def take(self) -> CaseRecord:
        """The record of its case; that it died, if it did."""
        case, self._case = self._case, None
        assert case is not None
        try:
            return decoded(msgspec.msgpack.Decoder(CaseRecord).decode, self.line.recv_bytes())
        except (EOFError, OSError, ProtocolError) as error:
            self.dead = True
            if isinstance(error, ProtocolError):
                _log.error("%s sent what is no record: %s", self._process.pid, error)
                self._process.kill()
            code = self._process.wait()
            how = f"was killed by {_signal(-code)}" if code < 0 else f"exited with {code}"
            detail = f"the process {self._process.pid} that ran this case {how}; nothing is known of the case"
            _log.error("%s: %s", case.id, detail)
            return unknown(case, detail)

    def close(self) -> None:
        """End it: an idle one by itself, so that its last log records come, any other at once. Idempotent."""
        with contextlib.ExitStack() as stack:  # from the last: each is done, whatever the others raise
            stack.callback(self._opened.close)
            stack.callback(self._process.wait)
            stack.callback(self._process.kill)
            if self._case is None and not self.dead:
                self._send(None)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_GRACE)

    def _send(self, case: Case | None) -> None:
        try:
            self.line.send(case)
        except OSError:  # it is dead: `take` finds out how
            return


def _start(fds: tuple[int, ...], arguments: list[str]) -> subprocess.Popen[bytes]:
    here = Surroundings.here()
    command = ["-m", "crumplezone.diagnostics.ci.runner", *map(str, fds), *arguments]
    # In a group of its own: the terminal's ctrl-C is for the run to handle.
    return run_python(here, command, here.environment, pass_fds=fds, process_group=0)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
