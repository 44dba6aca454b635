"""What the walk must know of a machine: DWARF's numbers of registers, and which of them a call preserves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """One kind of processor.

    Attributes:
        numbers: DWARF's number of each register, by its name in `SignalFrame.registers`.
        pc_name: The program counter's name.
        pc: The number under which expressions know the program counter.
        sp: The stack pointer's.
        preserved: Those that a function gives back as it found them. Of the others a caller knows nothing.
        address_bits: Of a pointer into code; above them a signed return address has its signature.
    """

    numbers: Mapping[str, int]
    pc_name: str
    pc: int
    sp: int
    preserved: frozenset[int]
    address_bits: int


# System V ABI, AMD64 supplement, figure 3.36: not the order of the processor's own encoding.
_X86_64 = Machine(
    {
        name: number
        for number, name in enumerate(
            "rax rdx rcx rbx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15 rip".split()  # noqa: SIM905
        )
    },
    pc_name="rip",
    pc=16,
    sp=7,
    preserved=frozenset((3, 6, 12, 13, 14, 15)),
    address_bits=64,
)
# DWARF for the Arm 64-bit Architecture, "DWARF register names". x30, the link register, is no caller's.
_AARCH64 = Machine(
    {**{f"x{number}": number for number in range(31)}, "sp": 31, "pc": 32},
    pc_name="pc",
    pc=32,
    sp=31,
    preserved=frozenset(range(19, 30)),
    address_bits=48,
)

MACHINES = {"x86_64": _X86_64, "aarch64": _AARCH64}
"""By the names of `platform.machine`."""
