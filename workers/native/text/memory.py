"""Child side: a limit of memory for what is somebody else's program. Only cells import this module."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

MEMORY = 2**29  # bytes that it may take


@contextmanager
def little_memory() -> Iterator[None]:
    """With no more memory than that: what it asks for beyond that is a MemoryError.

    RLIMIT_DATA counts private writable memory (setrlimit(2)); what the cell has already counts too, and is
    the sixth number of statm, in pages (proc_pid_statm(5)).
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[5]) * resource.getpagesize()
    soft = used + MEMORY
    if before[0] != resource.RLIM_INFINITY:
        soft = min(soft, before[0])
    resource.setrlimit(resource.RLIMIT_DATA, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
