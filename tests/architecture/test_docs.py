"""The examples in the documents run as they stand, and every folder has its line."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import PACKAGE, ROOT, modules

ARCHITECTURE = ROOT / "docs/architecture.md"
FOLDERS = re.compile(r"^\| Folder .*?(?=^\n)", re.DOTALL | re.MULTILINE)
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


def test_every_folder_has_its_line() -> None:
    """It stands in the package's docstring; `python -m tests.architecture.test_docs` copies it."""
    assert FOLDERS.search(ARCHITECTURE.read_text("utf-8"))
    assert folder_table() in ARCHITECTURE.read_text("utf-8")


def folder_table() -> str:
    rows = ["| Folder | What it holds |", "|---|---|"]
    for name, path in modules():
        if path.name == "__init__.py" and path.parent != PACKAGE:
            line = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n")[0]
            assert line.endswith("."), path
            folder = name.removesuffix(".__init__").replace(".", "/")
            rows.append(f"| `{folder}/` | {line} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    ARCHITECTURE.write_text(FOLDERS.sub(lambda _: folder_table(), ARCHITECTURE.read_text("utf-8")), "utf-8")
