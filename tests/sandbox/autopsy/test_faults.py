"""Thirteen kinds of fault on three kinds of thread: each is held, and reported as what it was."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import pytest

from crumplezone.reports.analysis.frames import REST_UNKNOWN
from crumplezone.reports.records.report import Exit
from crumplezone.sandbox.autopsy import autopsy
from tests.support.processes.crashes import EXPECTED, check_stacks, crashed_thread, die, has_address
from tests.support.processes.helpers import autopsies
from tests.support.records.stacks import by_pystack, comparable
from tests.support.services.faults import BUILD_ID, KINDS, build

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="faults of x86-64")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("crashlib"))


def check_own_stack(seen: autopsy._Seen, kind: str) -> None:
    """That the supervisor finds, frame by frame, what pystack does."""
    theirs = by_pystack(seen)
    if kind in {"stack overflow", "smashed stack"}:  # of which nobody has the whole stack
        assert seen.native[-1].symbol == REST_UNKNOWN
        last = next((at for at, frame in enumerate(theirs) if "left out" in frame.symbol), 1)
        assert comparable(seen.native[:last]) == comparable(theirs[:last])
    else:
        assert comparable(seen.native) == comparable(theirs)


@pytest.mark.parametrize("thread", ["main", "python", "native"])
@pytest.mark.parametrize("kind", KINDS)
def test_fault(library: Path, monkeypatch: pytest.MonkeyPatch, kind: str, thread: str) -> None:
    seen = autopsies(monkeypatch)
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
    check_own_stack(seen[0], kind)


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
