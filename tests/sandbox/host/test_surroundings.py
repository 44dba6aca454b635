"""What cells find of a host that has lost its directory, its program or its way: what was there at first."""

from __future__ import annotations

import errno
import multiprocessing
import multiprocessing.spawn
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from crumplezone.errors import InputError
from crumplezone.sandbox.cells.cell import Cell, CellSpec
from crumplezone.sandbox.cells.zygote import Zygote
from crumplezone.sandbox.host.scarcity import remedy
from crumplezone.sandbox.host.surroundings import Surroundings
from tests.support.decoders import kill
from tests.support.processes.zygotes import DOUBLE, SPEC, echo
from tests.support.services.stunts import Config
from tests.support.services.tricks import perform


def import_path() -> list[str]:
    return Surroundings.here().environment["PYTHONPATH"].split(os.pathsep)


def test_the_import_path_is_what_python_itself_makes_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    odd: list[Any] = ["", "src", tmp_path, b"/bytes", "/nul\0", "/lone\ud800", "/last\udcff"]
    monkeypatch.setattr(sys, "path", odd)
    monkeypatch.chdir(tmp_path)
    assert import_path() == [str(tmp_path), str(tmp_path / "src"), "/last\udcff"]


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A working directory that is no more."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()


@pytest.mark.usefixtures("nowhere")
def test_the_directory_may_be_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend("")
    assert "" not in import_path()
    cell = Cell(CellSpec(DOUBLE, Config()))
    echo(cell)
    cell.close()


@pytest.mark.parametrize("forked", [False, True])
def test_a_later_cell_is_like_the_first(
    forked: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CRUMPLEZONE_TEST_FIRST", "x")
    surroundings = Surroundings.here()
    own = CellSpec(DOUBLE, Config(), surroundings=surroundings)
    seed = Zygote(own, print)
    directory = Path.cwd()
    seed.start()
    monkeypatch.delenv("CRUMPLEZONE_TEST_FIRST")
    for n in range(3):
        monkeypatch.setenv(f"CRUMPLEZONE_TEST_LATE{n}", "x" * 60000)  # more than a request takes
    monkeypatch.setattr(sys, "path", [tmp_path, "late", *sys.path])
    monkeypatch.setattr(sys, "executable", "/bin/true")
    monkeypatch.chdir(tmp_path)
    if forked:
        kill(seed.pid)
    code = f"""
import sys
path = os.environ["PYTHONPATH"].split(os.pathsep)
late = [name for name in os.environ if name.startswith("CRUMPLEZONE_TEST_LATE")]
os._exit(7 if os.getcwd() == {str(directory)!r} and "CRUMPLEZONE_TEST_FIRST" in os.environ and not late
         and not any(each.endswith("late") for each in path) else 8)
"""
    start = {"start": seed.fork} if forked else {}
    assert perform(code, surroundings=surroundings, **start).returncode == 7  # type: ignore[arg-type]
    seed.close()


@pytest.fixture
def unnamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has told multiprocessing of a program."""
    monkeypatch.setattr(multiprocessing.spawn, "_python_exe", None)


def program(path: Path, code: str) -> str:
    path.write_text(f"#!/bin/sh\n{code}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.usefixtures("unnamed")
@pytest.mark.parametrize("named", [None, "", "/bin/true", "/bin/cat", "/missing/python3", "/"])
def test_a_host_that_is_another_program(named: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """uWSGI and other programs that embed Python."""
    own = psutil.Process().exe()
    monkeypatch.setattr(sys, "executable", named)
    cell = Cell(CellSpec(DOUBLE, Config()))
    assert psutil.Process(cell.pid).exe() == own
    echo(cell)
    cell.close()


@pytest.mark.usefixtures("unnamed")
def test_a_python_is_believed_by_what_it_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = sys.executable
    other = program(tmp_path / "python3.11", "echo 2.7.18")
    monkeypatch.setattr(sys, "executable", other)
    assert Surroundings.here().python != other
    wrapper = program(tmp_path / "python-wrapped", f'exec {real} "$@"')
    monkeypatch.setattr(sys, "executable", wrapper)
    assert Surroundings.here().python == wrapper


@pytest.mark.usefixtures("unnamed")
def test_no_python_is_found_until_one_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = sys.executable
    monkeypatch.setattr(sys, "executable", "/usr/bin/uwsgi")
    monkeypatch.setattr(sys, "exec_prefix", str(tmp_path))
    monkeypatch.setattr(sys, "base_exec_prefix", str(tmp_path))
    with pytest.raises(InputError, match=r"sys.executable is '/usr/bin/uwsgi'.*set_executable") as caught:
        Surroundings.here()
    assert str(tmp_path / "bin") in caught.value.limit
    multiprocessing.set_executable(real)
    assert Surroundings.here().python == real


@pytest.fixture
def limit() -> Iterator[int]:
    """The soft limit of descriptors, restored after the test."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_variable_that_linux_does_not_take_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRUMPLEZONE_TEST_LARGE", "x" * 200_000)
    with pytest.raises(OSError, match="CRUMPLEZONE_TEST_LARGE takes 200024 bytes") as caught:
        Cell(CellSpec(DOUBLE, Config()))
    assert "131072" in remedy(caught.value)


def test_what_a_fork_is_asked_for_has_a_bound() -> None:
    seed = Zygote(SPEC, print)
    seed.start()
    pid = seed.pid
    with pytest.raises(OSError, match="A takes 150003 bytes") as caught:
        Cell(CellSpec(DOUBLE, Config(), env={"A": "x" * 150_000}), seed.fork)
    assert caught.value.errno == errno.E2BIG
    assert seed.pid == pid  # it was not asked
    seed.close()
