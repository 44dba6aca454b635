"""Cells forked off a zygote: as good as spawned ones, and none the worse for the zygote's death."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from crumplezone.errors import CellDied, CellRefused, UsageError
from crumplezone.reports.records.report import Exit
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells import zygote
from crumplezone.sandbox.cells.cell import Cell, CellSpec
from crumplezone.sandbox.cells.zygote import Zygote
from crumplezone.sandbox.child import fork_server
from tests.support.decoders import collect, descriptors, kill, opened_since, wait_for_end
from tests.support.native import liars
from tests.support.processes.constrained import STRANGER, descriptors_used_up
from tests.support.processes.crashes import EXPECTED, check_stacks, has_address
from tests.support.processes.zygotes import DOUBLE, SPEC, Asked, Deaths, echo, evidence_of, parent
from tests.support.services import faults
from tests.support.services.stunts import Config, Echo, Info, Stunt
from tests.support.services.tricks import failed, perform


@pytest.fixture
def deaths() -> Deaths:
    return queue.SimpleQueue()


Grow = Callable[..., Zygote]


@pytest.fixture
def grow(deaths: Deaths) -> Iterator[Grow]:
    """Make zygotes that are closed after the test."""
    grown: list[Zygote] = []

    def make(at_start: str = "") -> Zygote:
        grown.append(Zygote(CellSpec(DOUBLE, Config(at_start), start_deadline=60), deaths.put))
        return grown[-1]

    yield make
    for each in grown:
        each.close()


def test_a_cell_is_forked_with_what_the_zygote_has_loaded(grow: Grow) -> None:
    seed = grow()
    cells = [Cell(SPEC, seed.fork) for _ in range(2)]
    for cell in cells:
        echo(cell)
        assert parent(cell.pid) == seed.pid
        assert cell.info(Info) == Info(cell.pid, seed=seed.pid or 0)
        assert os.getpgid(cell.pid) == cell.pid
        cell.close()
    assert psutil.Process(seed.pid).children() == []  # reaped


def test_a_want_of_descriptors_is_no_lie_of_the_zygote(grow: Grow, deaths: Deaths) -> None:
    seed = grow()
    seed.start()
    known, refused = seed.pid, 0
    for left in range(24):
        with descriptors_used_up(but=left):
            try:
                cell = Cell(SPEC, seed.fork)
            except OSError:
                refused += 1
                continue
        cell.close()
        break
    assert 8 < refused < 24
    assert seed.pid == known
    assert deaths.empty()
    Cell(SPEC, seed.fork).close()  # with this, those that came too late are reaped
    assert psutil.Process(seed.pid).children() == []


def open_files(pid: int | None) -> list[tuple[int, int]]:
    found = [each.stat() for each in Path(f"/proc/{pid}/fd").iterdir()]
    return [(each.st_dev, each.st_ino) for each in found]


def test_a_forked_cell_has_the_descriptors_of_a_spawned_one(grow: Grow) -> None:
    seed = grow()
    first, second, spawned = Cell(SPEC, seed.fork), Cell(SPEC, seed.fork), Cell(SPEC)
    null = Path(os.devnull).stat()
    own = [set(open_files(cell.pid)) - {(null.st_dev, null.st_ino)} for cell in (first, second)]
    theirs = set(open_files(seed.pid))
    assert len(open_files(first.pid)) == len(open_files(second.pid)) == len(open_files(spawned.pid))
    assert own[0].isdisjoint(theirs | own[1])
    for cell in (first, second, spawned):
        cell.close()


def test_the_environment_of_a_forked_cell_is_todays(grow: Grow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRUMPLEZONE_TEST_GONE", "x")
    seed = grow()
    seed.start()
    monkeypatch.delenv("CRUMPLEZONE_TEST_GONE")
    monkeypatch.setenv("CRUMPLEZONE_TEST_NEW", "\udcff")  # a byte that is no UTF-8
    code = "gone = 'CRUMPLEZONE_TEST_GONE' in os.environ\n"
    code += "os._exit(len(os.environb[b'CRUMPLEZONE_TEST_NEW']) + 2 * gone + {})"
    assert perform(code.format("0"), start=seed.fork).returncode == 1
    given = {"CRUMPLEZONE_TEST_OWN": "abcd"}
    own = "len(os.environ['CRUMPLEZONE_TEST_OWN'])"
    assert perform(code.format(own), start=seed.fork, env=given).returncode == 5


@pytest.mark.parametrize(
    ("code", "kind", "returncode"),
    [
        ("os._exit(7)", Exit.NATIVE_EXIT, 7),
        ("lib.memset(0x18, 1, 1)", Exit.SIGNAL, -signal.SIGSEGV),
        ("lib.abort()", Exit.ABORT, -signal.SIGABRT),
        (STRANGER.format(9), Exit.KILLED, -signal.SIGKILL),
        (STRANGER.format(11), Exit.KILLED, -signal.SIGSEGV),
        ("lib.pause()", Exit.HANG, -signal.SIGKILL),
        ("x = bytearray(500 << 20); lib.pause()", Exit.OOM, -signal.SIGKILL),
    ],
)
def test_the_true_status_comes_through_the_zygote(grow: Grow, code: str, kind: Exit, returncode: int) -> None:
    seed = grow()
    limit = 400 << 20 if kind == Exit.OOM else None
    deadline = 0.3 if kind == Exit.HANG else 30
    evidence = perform(code, deadline, start=seed.fork, memory_limit=limit)
    assert (evidence.exit, evidence.returncode) == (kind, returncode)
    held_by_a_stranger = (kind, returncode) == (Exit.KILLED, -signal.SIGSEGV)  # whose stacks tell nothing
    assert list(failed(evidence)) == ["stacks (pystack)"] * held_by_a_stranger
    assert psutil.Process(seed.pid).children() == []


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faults.build(tmp_path_factory.mktemp("crashlib"))


@pytest.mark.parametrize(
    ("kind", "thread"),
    [
        *[("null", thread) for thread in ("main", "python", "native")],
        *[("stack overflow", thread) for thread in ("main", "python")],
        *[("abort", "native"), ("jump to null", "main")],
    ],
)
def test_faults_are_held_in_forked_cells(library: Path, deaths: Deaths, kind: str, thread: str) -> None:
    spec = CellSpec("tests.support.services.faults:Faults", faults.Config(str(library)))
    seed = Zygote(spec, deaths.put)
    cell = Cell(spec, seed.fork)
    info = cell.info(faults.Info)
    with pytest.raises(CellDied) as caught:
        cell.call(faults.Crash(kind, thread), faults.Survived, 60)
    evidence = Incident.of(caught.value).evidence.result(60)
    seed.close()
    fault, expected = evidence.fault, EXPECTED[kind]
    assert fault is not None
    assert (fault.name, evidence.returncode) == (expected.signal, -fault.signal)
    assert failed(evidence) == {}
    assert has_address(fault, expected.address, evidence, info), fault
    check_stacks(evidence, thread, expected.function)
    assert [phase.name for phase in evidence.flight] == ["start", "validate"]  # none of the zygote's


def test_a_killed_zygote_is_replaced_and_its_cells_go_on(grow: Grow, deaths: Deaths) -> None:
    seed = grow()
    old = Cell(SPEC, seed.fork)
    first = seed.pid
    kill(first)
    new = Cell(SPEC, seed.fork)
    evidence = evidence_of(deaths)
    assert (evidence.pid, evidence.phase, evidence.returncode) == (first, "idle", -signal.SIGKILL)
    assert parent(new.pid) == seed.pid != first
    for cell in (old, new):
        echo(cell)
    kill(old.pid)
    died = old.died_idle()
    assert died is not None
    evidence = Incident.of(died).evidence.result(30)
    assert (evidence.exit, evidence.returncode) == (Exit.KILLED, None)
    assert "its exit status is not known: it went with the zygote" in evidence.detail
    new.close()


def test_a_death_that_another_thread_noticed_first(
    grow: Grow, deaths: Deaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = grow()
    seed.start()
    first, ready = seed.pid, seed._ready

    def overtaken() -> object:
        """The line is taken; then the zygote dies, and another thread looks at it before this one."""
        line = ready()
        if seed.pid == first:
            kill(first)
            assert line is not None
            assert not line.lives()
        return line

    monkeypatch.setattr(seed, "_ready", overtaken)
    cell = Cell(SPEC, seed.fork)
    assert parent(cell.pid) == seed.pid != first
    assert evidence_of(deaths).pid == first
    assert deaths.empty()  # it is told once
    cell.close()


def test_who_meets_a_dead_zygote_each_time_spawns(grow: Grow, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = grow()
    ready = seed._ready

    def doomed() -> object:
        """Others fork in between, so that the deaths are never three in a row."""
        seed._deaths = 0
        line = ready()
        kill(seed.pid)
        return line

    monkeypatch.setattr(seed, "_ready", doomed)
    cell = Cell(SPEC, seed.fork)
    assert parent(cell.pid) == os.getpid()
    cell.close()


def test_a_zygote_that_does_not_answer_is_closed_in_the_middle_of_a_fork(grow: Grow, deaths: Deaths) -> None:
    seed = grow()
    cell = Cell(SPEC, seed.fork)
    pid = seed.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    raised, asked = queue.SimpleQueue[BaseException](), Asked()

    def fork() -> None:
        sys.setprofile(asked)
        try:
            Cell(SPEC, seed.fork)
        except UsageError as error:
            raised.put(error)

    thread = threading.Thread(target=fork)
    thread.start()
    assert asked.wait(30)
    seed.close()
    assert "closed" in str(raised.get(timeout=10))
    thread.join()
    assert wait_for_end(pid)
    assert deaths.empty()  # whoever closed it killed it, and did not wait until it counted as hung
    echo(cell)
    cell.close()


def test_a_fault_is_held_and_read_after_the_zygotes_death(grow: Grow) -> None:
    seed = grow()
    cell = Cell(SPEC, seed.fork)
    kill(seed.pid)
    with pytest.raises(CellDied) as caught:
        cell.call(Stunt("segv"), Echo, 30)
    evidence = Incident.of(caught.value).evidence.result(30)
    assert (evidence.exit, evidence.returncode) == (Exit.SIGNAL, -signal.SIGSEGV)
    assert evidence.registers


@pytest.fixture
def lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file that tells the next zygotes what to say."""
    file = tmp_path / "lie"
    file.touch()
    monkeypatch.setenv(liars.VARIABLE, str(file))
    monkeypatch.setattr(fork_server, "TARGET", "tests.support.native.liars:Changeling")
    return file


def test_a_zygote_that_names_a_foreign_process_is_condemned(grow: Grow, deaths: Deaths, lie: Path) -> None:
    seed = grow()
    mine = Cell(SPEC, seed.fork)
    with subprocess.Popen(["sleep", "60"]) as sibling:
        for pid in (1, os.getpid(), sibling.pid, seed.pid, mine.pid, 2**22):
            lie.write_text(str(pid))
            first = seed.pid
            cell = Cell(SPEC, seed.fork)
            evidence = evidence_of(deaths)
            assert (evidence.exit, evidence.pid) == (Exit.PROTOCOL, first)
            assert f"forked {pid}, which is no new child" in evidence.detail
            echo(cell)
            cell.close()
            assert wait_for_end(int(lie.with_suffix(".forked").read_text()))
        assert sibling.poll() is None
        sibling.kill()
    echo(mine)
    mine.close()


def test_a_zygote_killed_in_the_middle_of_a_fork(grow: Grow, deaths: Deaths, lie: Path) -> None:
    seed = grow()
    lie.write_text("killed")
    cell = Cell(SPEC, seed.fork)
    assert evidence_of(deaths).exit == Exit.KILLED
    assert wait_for_end(int(lie.with_suffix(".forked").read_text()))  # nobody knew it, and it dies
    echo(cell)
    cell.close()


def test_a_zygote_that_somebody_stops_is_replaced(
    grow: Grow, deaths: Deaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zygote, "_DEADLINE", 0.5)
    seed = grow()
    seed.start()
    assert seed.pid is not None
    os.kill(seed.pid, signal.SIGSTOP)
    cell = Cell(SPEC, seed.fork)
    assert evidence_of(deaths).exit == Exit.KILLED
    echo(cell)
    cell.close()


def test_after_three_deaths_without_a_fork_cells_are_spawned_for_a_while(
    grow: Grow, deaths: Deaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = grow()
    for _ in range(3):
        seed.start()
        kill(seed.pid)
    cell = Cell(SPEC, seed.fork)
    assert (parent(cell.pid), seed.pid) == (os.getpid(), None)
    assert [evidence_of(deaths).exit for _ in range(3)] == [Exit.KILLED] * 3
    assert seed.info(Info) is None
    cell.close()
    monkeypatch.setattr(zygote, "_RETRY", 0.0)
    cell = Cell(SPEC, seed.fork)
    assert parent(cell.pid) == seed.pid
    cell.close()


def test_a_zygote_with_threads_does_not_fork(grow: Grow, caplog: pytest.LogCaptureFixture) -> None:
    cell = Cell(SPEC, grow("thread").fork)
    assert parent(cell.pid) == os.getpid()
    echo(cell)
    cell.close()
    assert "UnforkableError: 2 threads run in the zygote" in caplog.text


def test_a_seed_that_fails(grow: Grow, deaths: Deaths) -> None:
    with pytest.raises(CellRefused, match="refused on demand"):
        grow("raise").start()
    with pytest.raises(CellDied) as caught:
        Cell(SPEC, grow("segv").fork)
    evidence = Incident.of(caught.value).evidence.result(30)
    assert (evidence.exit, evidence.phase) == (Exit.SIGNAL, "start")
    assert deaths.empty()  # whoever started it was told


def test_a_closed_zygote_leaves_its_cells(grow: Grow) -> None:
    seed = grow()
    cell = Cell(SPEC, seed.fork)
    seed.close()
    echo(cell)
    with pytest.raises(UsageError):
        Cell(SPEC, seed.fork)
    cell.close()


SUPERVISOR = """
import os, signal
from crumplezone.sandbox.cells.cell import Cell
from crumplezone.sandbox.cells.zygote import Zygote
from tests.support.decoders import fork
from tests.support.processes.zygotes import SPEC
seed = Zygote(SPEC, print)
cells = [Cell(SPEC, seed.fork) for _ in range(2)]
os.kill(cells[1].pid, signal.SIGSTOP)
if fork() == 0:  # a forked sibling must not keep the cells alive
    signal.pause()
os.kill(seed.pid, signal.SIGSTOP)
print(seed.pid, *[cell.pid for cell in cells], flush=True)
signal.pause()
"""


def test_zygote_and_cells_die_with_a_killed_supervisor() -> None:
    command = [sys.executable, "-c", SUPERVISOR]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0) as supervisor:
        assert supervisor.stdout is not None
        pids = [int(pid) for pid in supervisor.stdout.readline().split()]
        assert len(pids) == 3
        supervisor.kill()
        try:
            assert [wait_for_end(pid, 1) for pid in pids] == [True] * 3
        finally:
            os.killpg(supervisor.pid, signal.SIGKILL)


def test_nothing_is_left_behind(grow: Grow) -> None:
    seed = grow()

    def one(code: str) -> None:
        perform(code, start=seed.fork)

    one("os._exit(1)")
    before = descriptors(), descriptors(seed.pid)
    for _ in range(5):
        for code in ("os._exit(1)", "lib.raise_(9)", "os.kill(os.getpid(), 9)"):
            one(code.replace("raise_", "__getattr__('raise')"))
    assert opened_since(before[0]) == []
    assert descriptors(seed.pid) == before[1]
    assert psutil.Process(seed.pid).children() == []


def test_a_cell_that_nobody_closed_is_reaped(grow: Grow) -> None:
    seed = grow()
    cell = Cell(SPEC, seed.fork)
    pid = cell.pid
    del cell
    collect()
    assert not psutil.pid_exists(pid)
    assert psutil.Process(seed.pid).children() == []
