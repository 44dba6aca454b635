"""The arena, where memory, descriptors or patience run out, and where the child is hostile."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from crumplezone.errors import ShortageError
from crumplezone.sandbox.ipc.arena import HEADER, Arena, huge_page
from crumplezone.sandbox.ipc.channel import ProtocolError
from tests.support.decoders import descriptors, limited, opened_since

MIB = 1 << 20


def no_memory() -> contextlib.AbstractContextManager[None]:
    found = re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return limited(resource.RLIMIT_AS, (int(found[1]) << 10) + MIB)


def no_descriptor() -> contextlib.AbstractContextManager[None]:
    free = os.dup(0)
    os.close(free)
    return limited(resource.RLIMIT_NOFILE, free)


def no_large_file() -> contextlib.AbstractContextManager[None]:
    return limited(resource.RLIMIT_FSIZE, HEADER)


@pytest.fixture
def arena() -> Iterator[Arena]:
    before = descriptors()
    one = Arena()
    yield one
    one.release()
    assert opened_since(before) == []


def check(arena: Arena, n_bytes: int) -> None:
    """What is written into so many bytes is what a child reads there."""
    (room,) = arena.arrays([("u1", n_bytes)])
    room[-1] = n_bytes % 251
    child = Arena(os.dup(arena.fd))
    (seen,) = child.arrays([("u1", n_bytes)])
    assert seen[-1] == n_bytes % 251
    del seen
    child.release()


@pytest.mark.parametrize("shortage", [no_memory, no_descriptor, no_large_file])
def test_a_shortage_is_told_and_then_forgotten(
    arena: Arena, shortage: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    check(arena, MIB)
    with shortage(), pytest.raises(ShortageError, match="free memory or descriptors"):
        arena.reserve([("u1", 64 * MIB)])
    for size in (2 * MIB, 100 * MIB, MIB):  # less than what failed, more, and less again
        check(arena, size)


@pytest.mark.parametrize("size", [2**47, 2**63 - HEADER - 64, 2**70])
def test_what_nobody_can_have_is_a_shortage(arena: Arena, size: int) -> None:
    with pytest.raises(ShortageError):
        arena.reserve([("u1", size)])
    check(arena, MIB)


@pytest.mark.parametrize("late", [True, False], ids=["truncated", "not yet"])
def test_an_interrupt_before_it_is_mapped(
    arena: Arena, monkeypatch: pytest.MonkeyPatch, *, late: bool
) -> None:
    truncate = os.ftruncate

    def interrupted(fd: int, size: int) -> None:
        if late:
            truncate(fd, size)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            arena.reserve([("u1", 64 * MIB)])
    for size in (2 * MIB, 100 * MIB, MIB):
        check(arena, size)


def test_a_memfd_that_cannot_be_given_its_size_is_closed() -> None:
    before = descriptors()
    with limited(resource.RLIMIT_FSIZE, 0), pytest.raises(OSError, match="File too large"):
        Arena()
    assert opened_since(before) == []


def grown(fd: int) -> None:
    os.ftruncate(fd, 8 * MIB)


def written(fd: int) -> None:
    os.pwrite(fd, b"x", 8 * MIB)


def allocated(fd: int) -> None:
    """Memory behind the end, which leaves the size as it is: FALLOC_FL_KEEP_SIZE."""
    size = ctypes.c_int64(MIB + huge_page())
    assert ctypes.CDLL(None).fallocate(fd, 1, ctypes.c_int64(2**40), size) == 0


@pytest.mark.parametrize("tamper", [grown, written, allocated])
def test_a_child_that_changes_its_size_is_found_out(arena: Arena, tamper: Callable[[int], None]) -> None:
    check(arena, 1000)
    arena.held()
    tamper(arena.fd)
    with pytest.raises(ProtocolError, match="changed the size"):
        arena.held()
    for size in (2 * MIB, 64 * MIB):  # what the child has made of it, or more
        with pytest.raises(ProtocolError, match="changed the size"):
            arena.reserve([("u1", size)])


def test_a_child_that_makes_it_larger_in_the_last_moment(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    truncate = os.ftruncate

    def overtaken(fd: int, size: int) -> None:
        truncate(fd, 2 * size)
        truncate(fd, size)

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", overtaken)
        with pytest.raises(ProtocolError, match="changed the size"):
            arena.reserve([("u1", MIB)])


def test_what_a_child_has_added_is_given_back() -> None:
    arena = Arena()
    (kept,) = arena.arrays([("u1", MIB)])
    kept[:] = 5
    other = os.dup(arena.fd)  # the map of whoever asks keeps the file just so
    for at in range(8, 32):
        os.pwrite(other, bytes(MIB), at * MIB)
    before = os.fstat(other).st_blocks * 512
    arena.close()
    after = os.fstat(other).st_blocks * 512
    assert before >= 25 * MIB
    assert after <= 2 * MIB + huge_page()
    assert kept.min() == 5
    del kept
    arena.release()
    os.close(other)


@pytest.mark.parametrize("size", [3 * MIB + 5, 70 * MIB + 5])
def test_what_is_taken_is_whole_and_much_is_not_there_twice(arena: Arena, size: int) -> None:
    (room,) = arena.arrays([("u1", size)])
    room[:] = np.arange(size, dtype=np.uint8)
    expected = room.tobytes()
    assert arena.held() >= size
    assert arena.taken(size) == expected
    assert (arena.held() < size) == (size > 64 * MIB)
    check(arena, size)


def test_what_a_lost_child_has_left_can_be_read_of_a_closed_one() -> None:
    arena = Arena()
    shapes = [("i4", 10), ("u8", 4)]
    assert [array.tolist() for array in arena.left(shapes)] == [[0] * 10, [0] * 4]
    for array in arena.arrays(shapes):
        array[:] = 3
    arena.close()
    assert [array.tolist() for array in arena.left(shapes)] == [[3] * 10, [3] * 4]
    assert [array.tolist() for array in arena.left([("u1", MIB)])] == [[0] * MIB]
    arena.release()
    arena.nudge()  # nobody hears it
