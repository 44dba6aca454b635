"""Cells of callers that have closed their stdio, have no descriptor left, or have many."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from crumplezone.reports.records.report import Evidence, Exit
from crumplezone.sandbox.ipc.arena import Arena
from tests.support.decoders import descriptors, opened_since
from tests.support.services.tricks import failed, perform

SEGV = "lib.memset(0x18, 1, 1)"


def held(evidence: Evidence) -> bool:
    return evidence.exit == Exit.SIGNAL and bool(evidence.registers)


@pytest.mark.parametrize("closed", ["0", "0, 1, 2"])
def test_a_caller_may_have_closed_its_stdio(tmp_path: Path, closed: str) -> None:
    answer = tmp_path / "answer"
    script = f"""
import os, pathlib
from tests.support.services.tricks import failed, perform
for fd in ({closed},): os.close(fd)
evidence = perform({SEGV!r})
answer = (evidence.returncode, bool(evidence.registers), failed(evidence))
pathlib.Path({str(answer)!r}).write_text(repr(answer))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    assert answer.read_text() == "(-11, True, {})"


@pytest.fixture
def limit() -> Iterator[int]:
    """The soft limit of descriptors, restored after the test."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_what_fails_for_want_of_descriptors_leaves_none_open(limit: int) -> None:
    perform(SEGV)
    before, refused = descriptors(), 0
    for more in range(24):
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) + more, limit))
        try:
            assert held(perform(SEGV))
        except OSError:
            refused += 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, limit))
        assert opened_since(before) == []
        assert psutil.Process().children() == []
        if more > refused + 1:  # once there are enough there are enough
            break
    assert 8 < refused < 24


def test_descriptors_may_have_large_numbers(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, limit))
    many = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        evidence = perform(SEGV)
    finally:
        for fd in many:
            os.close(fd)
    assert held(evidence)
    assert failed(evidence) == {}


def test_an_abort_note_ends_at_its_nul() -> None:
    arena = Arena()
    arena.note_abort(b"GGML_ASSERT(x) failed\0\0rest")
    assert arena.abort_note() == "GGML_ASSERT(x) failed"
    arena.close()
