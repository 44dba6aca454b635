"""Stacks of a held or hung process, taken by a helper process: a corrupt target can crash or stall it.

What costs both kinds of stacks may spare one: if they cannot be had together, each is tried alone.
"""

from __future__ import annotations

import subprocess
import time

import msgspec

from crumplezone.reports.records.report import Thread
from crumplezone.sandbox.autopsy.unwind import Part, Stacks
from crumplezone.sandbox.ipc.surroundings import Surroundings
from crumplezone.sandbox.process.launch import run_python

_DEADLINE = 15.0  # seconds in all
_OUTPUT_MAX = 8 * 1024 * 1024  # bytes
_STDERR_TAIL = 500


def take_stacks(pid: int) -> Stacks:
    """Everything at once, or else what can be had of native and of Python stacks alone."""
    end = time.monotonic() + _DEADLINE
    both = _run(pid, Part.BOTH, end)
    if not both.error or both.missing or both.refused:
        return both
    native, python = (_run(pid, part, end) for part in (Part.NATIVE, Part.PYTHON))
    got = [name for name, part in (("native", native), ("Python", python)) if not part.error]
    error = f"{both.error}; had after all: {' and '.join(got) or 'nothing'}"
    build_ids = both.build_ids or native.build_ids or python.build_ids
    return Stacks(_merged(native.threads, python.threads), build_ids, error)


def _merged(native: list[Thread], python: list[Thread]) -> list[Thread]:
    threads = {thread.tid: thread for thread in native}
    for thread in python:
        known = threads.get(thread.tid, thread)
        threads[thread.tid] = msgspec.structs.replace(known, python=thread.python)
    return list(threads.values())


def _run(pid: int, part: Part, end: float) -> Stacks:
    here = Surroundings.here()
    command = ["-m", "crumplezone.sandbox.autopsy.unwind", str(pid), part]
    pipe = subprocess.PIPE
    with run_python(here, command, here.environment, stdout=pipe, stderr=pipe) as helper:
        try:
            out, err = helper.communicate(timeout=max(end - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            return Stacks([], error=f"the helper did not end within {_DEADLINE:.0f} s")
        finally:
            helper.kill()
    if helper.returncode != 0 or len(out) > _OUTPUT_MAX:
        tail = err[-_STDERR_TAIL:].decode(errors="replace")
        return Stacks([], error=f"the helper ended with {helper.returncode}: {tail}")
    return msgspec.json.decode(out, type=Stacks)
