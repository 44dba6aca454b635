"""The flight recorder: what a cell did last, in a ring of its arena that outlives any death.

One slot for each phase: its number, name, count, beginning and end (CLOCK_MONOTONIC, which supervisor and
cell share). A phase that never ended is the one that the cell died in.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
import time
from collections.abc import Iterator
from operator import itemgetter

from crumplezone.reports.records.report import Phase

_SLOT = struct.Struct("<I12sqqq")
SIZE = mmap.PAGESIZE
SLOTS = SIZE // _SLOT.size


class Recorder:
    """Child side: writes the ring.

    Args:
        memory: `SIZE` bytes of the arena.
    """

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._number = 0

    @contextlib.contextmanager
    def phase(self, name: str, count: int = 0) -> Iterator[None]:
        """Record that a phase begins, and that it ends.

        Args:
            name: Up to twelve ASCII characters.
            count: Tokens, rows or bytes, whatever the phase counts.
        """
        at = self._number % SLOTS * _SLOT.size
        self._number += 1
        slot = (self._number & 0xFFFFFFFF, name.encode(), count, time.monotonic_ns())
        _SLOT.pack_into(self._memory, at, *slot, 0)
        try:
            yield
        finally:
            _SLOT.pack_into(self._memory, at, *slot, time.monotonic_ns())


def read(memory: bytes, end: int) -> list[Phase]:
    """Supervisor side: the phases in a ring, oldest first. Every byte of it is untrusted.

    Args:
        memory: `SIZE` bytes of the arena.
        end: When the cell was lost, nanoseconds of CLOCK_MONOTONIC.
    """
    slots = [slot for slot in _SLOT.iter_unpack(memory[: SLOTS * _SLOT.size]) if slot[0]]
    phases = []
    for _, raw, count, began, ended in sorted(slots, key=itemgetter(0)):
        name = raw.rstrip(b"\0").decode("ascii", "replace")
        took = round((ended - began) / 1e6, 3) if ended else None
        phases.append(Phase(name, count, round((end - began) / 1e6, 3), took))
    return phases
