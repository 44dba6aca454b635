"""Supervisors in an environment that refuses something."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from crumplezone.reports.records.report import Evidence
from crumplezone.sandbox.autopsy.turns import TURNS, Turns

# A grandchild: not the cell itself.
STRANGER = "if not os.fork(): os.kill(os.getppid(), {0}); os._exit(0)\nlib.sleep(60)"


on_x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of system calls")

SUPERVISOR = """
import sys, msgspec
from tests.support.services import refuse
from tests.support.processes.cells import die
for name in sys.argv[2:]:
    getattr(refuse, name)()
sys.stdout.buffer.write(msgspec.json.encode(die(sys.argv[1])))
"""


def die_in_a_supervisor(stunt: str, *refused: str, before_exec: Callable[[], None] | None = None) -> Evidence:
    command = [sys.executable, "-c", SUPERVISOR, stunt, *refused]
    done = subprocess.run(command, capture_output=True, preexec_fn=before_exec, check=True, timeout=60)
    return msgspec.json.decode(done.stdout, type=Evidence)


@contextlib.contextmanager
def descriptors_used_up(but: int) -> Iterator[None]:
    """So many are left, and no gap below them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as taken:
        top = max(int(each.name) for each in Path("/proc/self/fd").iterdir())
        while (fd := os.open(os.devnull, os.O_RDONLY)) <= top:
            taken.callback(os.close, fd)
        os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (fd + but, hard))
        taken.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        yield


@contextlib.contextmanager
def every_turn_taken(turns: Turns = TURNS) -> Iterator[None]:
    """While the stacks of crashes have to wait."""
    with contextlib.ExitStack() as taken:
        while turns._free:
            assert taken.enter_context(turns.turn()) == ""
        yield
