"""What `crumplezone` shows: to type checkers, to Python, and to somebody who presses tab."""

from __future__ import annotations

import ast
import importlib
import pickle
import subprocess
import sys
import tomllib
from pathlib import Path

import crumplezone
from crumplezone import errors
from tests.support.paths import ROOT

MODULES = {"errors", "lowlevel"}


def test_type_checkers_read_the_names_that_there_are() -> None:
    (block,) = [
        node
        for node in ast.parse(Path(crumplezone.__file__).read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    read = {
        alias.name: importlib.import_module(node.module or "")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(read) == {*crumplezone.__all__, *MODULES}
    for name, home in read.items():
        assert getattr(crumplezone, name) is getattr(home, name)


def test_dir_shows_the_public_names_only() -> None:
    shown = {name for name in dir(crumplezone) if not name.startswith("__")}
    assert shown == {*crumplezone.__all__, *MODULES}
    assert {"__version__", "__doc__", "__path__"} <= set(dir(crumplezone))


def test_every_error_is_at_the_top_and_survives_pickling() -> None:
    kinds = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.CrumplezoneError)
    }
    assert len(kinds) > 10
    for name, kind in kinds.items():
        assert getattr(crumplezone, name) is kind
    error = pickle.loads(pickle.dumps(crumplezone.ModelError("a.gguf", "is none", "report")))
    assert (type(error), error.path, error.report) == (crumplezone.ModelError, "a.gguf", "report")


def test_the_version_is_said_once() -> None:
    """If this fails, what is installed is older than pyproject.toml: install again."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert crumplezone.__version__ == declared


def test_names_are_loaded_when_they_are_used() -> None:
    code = (
        "import sys, crumplezone; dir(crumplezone);"
        "assert not [name for name in sys.modules if name.startswith('crumplezone.')];"
        "crumplezone.ModelError, crumplezone.__version__;"
        "assert [name for name in sys.modules if name.startswith('crumplezone.')] == ['crumplezone.errors']"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
