"""The arena: one memfd shared by a supervisor and one cell. Only numbers are ever read from it.

Layout: a page for the nudge, the abort message and the marks of exits, a page for the flight recorder, then a
data zone that both sides cut into arrays by the same rule: in order, each aligned to 64 bytes.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from crumplezone.reports.records.report import Phase
from crumplezone.sandbox.ipc import flight_recorder as recorder
from crumplezone.sandbox.ipc.exit_marks import EXITED_AT, FINISHED_AT

_RECORDER_AT = mmap.PAGESIZE
HEADER = _RECORDER_AT + recorder.SIZE
_NUDGE_AT = 0  # one byte
_MESSAGE_AT = 8  # u32 length, then the text
_MESSAGE_MAX = 2048

Shape = tuple[str, int]  # dtype, number of elements


def _aligned(n: int) -> int:
    return (n + 63) & ~63


def offsets(shapes: Sequence[Shape]) -> list[int]:
    """Byte offset of each array in the data zone, and of its end as the last element."""
    at = [0]
    for dtype, count in shapes:
        at.append(at[-1] + _aligned(np.dtype(dtype).itemsize * count))
    return at


class Arena:
    """Shared memory of one cell, grown by the supervisor only.

    Args:
        fd: Descriptor of an existing memfd (child), or None to make one (supervisor).
    """

    def __init__(self, fd: int | None = None) -> None:
        self._owner = fd is None
        if fd is None:
            fd = os.memfd_create("crumplezone-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, HEADER)
            # A child that shrank the file would turn the supervisor's next read into SIGBUS; one that sealed
            # it against growth would fail the next request.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        self.fd = fd
        try:
            self._map = mmap.mmap(fd, os.fstat(fd).st_size)
            self._cut: tuple[tuple[Shape, ...], list[npt.NDArray[Any]]] = (), []  # as it was cut last
        except BaseException:  # no memory, or no descriptor: a map keeps one of its own
            self.close()
            raise

    @property
    def room(self) -> int:
        """Bytes of the data zone."""
        return os.fstat(self.fd).st_size - HEADER

    def reserve(self, shapes: Sequence[Shape]) -> None:
        """Make room for these arrays. Sparse: memory is used only where it is touched."""
        need = HEADER + offsets(shapes)[-1]
        if need > len(self._map):
            if self._owner:
                os.ftruncate(self.fd, need)
            self._map = mmap.mmap(self.fd, os.fstat(self.fd).st_size)
            self._cut = (), []

    def arrays(self, shapes: Sequence[Shape]) -> list[npt.NDArray[Any]]:
        """Views of the data zone, cut into these arrays. Copy what must outlive the next call."""
        wanted = tuple(shapes)
        if wanted != self._cut[0]:
            self.reserve(wanted)
            places = zip(wanted, offsets(wanted), strict=False)
            views = [np.frombuffer(self._map, dtype, count, HEADER + at) for (dtype, count), at in places]
            self._cut = wanted, views
        return self._cut[1].copy()

    def nudge(self) -> None:
        """Supervisor: ask the child to end its call early. This lasts until it is seen, in whichever call."""
        self._map[_NUDGE_AT] = 1

    def nudged(self) -> bool:
        """Child: whether there was a nudge since the last look."""
        if not self._map[_NUDGE_AT]:
            return False
        self._map[_NUDGE_AT] = 0
        return True

    def note_abort(self, text: bytes) -> None:
        """Child: leave the reason of an abort where it can be read after any death."""
        text = text[:_MESSAGE_MAX]
        self._map[_MESSAGE_AT + 4 : _MESSAGE_AT + 4 + len(text)] = text
        self._map[_MESSAGE_AT : _MESSAGE_AT + 4] = len(text).to_bytes(4, "little")

    def abort_note(self) -> str:
        """Supervisor: the reason that the child left, or an empty string."""
        length = min(int.from_bytes(self._map[_MESSAGE_AT : _MESSAGE_AT + 4], "little"), _MESSAGE_MAX)
        note = self._map[_MESSAGE_AT + 4 : _MESSAGE_AT + 4 + length]
        return note.partition(b"\0")[0].decode("utf-8", "replace")

    def native_exit(self) -> bool:
        """Supervisor: whether native code called exit(), as `ExitMarks` has it."""
        return self._map[EXITED_AT] != 0 and self._map[FINISHED_AT] == 0

    def recorder(self) -> recorder.Recorder:
        """Child: the flight recorder."""
        return recorder.Recorder(memoryview(self._map)[_RECORDER_AT:HEADER])

    def flight(self, end: int) -> list[Phase]:
        """Supervisor: what the child recorded, oldest first; ``end`` is when it was lost, monotonic ns."""
        return recorder.read(self._map[_RECORDER_AT:HEADER], end)

    def close(self) -> None:
        """Close the descriptor; the map goes with its last view."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
