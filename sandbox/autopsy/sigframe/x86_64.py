"""The signal frame of x86-64.

Source: Linux arch/x86/include/asm/sigframe.h (struct rt_sigframe: return address, ucontext, siginfo),
uapi/asm/sigcontext.h; placed by get_sigframe() in arch/x86/kernel/signal.c.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from crumplezone.sandbox.autopsy.sigframe.layout import FATAL, Saved, first_match, read_siginfo

# Offsets in the frame, in bytes.
_FLAGS, _LINK, _GREGS, _SEGMENTS, _ERR, _FPSTATE, _SIGINFO, _SIZE = 8, 16, 48, 192, 200, 232, 312, 440
_NAMES = tuple("r8 r9 r10 r11 r12 r13 r14 r15 rdi rsi rbp rbx rdx rax rcx rsp rip eflags".split())  # noqa: SIM905 - one line
PC, SP = "rip", "rsp"
PC_AT, SP_AT = _GREGS + 8 * _NAMES.index(PC), _GREGS + 8 * _NAMES.index(SP)

_USER_CS = 0x33
_PAGE_FAULT = 14
_PF_WRITE, _PF_INSTRUCTION = 2, 16  # arch/x86/include/asm/trap_pf.h
# arch/x86/include/asm/trapnr.h
_TRAPS = {
    0: "#DE",
    1: "#DB",
    3: "#BP",
    4: "#OF",
    5: "#BR",
    6: "#UD",
    7: "#NM",
    8: "#DF",
    10: "#TS",
    11: "#NP",
}
_TRAPS |= {12: "#SS", 13: "#GP", 14: "#PF", 16: "#MF", 17: "#AC", 18: "#MC", 19: "#XM", 21: "#CP"}


def _looks_right(words: Any, addresses: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    # The kernel puts the floating point state right above the frame, at the next multiple of 64 at most.
    gap = words[:, _FPSTATE // 8] - addresses - np.uint64(_SIZE)  # unsigned: what is below is huge
    found: npt.NDArray[np.bool_] = (
        (gap < 128)
        & (words[:, _FLAGS // 8] < 8)  # UC_FP_XSTATE, UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS
        & (words[:, _LINK // 8] == 0)
        & (words[:, _SEGMENTS // 8] & np.uint64(0xFFFF) == _USER_CS)
        & np.isin(words[:, _SIGINFO // 8], FATAL)  # si_signo, and si_errno 0
    )
    return found


def find(stack: bytes, base: int) -> Saved | None:
    """The first signal frame of a fatal signal in a piece of stack that begins at address ``base``."""
    at = first_match(stack, base, _SIZE, _looks_right)
    return None if at is None else _parse(stack[at : at + _SIZE], base + at)


def _parse(raw: bytes, address: int) -> Saved:
    registers = dict(zip(_NAMES, struct.unpack_from("<18Q", raw, _GREGS), strict=True))
    (registers["cs"],) = struct.unpack_from("<H", raw, _SEGMENTS)
    error, trap, _, cr2 = struct.unpack_from("<4Q", raw, _ERR)
    registers |= {"err": error, "trapno": trap, "cr2": cr2}
    access = ""
    if trap == _PAGE_FAULT:
        access = "exec" if error & _PF_INSTRUCTION else "write" if error & _PF_WRITE else "read"
    return Saved(address, read_siginfo(raw[_SIGINFO:], access, _TRAPS.get(trap, "")), registers)


def returned(saved: dict[str, int], top: int) -> tuple[int, int]:
    """Program counter and stack pointer after a return: `call` had pushed the return address."""
    return top, saved[SP] + 8
