"""Native crashes of every kind, and what must be known of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from crumplezone.errors import CellDied
from crumplezone.reports.records.report import Evidence, Fault, Thread
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.cell import Cell, CellSpec
from tests.support.services.faults import Config, Crash, Info, Survived


@dataclass(frozen=True)
class Expected:
    """``address`` is what the fault's address must be, given the evidence; None: there is none."""

    signal: str
    code: str
    address: str | None = None
    access: str = ""
    trap: str = ""
    function: str = "crash_static"  # that crashed, or called what did


EXPECTED = {
    "null": Expected("SIGSEGV", "SEGV_MAPERR", "0x18", "write", "#PF"),
    "abort": Expected("SIGABRT", "SI_TKILL"),
    "stack overflow": Expected("SIGSEGV", "SEGV_*", "stack pointer", "write", "#PF", "overflow"),
    "double free": Expected("SIGABRT", "SI_TKILL"),
    "division": Expected("SIGFPE", "FPE_INTDIV", "program counter", trap="#DE"),
    "illegal instruction": Expected("SIGILL", "ILL_ILLOPN", "program counter", trap="#UD"),
    "terminate": Expected("SIGABRT", "SI_TKILL"),
    "jump to null": Expected("SIGSEGV", "SEGV_MAPERR", "0x0", "exec", "#PF"),
    "truncated file": Expected("SIGBUS", "BUS_ADRERR", "page + 5", "write", "#PF", "truncated_file"),
    "non-canonical": Expected("SIGSEGV", "SI_KERNEL", trap="#GP"),
    "smashed stack": Expected("SIGSEGV", "SI_KERNEL", trap="#GP", function="smash"),
    "write to read-only": Expected("SIGSEGV", "SEGV_ACCERR", "read-only", "write", "#PF"),
    "throw through ctypes": Expected("SIGABRT", "SI_TKILL"),
}


def die(library: Path, kind: str, thread: str) -> tuple[Evidence, Info]:
    cell = Cell(CellSpec("tests.support.services.faults:Faults", Config(str(library))))
    info = cell.info(Info)
    with pytest.raises(CellDied) as caught:
        cell.call(Crash(kind, thread), Survived, 60)
    evidence = Incident.of(caught.value).evidence.result(60)
    return evidence, info


def has_address(fault: Fault, expected: str | None, evidence: Evidence, info: Info) -> bool:
    if expected is None or fault.address is None:
        return fault.address == expected
    address, registers = int(fault.address, 16), evidence.registers
    return {
        "stack pointer": abs(address - int(registers["rsp"], 16)) < 8192,
        "program counter": address == int(registers["rip"], 16),
        "page + 5": address % 4096 == 5,
        "read-only": address == info.read_only,
    }.get(expected, fault.address == expected)


def crashed_thread(evidence: Evidence) -> Thread:
    (crashed,) = [thread for thread in evidence.threads if thread.crashed]
    return crashed


def check_stacks(evidence: Evidence, thread: str, function: str) -> None:
    crashed = crashed_thread(evidence)
    native = [frame.symbol.partition("(")[0] for frame in crashed.native]  # C++: with its arguments
    assert function in native
    if function != "smash":  # which destroyed its callers' frames
        assert "crash" in native[native.index(function) :]
    calling = ["call_native", "handle"] if thread == "main" else ["call_native"] if thread == "python" else []
    python = [frame.symbol for frame in crashed.python]
    assert [name for name in python if name in {"call_native", "handle"}] == calling
    assert (crashed.tid == evidence.pid) == (thread == "main")
    assert any(frame.symbol == "handle" for each in evidence.threads for frame in each.python)
