"""A cell that measures widths, and that dies, hangs or lies as it is told."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import msgspec

from crumplezone.workers.native.width_cell import WidthCell
from crumplezone.workers.protocol.width import Fill, Step, Weigh

TARGET = "tests.support.native.width_stunts:StuntCell"
VARIABLE = "CRUMPLEZONE_TEST_WIDTH"  # "<request> <stunt>"


class Told(msgspec.Struct):
    """A `Stepped` in which anything can stand."""

    steps: Any
    nanoseconds: Any
    waited: Any = 0


LIES = {
    "not_a_number": Told(1, float("nan")),
    "negative": Told(1, -5),
    "no_step": Told(0, 10**6),
    "too_many_steps": Told(10**6, 10**12),
    "too_fast": Told(64, 64),
    "longer_than_the_call": Told(1, 2**49),
}


class StuntCell(WidthCell):
    def handle(self, request: Any) -> msgspec.Struct:
        where, stunt = os.environ[VARIABLE].split()
        if not isinstance(request, {"weigh": Weigh, "fill": Fill, "step": Step}[where]):
            return super().handle(request)
        if stunt == "segv":
            ctypes.memset(0x18, 1, 1)
        elif stunt == "hang":
            ctypes.CDLL(None).pause()
        elif stunt == "refuse":
            raise ValueError("refused on demand")
        return LIES[stunt]
