"""Cells and zygotes that die while they start, as often as a file says: ``"N HOW"``."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from crumplezone.sandbox.child.loop import Room, find
from crumplezone.workers.cells.targets import SEEDS, TARGETS, Kind

VARIABLE = "CRUMPLEZONE_TEST_MORTAL"


def _live() -> None:
    file = Path(os.environ[VARIABLE])
    left, how = file.read_text().split()
    if int(left):
        file.write_text(f"{int(left) - 1} {how}")
        {"kill": _kill, "segv": _segv, "stop": _stop}[how]()


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _segv() -> None:
    ctypes.memset(0x18, 1, 1)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _mortal(kind: Kind) -> Callable[..., Any]:
    def cell(config: msgspec.Raw, room: Room, preloaded: Any = None) -> Any:
        _live()
        return find(TARGETS[kind])(config, room, preloaded)

    return cell


decode, embed = _mortal("decode"), _mortal("embed")
width, llama = _mortal("width"), _mortal("llama")


def seed(config: msgspec.Raw, room: Room) -> Any:
    _live()
    return find(SEEDS["context"])(config, room)
