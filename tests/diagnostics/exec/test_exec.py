"""`crumplezone exec`: a program runs as it would without it, and its crash is the same as a cell's."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import termios
from pathlib import Path

import pytest

from crumplezone.reports.records.report import Exit
from crumplezone.reports.store.store import Store
from tests.support.cli import read_until
from tests.support.decoders import read_all, wait_for_end
from tests.support.processes.programs import EXEC, PYTHON, armed, plain

CRASH = "import ctypes; ctypes.string_at(8)"


def test_a_program_whose_fatal_signals_are_blocked_is_held(store: Store) -> None:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGSEGV})
    try:
        done = armed(store, [PYTHON, "-c", CRASH])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    assert done.returncode == 139
    (report,) = read_all(store)
    assert report.evidence.fault is not None
    assert report.evidence.fault.address == "0x8"
    assert report.evidence.registers


# --- unchanged


PROGRAM = """
import os, signal, sys
names = sorted(name for name in globals() if name != "names")
print(sys.argv, sys.path, sys.flags, sys.orig_argv, __name__, __spec__ and __spec__.name, names)
print(signal.pthread_sigmask(signal.SIG_BLOCK, []), [signal.getsignal(n) for n in (2, 13, 15)])
print(os.getcwd(), os.getpgrp() == os.getpid(), os.open(os.devnull, os.O_RDONLY), sys.stdin.read())
print([os.isatty(n) for n in range(3)], type(sys.modules.get("sitecustomize")))
print("said", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "package").mkdir()
    for name in ("script.py", "package/__init__.py", "package/__main__.py"):
        (tmp_path / name).write_text(PROGRAM if name != "package/__init__.py" else "")
    (tmp_path / "sitecustomize.py").write_text("")  # one that ours hides
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [["script.py"], ["-m", "package"], ["-c", PROGRAM], ["-X", "dev", "-W", "ignore", "-P", "./script.py"]],
)
def test_a_program_is_run_as_its_python_would(package: Path, store: Store, arguments: list[str]) -> None:
    command = [PYTHON, *arguments, "5", "--flag", "two words"]
    path = str(package)
    expected = plain(command, package, "input", PYTHONPATH=path)
    found = armed(store, command, cwd=package, stdin="input", PYTHONPATH=path)
    assert (found.returncode, found.stdout, found.stderr) == (5, expected.stdout, "said\n")
    assert expected.stderr == found.stderr
    assert store.rows() == []


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("raise ValueError('of the program')", 1),
        ("raise KeyboardInterrupt", 130),
        ("import os; os._exit(9)", 9),
        ("import os, sys; os.fork() or sys.exit(4); print(os.wait()[1] >> 8); os._exit(5)", 5),
        ("import os, signal; signal.signal(13, signal.SIG_DFL); os.kill(os.getpid(), 13)", 141),
        ("import faulthandler, sys; faulthandler.enable(); sys.exit('a message')", 1),
    ],
)
def test_its_end_is_its_own(store: Store, code: str, status: int) -> None:
    command = [PYTHON, "-c", code]
    expected, found = plain(command), armed(store, command)
    assert found.returncode == status
    assert expected.returncode == (status if status < 128 else 128 - status)
    assert (found.stdout, found.stderr) == (expected.stdout, expected.stderr)
    assert store.rows() == []


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_are_passed_on(store: Store, signum: signal.Signals, status: int) -> None:
    code = "import signal; print('ready', flush=True); signal.pause()"
    command = [*EXEC, "--reports", str(store.directory), "--", PYTHON, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signum)
        said = process.stderr.read()
    assert process.returncode == status
    assert ("KeyboardInterrupt" in said) == (signum == signal.SIGINT)
    assert store.rows() == []


ON_A_TERMINAL = """
import os, signal, sys
seen = []
signal.signal(signal.SIGINT, lambda *_: seen.append(1))
sys.stderr.write(f"{[os.isatty(n) for n in range(3)]} {os.get_terminal_size(2)}\\nready\\n")
print(sys.stdin.readline().strip(), len(seen), flush=True)
sys.exit(7)
"""


def test_on_a_terminal_it_is_on_a_terminal_and_one_ctrl_c_is_one(store: Store) -> None:
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (33, 99))
    command = [*EXEC, "--reports", str(store.directory), "--", PYTHON, "-c", ON_A_TERMINAL]
    process = subprocess.Popen(
        command,
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(its)
    text = read_until(ours, b"ready")  # ctrl-C throws away what has not been read (termios(3), NOFLSH)
    os.write(ours, b"\x03")
    text += read_until(ours, b"^C")
    os.write(ours, b"line\n")
    assert process.wait(30) == 7
    text += read_until(ours, b"")
    os.close(ours)
    assert b"[True, True, True] os.terminal_size(columns=99, lines=33)\r\n" in text
    assert b"\r\r" not in text
    assert b"line 1\r\n" in text


LEAVES = """
import os
if child := os.fork():
    os.write(1, b"%d\\n" % child)
else:
    os.read(0, 1)
    os.write(2, b"late\\n" * 30_000)  # more than a pipe holds
    os.write(2, b"end\\n")
"""


@pytest.mark.parametrize("stderr", ["pipe", "terminal"])
def test_what_it_leaves_running_runs_on_and_is_heard(store: Store, stderr: str) -> None:
    ours, its = os.pipe() if stderr == "pipe" else pty.openpty()
    command = [*EXEC, "--reports", str(store.directory), "--", PYTHON, "-c", LEAVES]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=its, start_new_session=True
    ) as process:
        os.close(its)
        assert process.stdout is not None
        assert process.stdin is not None
        child = int(process.stdout.readline())
        assert process.wait(30) == 0
        assert not wait_for_end(child, 0)
        process.stdin.close()
        said = read_until(ours, b"")
    os.close(ours)
    assert said.replace(b"\r", b"") == b"late\n" * 30_000 + b"end\n"
    assert wait_for_end(child)


def test_what_it_leaves_running_finds_out_that_nobody_hears_it(store: Store) -> None:
    code = LEAVES.replace("* 30_000", "* 300_000")
    command = [*EXEC, "--reports", str(store.directory), "--", PYTHON, "-c", code]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        child = int(process.stdout.readline())
        assert process.wait(30) == 0
        process.stderr.close()
    assert wait_for_end(child)


CHILDLESS = """
import signal, subprocess, sys
subprocess.run(["true"])  # nobody keeps its status
print(signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN)
sys.exit(3)
"""


def test_a_program_whose_parent_ignores_its_children_is_not_lost(store: Store) -> None:
    command = [*EXEC, "--reports", str(store.directory), "--", PYTHON, "-c", CHILDLESS]
    done = plain(["bash", "-c", "trap '' CHLD; exec \"$@\"", "bash", *command])
    assert (done.returncode, done.stdout, done.stderr) == (3, "True\n", "")
    assert store.rows() == []


def test_the_other_commands_have_their_children_kept() -> None:
    code = """
import signal, sys
from crumplezone.cli.app import main
try:
    main()
finally:
    print(signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL)
"""
    ignoring = ["bash", "-c", "trap '' CHLD; exec \"$@\"", "bash"]
    done = plain([*ignoring, PYTHON, "-c", code, "triage", "list", "--reports", "no-such-store"])
    assert done.stdout.splitlines()[-1] == "True"


@pytest.mark.parametrize("timeout", ["3e6", "1e300", "inf"])
def test_a_timeout_may_be_long(store: Store, timeout: str) -> None:
    done = armed(store, [PYTHON, "-c", "raise SystemExit(3)"], "--timeout", timeout)
    assert (done.returncode, done.stderr) == (3, "")


def test_it_dies_with_its_supervisor(store: Store) -> None:
    code = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    command = [*EXEC, "--reports", str(store.directory), "--", PYTHON, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        program = int(process.stdout.readline())
        process.kill()
        assert wait_for_end(program)


# --- whatever it does


CHILDREN = """
import ctypes, multiprocessing, os
def crash(): ctypes.string_at(8)
if __name__ == "__main__":
    for method in ("fork", "spawn", "forkserver"):
        process = multiprocessing.get_context(method).Process(target=crash)
        process.start()
        process.join()
        print(method, process.exitcode, flush=True)
    with multiprocessing.Pool(2) as pool:
        print(pool.map(abs, [-1, -2]))
"""


def test_children_are_armed_each_for_itself(tmp_path: Path, store: Store) -> None:
    (tmp_path / "parent.py").write_text(CHILDREN)
    done = armed(store, [PYTHON, "parent.py"], cwd=tmp_path)
    assert done.stdout.splitlines() == ["fork -11", "spawn -11", "forkserver -11", "[1, 2]"]
    assert done.returncode == 0
    reports = read_all(store)
    assert [report.evidence.returncode for report in reports] == [-11] * 3
    for report in reports:
        (crashed,) = [thread for thread in report.evidence.threads if thread.crashed]
        assert crashed.python[1].symbol == "crash"
        assert str(store.path(report.id)) in done.stderr


def test_a_hang_ends_its_children_too(store: Store) -> None:
    code = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True); input()"
    command = [*EXEC, "--reports", str(store.directory), "--timeout", "2", "--", PYTHON, "-c", code]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        sleeping = int(process.stdout.readline())
        assert process.wait(30) == 137
    assert wait_for_end(sleeping)
    (report,) = read_all(store)
    assert report.evidence.exit == Exit.HANG


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (f"import os; os.closerange(3, 9999); {CRASH}", 139),
        (f"import os, sys; os.execv(sys.executable, ['python', '-c', {CRASH!r}])", 139),
        (f"import faulthandler, os; faulthandler.enable(); os.environ.clear(); {CRASH}", 139),
    ],
)
def test_a_fault_is_held_whatever_went_before(store: Store, code: str, status: int) -> None:
    assert armed(store, [PYTHON, "-c", code]).returncode == status
    (report,) = read_all(store)
    assert report.evidence.registers


def test_a_crash_after_pythons_end_is_its_true_end(store: Store) -> None:
    code = "import ctypes; libc = ctypes.CDLL(None); libc['__cxa_atexit'](libc['abort'], None, None)"
    assert armed(store, [PYTHON, "-c", code]).returncode == 134
    (report,) = read_all(store)
    assert (report.evidence.exit, report.evidence.returncode) == (Exit.ABORT, -6)


def test_pytest_too(tmp_path: Path, store: Store) -> None:
    (tmp_path / "test_it.py").write_text(f"def test_dies():\n    {CRASH}\n")
    done = armed(store, [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=tmp_path)
    assert done.returncode == 139
    (report,) = read_all(store)
    (crashed,) = [thread for thread in report.evidence.threads if thread.crashed]
    assert any(frame.symbol == "test_dies" for frame in crashed.python)


def test_a_python_of_another_environment(tmp_path: Path, store: Store) -> None:
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", tmp_path / "other"], check=True, timeout=60)
    python = str(tmp_path / "other/bin/python")
    code = f"import importlib.util; print(importlib.util.find_spec('crumplezone')); {CRASH}"
    done = armed(store, ["sh", "-c", 'exec "$0" "$@"', python, "-u", "-c", code], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (139, "None\n")
    (report,) = read_all(store)
    assert report.evidence.registers


def test_a_python_that_cannot_be_armed_is_said(store: Store) -> None:
    done = armed(store, [PYTHON, "-I", "-c", CRASH])
    assert done.returncode == 139
    assert "without the options -I" in done.stderr
    (report,) = read_all(store)
    assert (report.evidence.exit, report.evidence.registers) == (Exit.SIGNAL, {})


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--", "no-such-program"], "no-such-program"),
        (["--", "/etc/passwd"], "Permission denied"),
        (["--timeout", "0", "--", "true"], "--timeout"),
        (["--timeout", "nan", "--", "true"], "--timeout"),
        ([], "PROGRAM"),
    ],
)
def test_bad_usage_is_one_clear_error(arguments: list[str], said: str) -> None:
    done = plain([*EXEC, *arguments])
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_store_that_cannot_be_written_changes_nothing_for_the_program() -> None:
    done = armed(Store(Path("/dev/null/reports")), [PYTHON, "-c", CRASH])
    assert done.returncode == 139
    assert "could not be written" in done.stderr
    assert "Traceback" not in done.stderr
