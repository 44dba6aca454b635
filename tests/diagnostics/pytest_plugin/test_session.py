"""Sessions of pytest with tests in cells: how they stop, what they refuse, log, pass through and believe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from crumplezone.diagnostics.pytest_plugin.notes import Ended, Note, Notes, Reported, Warned
from crumplezone.reports.records.report import Exit
from crumplezone.reports.store.store import Store
from tests.support.decoders import read_all, wait_for_end

if TYPE_CHECKING:
    from tests.support.pytester import Run

pytest_plugins = ["pytester", "tests.support.pytester"]

STOPS = """
import os, signal, time
import pytest

def test_dies(): os._exit(1)
def test_fails(): assert 0
def test_passes(): pass
def test_ends(): pytest.exit("enough", 42)
def test_interrupts(): raise KeyboardInterrupt

def test_waits():
    with open("waits", "w") as file:
        file.write(f"{os.getpid()} {os.getppid()}")
    signal.pause()
"""


@pytest.mark.parametrize(
    ("arguments", "status", "outcomes"),
    [
        (["-x"], pytest.ExitCode.TESTS_FAILED, {"failed": 1}),
        (["-k", "passes or ends"], 42, {"passed": 1, "deselected": 4}),
        (["-k", "passes or interrupts"], pytest.ExitCode.INTERRUPTED, {"passed": 1, "deselected": 4}),
    ],
)
def test_the_session_stops(crumple: Run, arguments: list[str], status: int, outcomes: dict[str, int]) -> None:
    result = crumple(*arguments, test_stops=STOPS)
    assert result.ret == status
    assert result.parseoutcomes() == outcomes


@pytest.mark.usefixtures("crumple")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_a_cell_ends_with_its_session(pytester: pytest.Pytester, signum: signal.Signals) -> None:
    pytester.makepyfile(test_stops=STOPS)
    os.mkfifo("waits")
    command = [sys.executable, "-m", "pytest", "--crumple", "-k", "waits"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as session:
        cell, supervisor = map(int, Path("waits").read_text().split())
        assert supervisor == session.pid
        session.send_signal(signum)
        out, _ = session.communicate(timeout=30)
    assert wait_for_end(cell)
    if signum == signal.SIGINT:
        assert session.returncode == pytest.ExitCode.INTERRUPTED
        assert "KeyboardInterrupt" in out


@pytest.mark.parametrize("workers", [(), ("-n2",)], ids=["alone", "xdist"])
def test_deaths_are_told_where_sigchld_is_ignored(crumple: Run, workers: tuple[str, ...]) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        result = crumple(
            *workers,
            test_it="""
import os, signal

def test_passes(): assert signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN
def test_leaves(): os._exit(3)
""",
        )
    finally:
        signal.signal(signal.SIGCHLD, before)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*native_exit*_exit(3) in the middle of the test*"])


@pytest.mark.parametrize("arguments", [("--pdb",), ("--trace",), ("--trace", "-n2")])
def test_debuggers_are_refused_before_any_worker_starts(crumple: Run, arguments: tuple[str, ...]) -> None:
    result = crumple(*arguments, test_it="def test_it(): pass\n")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --pdb and --trace need the terminal, and --crumple runs all*"])
    assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()
    crumple(*arguments, "--collect-only", test_it="def test_it(): pass\n").stdout.fnmatch_lines(["*1 test*"])


def test_debuggers_are_refused(crumple: Run) -> None:
    marked = "import pytest\n@pytest.mark.crumple\ndef test_stops(): breakpoint()\ndef test_free(): pass\n"
    result = crumple("--pdb", crumple=False, test_it=marked)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --pdb and --trace need the terminal, and 1 of these tests*"])
    result = crumple("-s", crumple=False, test_it=marked)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["a debugger needs the terminal, and a cell has none: leave out --crumple"])


def test_limits(crumple: Run, store: Store) -> None:
    pytest.importorskip("pytest_timeout")
    result = crumple(
        "-o",
        "timeout=0.5",
        test_it="""
import ctypes, pytest

@pytest.mark.crumple(3)
def test_by_place(): pass
@pytest.mark.crumple(timeout="1")
def test_text(): pass
@pytest.mark.crumple(timeout=float("nan"))
def test_nan(): pass
@pytest.mark.crumple(memory=0)
def test_none(): pass
@pytest.mark.crumple(time=1)
def test_unknown(): pass

def test_hangs():
    ctypes.CDLL(None).pause()
@pytest.mark.timeout(0.1, func_only=True)
def test_late():
    while True: pass
@pytest.mark.timeout(50, method="thread")
@pytest.mark.crumple(timeout=0.4)
def test_earlier():
    ctypes.CDLL(None).pause()
""",
    )
    result.assert_outcomes(errors=5, failed=3)
    result.stdout.fnmatch_lines(
        [
            "*@pytest.mark.crumple is ?3?: takes timeout= (seconds) and memory= (MiB), by name",
            "*timeout of @pytest.mark.crumple is '1': must be a number from 0.001 to 1e+06",
            "*timeout of @pytest.mark.crumple is nan: must be a number from 0.001 to 1e+06",
            "*memory of @pytest.mark.crumple is 0: must be from 1 to 16777216 MiB",
            "*@pytest.mark.crumple is ?'time'?: takes timeout= (seconds) and memory= (MiB), by name",
            "hang in test_hangs (test_it.py) (it had not ended after 0.5 s); report: *",
            "*Failed: Timeout (>0.1s) from pytest-timeout.",
            "hang in test_earlier (test_it.py) (it had not ended after 0.4 s); report: *",
        ]
    )
    assert [report.evidence.exit for report in read_all(store)] == [Exit.HANG] * 2


def test_log_records_reach_the_handlers_of_pytest(crumple: Run, tmp_path: Path) -> None:
    log = tmp_path / "log"
    result = crumple(
        f"--log-file={log}",
        "--log-file-level=INFO",
        "--log-file-format=%(levelname)s %(funcName)s %(message)s %(job)s",
        "--log-cli-level=WARNING",
        test_it="""
import ctypes, logging, multiprocessing, os
import pytest

voice = logging.getLogger("voice")

def shout(n):
    for i in range(50):
        voice.info("%d.%d%s", n, i, "!" * 5000, extra={"job": 7})

def test_processes():
    context = multiprocessing.get_context("fork")
    crowd = [context.Process(target=shout, args=(n,)) for n in range(3)]
    for each in crowd: each.start()
    for each in crowd: each.join()

def test_odd():
    try:
        raise ValueError("seen")
    except ValueError:
        voice.exception("caught %s", "it", extra={"job": multiprocessing.Lock()})
    voice.warning("half a pair: \\udc80", extra={"job": 1})

def test_dies():
    voice.warning("last words", extra={"job": 2})
    ctypes.string_at(8)
""",
    )
    result.assert_outcomes(passed=2, failed=1)
    lines = log.read_text().splitlines()
    shouted = [line for line in lines if "!!!" in line]
    for n in range(3):
        assert [line.split()[2] for line in shouted if line.split()[2].startswith(f"{n}.")] == [
            f"{n}.{i}{'!' * 5000}" for i in range(50)
        ]
    assert "WARNING test_dies last words 2" in lines
    assert "WARNING test_odd half a pair: ? 1" in lines
    assert sum(line.startswith("Traceback") for line in lines) == 1
    result.stdout.fnmatch_lines(["*live log*", "WARNING*last words", "*FAILED*"])


def test_without_capture_stderr_passes_through_and_is_kept(crumple: Run, store: Store) -> None:
    result = crumple(
        "-s",
        test_it="""
import os, sys

def test_dies():
    print("on stdout")
    sys.stderr.write("on stderr\\n")
    os.write(2, b"free(): invalid pointer\\n")
    sys.stdin.readline()
    os.abort()
""",
    )
    result.stdout.fnmatch_lines(["*on stdout", "FAILED *- abort: free(): invalid pointer; report: *"])
    result.stderr.fnmatch_lines(["on stderr", "free(): invalid pointer"])
    (report,) = read_all(store)
    assert report.evidence.stderr_tail == "on stderr\nfree(): invalid pointer\n"


def test_threads_are_warned_of_once(crumple: Run) -> None:
    files = {
        "conftest": """
import threading
threading.Thread(target=threading.Event().wait, name='idler', daemon=True).start()
""",
        "test_it": "def test_one(): pass\ndef test_two(): pass\n",
    }
    result = crumple("-Werror", **files)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(
        ["pytest forks the cells of tests, and has other threads (idler): they do not run in there*"]
    )


def test_without_descriptors_a_test_fails_and_the_session_goes_on(crumple: Run) -> None:
    result = crumple(
        conftest="""
import os, resource
import pytest

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if item.name == "test_starved":
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 4, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    return True
""",
        test_it="def test_before(): pass\ndef test_starved(): pass\ndef test_after(): pass\n",
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(
        ["no cell for this test (?Errno 24? Too many open files*): more processes or*"]
    )


def test_a_store_that_cannot_be_written_hides_no_cause(crumple: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRUMPLEZONE_REPORTS", "/proc/reports")
    result = crumple("-W", "ignore", test_it="import os\ndef test_dies(): os.abort()\n")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["abort*; no report: set CRUMPLEZONE_REPORTS to a writable directory", "#0*test_dies*"]
    )


def test_what_a_cell_tells_is_not_believed(crumple: Run) -> None:
    result = crumple(
        test_it="""
import os, pytest

def notes():
    for fd in os.listdir("/proc/self/fd"):
        try:
            if "memfd:notes" in os.readlink(f"/proc/self/fd/{fd}"):
                return int(fd)
        except FileNotFoundError:
            pass

@pytest.mark.parametrize("text", [
    "nonsense", "[" * 100_000, "[]", '{"type": "ended", "by": 7}', '{"type": "report", "report": {}}',
    "of another test",
], ids=range(6))
def test_lies(text):
    line = text.encode() + b"\\n"
    if "other" in text:
        line = os.pread(notes(), 1 << 20, 0).replace(b"test_lies[5]", b"test_other")
        assert line.count(b"test_other") > 1
    os.write(notes(), line)

def test_lies_and_dies():
    os.write(notes(), b"nonsense\\n")
    os.abort()

def test_floods():
    os.ftruncate(notes(), 1 << 40)

def test_shrinks():
    os.ftruncate(notes(), 0)

def test_closes_all():
    os.closerange(3, 5000)

@pytest.fixture
def takes_back():
    yield
    os.ftruncate(notes(), os.lseek(notes(), 0, os.SEEK_SET))

def test_takes_back(takes_back): assert 0

def test_has_another_os(monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr(os, "write", None)
    assert 0

def test_other(): pass
""",
    )
    result.assert_outcomes(passed=1, failed=2, errors=10)
    result.stdout.fnmatch_lines(
        [
            "the cell of this test told what cannot be used: a report of something else",
            "abort in test_lies_and_dies (test_it.py); report: *",
            "its cell did not tell how all of it ended",
            "OSError: * Bad file descriptor",
        ]
    )
    assert "INTERNALERROR" not in result.stdout.str()


def test_notes_keep_what_json_has_not() -> None:
    notes = Notes()
    try:
        notes.begin()
        told: list[Note] = [
            Warned("half a pair: \udc80", "builtins", "UserWarning", "a.py", 1),
            Reported({"path": "a", "number": float("inf"), "deep": [{"x": None}]}),
            Ended("exit", "why", 3),
        ]
        for note in told:
            notes.write(note)
        notes.write(Reported({"object": object, "by number": {1: 2}}))
        *same, changed = notes.read()
        assert same == told
        assert changed == Reported({"object": str(object), "by number": {"1": 2}})
    finally:
        notes.close()
