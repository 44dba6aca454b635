"""The documents: examples run as they stand, files that are named exist, every folder has its line."""

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
OWN = [ROOT / f"{name}.md" for name in ("CONTRIBUTING", "RELEASING", "SECURITY")]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIAL = ROOT / "docs/tutorial.md"


def examples(page: Path) -> list[tuple[str, str]]:
    """Language and code of each."""
    return re.findall(r"^```(\w+)\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


EXAMPLES = [
    pytest.param(language, code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, (language, code) in enumerate(examples(page))
    if page != TUTORIAL
]


@pytest.mark.timeout(260)
@pytest.mark.parametrize(("language", "code"), EXAMPLES)
def test_example(language: str, code: str, tmp_path: Path) -> None:
    run(language, code, tmp_path)


@pytest.mark.timeout(600)
def test_the_tutorial(tmp_path: Path) -> None:
    """Its steps need what those before have left."""
    said = [run(language, code, tmp_path) for language, code in examples(TUTORIAL)]
    for expected in (
        "alive; safe",
        "batch-only",
        "reproduced 3 of 3",
        "minimal: encode of 1 token",
        "exit status 139",
    ):
        assert any(expected in each for each in said), expected


def run(language: str, code: str, folder: Path) -> str:
    assert sum(map(bool, code.splitlines())) < 10
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # Passive: OpenMP's threads spin for long where tests run side by side.
    own = {"CRUMPLEZONE_REPORTS": str(folder / "reports"), "PATH": path, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [*RUN[language], code],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=250,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    return done.stdout


@pytest.mark.parametrize("page", [*PAGES, *OWN], ids=lambda page: page.name)
def test_every_file_that_is_named_is_there(page: Path) -> None:
    """By its path, or by as much of its end as only one file has."""
    tests = [f"/{path.relative_to(ROOT)}" for path in (ROOT / "tests").rglob("*.py")]
    files = [f"/{path.relative_to(PACKAGE)}" for _, path in modules()] + tests
    for name in re.findall(r"`([\w./]+\.py)`", page.read_text("utf-8")):
        end = "/" + name.removeprefix("src/crumplezone/")
        found = [file for file in files if file.endswith(end)]
        assert len(found) == 1 or (found and name == "__init__.py"), f"{name}: {found}"


def test_the_readme_leads_somewhere() -> None:
    """Its links are absolute, for a package index shows it too; what makes the site does not look at them."""
    text = (ROOT / "README.md").read_text("utf-8")
    links = re.findall(r"\(https://github.com/crumplezone/crumplezone/blob/main/([^)#]+)#?([^)]*)\)", text)
    assert len(links) > 10
    for path, anchor in links:
        heads = re.findall(r"^#+ (.*)$", (ROOT / path).read_text("utf-8"), re.MULTILINE)
        assert not anchor or anchor in {slug(head) for head in heads}, f"{path}#{anchor}"


def slug(head: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-")


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
