"""What the pools are given to do, and the same as a cell's service. Knows no llama.cpp."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from crumplezone.sandbox.child.loop import Room

TARGET, SEED = f"{__name__}:Chores", f"{__name__}:Seed"
FLOATS = 150_000  # float32: 600 kB


def nothing() -> int:
    """The least that there is to do."""
    return os.getpid()


def payload() -> npt.NDArray[np.float32]:
    """A large result, float32, shape (FLOATS,)."""
    return np.arange(FLOATS, dtype=np.float32)


def crash() -> None:
    """A real SIGSEGV."""
    ctypes.string_at(8)


def hang() -> None:
    """A native deadlock: the same mutex taken twice. No signal handler of Python's gets a turn."""
    libc = ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(64)  # PTHREAD_MUTEX_INITIALIZER is zeros in glibc
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


class Config(msgspec.Struct):
    """Nothing to configure."""


class Chore(msgspec.Struct, tag="chore"):
    """The name of a function above."""

    name: str


class Done(msgspec.Struct):
    """Its number; a large result lies in the arena."""

    number: int = 0


class Seed:
    """What a zygote preloads: nothing but these modules."""

    def __init__(self, _config: msgspec.Raw, _room: Room) -> None: ...

    def info(self) -> Config:
        """Nothing to tell."""
        return Config()


class Chores:
    """Serves `Chore` requests in a cell."""

    request_type: Any = Chore

    def __init__(self, _config: msgspec.Raw, room: Room, _preloaded: Any = None) -> None:
        self._arena = room.arena

    def info(self) -> Config:
        """Nothing to tell."""
        return Config()

    def handle(self, request: Chore) -> Done:
        """Do it."""
        match request.name:
            case "payload":
                self._arena.arrays([("f4", FLOATS)])[0][:] = payload()
                return Done(FLOATS)
            case "nothing":
                return Done(nothing())
            case "crash":
                crash()
            case "hang":
                hang()
        return Done()
