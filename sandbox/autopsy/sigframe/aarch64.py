"""The signal frame of aarch64.

Source: Linux arch/arm64/kernel/signal.c (struct rt_sigframe: siginfo, ucontext), uapi/asm/sigcontext.h
(struct sigcontext and the records in its reserved space), asm/esr.h.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from crumplezone.sandbox.autopsy.sigframe.layout import FATAL, Saved, first_match, read_siginfo

# Offsets in the frame, in bytes: siginfo takes 128, then the ucontext, whose sigcontext begins 176 into it.
_LINK, _SIGCONTEXT = 136, 304
_RECORDS, _RECORDS_SIZE = _SIGCONTEXT + 288, 4096
_NAMES = ("fault_address", *(f"x{n}" for n in range(31)), "sp", "pc", "pstate")
PC, SP = "pc", "sp"
PC_AT, SP_AT = _SIGCONTEXT + 8 * _NAMES.index(PC), _SIGCONTEXT + 8 * _NAMES.index(SP)

_FPSIMD = 528 << 32 | 0x46508001  # size and magic of the record that always comes first
_ESR_MAGIC = 0x45535201
_ESR_WNR, _ESR_CM = 1 << 6, 1 << 8  # a write; cache maintenance, which counts as a write but is none
# Exception classes; the odd ones are those taken from the kernel on the program's behalf.
_INSTRUCTION_ABORT, _DATA_ABORT = {0x20, 0x21}, {0x24, 0x25}
_TRAPS = dict.fromkeys(_INSTRUCTION_ABORT, "instruction abort") | dict.fromkeys(_DATA_ABORT, "data abort")
_TRAPS |= {0x22: "pc alignment", 0x26: "sp alignment"}


def _looks_right(words: Any, addresses: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = (
        (words[:, _RECORDS // 8] == _FPSIMD)
        & (words[:, _LINK // 8] == 0)
        & np.isin(words[:, 0], FATAL)  # si_signo, and si_errno 0
        & (addresses % np.uint64(16) == 0)
    )
    return found


def find(stack: bytes, base: int) -> Saved | None:
    """The first signal frame of a fatal signal in a piece of stack that begins at address ``base``."""
    at = first_match(stack, base, _RECORDS + 8, _looks_right)
    return None if at is None else _parse(stack[at : at + _RECORDS + _RECORDS_SIZE], base + at)


def _parse(raw: bytes, address: int) -> Saved:
    registers = dict(zip(_NAMES, struct.unpack_from("<35Q", raw, _SIGCONTEXT), strict=True))
    esr = _syndrome(raw[_RECORDS:])
    access = trap = ""
    if esr is not None:
        registers["esr"] = esr
        kind = esr >> 26 & 0x3F
        trap = _TRAPS.get(kind, "")
        if kind in _INSTRUCTION_ABORT:
            access = "exec"
        elif kind in _DATA_ABORT:
            access = "write" if esr & _ESR_WNR and not esr & _ESR_CM else "read"
    return Saved(address, read_siginfo(raw, access, trap), registers)


def _syndrome(records: bytes) -> int | None:
    """The exception syndrome register; the kernel adds it for faults on memory only."""
    at = 0
    while at + 16 <= len(records):
        magic, size = struct.unpack_from("<II", records, at)
        if magic == _ESR_MAGIC:
            return int.from_bytes(records[at + 8 : at + 16], "little")
        if magic == 0 or size < 8:
            return None
        at += size
    return None


def returned(saved: dict[str, int], top: int) -> tuple[int, int]:  # noqa: ARG001 - as on every machine
    """Program counter and stack pointer after a return: `blr` had put the return address into x30."""
    return saved["x30"], saved[SP]
