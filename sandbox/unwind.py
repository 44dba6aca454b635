"""Native and Python stacks of a held process, by pystack. Run as a helper process: ``-m ... PID``.

A corrupt target can crash or stall an unwinder; the supervisor only reads the JSON that this prints.
"""

from __future__ import annotations

import ctypes
import functools
import signal
import sys
from typing import Any

import msgspec
from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import NoteSection

from crumplezone.reports.schema import Frame, Thread
from crumplezone.sandbox.procfs import Map, find_map, read_maps

_FRAMES_MAX = 128
_PR_SET_PDEATHSIG = 1


class Stacks(msgspec.Struct, frozen=True):
    """What the helper prints."""

    threads: list[Thread]
    error: str = ""


@functools.cache
def _elf(path: str) -> tuple[str, tuple[tuple[int, int, int], ...]]:
    """Build-id and (file offset, size, virtual address) of the loadable segments of an ELF file."""
    try:
        with open(path, "rb") as file:
            elf = ELFFile(file)
            loads = tuple((s["p_offset"], s["p_filesz"], s["p_vaddr"]) for s in elf.iter_segments("PT_LOAD"))
            for section in elf.iter_sections():
                if isinstance(section, NoteSection):
                    for note in section.iter_notes():
                        if note["n_type"] == "NT_GNU_BUILD_ID":
                            return str(note["n_desc"]), loads
            return "", loads
    except (OSError, ELFError):
        return "", ()


def _native(frame: Any, maps: list[Map]) -> Frame:
    within = find_map(maps, frame.address)
    if within is None or not within.path.startswith("/"):
        module = within.path if within else ""
        return Frame(symbol=frame.symbol, module=module, offset=hex(frame.address))
    build_id, loads = _elf(within.path)
    offset = frame.address - within.start + within.offset
    for at, size, address in loads:
        if at <= offset < at + size:
            offset += address - at
            break
    return Frame(
        symbol="" if frame.symbol in {"???", "??"} else frame.symbol,
        module=within.path,
        build_id=build_id,
        offset=hex(offset),
        file="" if frame.path in {"???", "??"} else frame.path,
        line=max(frame.linenumber, 0),
    )


def unwind(pid: int) -> list[Thread]:
    """Stacks of every thread, innermost frame first."""
    from pystack.engine import NativeReportingMode, get_process_threads

    maps = read_maps(pid)
    found = []
    for thread in get_process_threads(pid, stop_process=True, native_mode=NativeReportingMode.ALL):
        native = [_native(frame, maps) for frame in reversed(thread.native_frames)]
        python = [
            Frame(symbol=f.code.scope, file=f.code.filename, line=f.code.location.lineno)
            for f in thread.frames
        ]
        python.reverse()
        found.append(
            Thread(thread.tid, thread.name or "", native=native[:_FRAMES_MAX], python=python[:_FRAMES_MAX])
        )
    return found


def main() -> None:
    """Print the stacks of the process named on the command line as JSON."""
    # The thread that spawned us waits for us, so here its death is the supervisor's.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        stacks = Stacks(unwind(int(sys.argv[1])))
    except Exception as error:  # noqa: BLE001 - whatever fails here is a line of the report's provenance
        stacks = Stacks([], f"{type(error).__name__}: {error}")
    sys.stdout.buffer.write(msgspec.json.encode(stacks))


if __name__ == "__main__":
    main()
