"""Supervisors in an environment that refuses something."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from crumplezone.reports.records.report import Evidence

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


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A memory cgroup of 300 MB below our own, version 1 or 2."""
    line = next(
        (x for x in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in x or "::" in x), "::/"
    )
    _, controllers, path = line.split(":", 2)
    base = Path("/sys/fs/cgroup", "memory" if controllers else "", path.lstrip("/"))
    group = base / f"crumplezone-test-{os.getpid()}"
    limit = group / ("memory.limit_in_bytes" if controllers else "memory.max")
    try:
        group.mkdir()
        limit.write_text(str(300 << 20))
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no cgroup can be made here: {error}")
    yield group
    group.rmdir()
