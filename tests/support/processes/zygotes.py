"""Zygotes of the stunt double."""

from __future__ import annotations

import queue
import threading
from types import FrameType
from typing import Any

import psutil

from crumplezone.reports.records.report import Evidence
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.cell import Cell, CellSpec
from crumplezone.sandbox.cells.zygote import _Line
from tests.support.services.stunts import Config, Echo, Stunt

DOUBLE = "tests.support.services.stunts:Double"
SPEC = CellSpec(DOUBLE, Config(), start_deadline=60)
Deaths = queue.SimpleQueue[Incident]


class Asked(threading.Event):
    """Set once a thread of which this is the profile function has sent a request to a zygote."""

    def __call__(self, frame: FrameType | None, event: str, called: Any) -> None:
        if event == "c_return" and called.__name__ == "send":
            while frame and frame.f_code is not _Line._call.__code__:
                frame = frame.f_back
            if frame:
                self.set()


def evidence_of(deaths: Deaths) -> Evidence:
    evidence: Evidence = deaths.get(timeout=30).evidence.result(30)
    return evidence


def echo(cell: Cell) -> None:
    assert cell.call(Stunt("echo", 5), Echo, 30) == Echo("echo", 5)


def parent(pid: int) -> int:
    ppid = psutil.Process(pid).ppid()
    assert ppid is not None
    return ppid
