"""What a cell says is drained whatever the caller's logging does with it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

import pytest

from crumplezone.errors import CellDied
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.cell import Cell, CellSpec
from tests.support.services.tricks import TARGET, Config, Done, Trick

Attach = Callable[[str, logging.Handler], None]


@pytest.fixture
def attach() -> Iterator[Attach]:
    """Give a logger a handler for as long as the test runs."""
    attached: list[tuple[logging.Logger, logging.Handler]] = []

    def one(name: str, handler: logging.Handler) -> None:
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        attached.append((logger, handler))

    yield one
    for logger, handler in attached:
        logger.removeHandler(handler)


class Stuck(logging.Handler):
    """Holds the thread that logs until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002 - the signature of handlers
        self.go.wait(60)


def log_tail(cell: Cell) -> list[str]:
    with pytest.raises(CellDied) as caught:
        cell.call(Trick("os.kill(os.getpid(), 9)"), Done, 30)
    evidence = Incident.of(caught.value).evidence.result(30)
    return evidence.log_tail


def test_a_stuck_logging_handler_stops_neither_the_cell_nor_its_memory_limit(attach: Attach) -> None:
    stuck = Stuck()
    attach("tricks.stuck", stuck)
    cell = Cell(CellSpec(TARGET, Config(), start_deadline=60))
    try:
        cell.call(
            Trick("""
for n in range(5000): logging.getLogger("tricks.stuck").warning("line %d", n)
for _ in range(64): os.write(2, b"x" * 65536)
"""),
            Done,
            30,
        )
        tail = log_tail(cell)
    finally:
        stuck.go.set()
    assert "WARNING tricks.stuck: line 4999" in tail
    dropped = tail[-1]
    assert int(dropped.removeprefix("(").split()[0]) >= 5000 - 4096 - 1
    assert "logging handler is slow" in dropped


def test_times_that_are_none_can_be_shown(attach: Attach) -> None:
    shown: list[str] = []

    class Showing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            shown.append(logging.Formatter("%(asctime)s %(message)s").format(record))

    attach("tricks.time", Showing())
    cell = Cell(CellSpec(TARGET, Config(), start_deadline=60))
    cell.call(
        Trick("""
import msgspec, socket
from crumplezone.sandbox.ipc.channel import LogLine
log = socket.socket(fileno=os.dup(int(sys.argv[2])))
for created in (1e300, float("inf"), float("nan"), -1e18):
    log.send(msgspec.msgpack.encode(LogLine("tricks.time", 40, str(created), created)))
"""),
        Done,
        30,
    )
    cell.close()  # delivers what was logged
    assert [line.split()[-1] for line in shown] == ["1e+300", "inf", "nan", "-1e+18"]
