"""Cells and zygotes that die while they start, as often as a file says: ``"N HOW"``."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path
from typing import Any

import msgspec

from crumplezone.sandbox.child.loop import Room, find
from crumplezone.workers.cells.targets import SEEDS, TARGETS

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


def decode(config: msgspec.Raw, room: Room, preloaded: Any = None) -> Any:
    _live()
    return find(TARGETS["decode"])(config, room, preloaded)


def embed(config: msgspec.Raw, room: Room, preloaded: Any = None) -> Any:
    _live()
    return find(TARGETS["embed"])(config, room, preloaded)


def width(config: msgspec.Raw, room: Room, preloaded: Any = None) -> Any:
    _live()
    return find(TARGETS["width"])(config, room, preloaded)


def llama(config: msgspec.Raw, room: Room, preloaded: Any = None) -> Any:
    _live()
    return find(TARGETS["llama"])(config, room, preloaded)


def seed(config: msgspec.Raw, room: Room) -> Any:
    _live()
    return find(SEEDS["context"])(config, room)
