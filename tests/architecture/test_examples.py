"""The programs in `examples/`: they run as they stand, and keep what they promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from crumplezone.reports.records.report import Exit
from crumplezone.reports.store.store import Store
from tests.support.paths import ROOT


@pytest.fixture
def env(store: Store) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "CRUMPLEZONE_REPORTS": str(store.directory), "PATH": path}


@pytest.fixture
def service(env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(ROOT / "examples/service.py")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as running:
        yield running
        running.kill()


def send(service: subprocess.Popen[str], request: object) -> None:
    assert service.stdin is not None
    service.stdin.write(json.dumps(request) + "\n")
    service.stdin.flush()


def receive(service: subprocess.Popen[str]) -> dict[str, Any]:
    assert service.stdout is not None
    reply: dict[str, Any] = json.loads(service.stdout.readline())
    return reply


def answer(service: subprocess.Popen[str]) -> dict[str, Any]:
    while "delta" in (reply := receive(service)):
        pass
    return reply


def test_the_service_outlives_crashes_and_bad_lines(service: subprocess.Popen[str], store: Store) -> None:
    request = {"id": 1, "prompt": "The quick brown fox", "max_tokens": 24}
    send(service, request)
    undisturbed = answer(service)
    assert (undisturbed["id"], undisturbed["recovered"]) == (1, 0)
    assert len(undisturbed["text"]) > 20

    (zygote,) = psutil.Process(service.pid).children()
    cell = min(zygote.children(), key=psutil.Process.create_time)  # a spare may be there too
    send(service, request | {"id": 2})
    assert "delta" in receive(service)
    cell.kill()
    disturbed = answer(service)
    assert (disturbed["id"], disturbed["recovered"]) == (2, 1)
    assert disturbed["text"] == undisturbed["text"]

    for wrong in ("text", {"id": 3}, {"id": 3, "prompt": 5}):
        send(service, wrong)
        assert "error" in answer(service)

    _, errors = service.communicate(timeout=60)  # which closes its input
    assert service.returncode == 0, errors
    (report,) = map(Path, disturbed["reports"])
    assert report == store.path(report.name)
    assert store.read(report.name).evidence.exit == Exit.KILLED


def test_the_notebook(env: dict[str, str], store: Store) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/notebook.py")],
        env=env,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    (row,) = store.rows()
    assert f"Crash report {row.id}" in done.stdout
    assert "build_input_k_idxs: batch-only, since every sequence got its result" in done.stdout


@pytest.mark.parametrize("name", ["service", "notebook"])
def test_examples_are_short(name: str) -> None:
    assert len((ROOT / f"examples/{name}.py").read_text().splitlines()) < 60
