"""The runner processes of a diagnostic run. One that dies takes its case along and nothing else."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

import msgspec

from crumplezone.diagnostics.ci.case import Case, run_case
from crumplezone.errors import CrumplezoneError
from crumplezone.reports.records.run import CaseRecord, Ending
from crumplezone.sandbox.child.arm import die_with
from crumplezone.sandbox.process.log_relay import LogRelay

# A runner has all that this process has read and imported, and starts at once.
_FORK = multiprocessing.get_context("fork")
_GRACE = 5.0  # seconds in which an idle runner ends by itself

_log = logging.getLogger("crumplezone.ci")

Do = Callable[[Case, Path], CaseRecord]


def run_all(
    cases: Sequence[Case], jobs: int, store: Path, log: logging.Handler, do: Do = run_case
) -> Generator[CaseRecord, None, None]:
    """Run cases, each in one of several processes; yields their records as they come.

    When it is closed, the runners are killed, and with them their cells.

    Args:
        cases: They are begun in this order.
        jobs: How many run at once.
        store: Directory of the crash reports.
        log: Is given the log records of all runners.
        do: What a runner does with a case.

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
                        remedy = "free processes or file descriptors, and go on with --resume"
                        raise CrumplezoneError(f"no runner could be started ({error}): {remedy}") from error
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
        for runner in runners:
            runner.close()


class _Runner:
    """One process. Each has a log relay of its own: it may die in the middle of a record."""

    def __init__(self, name: str, store: Path, log: logging.Handler, do: Do) -> None:
        self.dead = False
        self._case: Case | None = None
        self._relay = LogRelay(name, log)
        self.line, theirs = _FORK.Pipe()
        arguments = (theirs, self._relay, store, do)
        self._process = _FORK.Process(target=_serve, args=arguments, name=name, daemon=True)
        try:
            self._process.start()
        except BaseException:
            self.line.close()
            self._relay.close()
            raise
        finally:  # no later runner may inherit these: their ends of file tell of this one's death
            theirs.close()
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
            return msgspec.msgpack.decode(self.line.recv_bytes(), type=CaseRecord)
        except (EOFError, OSError):
            self.dead = True
            self._process.join()
            code = self._process.exitcode
            how = f"was killed by {_signal(-code)}" if code and code < 0 else f"exited with {code}"
            detail = f"the process {self._process.pid} that ran this case {how}; nothing is known of the case"
            _log.error("%s: %s", case.id, detail)
            return _unknown(case, detail)

    def close(self) -> None:
        """End it: an idle one by itself, so that its last log records come, any other at once."""
        if self._case is None and not self.dead:
            self._send(None)
            self._process.join(_GRACE)
        self._process.kill()
        self._process.join()
        self._process.close()
        self.line.close()
        self._relay.close()

    def _send(self, case: Case | None) -> None:
        try:
            self.line.send(case)
        except OSError:  # it is dead: `take` finds out how
            return


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _unknown(case: Case, detail: str) -> CaseRecord:
    return CaseRecord(case.id, case.model.name, case.shape, Ending.ERROR, detail=detail)


def _serve(line: Connection, relay: LogRelay, store: Path, do: Do) -> None:
    """A runner: cases come, records go, until there is None to do."""
    run = multiprocessing.parent_process()
    assert run is not None
    # One end of a pipe. Runners that were forked later have the other end too, and die first: the last one,
    # whose other end is the run's alone, then the one before it. The cells of each die with it in turn.
    die_with(run.sentinel)
    os.setpgid(0, 0)  # the terminal's ctrl-C is for the run to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as is its SIGTERM
    relay.take_over()
    logging.getLogger().setLevel(logging.INFO)
    logging.getLogger("llama.cpp").setLevel(logging.WARNING)
    while (case := line.recv()) is not None:
        _log.info("%s: begins", case.id)
        try:
            record = do(case, store)
        except Exception as error:  # noqa: BLE001 - whatever it was, the next case is another
            _log.exception("%s: could not be run", case.id)
            record = _unknown(case, f"could not be run ({type(error).__name__}: {error}); see run.log")
        what = record.detail and f": {record.detail}"
        _log.info("%s: %s in %.0f ms%s", case.id, record.ending.value, record.ms, what)
        line.send_bytes(msgspec.msgpack.encode(record))
