"""The command line, run as a program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COMMAND = [sys.executable, "-c", "from crumplezone.cli.app import main; main()"]


def crumplezone(
    *arguments: str | Path, cwd: Path, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "CRUMPLEZONE_REPORTS": str(cwd / "reports")}
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        env=env,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=100,
    )
