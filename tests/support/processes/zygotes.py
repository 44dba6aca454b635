"""Zygotes of the stunt double."""

from __future__ import annotations

import queue

import psutil

from crumplezone.reports.records.report import Evidence
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.cell import Cell, CellSpec
from tests.support.services.stunts import Config, Echo, Stunt

DOUBLE = "tests.support.services.stunts:Double"
SPEC = CellSpec(DOUBLE, Config(), start_deadline=60)
Deaths = queue.SimpleQueue[Incident]


def evidence_of(deaths: Deaths) -> Evidence:
    evidence: Evidence = deaths.get(timeout=30).evidence.result(30)
    return evidence


def echo(cell: Cell) -> None:
    assert cell.call(Stunt("echo", 5), Echo, 30) == Echo("echo", 5)


def parent(pid: int) -> int:
    ppid = psutil.Process(pid).ppid()
    assert ppid is not None
    return ppid
