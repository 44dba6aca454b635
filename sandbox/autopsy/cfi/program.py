"""What the programs of call frame information say of one address.

Source: DWARF 5, 6.4; LSB Core, "Exception Frames"; "DWARF for the Arm 64-bit Architecture".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from crumplezone.sandbox.autopsy.cfi.cursor import Cursor, NonsenseError
from crumplezone.sandbox.autopsy.cfi.tables import Rules

_INSTRUCTIONS_MAX = 4096  # of one program
_REMEMBERED_MAX = 32


class Kind(Enum):
    """Where a caller's register is."""

    AT_OFFSET = "in memory, so far from the frame's address"
    OFFSET = "it is the frame's address, moved so far"
    REGISTER = "in another register"
    AT_EXPRESSION = "in memory, where an expression says"
    EXPRESSION = "what an expression comes to"
    SAME = "where it was"
    UNDEFINED = "lost"


Rule = tuple[Kind, int | bytes]


@dataclass
class Row:
    """Where everything is at one address.

    Attributes:
        frame: A register and an offset, or an expression: the frame's address (CFA).
        registers: By their numbers.
        signed: The return address bears a signature in its upper bits (aarch64).
    """

    frame: tuple[int, int] | bytes | None = None
    registers: dict[int, Rule] = field(default_factory=dict)
    signed: bool = False

    def copy(self) -> Row:
        """Another of the same."""
        return Row(self.frame, dict(self.registers), self.signed)


def row_at(rules: Rules, pc: int) -> Row:
    """Run the programs of an entry up to an address.

    Raises:
        NonsenseError: They make no sense.
    """
    run = _Run(rules, pc)
    run.through(rules.initial)
    run.initial = run.row.copy()
    run.through(rules.program)
    return run.row


class _Run:
    """A program on its way."""

    def __init__(self, rules: Rules, pc: int) -> None:
        self.rules, self._pc, self.at = rules, pc, rules.begin
        self.row, self.initial = Row(), Row()
        self._remembered: list[Row] = []

    def through(self, program: Cursor) -> None:
        for _ in range(_INSTRUCTIONS_MAX):
            if not program.more or self.at > self._pc:  # what follows is about later addresses
                return
            self._step(program)
        raise NonsenseError("a program without an end")

    def _step(self, program: Cursor) -> None:
        code = program.unsigned(1)
        kind, low = code & 0xC0, code & 0x3F
        if kind == 0x40:  # advance_loc
            self.advance(low)
        elif kind == 0x80:  # offset
            self.put(low, Kind.AT_OFFSET, program.uleb() * self.rules.data_align)
        elif kind == 0xC0:  # restore
            self.restore(low)
        elif code not in _INSTRUCTIONS:
            raise NonsenseError(f"an instruction {code:#x}")
        else:
            _INSTRUCTIONS[code](self, program)

    def put(self, register: int, kind: Kind, value: int | bytes = 0) -> None:
        self.row.registers[register] = kind, value

    def advance(self, steps: int) -> None:
        self.at += steps * self.rules.code_align

    def restore(self, register: int) -> None:
        if register in self.initial.registers:
            self.row.registers[register] = self.initial.registers[register]
        else:
            self.row.registers.pop(register, None)

    def remember(self) -> None:
        if len(self._remembered) >= _REMEMBERED_MAX:
            raise NonsenseError("too much to remember")
        self._remembered.append(self.row.copy())

    def recall(self) -> None:
        if not self._remembered:
            raise NonsenseError("nothing to restore")
        self.row = self._remembered.pop()

    def frame(self, register: int | None, offset: int | None) -> None:
        known = self.row.frame
        if register is None or offset is None:
            if not isinstance(known, tuple):
                raise NonsenseError("half a frame's address")
            register = known[0] if register is None else register
            offset = known[1] if offset is None else offset
        self.row.frame = register, offset


def _scaled(run: _Run, program: Cursor) -> int:
    return program.sleb() * run.rules.data_align


def _block(program: Cursor) -> bytes:
    return program.take(program.uleb())


def _expression_frame(run: _Run, program: Cursor) -> None:
    run.row.frame = _block(program)


def _negate(run: _Run, _program: Cursor) -> None:
    run.row.signed = not run.row.signed


def _skip(_value: int) -> None:
    """What tells nothing of a caller."""


def _set_place(run: _Run, program: Cursor) -> None:
    run.at = program.pointer(run.rules.pointers)


_INSTRUCTIONS: Mapping[int, Callable[[_Run, Cursor], None]] = {
    0x00: lambda _run, _program: None,  # nop
    0x01: _set_place,  # set_loc
    0x02: lambda run, program: run.advance(program.unsigned(1)),
    0x03: lambda run, program: run.advance(program.unsigned(2)),
    0x04: lambda run, program: run.advance(program.unsigned(4)),
    0x05: lambda run, program: run.put(program.uleb(), Kind.AT_OFFSET, program.uleb() * run.rules.data_align),
    0x06: lambda run, program: run.restore(program.uleb()),
    0x07: lambda run, program: run.put(program.uleb(), Kind.UNDEFINED),
    0x08: lambda run, program: run.put(program.uleb(), Kind.SAME),
    0x09: lambda run, program: run.put(program.uleb(), Kind.REGISTER, program.uleb()),
    0x0A: lambda run, _program: run.remember(),
    0x0B: lambda run, _program: run.recall(),
    0x0C: lambda run, program: run.frame(program.uleb(), program.uleb()),
    0x0D: lambda run, program: run.frame(program.uleb(), None),
    0x0E: lambda run, program: run.frame(None, program.uleb()),
    0x0F: _expression_frame,
    0x10: lambda run, program: run.put(program.uleb(), Kind.AT_EXPRESSION, _block(program)),
    0x11: lambda run, program: run.put(program.uleb(), Kind.AT_OFFSET, _scaled(run, program)),
    0x12: lambda run, program: run.frame(program.uleb(), _scaled(run, program)),
    0x13: lambda run, program: run.frame(None, _scaled(run, program)),
    0x14: lambda run, program: run.put(program.uleb(), Kind.OFFSET, program.uleb() * run.rules.data_align),
    0x15: lambda run, program: run.put(program.uleb(), Kind.OFFSET, _scaled(run, program)),
    0x16: lambda run, program: run.put(program.uleb(), Kind.EXPRESSION, _block(program)),
    0x2D: _negate,  # AARCH64_negate_ra_state
    0x2E: lambda _run, program: _skip(program.uleb()),  # GNU_args_size
}
