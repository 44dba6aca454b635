"""Read the kernel's signal frame of a held thread: siginfo, registers, fault address (x86-64).

Layouts: Linux arch/x86/include/asm/sigframe.h (struct rt_sigframe), uapi/asm/sigcontext.h,
asm-generic/siginfo.h. Everything read is untrusted: lengths are bounded, pointers are only followed
through /proc/PID/mem, where a bad one is an error and not a fault.
"""

from __future__ import annotations

import platform
import signal
import struct
from dataclasses import dataclass
from typing import BinaryIO

from crumplezone.reports.schema import Fault
from crumplezone.sandbox.procfs import Map, find_map, read_at, read_maps, stack_pointer, threads

_GREGS = tuple("r8 r9 r10 r11 r12 r13 r14 r15 rdi rsi rbp rbx rdx rax rcx rsp rip eflags".split())  # noqa: SIM905
_RESTORER = bytes.fromhex("48c7c00f0000000f05")  # __restore_rt: mov $15,%rax ; syscall
_FRAME_SIZE = 440
_SCAN_MAX = 256 * 1024
_USER_CS = 0x33
_TRAPS = {0: "#DE", 6: "#UD", 13: "#GP", 14: "#PF", 17: "#AC", 19: "#XM"}
_CODES = {
    (11, 1): "SEGV_MAPERR",
    (11, 2): "SEGV_ACCERR",
    (8, 1): "FPE_INTDIV",
    (8, 2): "FPE_INTOVF",
    (8, 3): "FPE_FLTDIV",
    (4, 1): "ILL_ILLOPC",
    (4, 2): "ILL_ILLOPN",
    (7, 1): "BUS_ADRALN",
    (7, 2): "BUS_ADRERR",
    (7, 3): "BUS_OBJERR",
}
_ANY_CODES = {0: "SI_USER", -6: "SI_TKILL", 128: "SI_KERNEL"}
_WITH_ADDRESS = {signal.SIGILL, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV}
_PAGE_FAULT = 14


@dataclass(frozen=True)
class SignalFrame:
    """What the kernel saved when it delivered the fatal signal."""

    tid: int
    fault: Fault
    registers: dict[str, str]
    code_bytes: str


def _looks_like_frame(stack: bytes, at: int) -> bool:
    flags, link = struct.unpack_from("<QQ", stack, at + 8)
    (cs,) = struct.unpack_from("<H", stack, at + 192)
    return not flags & ~7 and not link and cs == _USER_CS


def _find(mem: BinaryIO, maps: list[Map], sp: int) -> bytes | None:
    """Scan up the stack for a return address of __restore_rt with a frame above it."""
    within = find_map(maps, sp)
    if within is None:
        return None
    stack = read_at(mem, sp, min(within.end - sp, _SCAN_MAX))
    is_restorer: dict[int, bool] = {}
    for at in range(-sp % 8, len(stack) - _FRAME_SIZE, 8):
        (address,) = struct.unpack_from("<Q", stack, at)
        if address not in is_restorer:
            code = find_map(maps, address) if 0x1000 < address < 1 << 47 else None
            is_restorer[address] = (
                code is not None and "x" in code.perms and read_at(mem, address, len(_RESTORER)) == _RESTORER
            )
        if is_restorer[address] and _looks_like_frame(stack, at):
            return stack[at : at + _FRAME_SIZE]
    return None


def parse(raw: bytes) -> tuple[Fault, dict[str, int]]:
    """Decode one rt_sigframe of 440 bytes into the fault and the registers."""
    registers = dict(zip(_GREGS, struct.unpack_from("<18Q", raw, 48), strict=True))
    error, trap, _, cr2 = struct.unpack_from("<4Q", raw, 200)
    signum, _, code = struct.unpack_from("<iii", raw, 312)
    (address,) = struct.unpack_from("<Q", raw, 328)
    sender, _ = struct.unpack_from("<iI", raw, 328)
    try:
        name = signal.Signals(signum).name
    except ValueError:
        name = f"signal {signum}"
    is_page_fault = trap == _PAGE_FAULT and signum in {signal.SIGSEGV, signal.SIGBUS}
    has_address = code > 0 and signum in _WITH_ADDRESS
    fault = Fault(
        signal=signum,
        name=name,
        code=code,
        code_name=_CODES.get((signum, code)) or _ANY_CODES.get(code, str(code)),
        address=hex(cr2 if is_page_fault and has_address else address) if has_address else None,
        access=("exec" if error & 16 else "write" if error & 2 else "read") if is_page_fault else "",
        trap=_TRAPS.get(trap, "") if has_address else "",
        sender_pid=sender if code <= 0 else None,
    )
    return fault, registers


def read_signal_frame(pid: int) -> SignalFrame | None:
    """Find the signal frame on any thread of a stopped process, or None.

    Raises:
        OSError: /proc refuses (permissions), or the process is gone.
    """
    if platform.machine() != "x86_64":
        return None
    maps = read_maps(pid)
    with open(f"/proc/{pid}/mem", "rb", 0) as mem:
        for tid in threads(pid):
            sp = stack_pointer(pid, tid)
            raw = _find(mem, maps, sp) if sp else None
            if raw is not None:
                fault, registers = parse(raw)
                code = read_at(mem, registers["rip"], 16).hex()
                shown = {name: f"{value:#018x}" for name, value in registers.items()}
                return SignalFrame(tid, fault, shown, code)
    return None
