"""A host that forks while cells start: its forks keep no cell alive, and hold nobody up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from crumplezone.sandbox.autopsy.turns import FAMILIAR
from crumplezone.sandbox.process import drain
from crumplezone.sandbox.process.lines import forks_wait
from tests.support.decoders import fork, wait_for_end

_END = 10  # seconds

SUPERVISOR = """
import signal, sys, threading
from crumplezone.sandbox.cells.cell import Cell
from crumplezone.sandbox.cells.zygote import Zygote
from crumplezone.sandbox.process.launch import spawn
from tests.support.decoders import fork
from tests.support.processes.zygotes import SPEC

FILES = "process/launch.py", "process/lines.py", "ipc/arena.py"
how, step = sys.argv[1], int(sys.argv[2])
wanted, done = threading.Event(), threading.Event()

def forks():
    while wanted.wait():
        wanted.clear()
        if not fork():
            signal.pause()
        done.set()

def at(point):
    def look(frame, event, _):
        global seen
        if event.endswith("return") and frame.f_code.co_filename.endswith(FILES):
            seen += 1
            if seen == point:  # it forks here, or waits until it may
                wanted.set()
                done.wait(0.3)
    return look

threading.Thread(target=forks, daemon=True).start()
zygote = Zygote(SPEC, print)
zygote.start()
cells, point, seen = [], 1, 1
while seen >= point:
    point, seen = point + step, 0
    sys.setprofile(at(point))
    cells.append(Cell(SPEC, spawn if how == "spawn" else zygote.fork))
    sys.setprofile(None)
    assert seen < point or done.wait(20)
    done.clear()
print(zygote.pid, *[cell.pid for cell in cells], flush=True)
signal.pause()
"""


@pytest.mark.parametrize(("how", "step"), [("spawn", 4), ("zygote", 1)])
def test_a_fork_at_any_point_of_a_start_keeps_no_cell_alive(how: str, step: int) -> None:
    command = [sys.executable, "-c", SUPERVISOR, how, str(step)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0) as supervisor:
        try:
            assert supervisor.stdout is not None
            pids = [int(pid) for pid in supervisor.stdout.readline().split()]
            assert len(pids) > 6
            supervisor.kill()
            assert [pid for pid in pids if not wait_for_end(pid, 5)] == []
        finally:
            os.killpg(supervisor.pid, signal.SIGKILL)


def test_a_fork_waits_while_it_may_not_be_but_not_for_ever() -> None:
    pids: list[int] = []

    def work() -> None:
        pid = fork()
        if not pid:
            with forks_wait():  # whoever held it is not here
                os._exit(0)
        pids.append(pid)

    thread = threading.Thread(target=work)
    with forks_wait():
        thread.start()
        thread.join(0.2)
        assert pids == []
        thread.join(30)
        assert len(pids) == 1
    with forks_wait():
        pass
    assert os.waitpid(pids[0], 0) == (pids[0], 0)


def test_a_thread_that_may_not_be_forked_may_fork_itself() -> None:
    """As the handler of a signal may do that comes in there."""
    with forks_wait():
        pid = fork()
        if not pid:
            os._exit(0)
    assert os.waitpid(pid, 0) == (pid, 0)


@pytest.mark.parametrize(
    ("keeper", "work"),
    [
        (FAMILIAR, lambda: FAMILIAR.count((signal.SIGSEGV, "a place"))),
        (drain._loggers, lambda: drain._loggers.named("a.name")),
    ],
)
def test_a_fork_waits_for_no_thread_that_it_does_not_have(keeper: Any, work: Callable[[], object]) -> None:
    held, end = threading.Event(), threading.Event()

    def hold() -> None:
        with keeper._lock:
            held.set()
            end.wait(_END)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(_END)
    pid = fork()
    if not pid:
        signal.alarm(_END)
        work()
        os._exit(0)
    end.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
