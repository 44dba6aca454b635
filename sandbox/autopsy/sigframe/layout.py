"""What the signal frames of all machines share: how they are searched for, and siginfo.

Layouts are pure functions of bytes, so that any machine can test them all. What they read is untrusted.
"""

from __future__ import annotations

import signal
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from crumplezone.reports.records.report import Fault

# Signals that faulthandler catches: what a cell can be held by.
FATAL = np.array(
    [signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT], dtype=np.uint64
)
_WITH_ADDRESS = {signal.SIGILL, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV}
_SI_USER, _SI_QUEUE, _SI_TKILL, _SI_KERNEL = 0, -1, -6, 128
_ANY_CODES = {_SI_USER: "SI_USER", _SI_QUEUE: "SI_QUEUE", _SI_TKILL: "SI_TKILL", _SI_KERNEL: "SI_KERNEL"}
# asm-generic/siginfo.h, codes from 1 up.
_CODES: dict[int, tuple[str, ...]] = {
    signal.SIGSEGV: (
        *("SEGV_MAPERR", "SEGV_ACCERR", "SEGV_BNDERR", "SEGV_PKUERR", "SEGV_ACCADI", "SEGV_ADIDERR"),
        *("SEGV_ADIPERR", "SEGV_MTEAERR", "SEGV_MTESERR", "SEGV_CPERR"),
    ),
    signal.SIGBUS: ("BUS_ADRALN", "BUS_ADRERR", "BUS_OBJERR", "BUS_MCEERR_AR", "BUS_MCEERR_AO"),
    signal.SIGILL: (
        *("ILL_ILLOPC", "ILL_ILLOPN", "ILL_ILLADR", "ILL_ILLTRP", "ILL_PRVOPC", "ILL_PRVREG"),
        *("ILL_COPROC", "ILL_BADSTK"),
    ),
    signal.SIGFPE: (
        *("FPE_INTDIV", "FPE_INTOVF", "FPE_FLTDIV", "FPE_FLTOVF", "FPE_FLTUND", "FPE_FLTRES"),
        *("FPE_FLTINV", "FPE_FLTSUB"),
    ),
}


@dataclass(frozen=True)
class Saved:
    """One signal frame, decoded. ``registers`` has the machine's own names."""

    address: int  # of the frame itself
    fault: Fault
    registers: dict[str, int]


class Layout(Protocol):
    """A module that knows one machine's signal frame."""

    PC: str  # names in `Saved.registers`
    SP: str
    PC_AT: int  # bytes from the beginning of the frame to what the kernel would restore
    SP_AT: int

    def find(self, stack: bytes, base: int) -> Saved | None:
        """The first signal frame of a fatal signal in a piece of stack that begins at address ``base``."""

    def returned(self, saved: dict[str, int], top: int) -> tuple[int, int]:
        """Program counter and stack pointer after a return; ``top`` is the word at the stack pointer."""


def first_match(
    stack: bytes,
    base: int,
    size: int,
    looks_right: Callable[[npt.NDArray[np.uint64], npt.NDArray[np.uint64]], npt.NDArray[np.bool_]],
) -> int | None:
    """Offset in ``stack`` of the first aligned word where a frame of ``size`` bytes can begin, or None.

    Args:
        stack: Raw bytes, little-endian.
        base: Address of the first.
        size: Bytes of a frame that are looked at, a multiple of 8.
        looks_right: Given the words of each candidate (n, size / 8) and its address (n), says which match.
    """
    start = -base % 8
    words = np.frombuffer(stack, "<u8", max(len(stack) - start, 0) // 8, start if len(stack) > start else 0)
    if len(words) * 8 < size:
        return None
    candidates = np.lib.stride_tricks.sliding_window_view(words, size // 8)
    addresses = np.arange(len(candidates), dtype=np.uint64) * np.uint64(8) + np.uint64(base + start)
    hits = np.flatnonzero(looks_right(candidates, addresses))
    return start + 8 * int(hits[0]) if len(hits) else None


def _name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


def _code_name(signum: int, code: int) -> str:
    names = _CODES.get(signum, ())
    return names[code - 1] if 0 < code <= len(names) else _ANY_CODES.get(code, str(code))


def read_siginfo(raw: bytes, access: str, trap: str) -> Fault:
    """Decode a siginfo_t (asm-generic/siginfo.h: the same on all 64-bit machines).

    Args:
        raw: Its first 24 bytes at least.
        access: What the fault did, if the processor said so; dropped if no fault of the processor raised it.
        trap: Likewise.
    """
    signum, _, code = struct.unpack_from("<iii", raw)
    (address,) = struct.unpack_from("<Q", raw, 16)
    sender, uid = struct.unpack_from("<iI", raw, 16)
    by_processor = code > 0 and signum in _WITH_ADDRESS
    by_process = code in {_SI_USER, _SI_QUEUE, _SI_TKILL}
    return Fault(
        signal=signum,
        name=_name(signum),
        code=code,
        code_name=_code_name(signum, code),
        # SI_KERNEL: the processor did not say which address (a non-canonical one on x86-64).
        address=hex(address) if by_processor and code != _SI_KERNEL else None,
        access=access if by_processor else "",
        trap=trap if by_processor else "",
        sender_pid=sender if by_process else None,
        sender_uid=uid if by_process else None,
    )
