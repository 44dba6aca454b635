"""A service that runs the Python code it is sent, so that a test can show its fault in place."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from typing import Any

import msgspec

from crumplezone.errors import CellDied
from crumplezone.reports.records.report import Evidence, Step
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.cell import Cell, CellSpec
from crumplezone.sandbox.child.loop import Room
from crumplezone.sandbox.process.launch import Launcher, spawn

TARGET = f"{__name__}:Tricks"


class Config(msgspec.Struct):
    """``library`` is what the code finds as ``lib``: `tests.faults.build`."""

    library: str = ""


class Info(msgspec.Struct):
    pid: int


class Trick(msgspec.Struct, tag="trick"):
    """``code`` runs with the service's modules, ``lib`` (libc if none was named) and ``room``."""

    code: str


class Done(msgspec.Struct):
    pid: int


class Tricks:
    """Serves `Trick` requests."""

    request_type: Any = Trick

    def __init__(self, config: msgspec.Raw, room: Room, _: object = None) -> None:
        self._room = room
        self._library = ctypes.CDLL(msgspec.msgpack.decode(config, type=Config).library or None)

    def info(self) -> Info:
        return Info(os.getpid())

    def handle(self, request: Trick) -> Done:
        modules = {each.__name__: each for each in (ctypes, logging, os, signal, sys, threading, time)}
        exec(request.code, modules | {"lib": self._library, "room": self._room})
        return Done(os.getpid())


def perform(
    code: str, deadline: float = 30, config: Config | None = None, start: Launcher = spawn, **options: Any
) -> Evidence:
    """The evidence of a cell that the code ends."""
    cell = Cell(CellSpec(TARGET, config or Config(), start_deadline=60, **options), start)
    try:
        cell.call(Trick(code), Done, deadline)
    except CellDied as died:
        return Incident.of(died).evidence.result(30)
    cell.close()
    raise AssertionError("it survived")


def failed(evidence: Evidence) -> dict[str, Step]:
    """The steps that were refused or went wrong."""
    return {step.name: step for step in evidence.steps if not step.ok}
