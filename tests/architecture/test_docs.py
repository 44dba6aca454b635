"""The examples in the documents run as they stand, and the file table is complete."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

RUN = {"python": [sys.executable, "-c"], "sh": ["sh", "-ec"]}
EXAMPLES = [
    pytest.param(language, code, id=f"{path.name}-{number}")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for number, (language, code) in enumerate(
        re.findall(r"^```(\w+)\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    )
]


@pytest.mark.parametrize(("language", "code"), EXAMPLES)
def test_example(language: str, code: str, tmp_path: Path) -> None:
    assert sum(map(bool, code.splitlines())) < 10
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # Passive: OpenMP's threads spin for long where tests run side by side.
    own = {"CRUMPLEZONE_REPORTS": str(tmp_path / "reports"), "PATH": path, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [*RUN[language], code],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_file_table_is_complete() -> None:
    table = (ROOT / "docs/architecture.md").read_text()
    listed = set(re.findall(r"^\| .*", table, re.MULTILINE))
    named = set(re.findall(r"`([\w/]+\.py)`", "\n".join(listed)))
    rooms = [ROOT / room for room in ("reports", "sandbox", "workers", "diagnostics", "src/crumplezone")]
    files = {str(file.relative_to(ROOT)) for room in rooms for file in room.glob("*.py")}
    files -= {str(file.relative_to(ROOT)) for room in rooms[:-1] for file in room.glob("__init__.py")}
    assert named == files
