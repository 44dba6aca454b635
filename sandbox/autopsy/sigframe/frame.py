"""Read the kernel's signal frame of a held thread: siginfo, registers, code and stack around the fault.

The layouts are in `sigframe_x86_64` and `sigframe_aarch64`. Everything read is untrusted: lengths are
bounded, and pointers are only followed through /proc/PID/mem, where a bad one is an error and not a fault.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import BinaryIO

from crumplezone.reports.records.report import Fault
from crumplezone.sandbox.autopsy.sigframe import aarch64 as sigframe_aarch64
from crumplezone.sandbox.autopsy.sigframe import x86_64 as sigframe_x86_64
from crumplezone.sandbox.autopsy.sigframe.layout import Layout, Saved
from crumplezone.sandbox.process.procfs import Map, SystemCall, find_map, is_code, read_at

_LAYOUTS: dict[str, Layout] = {"x86_64": sigframe_x86_64, "aarch64": sigframe_aarch64}
_SCAN_MAX = 64 * 1024  # bytes of each stack; faulthandler's handler, below the frame, takes under 1 kB
_CODE_BYTES, _STACK_BYTES = 16, 512
_WRITE = {"x86_64": 1, "aarch64": 64}  # write(FD, BUFFER, SIZE)
_OPENING = b"Fatal Python error: "  # the first that faulthandler writes; the second is the signal's name


@dataclass(frozen=True)
class SignalFrame:
    """What the kernel saved when it delivered the fatal signal.

    Attributes:
        tid: The thread that crashed.
        fault: The signal.
        registers: Hexadecimal, by the machine's own names, as they were at the fault.
        code_bytes: 16 bytes at the program counter, hexadecimal; fewer where nothing is mapped.
        stack_bytes: Up to 512 bytes from the stack pointer, hexadecimal.
        address: Where the frame is in the process.
        machine: As `platform.machine` names it.
    """

    tid: int
    fault: Fault
    registers: dict[str, str]
    code_bytes: str
    stack_bytes: str
    address: int
    machine: str


def _on_stack(layout: Layout, mem: BinaryIO, maps: list[Map], sp: int) -> Saved | None:
    within = find_map(maps, sp)
    return layout.find(read_at(mem, sp, min(within.end - sp, _SCAN_MAX)), sp) if within else None


def read_signal_frame(pid: int, calls: dict[int, SystemCall | None], maps: list[Map]) -> SignalFrame | None:
    """Find the signal frame on any thread of a stopped process; None if there is none, or on other machines.

    Args:
        pid: The process.
        calls: The system calls its threads are in.
        maps: Its mappings.

    Raises:
        OSError: /proc refuses (permissions), or the process is gone.
    """
    machine = platform.machine()
    layout = _LAYOUTS.get(machine)
    if layout is None:
        return None
    with open(f"/proc/{pid}/mem", "rb", 0) as mem:
        for tid, call in _suspects(calls, machine, mem):
            saved = _on_stack(layout, mem, maps, call.sp)
            if saved is not None:
                return SignalFrame(
                    tid=tid,
                    fault=saved.fault,
                    registers={name: f"{value:#018x}" for name, value in saved.registers.items()},
                    code_bytes=read_at(mem, saved.registers[layout.PC], _CODE_BYTES).hex(),
                    stack_bytes=read_at(mem, saved.registers[layout.SP], _STACK_BYTES).hex(),
                    address=saved.address,
                    machine=machine,
                )
    return None


def _suspects(
    calls: dict[int, SystemCall | None], machine: str, mem: BinaryIO
) -> list[tuple[int, SystemCall]]:
    """The threads with their system calls. Where several have faulted, the first to fault comes first.

    It is held with the name of its signal in hand, or was stopped on the way there; the others have the
    opening words in hand, or are parked.
    """

    def rank(suspect: tuple[int, SystemCall]) -> int:
        call = suspect[1]
        if call.number == _WRITE[machine]:
            return 2 if read_at(mem, call.arguments[1], len(_OPENING)) == _OPENING else 0
        return 1 if call.number < 0 else 3

    return sorted(((tid, call) for tid, call in calls.items() if call), key=rank)


def returned(mem: BinaryIO, maps: list[Map], frame: SignalFrame) -> tuple[int, int] | None:
    """After a jump to where no code is: program counter and stack pointer as if the call had just returned.

    None if there is code, or none where it would return to.
    """
    layout = _LAYOUTS[frame.machine]
    saved = {name: int(value, 16) for name, value in frame.registers.items()}
    if is_code(maps, saved[layout.PC]):
        return None
    pc, sp = layout.returned(saved, int.from_bytes(read_at(mem, saved[layout.SP], 8), "little"))
    return (pc, sp) if is_code(maps, pc) else None


def interrupted(mem: BinaryIO, maps: list[Map], frame: SignalFrame) -> dict[str, int]:
    """The registers of the thread at the fault, by name; after a jump to nowhere, those of its caller."""
    layout = _LAYOUTS[frame.machine]
    registers = {name: int(value, 16) for name, value in frame.registers.items()}
    if back := returned(mem, maps, frame):
        registers[layout.PC], registers[layout.SP] = back
    return registers


def mend_null_call(pid: int, maps: list[Map], frame: SignalFrame) -> bool:
    """After a jump to where no code is, let unwinders see the caller: they stop at such a program counter.

    Rewrites the program counter and stack pointer that the kernel saved, as if the call had just returned.
    The process never runs on from there: faulthandler's handler does not return, it ends parked.

    Args:
        pid: The process.
        maps: Its mappings.
        frame: As it was read.

    Returns:
        Whether it was such a jump and its return address was found.

    Raises:
        OSError: /proc refuses (permissions), or the process is gone.
    """
    layout = _LAYOUTS[frame.machine]
    with open(f"/proc/{pid}/mem", "r+b", 0) as mem:
        back = returned(mem, maps, frame)
        if back is None:
            return False
        for at, value in zip((layout.PC_AT, layout.SP_AT), back, strict=True):
            mem.seek(frame.address + at)
            mem.write(value.to_bytes(8, "little"))
    return True
