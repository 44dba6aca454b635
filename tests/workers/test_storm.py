"""A short kill storm, with everything at once; the long ones are `make storm`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.paths import ROOT

_SECONDS = 10


@pytest.mark.timeout(330)  # on a busy machine what goes on at the end of the storm takes long
def test_nothing_fails_in_a_storm() -> None:
    arguments = ["--seeds", "1", "--seconds", f"{_SECONDS}", "--prompts", "30", "--mean", "0.5"]
    command = [sys.executable, "-m", "benchmarks.storm", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 problems" in done.stdout
