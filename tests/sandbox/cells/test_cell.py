"""Real faults in real cells: held, classified, and survived."""

from __future__ import annotations

import gc
import logging
import os
import queue
import select
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from logging.handlers import QueueHandler

import psutil
import pytest

from crumplezone.errors import CellDied, CellRefused, UsageError
from crumplezone.reports.records.report import Exit
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.autopsy.release import named_fault
from crumplezone.sandbox.cells.cell import Cell
from tests.support.decoders import descriptors, opened_since
from tests.support.processes.cells import die, spec
from tests.support.processes.constrained import descriptors_used_up
from tests.support.services.stunts import Echo, Info, Stunt


@pytest.mark.parametrize(
    ("stunt", "name", "code"),
    [
        ("segv", "SIGSEGV", "SEGV_MAPERR"),
        ("fpe", "SIGFPE", "FPE_INTDIV"),
        ("ill", "SIGILL", "ILL_ILLOPN"),
        ("bus", "SIGBUS", "BUS_ADRERR"),
        ("stack_overflow", "SIGSEGV", "SEGV_MAPERR"),
    ],
)
def test_fatal_signals_are_held_and_read(stunt: str, name: str, code: str) -> None:
    evidence = die(stunt)
    assert evidence.exit == Exit.SIGNAL
    assert evidence.fault is not None
    assert (evidence.fault.name, evidence.fault.code_name) == (name, code)
    assert evidence.returncode == -evidence.fault.signal
    assert int(evidence.registers["rip"], 16) > 0
    assert [step for step in evidence.steps if not step.ok] == []
    crashed = [thread for thread in evidence.threads if thread.crashed]
    assert len(crashed) == 1
    assert any(frame.symbol == "handle" for frame in crashed[0].python)
    assert any(frame.module.endswith(".so") or "python" in frame.module for frame in crashed[0].native)
    assert "handle" in evidence.faulthandler
    assert "C stack" not in evidence.faulthandler  # Python 3.14 would add it
    named = named_fault(evidence.faulthandler)
    assert named is not None
    assert named.name == name


def test_fault_address_is_the_one_touched() -> None:
    evidence = die("segv")
    assert evidence.fault is not None
    assert evidence.fault.address == "0x18"
    assert evidence.fault.access == "write"
    memset = evidence.threads[0].native
    assert any(f.build_id and f.module.rpartition("/")[2].startswith("libc.so") for f in memset)


def test_ggml_abort_leaves_its_assertion() -> None:
    evidence = die("ggml_abort")
    assert evidence.exit == Exit.ABORT
    assert evidence.assertion is not None
    assert evidence.assertion.text == "GGML_ASSERT(stunt == double) failed"
    assert (evidence.assertion.file, evidence.assertion.line) == ("stunts.py", 7)


def test_terminate_is_an_abort() -> None:
    evidence = die("terminate")
    assert evidence.exit == Exit.ABORT
    assert evidence.assertion is not None
    assert evidence.assertion.source == "terminate"


@pytest.mark.parametrize("stunt", ["hang", "spin"])
def test_hang_is_killed_at_its_deadline_with_stacks(stunt: str) -> None:
    evidence = die(stunt, deadline=0.3)
    assert evidence.exit == Exit.HANG
    assert any(frame.symbol == "handle" for thread in evidence.threads for frame in thread.python)


@pytest.mark.parametrize(
    ("stunt", "exit_kind"),
    [
        ("exit_native", Exit.NATIVE_EXIT),
        ("kill", Exit.KILLED),
        ("term", Exit.KILLED),
        ("close_socket", Exit.PROTOCOL),
        ("garbage", Exit.PROTOCOL),
    ],
)
def test_other_ends(stunt: str, exit_kind: Exit) -> None:
    assert die(stunt).exit == exit_kind


def test_memory_balloon_is_oom() -> None:
    evidence = die("balloon", memory_limit=400 << 20)
    assert evidence.exit == Exit.OOM
    assert evidence.peak_rss is not None
    assert evidence.peak_rss > 400 << 20


@pytest.mark.parametrize(
    ("stunt", "exit_kind"),
    [("segv", Exit.SIGNAL), ("ggml_abort", Exit.ABORT), ("exit_native", Exit.FAILED_START)],
)
def test_death_at_start(stunt: str, exit_kind: Exit) -> None:
    with pytest.raises(CellDied) as caught:
        Cell(spec(stunt))
    evidence = Incident.of(caught.value).evidence.result(30)
    assert (evidence.exit, evidence.phase) == (exit_kind, "start")


def test_exceptions_in_the_child_leave_it_alive() -> None:
    with pytest.raises(CellRefused, match="refused on demand"):
        Cell(spec("raise"))
    cell = Cell(spec())
    with pytest.raises(CellRefused, match="refused on demand"):
        cell.call(Stunt("raise"), Echo, 30)
    assert cell.call(Stunt("echo", 5), Echo, 30) == Echo("echo", 5)
    cell.close()
    cell.close()
    with pytest.raises(UsageError):
        cell.call(Stunt("echo"), Echo, 30)


def test_arena_carries_arrays_both_ways_and_grows() -> None:
    cell = Cell(spec())
    for count in (10, 10, 100_000, 10):  # the same cut again, and one from before it grew
        (numbers,) = cell.arena.arrays([("i4", count)])
        numbers[:] = range(count)
        cell.call(Stunt("arena", count), Echo, 30)
        assert numbers[count - 1] == 2 * (count - 1)
    cell.close()


def test_flood_of_stderr_is_drained_into_a_bounded_tail() -> None:
    tail = die("kill", before="flood").stderr_tail
    assert tail.endswith("last words\n")
    assert len(tail) <= 64 * 1024


def test_log_records_arrive_under_their_own_name_and_level() -> None:
    records: queue.Queue[logging.LogRecord] = queue.Queue()
    logger = logging.getLogger("stunts.voice")
    handler = QueueHandler(records)
    logger.addHandler(handler)
    cell = Cell(spec())
    try:
        cell.call(Stunt("log"), Echo, 30)
        record = records.get(timeout=10)
        assert (record.levelname, record.getMessage(), record.process) == ("WARNING", "line 1", cell.pid)
    finally:
        logger.removeHandler(handler)
        cell.close()


def test_an_interrupted_call_does_not_answer_the_next_one() -> None:
    cell = Cell(spec())
    timer = threading.Timer(0.2, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        cell.call(Stunt("hang"), Echo, 30)
    timer.join()
    assert not cell.alive


def test_a_cell_that_writes_to_its_fault_pipe_for_ever_is_bounded() -> None:
    evidence = die("fake_fault")
    assert evidence.exit == Exit.PROTOCOL
    assert len(evidence.faulthandler) <= 64 * 1024


def test_huge_log_records_of_a_hostile_cell_are_cut() -> None:
    tail = die("kill", before="shout").log_tail
    assert tail
    assert max(map(len, tail)) < 4096


SUPERVISOR = """
import os, signal, threading
from crumplezone.sandbox.cells.cell import Cell
from tests.support.decoders import fork
from tests.support.processes.cells import spec
from tests.support.services.stunts import Echo, Stunt
cells = [Cell(spec()) for _ in range(3)]
threading.Thread(target=lambda: cells[0].call(Stunt("hang"), Echo, None)).start()
os.kill(cells[1].pid, signal.SIGSTOP)
if fork() == 0:  # a forked sibling must not keep the cells alive
    signal.pause()
print(*[cell.pid for cell in cells], flush=True)
signal.pause()
"""


def test_cells_die_with_a_killed_supervisor() -> None:
    command = [sys.executable, "-c", SUPERVISOR]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0) as supervisor:
        assert supervisor.stdout is not None
        pidfds = [os.pidfd_open(int(pid)) for pid in supervisor.stdout.readline().split()]
        assert len(pidfds) == 3
        supervisor.kill()
        try:
            for pidfd in pidfds:  # readable once the process has ended, reaped by anyone or not
                assert select.select([pidfd], [], [], 1)[0]
        finally:
            os.killpg(supervisor.pid, signal.SIGKILL)
            for pidfd in pidfds:
                os.close(pidfd)


def test_nothing_is_left_behind() -> None:
    def one(stunt: str) -> None:
        cell = Cell(spec())
        try:
            cell.call(Stunt(stunt), Echo, 30)
            cell.close()
        except CellDied as died:
            Incident.of(died).evidence.result(30)

    one("segv")
    gc.collect()
    before = descriptors()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, ["segv", "echo", "kill", "exit_native", "echo", "segv"]))
    assert opened_since(before) == []
    assert psutil.Process().children(recursive=True) == []


def test_a_deadline_may_be_long() -> None:
    cell = Cell(spec())
    assert [cell.call(Stunt("echo", 5), Echo, deadline).amount for deadline in (3e6, 1e300)] == [5, 5]
    cell.close()


def test_info_is_typed() -> None:
    cell = Cell(spec())
    assert cell.info(Info).pid == cell.pid
    with pytest.raises(CellDied):
        cell.info(Echo)


def test_a_watch_for_which_there_is_no_room_leaves_nothing() -> None:
    cell = Cell(spec())
    before = descriptors()
    with descriptors_used_up(but=1), pytest.raises(OSError, match="Too many open files"):
        cell.watch()
    assert opened_since(before) == []
    cell.close()
