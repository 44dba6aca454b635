"""The native stack of a held thread, with names, without a helper.

What pystack adds are parameters, and where there is debug information, inlined functions and lines.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from crumplezone.reports.analysis.frames import REST_UNKNOWN
from crumplezone.reports.analysis.mangled import plain_name
from crumplezone.reports.records.report import Frame
from crumplezone.sandbox.autopsy.cfi.machine import MACHINES
from crumplezone.sandbox.autopsy.cfi.walk import walk
from crumplezone.sandbox.autopsy.sigframe.frame import SignalFrame, interrupted
from crumplezone.sandbox.process.elf import Stamp, locate, read_symbols, stamp_of
from crumplezone.sandbox.process.procfs import Map

_NAMES_MAX = 4096  # kept, since equal crashes ask for equal ones
_FILES_MAX = 32  # of one stack whose names are looked up

_known: dict[tuple[str, Stamp, int], str] = {}


def native_stack(pid: int, maps: list[Map], frame: SignalFrame) -> tuple[list[Frame], str]:
    """The stack that a signal found, innermost first; at least the place of the fault.

    Args:
        pid: A process that stands still.
        maps: Its mappings.
        frame: Of the signal.

    Returns:
        The frames, and why there are no more; empty: the last is where the thread began. Where it is not
        empty, the last frame says so too.

    Raises:
        OSError: /proc refuses (permissions), or the process is gone.
    """
    machine = MACHINES[frame.machine]
    with open(f"/proc/{pid}/mem", "rb", 0) as mem:
        registers = interrupted(mem, maps, frame)
        found = walk(mem, maps, registers, machine)
    places = [(place.pc, place.at) for place in found.places] or [(registers[machine.pc_name],) * 2]
    located = [(*locate(maps, pc), pc - at) for pc, at in places]
    names = _names((module, offset - back) for module, _, offset, back in located)
    frames = [
        Frame(names.get((module, offset - back), ""), module, build_id, hex(offset))
        for module, build_id, offset, back in located
    ]
    return [*frames, Frame(REST_UNKNOWN)] if found.ended else frames, found.ended


def _names(wanted: Iterable[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """What functions addresses of files are in; each file is read once at most, and not kept."""
    by_file = defaultdict[str, set[int]](set)
    for module, address in wanted:
        if module.startswith("/") and (module in by_file or len(by_file) < _FILES_MAX):
            by_file[module].add(address)
    return {
        (module, address): name
        for module, addresses in by_file.items()
        for address, name in _names_in(module, addresses)
    }


def _names_in(module: str, addresses: Iterable[int]) -> Iterator[tuple[int, str]]:
    stamp, symbols = stamp_of(module), None
    for address in addresses:
        name = _known.get((module, stamp, address))
        if name is None:
            symbols = symbols or read_symbols(module)
            mangled = symbols.function(address)
            name = plain_name(mangled) or mangled
            if len(_known) >= _NAMES_MAX:
                _known.clear()
            _known[module, stamp, address] = name
        yield address, name
