"""Native and Python stacks of a held process, by pystack. Run as a helper process: ``-m ... PID PART FD``.

A corrupt target can crash or stall an unwinder; the supervisor only reads the JSON that this prints.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import itertools
import os
import signal
import sys
import threading
from enum import StrEnum
from typing import Any, BinaryIO

import msgspec

from crumplezone.reports.records.report import Frame, Thread
from crumplezone.sandbox.process.elf import locate, read_elf, read_symbols
from crumplezone.sandbox.process.procfs import Map, read_at, read_maps

_FRAMES_MAX, _OUTER_FRAMES = 128, 32
_UNKNOWN = {"??", "???"}  # as pystack calls what has no name
# What a signal handler returns to: mov $15,%rax; syscall (glibc, x86-64); mov x8,#139; svc #0 (vDSO, arm64).
_TRAMPOLINES = (bytes.fromhex("48c7c00f0000000f05"), bytes.fromhex("681180d2010000d4"))
_PR_SET_PDEATHSIG = 1
_STACK = 32 * 1024 * 1024  # bytes: pystack calls itself for each Python frame, with some 1.6 KiB

_symbols = functools.cache(read_symbols)


class Part(StrEnum):
    """Which stacks to take."""

    BOTH = "both"
    NATIVE = "native"
    PYTHON = "python"


class Stacks(msgspec.Struct, frozen=True):
    """What the helper prints. ``build_ids``: of every mapped ELF file that has one, by path."""

    threads: list[Thread]
    build_ids: dict[str, str] = {}
    error: str = ""
    missing: bool = False  # there is no pystack here
    refused: bool = False  # for want of a permission


def _demangled(name: str) -> str:
    with contextlib.suppress(OSError):  # no libstdc++
        demangle = ctypes.CDLL("libstdc++.so.6")["__cxa_demangle"]
        demangle.restype = ctypes.c_char_p
        return (demangle(name.encode(), None, None, None) or name.encode()).decode()
    return name


def _interrupted(frames: list[Any], mem: BinaryIO) -> set[int]:
    """Addresses of the frames that wait for no call to return: the innermost, and those around a signal."""
    found = {frame.address for frame in frames[:1]}
    for inner, outer in itertools.pairwise(frames):
        if read_at(mem, inner.address, 9).startswith(_TRAMPOLINES):
            found |= {inner.address, outer.address}
    return found


def _native(frame: Any, maps: list[Map], *, called: bool) -> Frame:
    symbol, file = ("" if text in _UNKNOWN else text for text in (frame.symbol, frame.path))
    module, build_id, offset = locate(maps, frame.address)
    # pystack looks up the address that a call returns to. A call that never returns (abort, throw) can be
    # its function's last instruction: the address is then the first of another function, or of none.
    if called and module.startswith("/") and not symbol.endswith("(inlined)"):
        symbols = _symbols(module)
        if not symbol or symbols.begins(offset):
            symbol = _demangled(symbols.function(offset - 1))
    return Frame(
        symbol=symbol,
        module=module,
        build_id=build_id,
        offset=hex(offset),
        file=file if frame.linenumber > 0 else "",  # without a line it is the ELF file again
        line=max(frame.linenumber, 0),
    )


def _both_ends(frames: list[Frame]) -> list[Frame]:
    """Innermost and outermost frames: of a stack overflow, where it ended and who began it."""
    if len(frames) <= _FRAMES_MAX:
        return frames
    left_out = Frame(symbol=f"({len(frames) - _FRAMES_MAX + 1} frames left out)")
    return [*frames[: _FRAMES_MAX - _OUTER_FRAMES - 1], left_out, *frames[-_OUTER_FRAMES:]]


def _thread(thread: Any, maps: list[Map], mem: BinaryIO) -> Thread:
    frames = list(reversed(thread.native_frames))
    exact = _interrupted(frames, mem)
    native = [_native(frame, maps, called=frame.address not in exact) for frame in frames]
    python = [
        Frame(symbol=f.code.scope, file=f.code.filename, line=f.code.location.lineno) for f in thread.frames
    ]
    python.reverse()
    return Thread(thread.tid, thread.name or "", native=_both_ends(native), python=_both_ends(python))


def unwind(pid: int, part: Part, maps: list[Map]) -> list[Thread]:
    """Stacks of every thread, innermost frame first.

    Raises:
        ImportError: There is no pystack.
        Exception: Whatever pystack raises.
    """
    from pystack.engine import NativeReportingMode, StackMethod, get_process_threads

    mode = NativeReportingMode.OFF if part == Part.PYTHON else NativeReportingMode.ALL
    # By this method it finds no interpreter before Python 3.13, and then it leaves Python alone.
    method = StackMethod.DEBUG_OFFSETS if part == Part.NATIVE else StackMethod.AUTO
    found = get_process_threads(pid, stop_process=True, native_mode=mode, method=method)
    with open(f"/proc/{pid}/mem", "rb", 0) as mem:
        return [_thread(thread, maps, mem) for thread in found]


def examine(pid: int, part: Part) -> Stacks:
    """All that can be had, and what went wrong."""
    maps: list[Map] = []
    build_ids: dict[str, str] = {}
    try:
        maps = read_maps(pid)
        paths = sorted({m.path for m in maps if m.path.startswith("/")})
        build_ids = {path: found for path in paths if (found := read_elf(path).build_id)}
        return Stacks(unwind(pid, part, maps), build_ids)
    except ImportError:
        return Stacks([], build_ids, "pystack is not installed: pip install pystack", missing=True)
    except Exception as error:  # noqa: BLE001 - whatever fails here is a line of the report's provenance
        refused = isinstance(error, PermissionError) or os.strerror(errno.EPERM) in str(error)
        return Stacks([], build_ids, f"{type(error).__name__}: {error}", refused=refused)


def main() -> None:
    """Print what can be found out about the process named on the command line, as JSON."""
    # The thread that spawned us waits for us, so here its death is the supervisor's.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    pid, part, line = int(sys.argv[1]), Part(sys.argv[2]), int(sys.argv[3])
    with contextlib.suppress(ImportError):  # to be told of by `examine`
        import pystack.engine  # noqa: F401 - what takes most of the start
    os.close(line)  # from now on the deadline runs

    def work() -> None:
        sys.stdout.buffer.write(msgspec.json.encode(examine(pid, part)))

    threading.stack_size(_STACK)
    worker = threading.Thread(target=work)
    worker.start()
    worker.join()


if __name__ == "__main__":
    main()
