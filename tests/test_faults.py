"""Thirteen kinds of fault on three kinds of thread: each is held, and reported as what it was."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from crumplezone.errors import CellDied
from crumplezone.reports.schema import Evidence, Exit, Fault, Thread
from crumplezone.sandbox.cell import Cell, CellSpec
from tests.faults import BUILD_ID, KINDS, Config, Crash, Info, Survived, build

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="faults of x86-64")


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


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("crashlib"))


def die(library: Path, kind: str, thread: str) -> tuple[Evidence, Info]:
    cell = Cell(CellSpec("tests.faults:Faults", Config(str(library))))
    info = cell.info(Info)
    with pytest.raises(CellDied) as caught:
        cell.call(Crash(kind, thread), Survived, 60)
    evidence: Evidence = caught.value.incident.evidence.result(60)
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


@pytest.mark.parametrize("thread", ["main", "python", "native"])
@pytest.mark.parametrize("kind", KINDS)
def test_fault(library: Path, kind: str, thread: str) -> None:
    evidence, info = die(library, kind, thread)
    expected = EXPECTED[kind]
    fault = evidence.fault
    assert fault is not None
    assert (fault.name, evidence.returncode) == (expected.signal, -fault.signal)
    assert evidence.exit == (Exit.ABORT if expected.signal == "SIGABRT" else Exit.SIGNAL)
    if (kind, thread) == ("stack overflow", "native"):  # no alternate stack: the kernel kills at once
        assert (evidence.registers, fault.code) == ({}, None)
        return
    assert [step for step in evidence.steps if not step.ok] == []
    assert "Fatal Python error" in evidence.faulthandler
    assert fault.code_name in {
        expected.code,
        expected.code.replace("*", "MAPERR"),
        expected.code.replace("*", "ACCERR"),
    }
    assert (fault.access, fault.trap) == (expected.access, expected.trap)
    assert has_address(fault, expected.address, evidence, info), fault
    if expected.signal == "SIGABRT":
        assert (fault.sender_pid, fault.sender_uid) == (evidence.pid, os.getuid())
    check_stacks(evidence, thread, expected.function)


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


def test_registers_stay_those_of_the_fault_when_the_frame_is_mended(library: Path) -> None:
    evidence, _ = die(library, "jump to null", "main")
    assert int(evidence.registers["rip"], 16) == 0
    assert evidence.code_bytes == ""


def test_frames_can_be_found_in_the_file(library: Path) -> None:
    evidence, _ = die(library, "null", "main")
    table = subprocess.run(["nm", "--dynamic", library], capture_output=True, text=True, check=True).stdout
    (start,) = [int(line.split()[0], 16) for line in table.splitlines() if line.endswith(" T crash")]
    (frame,) = [frame for frame in crashed_thread(evidence).native if frame.symbol == "crash"]
    assert (frame.module, frame.build_id) == (str(library), BUILD_ID)
    assert start < int(frame.offset, 16) < start + 64
