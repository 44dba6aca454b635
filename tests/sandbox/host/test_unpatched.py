"""Hosts that gevent or eventlet has patched: refused in words, before anything is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HOST = """
import sys, warnings
warnings.simplefilter("ignore")
model, reports = sys.argv[1:]
{patch}
from crumplezone import Decoder, Llama, SafeBatchProcessor
from crumplezone.errors import UsageError

for make in (Decoder, Llama, SafeBatchProcessor):
    try:
        make(model, n_ctx=256, n_threads=1, reports=reports).close()
        print("made")
    except UsageError as error:
        print(error)
"""
LATE = """
import sys
model, reports = sys.argv[1:]
from gevent import monkey
from crumplezone import Decoder
from crumplezone.errors import UsageError

decoder = Decoder(model, n_ctx=256, n_threads=1, reports=reports)
monkey.patch_all()
try:
    list(decoder.generate(["a"], max_tokens=1))
except UsageError as error:
    print(error)
"""
IMPORTED = "from gevent import monkey"
GEVENT = f"{IMPORTED}; monkey.patch_all({{}})"
EVENTLET = "import eventlet; eventlet.monkey_patch({})"


def run(code: str, model: Path, reports: Path) -> list[str]:
    command = [sys.executable, "-c", code, str(model), str(reports)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("patch", "told"),
    [
        (
            GEVENT.format(""),
            "gevent has monkey-patched os, queue, select, signal, socket, subprocess, threading",
        ),
        (GEVENT.format("thread=False, select=False"), "gevent has monkey-patched os, queue, signal, socket"),
        (EVENTLET.format(""), "eventlet has monkey-patched os, select, socket, thread"),
        (
            "from gevent import monkey; " + EVENTLET.format("thread=True"),
            "eventlet has monkey-patched thread",
        ),
    ],
)
def test_a_patched_host_is_refused(patch: str, told: str, tiny: Path, tmp_path: Path) -> None:
    said = run(HOST.format(patch=patch), tiny, tmp_path)
    assert len(said) == 3
    for line in said:
        assert line.startswith(told)
        assert "gunicorn -k gthread" in line


@pytest.mark.parametrize(
    "patch",
    ["from gevent import monkey", "from gevent import monkey; monkey.patch_time()", "import eventlet"],
)
def test_who_patches_nothing_that_matters_is_welcome(patch: str, tiny: Path, tmp_path: Path) -> None:
    assert run(HOST.format(patch=patch), tiny, tmp_path) == ["made"] * 3


def test_a_host_that_is_patched_later_is_told_at_the_next_start(tiny: Path, tmp_path: Path) -> None:
    (said,) = run(LATE, tiny, tmp_path)
    assert said.startswith("gevent has monkey-patched")
