"""What DWARF's expressions come to: arithmetic over registers, constants and memory.

Linkers use one for the entries of procedure linkage tables, the C library for the trampoline of signal
handlers. Source: DWARF 5, 2.5. Jumps are left out, so that every expression ends.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

from crumplezone.sandbox.autopsy.cfi.cursor import Cursor, NonsenseError

_OPERATIONS_MAX = 1024
_STACK_MAX = 64
_WORD = 2**64


def evaluate(
    expression: bytes, registers: Mapping[int, int], word: Callable[[int], int], stack: tuple[int, ...] = ()
) -> int:
    """What an expression comes to.

    Args:
        expression: Its operations.
        registers: By number.
        word: Reads eight bytes of the process; raises `NonsenseError` where none are.
        stack: What it begins with.

    Raises:
        NonsenseError: It makes no sense, or needs what is not known.
    """
    code, found = Cursor(expression), list(stack)
    for _ in range(_OPERATIONS_MAX):
        if not code.more or len(found) > _STACK_MAX:
            break
        try:
            value = _operate(code, found, registers, word)
        except LookupError as error:
            raise NonsenseError("an expression that needs what is not known") from error
        found.append(value % _WORD)
    if code.more or not found or len(found) > _STACK_MAX:
        raise NonsenseError("an expression without an end")
    return found[-1]


def _operate(code: Cursor, stack: list[int], registers: Mapping[int, int], word: Callable[[int], int]) -> int:
    operation = code.unsigned(1)
    if 0x30 <= operation <= 0x4F:  # lit0 to lit31
        return operation - 0x30
    if 0x70 <= operation <= 0x8F:  # breg0 to breg31
        return registers[operation - 0x70] + code.sleb()
    if operation in _CONSTANTS:
        return _CONSTANTS[operation](code)
    if operation == 0x06:  # deref
        return word(stack.pop())
    if operation == 0x12:  # dup
        return stack[-1]
    if operation == 0x23:  # plus_uconst
        return stack.pop() + code.uleb()
    if operation not in _BINARY:
        raise NonsenseError(f"an operation {operation:#x}")
    other, one = stack.pop(), stack.pop()
    return _BINARY[operation](one, other)


def _signed(compare: Callable[[int, int], bool]) -> Callable[[int, int], int]:
    return lambda one, other: compare(one ^ 1 << 63, other ^ 1 << 63)  # which orders two's complement


_CONSTANTS: Mapping[int, Callable[[Cursor], int]] = {
    0x08: lambda code: code.unsigned(1),
    0x09: lambda code: code.signed(1),
    0x0A: lambda code: code.unsigned(2),
    0x0B: lambda code: code.signed(2),
    0x0C: lambda code: code.unsigned(4),
    0x0D: lambda code: code.signed(4),
    0x0E: lambda code: code.unsigned(8),
    0x0F: lambda code: code.signed(8),
    0x10: Cursor.uleb,
    0x11: Cursor.sleb,
}
_BINARY: Mapping[int, Callable[[int, int], int]] = {
    0x1A: operator.and_,
    0x1C: operator.sub,
    0x1E: operator.mul,
    0x21: operator.or_,
    0x22: operator.add,
    0x24: lambda one, other: one << other if other < 64 else 0,
    0x25: lambda one, other: one >> other if other < 64 else 0,
    0x27: operator.xor,
    0x29: operator.eq,
    0x2A: _signed(operator.ge),
    0x2B: _signed(operator.gt),
    0x2C: _signed(operator.le),
    0x2D: _signed(operator.lt),
    0x2E: operator.ne,
}
