"""Bytes read one after the other, as DWARF lays them out. They are those of an untrusted process."""

from __future__ import annotations

_LEB_MAX = 10  # bytes of a number of 64 bits
_SIZES = {0x0: 8, 0x2: 2, 0x3: 4, 0x4: 8, 0xA: 2, 0xB: 4, 0xC: 8}  # DW_EH_PE_*: absptr, udata*, sdata*
_ULEB, _SLEB, _SIGNED = 0x1, 0x9, 0x8
_ABSOLUTE, _FROM_HERE = 0x00, 0x10
OMITTED = 0xFF


class NonsenseError(ValueError):
    """What was read says nothing, or nothing that is understood here: the walk ends."""


class Cursor:
    """A place in bytes.

    Args:
        data: What is read.
        address: Of its first byte in the process.
        at: Where to begin.
    """

    def __init__(self, data: bytes, address: int = 0, at: int = 0) -> None:
        self._data, self._address, self.at = data, address, at

    @property
    def more(self) -> bool:
        """Whether anything is left."""
        return self.at < len(self._data)

    def take(self, size: int) -> bytes:
        """The next bytes.

        Raises:
            NonsenseError: There are not so many.
        """
        end = self.at + size
        if not 0 <= size <= len(self._data) - self.at:
            raise NonsenseError("it ends too early")
        found, self.at = self._data[self.at : end], end
        return found

    def unsigned(self, size: int) -> int:
        """A number of so many bytes."""
        return int.from_bytes(self.take(size), "little")

    def signed(self, size: int) -> int:
        """Likewise, two's complement."""
        return int.from_bytes(self.take(size), "little", signed=True)

    def uleb(self) -> int:
        """A number of any length, seven bits in each byte."""
        return self._leb()[0]

    def sleb(self) -> int:
        """Likewise, two's complement."""
        value, bits, negative = self._leb()
        return value - (1 << bits) if negative else value

    def _leb(self) -> tuple[int, int, bool]:
        value = bits = 0
        for _ in range(_LEB_MAX):
            byte = self.unsigned(1)
            value |= (byte & 127) << bits
            bits += 7
            if byte < 128:
                return value, bits, bool(byte & 64)
        raise NonsenseError("a number without an end")

    def text(self, limit: int) -> str:
        """Characters up to a zero."""
        found = self._data[self.at : self.at + limit]
        end = found.find(b"\0")
        if end < 0:
            raise NonsenseError("a text without an end")
        self.at += end + 1
        return found[:end].decode("latin-1")

    def pointer(self, encoding: int) -> int:
        """A pointer in an encoding of .eh_frame, of those that linkers use there."""
        here = self._address + self.at
        kind, base = encoding & 0x0F, encoding & 0xF0
        if base not in (_ABSOLUTE, _FROM_HERE):
            raise NonsenseError(f"a pointer of encoding {encoding:#x}")
        return (self.number(kind) + (here if base == _FROM_HERE else 0)) % 2**64

    def number(self, encoding: int) -> int:
        """What an encoded pointer holds, from wherever it counts."""
        kind = encoding & 0x0F
        if kind == _ULEB:
            return self.uleb()
        if kind == _SLEB:
            return self.sleb()
        if kind not in _SIZES:
            raise NonsenseError(f"a pointer of encoding {encoding:#x}")
        return self.signed(_SIZES[kind]) if kind & _SIGNED else self.unsigned(_SIZES[kind])
