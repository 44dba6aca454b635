"""Cells that were taken over: whatever they do, it ends them, and not their supervisor."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from crumplezone.errors import CellDied
from crumplezone.reports.records.report import Evidence, Exit
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.cell import Cell, CellSpec
from crumplezone.sandbox.cells.zygote import Zygote
from crumplezone.sandbox.child.loop import Room
from crumplezone.sandbox.process import drain
from tests.support.decoders import descriptors, opened_since, wait_for_end
from tests.support.processes.cells import die
from tests.support.processes.zygotes import SPEC
from tests.support.services.stunts import Echo, Stunt
from tests.support.services.tricks import TARGET, Config, Done, Trick, perform

MIB = 1 << 20
WAIT = "\nthreading.Event().wait()"
FRAMES = """
import msgspec
from crumplezone.sandbox.ipc.channel import Ask, Reply
deep = msgspec.Raw(b"\\x91" * 100_000 + b"\\x00")
def send(frame): room.sock.send(msgspec.msgpack.encode(frame))
"""


@pytest.fixture
def cell() -> Iterator[Cell]:
    one = Cell(CellSpec(TARGET, Config(), start_deadline=60))
    yield one
    one.close()


def lost(act: Callable[[], object]) -> Evidence:
    with pytest.raises(CellDied) as caught:
        act()
    return Incident.of(caught.value).evidence.result(30)


@pytest.mark.parametrize(
    "code",
    [
        "send(Reply(1, deep))",
        "send(Ask(1, deep))",
        "room.sock.send(b'\\x81\\xa4type' + bytes(deep))",
        "room.sock.send(b'x' * 150_000)",
        "send(Reply(1, msgspec.Raw(b'\\xdd\\xff\\xff\\xff\\xff')))",
    ],
)
def test_no_frame_ends_more_than_its_cell(code: str) -> None:
    assert perform(FRAMES + code + WAIT).exit == Exit.PROTOCOL


class Deep:
    """Describes itself without end."""

    request_type: Any = Stunt

    def __init__(self, config: msgspec.Raw, room: Room, _: object = None) -> None:
        pass

    def info(self) -> msgspec.Raw:
        return msgspec.Raw(b"\x91" * 100_000 + b"\x00")


def test_what_a_cell_says_of_itself_is_a_frame_too() -> None:
    evidence = lost(lambda: Cell(CellSpec("tests.sandbox.cells.test_hostile:Deep", Config())))
    assert evidence.exit == Exit.PROTOCOL


FLOOD = (
    FRAMES
    + """
for _ in range(2000): send(Ask(1, msgspec.Raw(b"\\x90")))
"""
)


def test_a_flood_of_questions_makes_nobody_wait(cell: Cell) -> None:
    answered: list[int] = []

    def answer(_: msgspec.Raw) -> Done:
        answered.append(1)
        return Done(0)

    evidence = lost(lambda: cell.call(Trick(FLOOD + WAIT), Done, None, answer))  # without a deadline
    assert evidence.exit == Exit.PROTOCOL
    assert "has not read" in evidence.detail
    assert len(answered) <= 2


@pytest.mark.parametrize(
    "code",
    [
        "os.ftruncate(room.arena.fd, 1 << 30)",
        "os.pwrite(room.arena.fd, b'x', 1 << 30)",
        "lib.fallocate(room.arena.fd, 1, ctypes.c_int64(1 << 40), ctypes.c_int64(1 << 24))",
    ],
)
def test_an_arena_that_the_supervisor_has_not_made_so_large(code: str) -> None:
    evidence = perform(code + WAIT, deadline=60)
    assert (evidence.exit, evidence.returncode) == (Exit.PROTOCOL, -signal.SIGKILL)
    assert evidence.detail == (
        "the cell changed the size of its arena, which only the supervisor does; killed by the supervisor"
    )


def test_an_arena_is_looked_at_between_calls_and_before_them(cell: Cell) -> None:
    cell.call(Trick("os.ftruncate(room.arena.fd, 1 << 30)"), Done, 30)
    evidence = lost(lambda: cell.arrays([("u1", 100)]))
    assert evidence.exit == Exit.PROTOCOL
    other = Cell(CellSpec(TARGET, Config(), start_deadline=60))
    later = "threading.Timer(0.1, os.ftruncate, (room.arena.fd, 1 << 30)).start()"
    other.call(Trick(later), Done, 30)
    assert wait_for_end(other.pid)
    died = other.died_idle()
    assert died is not None
    evidence = Incident.of(died).evidence.result(30)
    assert (evidence.exit, evidence.phase) == (Exit.PROTOCOL, "idle")


FILL = """
page = bytes(1 << 20)
for at in range(1, 512): os.pwrite(room.arena.fd, page, at << 20)
"""


def test_what_fills_the_arena_counts(cell: Cell) -> None:
    limited = Cell(CellSpec(TARGET, Config(), start_deadline=60, memory_limit=250 * MIB))
    for each in (cell, limited):
        each.reserve([("u1", 512 * MIB)])
    evidence = lost(lambda: limited.call(Trick(FILL + WAIT), Done, 60))
    assert evidence.exit == Exit.OOM
    assert evidence.peak_rss is not None
    assert evidence.peak_rss > 250 * MIB


def test_pages_that_are_mapped_count_once() -> None:
    cell = Cell(CellSpec(TARGET, Config(), start_deadline=60, memory_limit=250 * MIB))
    cell.reserve([("u1", 120 * MIB)])
    fill = "room.arena.arrays([('u1', 120 << 20)])[0][:] = 1; "
    look = "import time\nfor _ in range(5): time.sleep(0.02)"  # five samples of the supervisor's
    cell.call(Trick(fill + look), Done, 60)
    assert cell.alive
    assert cell.died_idle() is None
    cell.close()


def test_no_more_is_copied_than_was_written(cell: Cell) -> None:
    cell.reserve([("u1", 64 * MIB)])
    cell.call(Trick("room.arena.arrays([('u1', 64 << 20)])[0][:33_000] = 1"), Done, 30)
    assert cell.taken(33_000) == b"\1" * 33_000
    evidence = lost(lambda: cell.taken(64 * MIB))
    assert "says that it wrote 67108864 bytes" in evidence.detail


def test_descriptors_that_a_cell_sends_are_not_taken(cell: Cell) -> None:
    cell.call(Trick("pass"), Done, 30)
    before = descriptors()
    code = """
import msgspec, socket
from crumplezone.sandbox.ipc.channel import Reply
reply = msgspec.msgpack.encode(Reply(2, msgspec.Raw(msgspec.msgpack.encode({"pid": 7}))))
socket.send_fds(room.sock, [reply], [0, 1, 2])
"""
    assert cell.call(Trick(code + WAIT), Done, 30).pid == 7
    assert opened_since(before) == []


def test_names_and_levels_of_loggers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain._loggers, "_left", 20)
    known = logging.root.manager.loggerDict
    mine, before = logging.getLogger("tricks.names.mine"), set(known)
    records: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(f"{record.name} {record.levelno}")

    kept = Kept()
    mine.addHandler(kept)
    mine.propagate = False
    mine.setLevel(1)
    try:
        for n in range(3):  # one cell after the other
            cell = Cell(CellSpec(TARGET, Config(), start_deadline=60))
            code = f"""
for n in range(10): logging.getLogger(f"tricks.names.{n}.{{n}}.a.b").warning("")
for n in range(500): logging.getLogger("tricks.names.mine").log(n + 10, "")
"""
            cell.call(Trick(code), Done, 30)
            cell.close()  # delivers what was logged
    finally:
        mine.removeHandler(kept)
        mine.setLevel(logging.NOTSET)
        mine.propagate = True
    assert len(set(known) - before) <= 20
    assert len(records) == 3 * 500  # a name that the program itself uses costs nothing
    assert len(vars(mine)["_cache"]) <= 101


def blocked() -> set[int | signal.Signals]:
    return signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS})


@pytest.mark.parametrize("how", ["spawned", "forked"])
def test_a_cell_of_a_thread_that_blocks_fatal_signals_is_held(how: str) -> None:
    mask = blocked()
    zygote = Zygote(SPEC, lambda _: None)
    try:
        if how == "spawned":
            evidence = die("segv")
        else:
            cell = Cell(SPEC, zygote.fork)
            evidence = lost(lambda: cell.call(Stunt("segv"), Echo, 30))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        zygote.close()
    assert evidence.exit == Exit.SIGNAL
    assert evidence.fault is not None
    assert evidence.fault.address == "0x18"
    assert evidence.registers
