"""Programs that answer nothing: how they end, and that nothing of them is left."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import pytest

from crumplezone.errors import UsageError
from crumplezone.reports.records.report import Evidence, Exit
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.guest import Guest
from crumplezone.sandbox.process.launch import child_of, launch
from crumplezone.sandbox.process.lines import Ends
from crumplezone.sandbox.process.process import Child, Process
from tests.support.decoders import descriptors, opened_since, wait_for_end

Open = Callable[..., Guest]
HELD = """
import ctypes, sys
from crumplezone.sandbox.child.arm import die_with, hold_on_fault
hold_on_fault(int(sys.argv[1]), int(sys.argv[2]))
ctypes.string_at(8)
"""


def start(code: str, env: Mapping[str, str]) -> Process:
    def execute(ends: Ends) -> Child:
        arguments = [sys.executable, "-c", code, str(ends.fault), str(os.getpid())]
        fds, output = (ends.fault,), ends.output
        popen = subprocess.Popen(
            arguments, pass_fds=fds, stderr=output, env={**os.environ, **env}, process_group=0
        )
        return child_of(popen)

    return launch(execute)


@pytest.fixture
def run() -> Iterator[Open]:
    """Start programs that have ended after the test, and left nothing behind."""
    before, started = descriptors(), list[Guest]()

    def one(code: str, **options: object) -> Guest:
        started.append(Guest(partial(start, code), **options))  # type: ignore[arg-type]
        return started[-1]

    yield one
    while started:
        started.pop().close()
    assert opened_since(before) == []


def lost(guest: Guest, timeout: float | None = 30) -> Evidence:
    outcome = guest.wait(timeout)
    assert isinstance(outcome, Incident)
    assert guest.wait() is outcome
    return outcome.evidence.result(30)


def test_a_timeout_of_any_length_is_one(run: Open) -> None:
    assert [run("import sys; sys.exit(3)").wait(timeout) for timeout in (3e6, 1e300, math.inf)] == [3] * 3


@pytest.mark.parametrize(("code", "status"), [("0", 0), ("import sys; sys.exit(3)", 3)])
def test_an_orderly_end_is_its_return_code(run: Open, code: str, status: int) -> None:
    guest = run(code)
    assert (guest.wait(), guest.wait()) == (status, status)
    guest.close()
    guest.leave()


def test_the_environment_is_what_was_added(run: Open) -> None:
    assert run("import os; os._exit(int(os.environ['STATUS']))", env={"STATUS": "7"}).wait() == 7


def test_a_fault_is_held(run: Open) -> None:
    evidence = lost(run(HELD))
    assert (evidence.exit, evidence.returncode, evidence.phase) == (Exit.SIGNAL, -11, "run")
    assert evidence.fault is not None
    assert evidence.fault.address == "0x8"
    assert [step for step in evidence.steps if not step.ok] == []


def test_a_fault_is_found_though_the_fault_pipe_is_closed(run: Open) -> None:
    evidence = lost(run(HELD.replace("ctypes.string", "import os; os.closerange(3, 99); ctypes.string")))
    assert (evidence.exit, evidence.returncode) == (Exit.SIGNAL, -11)
    assert evidence.registers


def test_one_that_only_blocks_its_signals_is_not_taken_for_it(run: Open) -> None:
    code = "import os, signal, sys, time; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))"
    assert run(f"{code}; os.close(int(sys.argv[1])); time.sleep(1.3); sys.exit(4)").wait(30) == 4


def test_what_it_says_is_kept(run: Open) -> None:
    evidence = lost(run("import os; os.write(2, b'last words'); os.abort()"))
    assert (evidence.exit, evidence.returncode, evidence.registers) == (Exit.ABORT, -6, {})
    assert evidence.stderr_tail == "last words"


def test_a_hang_has_stacks(run: Open) -> None:
    evidence = lost(run("def stuck():\n    import signal\n    signal.pause()\nstuck()"), timeout=1.5)
    assert (evidence.exit, evidence.returncode) == (Exit.HANG, -9)
    assert any(frame.symbol == "stuck" for thread in evidence.threads for frame in thread.python)


def test_over_its_memory_limit_it_is_ended(run: Open) -> None:
    evidence = lost(run("held = [bytes(1 << 20) for _ in iter(int, 1)]", memory_limit=64 << 20))
    assert evidence.exit == Exit.OOM
    assert evidence.peak_rss is not None
    assert evidence.peak_rss > 64 << 20


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_asks_it_to_end_is_no_incident(run: Open, signum: signal.Signals) -> None:
    guest = run("import os, signal; signal.signal(2, signal.SIG_DFL); os.kill(os.getpid(), signal.SIGSTOP)")
    os.waitid(os.P_PID, guest.pid, os.WSTOPPED | os.WNOWAIT)  # it is ready
    guest.signal(signum)
    guest.signal(signal.SIGCONT)
    assert guest.wait() == -signum


def test_a_strangers_kill_is_one(run: Open) -> None:
    guest = run("import signal; signal.pause()")
    os.kill(guest.pid, signal.SIGKILL)
    assert lost(guest).exit == Exit.KILLED


@pytest.mark.parametrize("end", ["close", "leave"])
def test_another_thread_may_close_it_or_let_it_go(run: Open, end: str) -> None:
    guest = run("import signal; signal.pause()")
    waiting, raised = threading.Event(), list[UsageError]()

    def wait() -> None:
        waiting.set()
        try:
            guest.wait()
        except UsageError as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    assert waiting.wait(10)
    getattr(guest, end)()
    thread.join(10)
    assert len(raised) == 1
    with pytest.raises(UsageError):
        guest.wait()
    if end == "leave":
        assert not wait_for_end(guest.pid, 0)
        os.kill(guest.pid, signal.SIGKILL)
        os.waitpid(guest.pid, 0)
    assert wait_for_end(guest.pid)
