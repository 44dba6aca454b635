"""The arrows between the rooms, and inside each, point one way; only cells load llama.cpp."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter

import pytest

from tests.support.paths import ROOMS, modules

# Left imports nothing to its right. `errors` is a leaf that everybody may import.
ORDER = {
    "": (*ROOMS, "lowlevel", "cli"),
    "reports": ("printable", "records", "analysis", "formats", "store", "html"),
    "sandbox": ("host", "ipc", "process", "child", "autopsy", "cells"),
    "workers": (
        *("protocol", "native", "batch", "model", "observe", "incidents", "cells"),
        *("memory", "width", "ladder", "embed", "text", "generate", "chat", "llama", "decoder"),
    ),
}
INDEPENDENT = {"diagnostics"}  # its folders do not import each other
# In a Python that is armed, perhaps of another environment: the standard library, and each other.
STDLIB_ONLY = {"sandbox.child.arm", "sandbox.child.exec_hook", "sandbox.child.startup.sitecustomize"} | {
    "sandbox.ipc.exit_marks"
}
MODULES_MAX = 8  # in a folder
TWICE: set[str] = set()  # class names that mean two things in a room: this may only shrink


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names, of what is imported for type checkers only as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = {name.removesuffix(".__init__"): path for name, path in modules()}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in FILES.items()}


def module_of(name: str) -> str:
    """Of ``workers.batch.batch.Batch`` the part that is a module."""
    while name and name not in FILES:
        name = name.rpartition(".")[0]
    return name or "__init__"


IMPORTS = {
    name: {module_of(each[12:]) for each in imported(tree) if each.startswith("crumplezone.")}
    for name, tree in TREES.items()
}


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 150
    assert sum(map(len, IMPORTS.values())) > 500


@pytest.mark.parametrize("room", ORDER)
def test_arrows_point_one_way(room: str) -> None:
    prefix, order = f"{room}." if room else "", ORDER[room]
    back = []
    for name, targets in IMPORTS.items():
        for target in targets - {"errors", "__init__"}:
            if name.startswith(prefix) and target.startswith(prefix):
                a, b = (each.removeprefix(prefix).partition(".")[0] for each in (name, target))
                if a in order and b in order and order.index(a) < order.index(b):
                    back.append(f"{name} imports {target}")
    assert back == []


@pytest.mark.parametrize("room", ROOMS)
def test_every_folder_has_its_place(room: str) -> None:
    found = {name.split(".")[1] for name in FILES if name.startswith(f"{room}.")}
    assert room in INDEPENDENT or found == set(ORDER[room])


@pytest.mark.parametrize("room", INDEPENDENT)
def test_independent_folders(room: str) -> None:
    arrows = {
        (name, target)
        for name, targets in IMPORTS.items()
        for target in targets
        if name.startswith(f"{room}.") and target.startswith(f"{room}.")
    }
    assert arrows
    assert {(a, b) for a, b in arrows if a.split(".")[1] != b.split(".")[1]} == set()


def test_errors_is_a_leaf() -> None:
    assert IMPORTS["errors"] == set()


def test_only_cells_load_llama_cpp() -> None:
    loaders = {
        name
        for name, tree in TREES.items()
        if any(each.partition(".")[0] == "llama_cpp" for each in imported(tree))
    }
    assert loaders
    assert {name for name in loaders if not name.startswith("workers.native.")} == set()


def test_nobody_imports_what_cells_run() -> None:
    native = {name for name in FILES if name.startswith("workers.native")}
    assert {name for name in FILES if name not in native and IMPORTS[name] & native} == set()
    allowed = ("workers.native", "workers.protocol", "sandbox.", "reports.records")
    assert {target for name in native for target in IMPORTS[name] if not target.startswith(allowed)} == set()


def test_what_arms_a_program_imports_the_standard_library_only() -> None:
    for name in STDLIB_ONLY:
        outside = {
            each for each in imported(TREES[name]) if each.partition(".")[0] not in sys.stdlib_module_names
        }
        assert {each for each in outside if not each.startswith("crumplezone.")} == set()
        assert IMPORTS[name] <= STDLIB_ONLY


def test_no_circle() -> None:
    list(TopologicalSorter(IMPORTS).static_order())  # CycleError names it


def test_folders_are_small() -> None:
    sizes = Counter(path.parent for path in FILES.values() if path.name != "__init__.py")
    assert {folder: size for folder, size in sizes.items() if size > MODULES_MAX} == {}


@pytest.mark.parametrize("room", ROOMS)
def test_a_class_name_means_one_thing(room: str) -> None:
    homes = defaultdict(list)
    for name, tree in TREES.items():
        if name.startswith(f"{room}."):
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    homes[node.name.lstrip("_")].append(name)
    assert homes
    assert {each: where for each, where in homes.items() if len(where) > 1 and each not in TWICE} == {}


def test_targets_resolve() -> None:
    """What cells are told to run is a string; so are the modules that are run with ``-m``."""
    targets = []
    for name, path in FILES.items():
        for module, attribute in re.findall(r'"(crumplezone\.[\w.]+|\{__name__\}):(\w+)"', path.read_text()):
            targets.append(f"{module.format(__name__=f'crumplezone.{name}')}:{attribute}")
        for module in re.findall(r'"-m", "crumplezone\.([\w.]+)"', path.read_text()):
            assert module in FILES
    assert len(targets) >= 8
    code = (
        "import importlib, sys\n"
        "for module, name in (each.split(':') for each in sys.argv[1:]):\n"
        "    getattr(importlib.import_module(module), name)"
    )
    # In a process of its own: this one never loads llama.cpp.
    subprocess.run([sys.executable, "-c", code, *targets], check=True, timeout=100)


def test_the_supervisor_never_loads_llama_cpp() -> None:
    names = [f"crumplezone.{name}" for name in FILES if not name.startswith("workers.native.")]
    harmless = [name for name in names if not name.endswith(("sitecustomize", "__main__"))]
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name.removesuffix('.__init__'))\n"
        "assert not [m for m in sys.modules if m.startswith('llama_cpp')]"
    )
    subprocess.run([sys.executable, "-c", code, *harmless], check=True, timeout=60)
    assert importlib.import_module("crumplezone").Decoder
