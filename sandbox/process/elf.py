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
from pathlib import Path

from crumplezone.sandbox.process.procfs import Map, find_map

_MAGIC = b"\x7fELF\x02\x01"
_PT_LOAD, _PT_NOTE, _SHT_SYMTAB, _SHT_DYNSYM, _STT_FUNC = 1, 4, 2, 11, 2
_NOT_CODE = (3, 4, 6)  # STT_SECTION, STT_FILE, STT_TLS
_STRENGTH = {1: 3, 2: 2, 0: 1}  # STB_GLOBAL, STB_WEAK, STB_LOCAL
_SEGMENT = struct.Struct(
    "<IIQQQQQQ"
)  # type, flags, offset, address, physical address, size, in memory, align
_SECTION = struct.Struct("<IIQQQQIIQQ")  # name, type, flags, address, offset, size, link, info, align, entry
_SYMBOL = struct.Struct("<IBBHQQ")  # name, info, other, section, value, size
_NT_GNU_BUILD_ID, _GNU = 3, b"GNU\0"
_HEADERS_MAX, _NOTES_MAX, _TABLE_MAX, _NAME_MAX = 1024, 64 * 1024, 64 * 1024 * 1024, 4096
_DEBUG = "/usr/lib/debug/.build-id"  # where distributions put what they strip
_ALIASES_MAX = 64  # symbols that one address is in
_FILES_MAX = 1024  # whose headers are kept


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
        """The name, as linkers know it, of what an address is in; empty if none is known.

        Of several it is the one that elfutils takes, and so pystack: global before local, else the nearest.
        """
        # Half a millisecond for the thirty thousand symbols of a Python, instead of thirty.
        import numpy as np  # here, for the helper that takes the stacks seldom needs it

        words = np.frombuffer(self.table, "<u8").reshape(-1, 3)
        distance = np.uint64(address % 2**64) - words[:, 1]  # unsigned: what lies behind is huge
        inside = np.flatnonzero((distance < words[:, 2]) & (words[:, 1] <= np.uint64(address % 2**64)))
        found = [_SYMBOL.unpack_from(self.table, int(at) * _SYMBOL.size) for at in inside[:_ALIASES_MAX]]
        found = [each for each in found if each[3] and each[1] & 15 not in _NOT_CODE]
        found = [each for each in found if each[1] >> 4] or found
        best = None
        for each in found:
            if best is None or _is_better(each, best):
                best = each
        name = best[0] if best else len(self.strings)
        return self.strings[name : name + _NAME_MAX].partition(b"\0")[0].decode(errors="replace")


def _is_better(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Of two symbols that an address is in; as in elfutils, dwfl_module_addrsym.c."""
    (_, info, _, _, start, size), (_, other_info, _, _, other_start, other_size) = one, other
    strength, others = (_STRENGTH.get(each >> 4, 0) for each in (info, other_info))
    if start > other_start or strength > others:
        return True
    same_start = start == other_start
    return same_start and size < other_size and strength >= others


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


Stamp = tuple[int, ...]
"""Which file a path names, and in which state: it may be replaced while this process runs."""


def stamp_of(path: str) -> Stamp:
    """The stamp of a file; empty if there is none."""
    try:
        found = Path(path).stat()
    except (OSError, ValueError):
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def read_elf(path: str) -> Elf:
    """Read a file's headers; an empty `Elf` if it cannot be had or is none."""
    return _read_elf(path, stamp_of(path))


def locate(maps: list[Map], address: int) -> tuple[str, str, int]:
    """Which file of a process an address is in.

    Returns:
        The file's path, its build-id, and the address that its own symbols have for this one. In no file the
        path is empty, or as "[vdso]", and the address as it was.
    """
    within = find_map(maps, address)
    if within is None or not within.path.startswith("/"):
        return within.path if within else "", "", address
    elf = read_elf(within.path)
    return within.path, elf.build_id, elf.address(address - within.start + within.offset)


@functools.lru_cache(maxsize=_FILES_MAX)
def _read_elf(path: str, _stamp: Stamp) -> Elf:
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


def read_symbols(path: str) -> Symbols:
    """Read a file's symbol table; empty if it cannot be had or has none.

    Of a stripped file it is the table that its distribution keeps apart, if that is installed, or else what
    the file exports.
    """
    build_id = read_elf(path).build_id
    apart = f"{_DEBUG}/{build_id[:2]}/{build_id[2:]}.debug"
    return (
        _symbols(path, _SHT_SYMTAB)
        or (_symbols(apart, _SHT_SYMTAB) if build_id else None)
        or _symbols(path, _SHT_DYNSYM)
        or Symbols()
    )


def _symbols(path: str, wanted: int) -> Symbols | None:
    try:
        with _opened(path) as fd:
            sections = _headers(fd, _SECTION, 40, 58)
            tables = {kind: (at, size, link) for _, kind, _, _, at, size, link, *_ in sections}
            at, size, link = tables[wanted]
            table = os.pread(fd, min(size, _TABLE_MAX), at)
            _, _, _, _, at, size, *_ = sections[link]
            strings = os.pread(fd, min(size, _TABLE_MAX), at)
            return Symbols(table[: len(table) // _SYMBOL.size * _SYMBOL.size], strings)
    except (OSError, ValueError, OverflowError, LookupError, struct.error):
        return None
