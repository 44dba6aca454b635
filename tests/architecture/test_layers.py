"""The arrows between the rooms point one way, and only cells load llama.cpp."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

ALLOWED = {
    "reports": set[str](),
    "sandbox": {"reports"},
    "workers": {"reports", "sandbox"},
    "diagnostics": {"reports", "sandbox", "workers"},
}
CHILD_SIDE = {
    f"workers/{name}.py"
    for name in (
        *("native", "native_memory", "native_model", "native_embed", "native_width"),
        *("engine", "prefix", "sampler", "llama_cell", "llama_hosted"),
    )
}


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", list(ALLOWED))
def test_rooms_import_only_what_lies_below(room: str) -> None:
    files = list((ROOT / room).glob("**/*.py"))
    assert files
    for file in files:
        for name in imports(file):
            parts = name.split(".")
            if parts[0] == "crumplezone" and len(parts) > 1:
                # errors.py is a leaf below every room
                assert parts[1] in ALLOWED[room] | {room, "errors"}, f"{file} imports {name}"
            if parts[0] == "llama_cpp":
                assert str(file.relative_to(ROOT)) in CHILD_SIDE, f"{file} imports {name}"


def test_errors_is_a_leaf() -> None:
    assert not [name for name in imports(ROOT / "src/crumplezone/errors.py") if "crumplezone" in name]


def test_the_supervisor_never_loads_llama_cpp() -> None:
    code = (
        "import sys, crumplezone, crumplezone.lowlevel;"
        "import crumplezone.cli.app, crumplezone.cli.run, crumplezone.cli.demo;"
        "crumplezone.Decoder, crumplezone.SafeBatchProcessor, crumplezone.Llama;"
        "assert not [m for m in sys.modules if m.startswith('llama_cpp')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
