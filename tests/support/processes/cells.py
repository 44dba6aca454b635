"""Cells that run the stunt double."""

from __future__ import annotations

import psutil
import pytest

from crumplezone.errors import CellDied
from crumplezone.reports.records.report import Evidence
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.cell import Cell, CellSpec
from tests.support.services.stunts import Config, Echo, Stunt

TARGET = "tests.support.services.stunts:Double"


def spec(at_start: str = "", memory_limit: int | None = None) -> CellSpec:
    return CellSpec(TARGET, Config(at_start), memory_limit=memory_limit, start_deadline=60)


def die(name: str, deadline: float = 30, memory_limit: int | None = None, *, before: str = "") -> Evidence:
    """What is found of a cell that dies of a stunt; ``before`` is one that it survives."""
    cell = Cell(spec(memory_limit=memory_limit))
    if before:
        cell.call(Stunt(before), Echo, deadline)
    with pytest.raises(CellDied) as caught:
        cell.call(Stunt(name), Echo, deadline)
    evidence = Incident.of(caught.value).evidence.result(30)
    assert not psutil.pid_exists(evidence.pid)
    assert not cell.alive
    return evidence
