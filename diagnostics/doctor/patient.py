"""Child side: what `doctor` has crash, to see what can be learnt of a crash on this machine."""

from __future__ import annotations

import ctypes
from typing import Any

import msgspec

from crumplezone.sandbox.child.loop import Room


class Healthy(msgspec.Struct, frozen=True):
    """Nothing to say or to configure."""


class Fall(msgspec.Struct, tag="fall", frozen=True):
    """Crash: read where nothing is mapped."""


class Patient:
    """A service that crashes when it is asked to. The arguments are those of any target."""

    request_type = Fall

    def __init__(self, config: msgspec.Raw, room: Room, preloaded: Any = None) -> None:
        del config, room, preloaded

    def info(self) -> Healthy:
        """Nothing."""
        return Healthy()

    def handle(self, request: Fall) -> Healthy:
        """Does not return."""
        del request
        ctypes.string_at(0x18, 1)
        return Healthy()
