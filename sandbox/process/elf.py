"""What an ELF file says of itself: its build-id, where its segments lie in memory, its functions.

The file is one that an untrusted process has mapped: it may be no ELF file, or one made to confuse.
Layout: elf(5), 64 bits and little-endian, as on x86-64 and aarch64.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_MAGIC = b"\x7fELF\x02\x01"
_PT_LOAD, _PT_NOTE, _SHT_SYMTAB, _SHT_DYNSYM, _STT_FUNC = 1, 4, 2, 11, 2
_SEGMENT = struct.Struct(
    "<IIQQQQQQ"
)  # type, flags, offset, address, physical address, size, in memory, align
_SECTION = struct.Struct("<IIQQQQIIQQ")  # name, type, flags, address, offset, size, link, info, align, entry
_SYMBOL = struct.Struct("<IBBHQQ")  # name, info, other, section, value, size
_NT_GNU_BUILD_ID, _GNU = 3, b"GNU\0"
_HEADERS_MAX, _NOTES_MAX, _TABLE_MAX, _NAME_MAX = 1024, 64 * 1024, 64 * 1024 * 1024, 4096


@dataclass(frozen=True)
class Elf:
    """``loads``: (file offset, size, address) of each loadable segment, in bytes."""

    build_id: str = ""
    loads: tuple[tuple[int, int, int], ...] = ()

    def address(self, offset: int) -> int:
        """The address that the file's own symbols have for a byte of the file."""
        for at, size, address in self.loads:
            if at <= offset < at + size:
                return (offset - at + address) % 2**64
        return offset


@dataclass(frozen=True)
class Symbols:
    """A file's symbol table, as it lies there: it is asked about few addresses."""

    table: bytes = b""
    strings: bytes = b""

    def begins(self, address: int) -> bool:
        """Whether a function begins at an address."""
        packed = address.to_bytes(8, "little")
        at = self.table.find(packed)
        while at >= 0:
            if at % _SYMBOL.size == 8 and self.table[at - 4] & 15 == _STT_FUNC:
                return True
            at = self.table.find(packed, at + 1)
        return False

    def function(self, address: int) -> str:
        """The name, as linkers know it, of the function that an address is in; empty if none is known."""
        for name, info, _, _, start, size in _SYMBOL.iter_unpack(self.table):
            if info & 15 == _STT_FUNC and start <= address < start + size:
                return self.strings[name : name + _NAME_MAX].partition(b"\0")[0].decode(errors="replace")
        return ""


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    # By now the path may be a named pipe, which would wait for ever.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode) or os.pread(fd, len(_MAGIC), 0) != _MAGIC:
            raise ValueError("no ELF file of 64 bits, little-endian")
        yield fd
    finally:
        os.close(fd)


def _headers(fd: int, kind: struct.Struct, at: int, sizes_at: int) -> list[tuple[int, ...]]:
    """The table whose place is told at one offset of the file's header, and its entries' size at another."""
    (table,) = struct.unpack("<Q", os.pread(fd, 8, at))
    size, count = struct.unpack("<HH", os.pread(fd, 4, sizes_at))
    if size != kind.size:
        return []
    raw = os.pread(fd, min(count, _HEADERS_MAX) * size, table)
    return list(kind.iter_unpack(raw[: len(raw) // size * size]))


@functools.cache
def read_elf(path: str) -> Elf:
    """Read a file's headers; an empty `Elf` if it cannot be had or is none."""
    try:
        with _opened(path) as fd:
            segments = _headers(fd, _SEGMENT, 32, 54)
            found = (
                _build_id(os.pread(fd, min(size, _NOTES_MAX), at), 8 if align == 8 else 4)
                for kind, _, at, _, _, size, _, align in segments
                if kind == _PT_NOTE
            )
            loads = ((at, size, start) for kind, _, at, start, _, size, *_ in segments if kind == _PT_LOAD)
            return Elf(next(filter(None, found), ""), tuple(loads))
    except (OSError, ValueError, OverflowError, struct.error):
        return Elf()


def _build_id(notes: bytes, align: int) -> str:
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        name = at + 12
        content = at + -(-(12 + name_size) // align) * align
        if kind == _NT_GNU_BUILD_ID and notes[name : name + name_size] == _GNU:
            return notes[content : content + min(size, 64)].hex()
        at = content + -(-size // align) * align
    return ""


@functools.cache
def read_symbols(path: str) -> Symbols:
    """Read a file's symbol table, or what a stripped file exports; empty if it cannot be had or has none."""
    try:
        with _opened(path) as fd:
            sections = _headers(fd, _SECTION, 40, 58)
            tables = {kind: (at, size, link) for _, kind, _, _, at, size, link, *_ in sections}
            at, size, link = tables.get(_SHT_SYMTAB) or tables[_SHT_DYNSYM]
            table = os.pread(fd, min(size, _TABLE_MAX), at)
            _, _, _, _, at, size, *_ = sections[link]
            strings = os.pread(fd, min(size, _TABLE_MAX), at)
            return Symbols(table[: len(table) // _SYMBOL.size * _SYMBOL.size], strings)
    except (OSError, ValueError, OverflowError, LookupError, struct.error):
        return Symbols()
