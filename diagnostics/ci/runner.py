"""Child side: a runner of a diagnostic run. Cases come, records and what is logged go."""

from __future__ import annotations

import logging
import multiprocessing
import socket
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from crumplezone.diagnostics.ci.case import Case
from crumplezone.reports.records.run import CaseRecord, Ending
from crumplezone.sandbox.child.arm import die_with
from crumplezone.sandbox.child.loop import find
from crumplezone.sandbox.process.log_relay import LogSender

_log = logging.getLogger("crumplezone.ci")

Do = Callable[[Case, Path], CaseRecord]


def unknown(case: Case, detail: str) -> CaseRecord:
    """Of a case of which nothing is known."""
    return CaseRecord(case.id, case.model.name, case.shape, Ending.ERROR, detail=detail)


def _serve(line: Connection, store: Path, do: Do) -> None:
    """Do what comes, until there is None to do."""
    while (case := line.recv()) is not None:
        _log.info("%s: begins", case.id)
        try:
            record = do(case, store)
        except Exception as error:  # noqa: BLE001 - whatever it was, the next case is another
            _log.exception("%s: could not be run", case.id)
            record = unknown(case, f"could not be run ({type(error).__name__}: {error}); see run.log")
        what = record.detail and f": {record.detail}"
        _log.info("%s: %s in %.0f ms%s", case.id, record.ending.value, record.ms, what)
        line.send_bytes(msgspec.msgpack.encode(record))


def main() -> None:
    """Entry point."""
    line, log, parent, name, do, store = sys.argv[1:]
    die_with(int(parent))  # its cells die with this process in turn
    multiprocessing.current_process().name = name  # as its log records have it
    logging.basicConfig(level=logging.INFO, handlers=[LogSender(socket.socket(fileno=int(log)))])
    logging.getLogger("llama.cpp").setLevel(logging.WARNING)
    _serve(Connection(int(line)), Path(store), find(do))


if __name__ == "__main__":
    main()
