"""Signs of life: asked for from any thread, between calls, at no cost to them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from crumplezone.errors import CellDied
from crumplezone.reports.records.report import Exit
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.cell import Cell
from tests.support.decoders import kill, wait_for_end
from tests.support.processes.cells import spec
from tests.support.services.stunts import Echo, Stunt


@pytest.fixture
def cell() -> Iterator[Cell]:
    made = Cell(spec())
    yield made
    made.close()


def echo(cell: Cell) -> str:
    return cell.call(Stunt("echo"), Echo, 30).text


def test_a_cell_that_waits_answers(cell: Cell) -> None:
    before = cell.heard
    assert cell.ping(30) is True
    assert cell.heard > before > 0
    assert echo(cell) == "echo"


def test_one_in_a_call_is_not_asked(cell: Cell) -> None:
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(cell.call, Stunt("hang"), Echo, None)
        while cell.ping(30) is not None:
            pass
        os.kill(cell.pid, signal.SIGKILL)
        with pytest.raises(CellDied):
            call.result(30)
    assert cell.ping(30) is False


def test_pings_and_calls_of_two_threads(cell: Cell) -> None:
    """None of them takes the other's answer."""
    stop = threading.Event()
    found: set[bool | None] = set()

    def ask() -> None:
        while not stop.is_set():
            found.add(cell.ping(30))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        assert {echo(cell) for _ in range(300)} == {"echo"}
    finally:
        stop.set()
        asking.join()
    assert True in found
    assert False not in found


def test_one_that_answers_late_is_not_given_up(cell: Cell) -> None:
    os.kill(cell.pid, signal.SIGSTOP)
    assert cell.ping(0.05) is False
    assert cell.ping(0.05) is False
    os.kill(cell.pid, signal.SIGCONT)
    assert echo(cell) == "echo"
    assert cell.ping(30) is True


def test_a_death_is_left_to_whoever_works_with_it(cell: Cell) -> None:
    kill(cell.pid)
    assert cell.ping(30) is False
    died = cell.died_idle()
    assert died is not None
    assert Incident.of(died).evidence.result(60).exit == Exit.KILLED


def test_one_that_is_stopped_for_good_is_killed_and_asking_ends(cell: Cell) -> None:
    os.kill(cell.pid, signal.SIGSTOP)
    assert cell.ping(60) is False
    assert wait_for_end(cell.pid)
    assert cell.died_idle() is not None


@pytest.mark.parametrize("stunt", ["stray_reply", "stray_frame"])
def test_one_that_says_something_else_is_condemned_by_the_next_call(cell: Cell, stunt: str) -> None:
    cell.call(Stunt(stunt), Echo, 30)
    assert cell.ping(30) is False
    with pytest.raises(CellDied) as died:
        echo(cell)
    assert Incident.of(died.value).evidence.result(60).exit == Exit.PROTOCOL


def test_a_late_lie_is_one_too(cell: Cell) -> None:
    cell.call(Stunt("stray_reply"), Echo, 30)
    os.kill(cell.pid, signal.SIGSTOP)
    assert cell.ping(0.05) is False
    os.kill(cell.pid, signal.SIGCONT)
    with pytest.raises(CellDied) as died:
        echo(cell)
    assert Incident.of(died.value).evidence.result(60).exit == Exit.PROTOCOL


def test_a_closed_one_does_not_answer(cell: Cell) -> None:
    cell.close()
    assert cell.ping(30) is False
