"""From the registers of a held thread to the addresses that its callers go on at.

Every step rests on the call frame information of the code it is in. Nothing is guessed, and the stack is not
searched: where nothing is known, or what is known makes no sense, the walk ends with what it has.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

from crumplezone.sandbox.autopsy.cfi.cursor import NonsenseError
from crumplezone.sandbox.autopsy.cfi.expression import evaluate
from crumplezone.sandbox.autopsy.cfi.machine import Machine
from crumplezone.sandbox.autopsy.cfi.program import Kind, Row, Rule, row_at
from crumplezone.sandbox.autopsy.cfi.tables import find_rules
from crumplezone.sandbox.process.procfs import Map, find_map, is_code, read_at

FRAMES_MAX = 128
_SECONDS_MAX = 1.0  # a frame takes some 0.2 ms; one made to take long, a hundred times that
_REGISTERS_MAX = 128  # numbers; vectors and flags have higher ones on some machines
_WORD = 2**64


@dataclass(frozen=True)
class Place:
    """One frame.

    Attributes:
        pc: Where the thread is, or where it goes on once the frame below has returned.
        called: The latter: the call itself is the instruction before.
    """

    pc: int
    called: bool

    @property
    def at(self) -> int:
        """An address within the instruction that the frame is at."""
        return self.pc - 1 if self.called else self.pc


@dataclass(frozen=True)
class Walk:
    """What was found.

    Attributes:
        places: Innermost first.
        ended: Why there are no more; empty: the last is where the thread began.
    """

    places: tuple[Place, ...]
    ended: str = ""


def walk(mem: BinaryIO, maps: list[Map], registers: Mapping[str, int], machine: Machine) -> Walk:
    """Walk from a thread's registers to where it began.

    Args:
        mem: /proc/PID/mem of a process that stands still.
        maps: Its mappings.
        registers: By name, those that are known.
        machine: The processor.
    """
    known = {number: registers[name] for name, number in machine.numbers.items() if name in registers}
    place, places = Place(known.get(machine.pc, 0), called=False), list[Place]()
    begin = time.thread_time()
    while is_code(maps, place.pc):
        places.append(place)
        if len(places) == FRAMES_MAX:
            return Walk(tuple(places), f"the innermost {FRAMES_MAX} frames")
        if time.thread_time() - begin > _SECONDS_MAX:
            return Walk(tuple(places), f"it took {_SECONDS_MAX:.0f} s of processor time")
        try:
            outer = _Step(mem, maps, known, machine).out_of(place)
        except (NonsenseError, OSError) as error:
            return Walk(tuple(places), str(error))
        if outer is None:
            return Walk(tuple(places))
        place, known = outer
    return Walk(tuple(places), f"{place.pc:#x} is not in code")


class _Step:
    """One frame, and how to get out of it."""

    def __init__(self, mem: BinaryIO, maps: list[Map], known: dict[int, int], machine: Machine) -> None:
        self._mem, self._maps, self._known, self._machine = mem, maps, known, machine

    def out_of(self, place: Place) -> tuple[Place, dict[int, int]] | None:
        """The caller's place and registers; None if there is no caller.

        Raises:
            NonsenseError: It cannot be told.
        """
        within = find_map(self._maps, place.at)
        if within is None:
            raise NonsenseError("it is in no mapping")
        rules = find_rules(self._mem, self._maps, within, place.at)
        row = row_at(rules, place.at)
        back = row.registers.get(rules.return_register, (Kind.SAME, 0))
        if back[0] is Kind.UNDEFINED:  # so is marked where threads begin
            return None
        frame = self._frame(row)
        pc = self._unsigned(self._value(rules.return_register, back, frame), row)
        if pc == 0:
            return None
        known = self._callers(row, frame, everything=rules.signal)
        known[self._machine.pc] = pc
        self._check(known, place, signal=rules.signal)
        return Place(pc, called=not rules.signal), known

    def _frame(self, row: Row) -> int:
        """The frame's address (CFA): the stack pointer before the call."""
        if isinstance(row.frame, bytes):
            return evaluate(row.frame, self._known, self._word)
        if row.frame is None or row.frame[0] not in self._known:
            raise NonsenseError("the frame's address is not known")
        return (self._known[row.frame[0]] + row.frame[1]) % _WORD

    def _callers(self, row: Row, frame: int, *, everything: bool) -> dict[int, int]:
        """The registers as the caller had them. After a signal it is told of all of them."""
        known = {
            number: value
            for number, value in self._known.items()
            if everything or number in self._machine.preserved
        }
        known[self._machine.sp] = frame
        for number, rule in row.registers.items():
            known.pop(number, None)
            if rule[0] is not Kind.UNDEFINED and number < _REGISTERS_MAX:
                with contextlib.suppress(NonsenseError):  # the walk may get on without it
                    known[number] = self._value(number, rule, frame)
        return known

    def _value(self, register: int, rule: Rule, frame: int) -> int:
        kind, value = rule
        if kind is Kind.SAME or kind is Kind.REGISTER:
            number = value if kind is Kind.REGISTER else register
            if number not in self._known:
                raise NonsenseError(f"register {register} is not known")
            return self._known[number]
        if isinstance(value, bytes):
            found = evaluate(value, self._known, self._word, (frame,))
        else:
            found = (frame + value) % _WORD
        return self._word(found) if kind in (Kind.AT_OFFSET, Kind.AT_EXPRESSION) else found

    def _word(self, address: int) -> int:
        found = read_at(self._mem, address, 8)
        if len(found) < 8:
            raise NonsenseError(f"there is no memory at {address:#x}")
        return int.from_bytes(found, "little")

    def _unsigned(self, pc: int, row: Row) -> int:
        return pc % 2**self._machine.address_bits if row.signed else pc

    def _check(self, known: dict[int, int], place: Place, *, signal: bool) -> None:
        """Whether the stack grows towards its callers. A leaf of aarch64 need not have used any."""
        before, after = self._known.get(self._machine.sp), known.get(self._machine.sp)
        if after is None:
            raise NonsenseError("the stack pointer is not known")
        if before is None or signal:  # a handler may have had a stack of its own
            return
        if after < before or (after == before and place.called):
            raise NonsenseError("the stack goes the wrong way")
