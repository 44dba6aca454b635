"""Stacks of a held or hung process, taken by a helper process: a corrupt target can crash or stall it.

What costs both kinds of stacks may spare one: if they cannot be had together, each is tried alone.
"""

from __future__ import annotations

import os
import select
import subprocess
import time
from io import FileIO

import msgspec

from crumplezone.reports.records.report import Thread
from crumplezone.sandbox.autopsy.unwind import Part, Stacks
from crumplezone.sandbox.host.surroundings import Surroundings
from crumplezone.sandbox.process.launch import run_python, stdio_taken

_DEADLINE = 15.0  # seconds that it runs, in all
_START_DEADLINE = 60.0  # seconds until it runs, in all: on a loaded machine an interpreter starts slowly
_OUTPUT_MAX = 8 * 1024 * 1024  # bytes
_STDERR_TAIL = 500


class _Budget:
    """How long helpers may take, all together: to start, which is the machine's doing, and to run."""

    def __init__(self) -> None:
        self.start, self.run = _START_DEADLINE, _DEADLINE


def take_stacks(pid: int) -> Stacks:
    """Everything at once, or else what can be had of native and of Python stacks alone."""
    budget = _Budget()
    both = _run(pid, Part.BOTH, budget)
    if not both.error or both.missing or both.refused:
        return both
    native, python = (_run(pid, part, budget) for part in (Part.NATIVE, Part.PYTHON))
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


def _run(pid: int, part: Part, budget: _Budget) -> Stacks:
    with stdio_taken():  # what is given on keeps its number in there
        begun, its_end = os.pipe()
    with open(begun, "rb", 0) as line:
        try:
            process = _start(pid, part, its_end)
        finally:
            os.close(its_end)
        with process:
            try:
                _await_begin(line, budget)
                stdout, stderr = _finish(process, budget)
            except subprocess.TimeoutExpired as late:
                process.kill()
                return Stacks([], error=f"the helper did not {late.cmd} within {late.timeout:.0f} s")
            except BaseException:
                process.kill()
                raise
    if process.returncode != 0 or len(stdout) > _OUTPUT_MAX:
        tail = stderr[-_STDERR_TAIL:].decode(errors="replace")
        return Stacks([], error=f"the helper ended with {process.returncode}: {tail}")
    return msgspec.json.decode(stdout, type=Stacks)


def _start(pid: int, part: Part, its_end: int) -> subprocess.Popen[bytes]:
    here, pipe = Surroundings.here(), subprocess.PIPE
    command = ["-m", "crumplezone.sandbox.autopsy.unwind", str(pid), part, str(its_end)]
    return run_python(here, command, here.environment, stdout=pipe, stderr=pipe, pass_fds=[its_end])


def _await_begin(line: FileIO, budget: _Budget) -> None:
    """Wait until the helper has loaded what it needs, and closes its end of the pipe; or has ended."""
    begin = time.monotonic()
    ready = select.poll()
    ready.register(line, select.POLLIN)  # nothing is written: it tells of the end
    if not ready.poll(max(budget.start, 0) * 1000):
        raise subprocess.TimeoutExpired("start", _START_DEADLINE)
    budget.start -= time.monotonic() - begin


def _finish(process: subprocess.Popen[bytes], budget: _Budget) -> tuple[bytes, bytes]:
    begin = time.monotonic()
    try:
        return process.communicate(timeout=max(budget.run, 0))
    except subprocess.TimeoutExpired as late:
        raise subprocess.TimeoutExpired("end", _DEADLINE) from late
    finally:
        budget.run -= time.monotonic() - begin
