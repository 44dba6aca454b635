"""Run a program as it is, but armed and supervised: what it dies of is held, examined and reported."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import psutil

from crumplezone.diagnostics.exec.stderr import Copy
from crumplezone.errors import InputError, ReportError
from crumplezone.reports.formats.text import summary
from crumplezone.reports.printable import printable
from crumplezone.reports.records.report import Evidence, Exit
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.guest import Guest
from crumplezone.sandbox.cells.guest_server import GuestServer
from crumplezone.sandbox.child import startup
from crumplezone.sandbox.child.exec_hook import VARIABLE
from crumplezone.sandbox.process.launch import child_of, launch, stdio_taken
from crumplezone.sandbox.process.lines import Ends
from crumplezone.sandbox.process.process import Child, Process, children_kept
from crumplezone.workers.incidents.reporter import Reporter

# Of a child the rest is its parent's business: programs end their own workers by SIGTERM and by SIGKILL.
_OF_A_CHILD = {Exit.SIGNAL, Exit.ABORT, Exit.OOM, Exit.NATIVE_EXIT}
_PASSED_ON = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
_HANDLED = {*_PASSED_ON, signal.SIGWINCH, signal.SIGRTMIN}  # the last ends the thread that handles them
_SI_KERNEL = 0x80  # sigaction(2), si_code; here: the terminal has sent it to the program, too
_UNKNOWN = 255


@dataclass(frozen=True)
class ProgramLimits:
    """Of a program.

    Attributes:
        timeout: Seconds until it is ended, with its children; None: never.
        memory: Bytes of resident memory above which one of its Pythons is ended, or None.
    """

    timeout: float | None = None
    memory: int | None = None


def run(command: Sequence[str], limits: ProgramLimits, store: Path) -> int:
    """Run a program with the input, output, directory and environment of this process.

    Call it from the main thread of a process that has no other: it blocks signals, to pass them on.

    Args:
        command: The program and its arguments.
        limits: When it is ended.
        store: Where reports go.

    Returns:
        Its exit status; 128 + n if it died of signal n.

    Raises:
        InputError: There is no such program.
        OSError: No process, thread or descriptor could be had.
    """
    reporter = Reporter(store)
    try:
        outcome = _watch(command, limits, reporter)
        if isinstance(outcome, int):
            return _status(outcome)
        _tell(reporter, outcome, command)
        evidence = outcome.evidence.result()
        code = evidence.returncode
        if code is None and evidence.fault:
            code = -evidence.fault.signal
        return _UNKNOWN if code is None else _status(code)
    finally:
        reporter.close()


def _watch(command: Sequence[str], limits: ProgramLimits, reporter: Reporter) -> int | Incident:
    """Run it to its end, and all that was lost on the way to the end of its autopsy."""
    with stdio_taken(), contextlib.ExitStack() as stack:
        copy = Copy()
        stack.callback(copy.close)
        ignored = stack.enter_context(children_kept())
        # Before there is any thread, for all of them inherit this; but not the program.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
        guests = GuestServer(partial(_tell_of_child, reporter, command), limits.memory, copy.tail)
        stack.callback(guests.close)
        restore = partial(_restore, mask, ignored)
        begin, env = partial(_begin, command, restore, copy, guests), _environment(guests.address)
        guest = Guest(begin, env=env, memory_limit=limits.memory, stderr=copy.tail)
        stack.callback(guest.close)
        copy.begin()
        guests.open()
        stack.enter_context(_passing_on(guest, copy))
        outcome = guest.wait(limits.timeout)
        if isinstance(outcome, Incident):
            children = _descendants(guest.pid)  # it is stopped, if it was condemned, and can make no more
            evidence = outcome.evidence.result()
            if evidence.exit in {Exit.HANG, Exit.OOM}:
                for child in children:
                    with contextlib.suppress(psutil.Error):
                        child.kill()
                guests.end()
        return outcome


def _environment(address: str) -> dict[str, str]:
    paths = [*startup.__path__, os.environ.get("PYTHONPATH", "")]
    return {
        "GGML_NO_BACKTRACE": "1",  # else an abort starts gdb, and what holds the process gets in its way
        **os.environ,
        VARIABLE: address,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def _restore(mask: set[Any], ignored: bool) -> None:
    """In the program to be: signals as this process has inherited them."""
    if ignored:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _begin(
    command: Sequence[str],
    restore: Callable[[], None],
    copy: Copy,
    guests: GuestServer,
    env: Mapping[str, str],
) -> Process:
    """Start it. It stays in our process group: its terminal shall treat it as it would without us."""

    def execute(_: Ends) -> Child:
        try:
            # preexec_fn is safe here: this process has one thread. numpy's OpenBLAS had another, and ended it
            # for the fork (pthread_atfork(3)). Without preexec_fn there is no such fork, but a vfork: that
            # thread, which blocks no signals, would die of those that are to be passed on.
            # close_fds would take what a shell gave it.
            popen = subprocess.Popen(command, stderr=copy.end, env=env, preexec_fn=restore, close_fds=False)
        except OSError as error:
            if error.filename is None:  # no process could be had
                raise
            remedy = "for Python code put `python` or `python -m` before it"
            limit = f"must be a program that can be run: {error.strerror}; {remedy}"
            raise InputError("the command", command[0], limit) from error
        return child_of(popen, leads=False)

    process = launch(execute)
    guests.expect(process)
    return process


@contextlib.contextmanager
def _passing_on(guest: Guest, copy: Copy) -> Iterator[None]:
    """Pass signals on to the program, but those that its terminal has sent to it as well."""

    def handle() -> None:
        while (info := signal.sigwaitinfo(_HANDLED)).si_signo != signal.SIGRTMIN:
            if info.si_signo == signal.SIGWINCH:
                copy.resize()
            elif info.si_code != _SI_KERNEL:
                guest.signal(info.si_signo)

    thread = Thread(target=handle, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        assert thread.ident
        signal.pthread_kill(thread.ident, signal.SIGRTMIN)
        thread.join()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:  # it has ended
        return []


def _status(code: int) -> int:
    return code if code >= 0 else 128 - code


def _tell_of_child(reporter: Reporter, command: Sequence[str], pid: int, incident: Incident) -> None:
    """As `_tell`, on a thread of the server, while the program runs on."""
    arguments: Sequence[str] = []
    with contextlib.suppress(OSError):  # it is held, or has ended
        arguments = os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")[:-1]
    if incident.evidence.result().exit in _OF_A_CHILD:
        _tell(reporter, incident, arguments or command)


def _tell(reporter: Reporter, incident: Incident, command: Sequence[str]) -> None:
    """Report it, and say so."""
    path = Path(reporter.file_program(incident, command))
    reporter.flush()
    with contextlib.suppress(ReportError):  # it could not be written: the reporter has said why
        what = summary(reporter.store.read(path.name))
        lines = [what, *_advice(incident.evidence.result()), f"Report: {printable(str(path))}"]
        if sys.stderr:  # it may have been closed when this process began
            with contextlib.suppress(OSError):  # nobody reads it
                print(*(f"crumplezone: {line}" for line in lines), sep="\n", file=sys.stderr, flush=True)


def _advice(evidence: Evidence) -> Iterator[str]:
    """What would have shown more."""
    for step in evidence.steps:
        if step.remedy:
            yield printable(f"{step.name}: {step.detail}. What would allow it: {step.remedy}")
