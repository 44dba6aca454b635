"""Child side: marks in the arena that tell who called exit(3). The standard library only."""

from __future__ import annotations

import ctypes
import mmap

_PROT_READ_WRITE, _MAP_SHARED, _MAP_FIXED = 3, 1, 16

# In the first page of the arena: a sem_t, and a byte.
EXITED_AT, FINISHED_AT = 4032, 4088


class ExitMarks:
    """Leaves in the arena who called exit(3): Python, or native code behind its back.

    libc's exit() posts a semaphore there. Python's end, which comes before that, is noted by `finished`.
    _exit(2) leaves neither. The page stays mapped to the very end: a handler of exit() cannot be taken back.
    """

    def __init__(self, arena_fd: int) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._page = self._map(None, _MAP_SHARED, arena_fd)
        post = ctypes.cast(self._libc.sem_post, ctypes.c_void_p)
        self._libc["__cxa_atexit"](post, ctypes.c_void_p(self._page + EXITED_AT), None)

    def move(self, arena_fd: int) -> None:
        """In a fork, which has inherited the handler: leave them in its own arena."""
        self._map(self._page, _MAP_SHARED | _MAP_FIXED, arena_fd)

    def finished(self) -> None:
        """Note that Python comes to its end."""
        ctypes.c_ubyte.from_address(self._page + FINISHED_AT).value = 1

    def _map(self, address: int | None, flags: int, fd: int) -> int:
        size = ctypes.c_size_t(mmap.PAGESIZE)
        page: int = self._libc.mmap(
            ctypes.c_void_p(address), size, _PROT_READ_WRITE, flags, fd, ctypes.c_long(0)
        )
        if page == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), "the arena cannot be mapped")
        return page
