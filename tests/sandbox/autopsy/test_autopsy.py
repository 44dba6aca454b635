"""Deaths that get in the way of their own examination: whatever happens, the cell is ended and reported."""

from __future__ import annotations

import platform
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from crumplezone.errors import CellDied
from crumplezone.reports.records.report import Exit
from crumplezone.sandbox.autopsy import autopsy
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.autopsy.release import named_fault
from crumplezone.sandbox.cells.cell import Cell, CellSpec
from tests.support.processes.constrained import STRANGER, die_in_a_supervisor, on_x86_64
from tests.support.services.faults import build
from tests.support.services.tricks import TARGET, Config, Done, Trick, failed, perform

SEGV = "lib.memset(0x18, 1, 1)"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build(tmp_path_factory.mktemp("crashlib")))


@pytest.mark.parametrize("threads", [2, 3, 4, 8])
def test_threads_that_crash_at_once_are_all_held(library: str, threads: int) -> None:
    evidence = perform(f"lib.crash_together({threads})", config=Config(library))
    assert evidence.exit == Exit.SIGNAL
    assert evidence.fault is not None
    assert evidence.returncode == -evidence.fault.signal
    assert evidence.registers
    assert failed(evidence) == {}
    (crashed,) = [thread for thread in evidence.threads if thread.crashed]
    assert "one_of_many" in [frame.symbol.partition("(")[0] for frame in crashed.native]
    named = named_fault(evidence.faulthandler)  # by any of them
    assert named is not None
    assert {named.name, evidence.fault.name} <= {"SIGSEGV", "SIGFPE"}


def test_a_faulthandler_that_was_on_already_is_taken_over() -> None:
    evidence = perform(SEGV, env={"PYTHONFAULTHANDLER": "1"})
    assert evidence.registers
    assert (evidence.returncode, failed(evidence)) == (-signal.SIGSEGV, {})
    assert "parked" in evidence.steps[-1].detail


@on_x86_64
def test_without_packet_pipes_the_parked_thread_is_read() -> None:
    evidence = die_in_a_supervisor("segv", "packet_pipes")
    assert evidence.fault is not None
    assert evidence.fault.address == "0x18"
    assert list(failed(evidence)) == ["hold (packet pipe)"]


@pytest.mark.parametrize("signum", [signal.SIGSEGV, signal.SIGABRT])
def test_a_strangers_fatal_signal_is_no_crash(signum: signal.Signals) -> None:
    evidence = perform(STRANGER.format(int(signum)))
    assert evidence.exit == Exit.KILLED
    assert evidence.fault is not None
    assert evidence.fault.sender_pid not in {None, evidence.pid}
    assert f"{signum.name} sent by process {evidence.fault.sender_pid} of user" in evidence.detail
    assert (evidence.returncode, evidence.assertion) == (-signum, None)


@pytest.mark.parametrize("signum", [signal.SIGQUIT, signal.SIGUSR1, signal.SIGXCPU])
def test_signals_that_no_native_code_raises_are_no_crash(signum: signal.Signals) -> None:
    evidence = perform(STRANGER.format(int(signum)))
    assert (evidence.exit, evidence.returncode) == (Exit.KILLED, -signum)
    assert evidence.detail.startswith(f"{signum.name} ")


@pytest.mark.parametrize(
    ("code", "kind"),
    [("lib.raise_(11)", Exit.SIGNAL), ("lib.abort()", Exit.ABORT), ("os.kill(os.getpid(), 7)", Exit.SIGNAL)],
)
def test_its_own_fatal_signal_is_a_crash(code: str, kind: Exit) -> None:
    evidence = perform(code.replace("raise_", "__getattr__('raise')"))
    assert evidence.exit == kind
    assert evidence.fault is not None
    assert evidence.fault.sender_pid == evidence.pid


@pytest.fixture
def children_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.usefixtures("children_ignored")
def test_a_crash_is_read_where_sigchld_is_ignored() -> None:
    evidence = perform(SEGV)
    assert (evidence.exit, evidence.returncode) == (Exit.SIGNAL, -signal.SIGSEGV)
    assert failed(evidence) == {}


@pytest.mark.usefixtures("children_ignored")
@pytest.mark.parametrize("code", ["os.kill(os.getpid(), 9)", "os._exit(3)"])
def test_an_exit_status_that_somebody_took_is_not_made_up(code: str) -> None:
    evidence = perform(code)
    assert (evidence.exit, evidence.returncode, evidence.fault) == (Exit.KILLED, None, None)
    assert "SIGCHLD" in evidence.detail
    assert "SIGCHLD" in failed(evidence)["reap"].detail


@pytest.fixture
def no_more_threads() -> Iterator[None]:
    """Each new thread wants half of the address space."""
    yield
    threading.stack_size(0)


@pytest.mark.usefixtures("no_more_threads")
def test_without_a_thread_for_it_there_is_evidence_at_once() -> None:
    cell = Cell(CellSpec(TARGET, Config(), start_deadline=60))
    threading.stack_size(2**47)
    with pytest.raises(CellDied) as caught:
        cell.call(Trick(SEGV), Done, 30)
    assert Incident.of(caught.value).evidence.done()
    evidence = Incident.of(caught.value).evidence.result()
    assert not psutil.pid_exists(evidence.pid)
    assert evidence.exit == Exit.SIGNAL
    assert evidence.registers
    assert next(each for each in evidence.threads if each.crashed).native[-1].symbol == "_start"
    assert "thread" in failed(evidence)["autopsy"].detail
    assert "ulimit" in failed(evidence)["autopsy"].remedy


def test_an_error_of_our_own_ends_the_cell_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def confused() -> dict[str, int]:
        raise LookupError("what is this kernel?")

    monkeypatch.setattr(autopsy, "oom_kills", confused)
    evidence = perform(SEGV)
    assert not psutil.pid_exists(evidence.pid)
    assert (evidence.exit, evidence.returncode) == (Exit.SIGNAL, -signal.SIGSEGV)
    assert evidence.fault is not None
    assert "what is this kernel?" in failed(evidence)["evidence"].detail


def test_a_cell_killed_while_it_was_held_says_so() -> None:
    evidence = perform(f"""
if not os.fork():
    while open(f"/proc/{{os.getppid()}}/stat").read().split(") ")[1][0] not in "tT":
        pass  # stopped, by us or by the unwinder
    os.kill(os.getppid(), signal.SIGKILL)
    os._exit(0)
{SEGV}""")
    assert evidence.returncode == -signal.SIGKILL
    assert failed(evidence).keys() & {"hold", "reap"}


def test_a_lie_on_the_fault_pipe_costs_little() -> None:
    evidence = perform("os.write(int(sys.argv[3]), b'x'); lib.sleep(60)")
    assert (evidence.exit, evidence.faulthandler) == (Exit.PROTOCOL, "x")
    (step,) = [step for step in evidence.steps if step.name == "faulthandler"]
    assert step.ms < 2000


@pytest.mark.parametrize("name", [b"a\rb", b"a\nb\\012", "\u2028 b".encode(), b"\xff\xfe"])
def test_mapped_files_may_have_any_name(tmp_path: Path, name: bytes) -> None:
    path = bytes(tmp_path) + b"/" + name
    evidence = perform(f"""
import mmap
file = open({path!r}, "w+b")
file.truncate(4096)
kept = mmap.mmap(file.fileno(), 4096)
{SEGV}""")
    assert evidence.registers
    assert failed(evidence) == {}
    assert msgspec.json.encode(evidence)
    assert sum(str(tmp_path) in each.path for each in evidence.maps) == 1


def test_a_thread_may_have_any_name() -> None:
    evidence = perform(f"lib.prctl(15, b'x\\r\\xffVm', 0, 0, 0)\n{SEGV}")
    (thread,) = evidence.threads
    assert thread.name == "x\r\\xffVm"
    assert thread.native  # pystack, which wants names in UTF-8, gives none: the place of the fault
    assert failed(evidence)["stacks (pystack)"].remedy == ""


def test_deep_recursion_of_python_has_its_stacks() -> None:
    evidence = perform(f"""
sys.setrecursionlimit(100_000)
def down(depth):
    down(depth - 1) if depth else {SEGV}
down(8000)""")
    assert failed(evidence) == {}
    (thread,) = evidence.threads
    assert thread.python[0].symbol == "down"
    assert any("left out" in frame.symbol for frame in thread.python)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="offsets in frames of CPython 3.11")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="offsets of x86-64")
def test_native_stacks_survive_what_is_wrong_with_python() -> None:
    evidence = perform(f"""
def ring():
    frame = ctypes.c_void_p.from_address(id(sys._getframe()) + 24).value
    ctypes.c_void_p.from_address(frame + 48).value = frame  # its own caller
    {SEGV}
ring()""")
    step = failed(evidence)["stacks (pystack)"]
    assert step.detail.endswith("had after all: native")
    (thread,) = evidence.threads
    assert "ring" not in [frame.symbol for frame in thread.python]
    assert any("memset" in frame.symbol for frame in thread.native)
