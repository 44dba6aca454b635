"""What this machine allows, what each lack costs, and what would cure it. What can be tried is tried."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import signal
from pathlib import Path

from crumplezone.diagnostics.doctor import machine
from crumplezone.diagnostics.doctor import model as doctor_model
from crumplezone.diagnostics.doctor.check import Check, State, attempt
from crumplezone.diagnostics.doctor.patient import Fall, Healthy
from crumplezone.errors import CellDied, CellRefused
from crumplezone.reports.analysis.stack import crashed_thread
from crumplezone.reports.records.report import Evidence, Report, Step
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.cell import Cell, CellSpec
from crumplezone.sandbox.host.scarcity import NO_CELL, remedy

_TARGET = "crumplezone.diagnostics.doctor.patient:Patient"
_DEADLINE = 20.0  # seconds, of each step with a cell
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_NO_CELL = "everything: no cell can run, and nothing runs outside of one"
_NO_STACKS = "native stacks of hangs, so that they are not grouped; of threads that did not crash; lines"
_STACKS = "stacks (pystack)"
_PIPE = "fault pipe"
# What a report lacks without each step of the autopsy, by the names that sandbox/ gives them.
_STEPS = {
    "hold (packet pipe)": "certainty: a crashed cell may have gone on before it is looked at",
    "hold (one slot)": "certainty: a crashed cell may have gone on before it is looked at",
    "hold": "registers, stacks and the place of the fault: a crashed cell was not held",
    "stop": "certainty: what is read of a crashed cell may not be of one moment",
    "maps": "modules: addresses have no names",
    "system calls": "what each thread was doing, and the signal frame",
    "signal frame": "registers, the address that faulted, the place of the fault",
    "callers": "the native stack of a crash of which pystack gets none",
    "threads": "what each thread was doing",
    "memory and limits": "memory and limits of the cell",
    "faulthandler": "the Python stack where pystack gets none",
    "autopsy": "all that is read of a crashed cell",
}
_NOT_OF_A_CRASH = {"call to nowhere", "reap"}  # for other crashes; what tells of the end, not of the machine


def examine(model: Path | None = None, reports: Path | None = None) -> list[Check]:
    """Look at everything, within some three seconds for a small model.

    Args:
        model: What must load. [default: the embedded model]
        reports: The store. [default: as of every command]
    """
    checks = [attempt("pidfd", _pidfd), *_crash()]
    held = any(check.name == "hold" and check.state is State.OK for check in checks)
    for name, look in (
        ("seccomp", machine.seccomp),
        ("landlock", machine.landlock),
        ("core files", functools.partial(machine.cores, held=held)),
        ("memory", machine.memory),
        ("OOM counters", machine.oom_counters),
        ("threads", machine.threads),
        ("descriptors", machine.descriptors),
        ("report store", functools.partial(machine.store, reports)),
    ):
        checks.append(attempt(name, look))
    return checks + doctor_model.examine(model)


def lacking(checks: list[Check]) -> bool:
    """Whether anything is lacking that costs evidence or work."""
    return any(check.state is State.LACK and check.costs for check in checks)


def _pidfd() -> Check:
    try:
        fd = os.pidfd_open(os.getpid())
        try:
            signal.pidfd_send_signal(fd, 0)
        finally:
            os.close(fd)
    except OSError as error:
        remedy = "Linux >= 5.4, and a seccomp profile that allows pidfd_open, pidfd_send_signal and waitid"
        return Check("pidfd", State.LACK, str(error), _NO_CELL, remedy)
    return Check("pidfd", State.OK, "signals reach the process they are meant for")


def _crash() -> list[Check]:
    """Have a cell crash for real, and see what is learnt of it."""
    cure = "free memory, processes or file descriptors"
    try:
        with contextlib.closing(Cell(CellSpec(_TARGET, Healthy(), _DEADLINE))) as cell:
            cell.call(Fall(), Healthy, _DEADLINE)
    except CellDied as died:
        evidence = Incident.of(died).evidence.result()
        if evidence.phase != "start":
            return _learnt(evidence)
        said = f"{evidence.detail} {evidence.stderr_tail[-200:]}"
        found = f"a cell did not start: {evidence.exit.value}. {said}"
    except (*NO_CELL, CellRefused) as error:
        found, cure = f"a cell did not start: {error}", remedy(error)
    else:
        found = "a cell read what is not mapped, and did not crash"
    return [Check("hold", State.LACK, found, _NO_CELL, cure)]


def _learnt(evidence: Evidence) -> list[Check]:
    """What could be read of a crashed cell, and every step that was refused."""
    failed = [each for each in evidence.steps if not each.ok and each.name not in {_STACKS, *_NOT_OF_A_CRASH}]
    checks = [_refused(step) for step in failed]
    if not any(check.name == _PIPE for check in checks):
        checks.insert(0, Check(_PIPE, State.OK, "a packet pipe of one slot holds its writer"))
    return [*checks, _hold(evidence), _pystack(), _ptrace(evidence)]


def _refused(step: Step) -> Check:
    name = _PIPE if step.name.startswith("hold (") else step.name
    return Check(name, State.LACK, step.detail, _STEPS.get(step.name, "a part of the evidence"), step.remedy)


def _hold(evidence: Evidence) -> Check:
    if not (evidence.fault and evidence.registers):
        found = f"a crash ended as {evidence.exit.value}, without registers"
        return Check("hold", State.LACK, found, _STEPS["hold"], "see the steps that failed")
    took = sum(step.ms for step in evidence.steps)
    read = f"{len(evidence.registers)} registers, {len(evidence.maps)} mappings"
    return Check("hold", State.OK, f"a crashed cell was held and read ({read}) in {took:.0f} ms")


def _pystack() -> Check:
    with contextlib.suppress(ImportError):  # a parent package is missing, or its metadata
        if importlib.util.find_spec("pystack.engine"):
            return Check("pystack", State.OK, importlib.metadata.version("pystack"))
    return Check("pystack", State.LACK, "it is not installed", _NO_STACKS, "pip install pystack")


def _ptrace(evidence: Evidence) -> Check:
    """The stacks of the cell that crashed."""
    yama = f"Yama's ptrace_scope is {_YAMA.read_text().strip()}" if _YAMA.exists() else "no Yama"
    step = next((each for each in evidence.steps if each.name == _STACKS), Step(_STACKS, ok=False))
    if "pystack is not installed" in step.detail:
        return Check("ptrace", State.UNKNOWN, f"not tried without pystack; {yama}")
    if not step.ok:
        remedy = step.remedy or "see the detail; the stacks are taken by a helper process"
        return Check("ptrace", State.LACK, f"{step.detail or 'not tried'}; {yama}", _NO_STACKS, remedy)
    thread = crashed_thread(Report("", "", evidence))
    native, python = (len(thread.native), len(thread.python)) if thread else (0, 0)
    found = f"{native} native and {python} Python frames of a crashed cell; {yama}"
    if native > 1 and python:
        return Check("ptrace", State.OK, found)
    return Check("ptrace", State.LACK, found, _NO_STACKS, "report this: nothing was refused")
