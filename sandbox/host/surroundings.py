"""What a child process finds: the Python that runs it, its import path, environment and working directory.

They are taken once for all cells of an owner. A cell that is started after a crash is like the first one,
whatever has become of the host's directory, its environment or ``sys.path`` meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from crumplezone.errors import InputError
from crumplezone.sandbox.host.scarcity import SCARCE, no_cell
from crumplezone.sandbox.host.unpatched import refuse_patched

_OWN_PROGRAM = "/proc/self/exe"
_CHECK_DEADLINE = 30.0  # seconds


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What a child process finds.

    Attributes:
        python: The program that is this Python.
        directory: Its working directory; empty if this process has none any more.
        environment: Of a child that is no cell.
        of_cell: Of a cell.
    """

    python: str
    directory: str
    environment: Mapping[str, str]
    of_cell: Mapping[str, str]

    @classmethod
    def here(cls) -> Self:
        """As this process has it now.

        Raises:
            InputError: There is no program that is this Python.
            UsageError: No cell can work beside what has been done to this process.
            CrumplezoneError: The machine has no process or descriptor to find that out.
        """
        refuse_patched()
        directory = _directory()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(_import_path(directory))}
        # A thread that waits for another spins so often before it sleeps; libgomp's 300,000 times are 3 ms.
        # Where something else computes as well, most of a decode's thousand waits last that long
        # (docs/performance.md).
        spins = {} if "OMP_WAIT_POLICY" in os.environ else {"GOMP_SPINCOUNT": "2000"}
        of_cell = {
            **spins,
            **environment,
            "GGML_NO_BACKTRACE": "1",  # an abort would fork gdb and flood stderr
            "OPENBLAS_NUM_THREADS": "1",  # numpy's threads are not wanted in a cell
            "PYTHONUNBUFFERED": "1",
        }
        return cls(_interpreter(), directory, environment, of_cell)

    def adding(self, variables: Mapping[str, str]) -> Self:
        """The same, with more variables for a cell."""
        return dataclasses.replace(self, of_cell={**self.of_cell, **variables})


def _directory() -> str:
    with contextlib.suppress(OSError):  # it has been removed, or may not be looked up
        return os.getcwd()  # noqa: PTH109 - a str, as everything here
    return ""


def _import_path(directory: str) -> Iterator[str]:
    """``sys.path``: what imports here must import in a child. Without what Python itself passes over."""
    for entry in list(sys.path):
        with contextlib.suppress(ValueError):  # no file has such a name
            # Of bytes and Path objects importlib.machinery.PathFinder takes no notice.
            if isinstance(entry, str) and b"\0" not in os.fsencode(entry) and (directory or entry[:1] == "/"):
                yield os.path.join(directory, entry) if entry else directory  # noqa: PTH118 - likewise


def _interpreter() -> str:
    """The program that is this Python: `sys.executable` is another one in uWSGI, say, and none if embedded.

    Raises:
        InputError: It was not found.
    """
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    spawn = sys.modules.get("multiprocessing.spawn")  # it is there once somebody has named one to it
    named = [spawn and spawn.get_executable(), sys.executable]
    found = [f"{prefix}/bin/{name}" for prefix in (sys.exec_prefix, sys.base_exec_prefix)]
    candidates = list(dict.fromkeys(os.fsdecode(each) for each in (*named, *found) if each))
    for candidate in candidates:
        if _is_this_python(candidate):
            return candidate
    limit = (
        f"cells are run by {name}, the Python that runs here, and none of {', '.join(candidates)} is that: "
        f"name it by multiprocessing.set_executable('/path/to/{name}')"
    )
    raise InputError("sys.executable", sys.executable, limit)


def _is_this_python(program: str) -> bool:
    """Whether it is. What has another name is never run: nobody knows what it does with our arguments."""
    name = os.path.basename(program)  # noqa: PTH119 - likewise
    if "python" not in name:
        return False
    with contextlib.suppress(OSError):
        if Path(program).samefile(_OWN_PROGRAM):
            if getattr(sys, "frozen", False):  # the host itself, made one file by PyInstaller or the like
                return False
            if re.fullmatch(r"python\d*(\.\d+)?[a-z]*", name):
                return True
    return _version_of(program) == sys.version


@functools.cache
def _version_of(program: str) -> str:
    """What a Python says of itself; empty of what is none.

    Raises:
        CrumplezoneError: No process or descriptor could be had.
    """
    command = [program, "-P", "-S", "-c", "import sys; sys.stdout.write(sys.version)"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_CHECK_DEADLINE, check=False
        )
    except OSError as error:
        if error.errno in SCARCE:
            raise no_cell(error) from error
        return ""
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.decode(errors="replace")
