"""The arena: one memfd shared by a supervisor and one cell. Only numbers are ever read from it.

Layout: a page for the nudge, the abort message and the marks of exits, a page for the flight recorder, then a
data zone that both sides cut into arrays by the same rule: in order, each aligned to 64 bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import io
import mmap
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from crumplezone.errors import ShortageError
from crumplezone.reports.records.report import Phase
from crumplezone.sandbox.ipc import flight_recorder as recorder
from crumplezone.sandbox.ipc.channel import ProtocolError
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


_RESIZED = "changed the size of its arena, which only the supervisor does"
_PUNCH_HOLE = 3  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE (fallocate(2))
_PIECE, _KEPT = 2**22, 2**26  # bytes that are copied at once; of more than this, no page is kept


def _made() -> int:
    """A memfd of its smallest size."""
    fd = os.memfd_create("crumplezone-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, HEADER)
        # A child that shrank the file would turn the supervisor's next read into SIGBUS; one that sealed
        # it against growth would fail the next request.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


@functools.cache
def huge_page() -> int:
    """Bytes by which shared memory may exceed the size of its file: the kernel may back its end by one."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size", "rb") as file:
            return int(file.read())
    except (OSError, ValueError):
        return mmap.PAGESIZE


@contextlib.contextmanager
def _told(need: int) -> Iterator[None]:
    """Of what cannot be had, one kind of error: the system says it in several."""
    try:
        yield
    except (OSError, MemoryError, OverflowError, ValueError) as error:
        needed = f"{need} bytes of memory shared with a cell"
        raise ShortageError(needed, str(error) or "no memory") from error


class Arena:
    """Shared memory of one cell, grown by the supervisor only.

    Args:
        fd: Descriptor of an existing memfd (child), or None to make one (supervisor).

    Raises:
        OSError: There is no memory or descriptor left.
    """

    def __init__(self, fd: int | None = None) -> None:
        self._owner = fd is None
        self._given = HEADER  # the largest size that the supervisor ever wanted the file to have
        self.fd = _made() if fd is None else fd
        try:
            self._map = mmap.mmap(self.fd, HEADER)
            self._cut: tuple[tuple[Shape, ...], list[npt.NDArray[Any]]] = (), []  # as it was cut last
        except BaseException:  # no memory, or no descriptor: a map keeps one of its own
            self.close()
            raise

    @property
    def room(self) -> int:
        """Bytes of the data zone: the supervisor goes by what it has mapped, the child by the file."""
        return (len(self._map) if self._owner else os.fstat(self.fd).st_size) - HEADER

    def reserve(self, shapes: Sequence[Shape]) -> None:
        """Make room for these arrays. Sparse: memory is used only where it is touched.

        What fails, or is interrupted, changes nothing for the next one: a file that is larger than what is
        mapped does no harm.

        Raises:
            ShortageError: There is no memory or descriptor for it.
            ProtocolError: The child has changed its size.
        """
        need = HEADER + offsets(shapes)[-1]
        if need > len(self._map):
            with _told(need):
                if self._owner:
                    self._grow(need)
                grown = mmap.mmap(self.fd, need)
            self._cut = (), []
            self._map = grown

    def _grow(self, need: int) -> None:
        self.held()
        # Noted first: if the next line is the last that is run, the file may have this size, or not.
        self._given = max(self._given, need)
        try:
            if os.fstat(self.fd).st_size < need:
                os.ftruncate(self.fd, need)
        except PermissionError as error:  # it may not shrink, so somebody has just made it larger still
            raise ProtocolError(_RESIZED) from error

    def held(self) -> int:
        """Supervisor: bytes of memory behind it, whoever has them mapped.

        Raises:
            ProtocolError: The child has changed its size, or allocated behind its end (fallocate(2)).
            OSError: It is closed.
        """
        found = os.fstat(self.fd)
        held = found.st_blocks * 512
        if found.st_size > self._given or held > self._given + huge_page():
            raise ProtocolError(_RESIZED)
        return held

    def arrays(self, shapes: Sequence[Shape]) -> list[npt.NDArray[Any]]:
        """Views of the data zone, cut into these arrays. Copy what must outlive the next call.

        Raises:
            ShortageError, ProtocolError: As `reserve`.
        """
        wanted = tuple(shapes)
        if wanted != self._cut[0]:
            self.reserve(wanted)
            places = zip(wanted, offsets(wanted), strict=False)
            views = [np.frombuffer(self._map, dtype, count, HEADER + at) for (dtype, count), at in places]
            self._cut = wanted, views
        return self._cut[1].copy()

    def left(self, shapes: Sequence[Shape]) -> list[npt.NDArray[Any]]:
        """Supervisor: as `arrays`, of what a lost child has left; zeros if it never had these."""
        if HEADER + offsets(shapes)[-1] > len(self._map):
            return [np.zeros(count, dtype) for dtype, count in shapes]
        return self.arrays(shapes)

    def taken(self, size: int) -> bytes:
        """Supervisor: the first bytes of the data zone.

        Of much, the pages are given back to the system as it is copied: it is never there twice.

        Raises:
            ShortageError: There is no memory for it.
        """
        into = io.BytesIO()
        with _told(size), memoryview(self._map) as whole:
            for at in range(HEADER, HEADER + size, _PIECE):
                n = min(_PIECE, HEADER + size - at)
                into.write(whole[at : at + n])
                if size > _KEPT:
                    with contextlib.suppress(OSError):  # not every kernel can
                        self._map.madvise(mmap.MADV_REMOVE, at, n)
            return into.getvalue()

    def nudge(self) -> None:
        """Supervisor: ask the child to end its call early. This lasts until it is seen, in whichever call."""
        with contextlib.suppress(ValueError):  # released: there is no child
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
        """Close the descriptor. The map stays for whoever asks what a lost child has left.

        It keeps all of the file's memory: what the child has added is given back.
        """
        fd, self.fd = self.fd, -1
        if fd >= 0:
            if self._owner:
                end = ctypes.c_int64(-(-self._given // mmap.PAGESIZE) * mmap.PAGESIZE)
                ctypes.CDLL(None).fallocate(fd, _PUNCH_HOLE, end, ctypes.c_int64(2**62))
            os.close(fd)

    def release(self) -> None:
        """Close everything, where nobody asks; under a view that is left, the map goes with that."""
        self.close()
        self._cut = (), []
        with contextlib.suppress(BufferError):
            self._map.close()
