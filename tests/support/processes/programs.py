"""Programs, run by themselves and under `crumplezone exec`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from crumplezone.reports.store.store import Store
from tests.support.decoders import WARN_OF_FORKS
from tests.support.paths import ROOT

EXEC = [sys.executable, "-c", "from crumplezone.cli.app import main; main()", "exec"]
PYTHON = sys.executable
Run = subprocess.CompletedProcess[str]


def armed(
    store: Store, command: list[str], *options: str, cwd: Path = ROOT, stdin: str = "", **env: str
) -> Run:
    done = plain([*EXEC, "--reports", str(store.directory), *options, "--", *command], cwd, stdin, **env)
    assert "multi-threaded" not in done.stderr
    return done


def plain(command: list[str], cwd: Path = ROOT, stdin: str = "", **env: str) -> Run:
    given = {"PYTHONDONTWRITEBYTECODE": "1", **WARN_OF_FORKS, **env}
    return subprocess.run(
        command, cwd=cwd, input=stdin, capture_output=True, text=True, env=os.environ | given, timeout=60
    )
