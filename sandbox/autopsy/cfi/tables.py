"""Where a module's call frame information lies, and the entry for one address.

It is read from the memory of the process, where every unwinder reads it: the file may be another by now, and
the vDSO has none. The linker's search table (.eh_frame_hdr) leads to an entry in some twenty reads.
Layout: LSB Core, "Exception Frames"; elf(5).
"""

from __future__ import annotations

import bisect
import struct
from dataclasses import dataclass
from typing import BinaryIO

from crumplezone.sandbox.autopsy.cfi.cursor import OMITTED, Cursor, NonsenseError
from crumplezone.sandbox.process.procfs import Map, read_at

_MAGIC = b"\x7fELF\x02\x01"
_PT_LOAD, _PT_GNU_EH_FRAME = 1, 0x6474E550
_SEGMENT = struct.Struct("<IIQQQQQQ")  # type, flags, offset, address, physical, size, in memory, align
_SEGMENTS_MAX, _MAPS_BACK = 64, 256
_ENTRY_MAX = 64 * 1024  # bytes of a CIE or an FDE; compilers make some dozens
_AUGMENTATION_MAX = 16
_TABLE = bytes(
    (1, 0x03, 0x3B)
)  # version; counted in 4 bytes; sorted pairs of 4 bytes, from the header's place
_ALIGN_MAX = 64


@dataclass(frozen=True)
class Rules:
    """The entry of a function: programs that say where its caller's registers are.

    Attributes:
        begin: The first address it is about.
        initial: The program that all functions of its kind begin with, and where it lies.
        program: Its own.
        code_align: What advances count in.
        data_align: What offsets count in.
        return_register: The column that holds the return address.
        signal: It is the trampoline of a signal handler: what it leads to was interrupted, not called.
        pointers: How addresses are encoded in programs.
    """

    begin: int
    initial: Cursor
    program: Cursor
    code_align: int
    data_align: int
    return_register: int
    signal: bool
    pointers: int


def find_rules(mem: BinaryIO, maps: list[Map], within: Map, pc: int) -> Rules:
    """The entry for an address.

    Args:
        mem: /proc/PID/mem.
        maps: The mappings of the process.
        within: The one that holds the address.
        pc: The address.

    Raises:
        NonsenseError: There is none, or it makes no sense.
    """
    header = _header_of(mem, _base(maps, within))
    entry = _search(mem, header, pc)
    if entry is None:
        raise NonsenseError("no entry is about this address")
    rules, size = _entry(mem, entry)
    if not rules.begin <= pc < rules.begin + size:
        raise NonsenseError("no entry is about this address")
    return rules


def _base(maps: list[Map], within: Map) -> int:
    """Where the file that a mapping belongs to begins in memory."""
    at = bisect.bisect_left(maps, within.start, key=lambda each: each.start)
    for each in reversed(maps[max(at - _MAPS_BACK, 0) : at + 1]):
        if each.path == within.path and each.offset == 0:
            return each.start
    raise NonsenseError("its file's beginning is not mapped")


def _header_of(mem: BinaryIO, base: int) -> int:
    """Address of the module's search table."""
    head = read_at(mem, base, 64)
    if len(head) < 64 or not head.startswith(_MAGIC):
        raise NonsenseError("no ELF header in memory")
    (place,) = struct.unpack_from("<Q", head, 32)
    size, count = struct.unpack_from("<HH", head, 54)
    if size != _SEGMENT.size:
        raise NonsenseError("segments of another size")
    raw = read_at(mem, base + place, min(count, _SEGMENTS_MAX) * size)
    segments = list(_SEGMENT.iter_unpack(raw[: len(raw) // size * size]))
    loaded = next((each for each in segments if each[0] == _PT_LOAD), None)
    found = next((each for each in segments if each[0] == _PT_GNU_EH_FRAME), None)
    if loaded is None or found is None:
        raise NonsenseError("it has no table of call frame information")
    return int(base - (loaded[3] - loaded[2]) + found[3])


def _search(mem: BinaryIO, header: int, pc: int) -> int | None:
    """Address of the last entry that begins at or below an address, by bisection in the process."""
    head = Cursor(read_at(mem, header, 32), header)
    version, pointers, counted, table = (head.unsigned(1) for _ in range(4))
    if bytes((version, counted, table)) != _TABLE:
        raise NonsenseError("its table of call frame information is of another kind")
    head.pointer(pointers)
    low, high = 0, head.unsigned(4)
    first = header + head.at
    found = None
    while low < high:
        middle = (low + high) // 2
        pair = Cursor(read_at(mem, first + 8 * middle, 8))
        if header + pair.signed(4) <= pc:
            found, low = header + pair.signed(4), middle + 1
        else:
            high = middle
    return found


def _block(mem: BinaryIO, address: int) -> tuple[Cursor, int]:
    """One CIE or FDE, and the address of its second word, from which an FDE's CIE is counted."""
    head = read_at(mem, address, 4)
    size = int.from_bytes(head, "little")
    if len(head) < 4 or not 4 < size <= _ENTRY_MAX:  # 0 ends the section; 2**32 - 1 would be a larger one
        raise NonsenseError("an entry of no sensible size")
    data = read_at(mem, address + 4, size)
    if len(data) < size:
        raise NonsenseError("it ends too early")
    return Cursor(data, address + 4), address + 4


def _entry(mem: BinaryIO, address: int) -> tuple[Rules, int]:
    """An FDE with its CIE, and how many bytes of code it is about."""
    own, second = _block(mem, address)
    kind, _ = _block(mem, second - own.unsigned(4))
    if kind.unsigned(4) != 0 or kind.unsigned(1) not in (1, 3):
        raise NonsenseError("an entry of another version")
    letters = kind.text(_AUGMENTATION_MAX)
    code_align, data_align = kind.uleb(), kind.sleb()
    if not (0 < code_align <= _ALIGN_MAX and 0 < abs(data_align) <= _ALIGN_MAX):
        raise NonsenseError("an entry of another alignment")
    return_register = kind.uleb()  # one byte in version 1, where it is below 128
    pointers = _augmentation(kind, letters)
    begin, size = own.pointer(pointers), own.number(pointers & 0x07)
    if letters:
        own.take(own.uleb())
    signal = "S" in letters
    return Rules(begin, kind, own, code_align, data_align, return_register, signal, pointers), size


def _augmentation(kind: Cursor, letters: str) -> int:
    """How pointers of the entries are encoded; leads up to the program."""
    if not letters:
        return 0
    if letters[0] != "z":
        raise NonsenseError("an entry of another kind")
    end = kind.uleb() + kind.at
    pointers = 0
    for letter in letters[1:]:
        if letter == "R":
            pointers = kind.unsigned(1)
        elif letter == "L":
            kind.unsigned(1)
        elif letter == "P":
            encoding = kind.unsigned(1)
            if encoding != OMITTED:
                kind.number(encoding)
        elif letter not in "SB":  # a signal's trampoline; signed with the other key of aarch64
            raise NonsenseError("an entry of another kind")
    kind.at = end
    return pointers
