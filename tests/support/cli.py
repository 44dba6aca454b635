"""The command line, run as a program, perhaps on a terminal."""

from __future__ import annotations

import os
import select
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


def read_until(fd: int, end: bytes) -> bytes:
    """What a terminal shows, or a pipe brings, until there is such a text; all of it, if that is empty."""
    text = b""
    while not end or end not in text:
        assert select.select([fd], [], [], 30)[0], text
        try:
            data = os.read(fd, 4096)
        except OSError:  # nobody has the terminal open any more
            return text
        if not data:  # nor the pipe
            return text
        text += data
    return text
