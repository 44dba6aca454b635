"""One crash has one signature, whatever becomes of the helper that takes the stacks."""

from __future__ import annotations

import contextlib
import platform
import signal
import time
from pathlib import Path

import pytest

from crumplezone.reports.analysis.same import CUT, is_same
from crumplezone.reports.analysis.signature import sign
from crumplezone.reports.records.report import Evidence, Report, Signature
from crumplezone.sandbox.autopsy import stacks
from crumplezone.sandbox.autopsy.stacks import take_stacks
from crumplezone.sandbox.cells.cell import Cell
from tests.support.processes.cells import spec
from tests.support.processes.crashes import die
from tests.support.processes.helpers import at_birth, kill_helpers
from tests.support.services.faults import build
from tests.support.services.tricks import failed


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("crashlib"))


def signed(evidence: Evidence) -> Signature:
    return sign(Report("", "", evidence))


def hide_pystack(monkeypatch: pytest.MonkeyPatch, empty: Path) -> None:
    (empty / "pystack").mkdir()
    (empty / "pystack" / "__init__.py").touch()
    monkeypatch.syspath_prepend(empty)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="faults of x86-64")
@pytest.mark.parametrize("thread", ["main", "python", "native"])
@pytest.mark.parametrize("kind", ["null", "throw through ctypes", "jump to null"])
def test_it_is_the_same_without_the_helper(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thread: str, kind: str
) -> None:
    whole, _ = die(library, kind, thread)
    assert failed(whole) == {}
    with monkeypatch.context() as patched:
        kill_helpers(patched)
        killed, _ = die(library, kind, thread)
    assert f"the helper ended with -{signal.SIGKILL:d}" in failed(killed)["stacks (pystack)"].detail
    hide_pystack(monkeypatch, tmp_path)
    missing, _ = die(library, kind, thread)
    assert "pip install pystack" in failed(missing)["stacks (pystack)"].detail
    assert signed(whole) == signed(killed) == signed(missing)
    assert signed(whole).confidence == "high"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="faults of x86-64")
def test_a_stack_that_is_destroyed_is_of_the_same_crash(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pystack goes on where there is no code; the supervisor says that it could not."""
    whole, _ = die(library, "smashed stack", "main")
    kill_helpers(monkeypatch)
    cut, _ = die(library, "smashed stack", "main")
    assert signed(cut).key == ["smash", CUT]
    assert is_same(signed(cut), signed(whole))


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(stacks, "time", found)
    return found


def test_the_deadline_runs_from_when_the_helper_runs(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """On a loaded machine an interpreter may take longer to start than to read a process."""
    with contextlib.closing(Cell(spec())) as cell:

        def late(_: object) -> None:
            clock.now += 3 * stacks._DEADLINE

        at_birth(monkeypatch, late)
        assert take_stacks(cell.pid).error == ""


def test_a_helper_that_never_begins_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "_START_DEADLINE", 0.05)
    with contextlib.closing(Cell(spec())) as cell:
        at_birth(monkeypatch, lambda helper: helper.send_signal(signal.SIGSTOP))
        assert "the helper did not start within" in take_stacks(cell.pid).error
