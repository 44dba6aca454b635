"""Questions that a cell asks in the middle of a call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from crumplezone.errors import CellDied, UsageError
from crumplezone.reports.records.report import Exit
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.cell import Cell, CellSpec
from crumplezone.sandbox.child.loop import Room


class Wonder(msgspec.Struct, frozen=True):
    """Ask so many questions; the reply is the sum of the answers."""

    times: int


class Number(msgspec.Struct, frozen=True):
    """Question, answer and reply."""

    value: int


class Curious:
    """The service."""

    request_type: Any = Wonder

    def __init__(self, config: msgspec.Raw, room: Room, _: object = None) -> None:  # noqa: ARG002 - as targets
        self._ask = room.ask

    def info(self) -> Number:
        return Number(0)

    def handle(self, request: Wonder) -> Number:
        answers = [self._ask(Number(i)) for i in range(request.times)]
        return Number(sum(number(answer) for answer in answers))


def number(raw: msgspec.Raw) -> int:
    return msgspec.msgpack.decode(raw, type=Number).value


@pytest.fixture
def cell() -> Iterator[Cell]:
    one = Cell(CellSpec("tests.sandbox.cells.test_questions:Curious", Number(0)))
    yield one
    one.close()


def test_questions_are_answered_in_turn(cell: Cell) -> None:
    asked: list[int] = []

    def answer(raw: msgspec.Raw) -> Number:
        asked.append(number(raw))
        return Number(10 * asked[-1])

    assert cell.call(Wonder(3), Number, 20.0, answer).value == 30
    assert asked == [0, 1, 2]


def test_an_answer_may_need_another_call(cell: Cell) -> None:
    def answer(raw: msgspec.Raw) -> Number:
        return cell.call(Wonder(number(raw) + 2), Number, 20.0, lambda _: Number(1))

    assert cell.call(Wonder(3), Number, 20.0, answer).value == 2 + 3 + 4


def test_an_exception_ends_the_call_and_not_the_cell(cell: Cell) -> None:
    error, pid = LookupError("mine"), cell.pid

    def fail(raw: msgspec.Raw) -> Number:
        if number(raw):
            raise error
        return Number(0)

    with pytest.raises(LookupError) as raised:
        cell.call(Wonder(3), Number, 20.0, fail)
    assert raised.value is error
    assert cell.call(Wonder(2), Number, 20.0, lambda _: Number(4)).value == 8
    assert cell.pid == pid


def test_a_question_that_nobody_expects_ends_the_cell(cell: Cell) -> None:
    with pytest.raises(CellDied) as raised:
        cell.call(Wonder(1), Number, 20.0)
    assert Incident.of(raised.value).evidence.result().exit == Exit.PROTOCOL


def test_a_cell_that_is_closed_while_it_asks(cell: Cell) -> None:
    def close(_: msgspec.Raw) -> Number:
        cell.close()
        return Number(0)

    with pytest.raises(UsageError, match="while it asked"):
        cell.call(Wonder(1), Number, 20.0, close)
