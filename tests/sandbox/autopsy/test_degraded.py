"""Evidence where the system refuses part of it, and evidence of deaths without a signal handler."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from crumplezone.errors import CellDied
from crumplezone.reports.records.report import Evidence, Exit, Step
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.cell import Cell
from tests.support.processes.cells import die, spec
from tests.support.processes.constrained import die_in_a_supervisor, on_x86_64
from tests.support.services import refuse
from tests.support.services.stunts import Echo, Stunt


def refused(evidence: Evidence) -> dict[str, Step]:
    return {step.name: step for step in evidence.steps if not step.ok}


@on_x86_64
def test_without_packet_pipes_there_is_text_and_status() -> None:
    evidence = die_in_a_supervisor("segv", "packet_pipes")
    assert (evidence.exit, evidence.returncode) == (Exit.SIGNAL, -signal.SIGSEGV)
    assert evidence.fault is not None
    assert "in handle" in evidence.faulthandler
    step = refused(evidence)["hold (packet pipe)"]
    assert "Invalid argument" in step.detail
    assert "O_DIRECT" in step.remedy


@on_x86_64
def test_without_ptrace_the_place_of_the_fault_remains() -> None:
    evidence = die_in_a_supervisor("segv", "ptrace")
    assert list(refused(evidence)) == ["stacks (pystack)"]
    assert "ptrace" in refused(evidence)["stacks (pystack)"].remedy
    assert evidence.fault is not None
    assert evidence.fault.address == "0x18"
    crashed = next(thread for thread in evidence.threads if thread.crashed)
    assert crashed.native[0].module.rpartition("/")[2].startswith("libc.so")
    assert crashed.native[0].build_id
    assert crashed.native[-1].symbol == "_start"  # by way of all that called it
    assert "for want of pystack's" in next(step.detail for step in evidence.steps if step.name == "callers")
    assert crashed.doing == "write"


def test_without_the_right_to_look_text_and_status_remain() -> None:
    evidence = die_in_a_supervisor("undumpable_segv", before_exec=refuse.capabilities)
    assert (evidence.exit, evidence.returncode) == (Exit.SIGNAL, -signal.SIGSEGV)
    assert "in handle" in evidence.faulthandler
    steps = refused(evidence)
    assert {"signal frame", "stacks (pystack)"} <= steps.keys()
    assert "CAP_SYS_PTRACE" in steps["signal frame"].remedy
    assert [phase.name for phase in evidence.flight] == ["start", "validate", "stunt"]


def test_without_pystack_the_report_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pystack").mkdir()
    (tmp_path / "pystack" / "__init__.py").touch()  # shadows the real one: there is no pystack.engine
    monkeypatch.syspath_prepend(tmp_path)
    evidence = die("segv")
    step = refused(evidence)["stacks (pystack)"]
    assert "pip install pystack" in step.detail + step.remedy
    assert "in handle" in evidence.faulthandler


@pytest.mark.parametrize("stunt", ["kill", "exit_native"])
def test_the_flight_recorder_survives_any_death(stunt: str) -> None:
    evidence = die(stunt)
    assert [phase.name for phase in evidence.flight] == ["start", "validate", "stunt"]
    assert evidence.flight[-1].took is None  # it died in there
    assert all(phase.took is not None for phase in evidence.flight[:-1])
    assert evidence.flight[0].ms > evidence.flight[1].ms > 0


def test_samples_end_where_the_cell_ends() -> None:
    evidence = die("balloon", memory_limit=300 << 20)
    rss = [sample.rss for sample in evidence.samples]
    assert rss[-1] > 300 << 20
    assert rss == sorted(rss)
    assert [s.ms for s in evidence.samples] == sorted((s.ms for s in evidence.samples), reverse=True)


def test_a_strangers_kill_is_told_from_an_oom_kill() -> None:
    evidence = die("kill")
    assert evidence.exit == Exit.KILLED
    assert "no OOM kill was counted" in evidence.detail
    assert all(before == after for before, after in evidence.kernel_kills.values())


def test_a_real_oom_kill_is_seen_in_the_cgroup(small_cgroup: Path) -> None:
    def join() -> None:
        (small_cgroup / "cgroup.procs").write_text(str(os.getpid()))

    evidence = die_in_a_supervisor("balloon", before_exec=join)
    assert evidence.exit == Exit.OOM
    assert "memory." in evidence.detail  # the cgroup's own counter, not the host's
    (rose,) = [counts for name, counts in evidence.kernel_kills.items() if name.startswith("memory.")]
    assert rose[1] == rose[0] + 1
    assert evidence.samples[-1].ms < 1000


def test_condemned_cells_are_looked_at() -> None:
    cell = Cell(spec())
    assert cell.call(Stunt("echo"), Echo, 30)
    died = cell.condemn(Exit.NON_FINITE, "NaN in row 0")
    assert isinstance(died, CellDied)
    evidence = Incident.of(died).evidence.result(30)
    assert (evidence.exit, evidence.detail) == (Exit.NON_FINITE, "NaN in row 0; killed by the supervisor")
    assert evidence.threads
    assert evidence.maps
    assert evidence.fault is None
    assert not psutil.pid_exists(evidence.pid)
