"""The reference pages name what the code has: no more, no less."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import typer

import crumplezone
from crumplezone import errors
from crumplezone.cli.app import app
from crumplezone.diagnostics.exec import run as exec_run
from tests.support.paths import ROOT, modules

TREES = {f"crumplezone.{name}": ast.parse(path.read_text("utf-8")) for name, path in modules()}


def rows(page: str) -> list[list[str]]:
    """The cells of all tables of a page, without heads."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    tables = re.findall(r"^\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [[cell.strip() for cell in row[1:-1].split("|")] for table in tables for row in table.splitlines()]


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def first_column(page: str) -> set[str]:
    return {name for row in rows(page) for name in named(row[0])}


def is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, errors.CrumplezoneError)


def test_every_error_is_on_its_page() -> None:
    known = {name: value for name, value in vars(errors).items() if is_error(value)}
    listed = {name: row[1] for row in rows("errors.md") for name in named(row[0]) if name in known}
    assert listed.keys() == known.keys()
    for name, cell in listed.items():
        bases = {base.__name__ for base in known[name].__bases__}
        assert bases == set(named(cell)) or bases == {*named(cell), "CrumplezoneError"}, name


def test_every_environment_variable_is_on_its_page() -> None:
    """In a function that looks into the environment, what is written in capitals is a variable's name."""
    found = {
        name
        for tree in TREES.values()
        for name in [
            *words(tree, "CRUMPLEZONE_[A-Z_]+"),
            *(each for part in readers(tree) for each in words(part)),
        ]
    }
    assert "CRUMPLEZONE_REPORTS" in found
    assert found == first_column("environment.md")


def readers(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and "os.environ" in ast.unparse(node):
            yield node


def words(tree: ast.AST, pattern: str = "[A-Z][A-Z_]{5,}") -> Iterator[str]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(pattern, node.value)
        ):
            yield node.value


def test_every_exit_code_is_on_its_page() -> None:
    values = {name: value for tree in TREES.values() for name, value in constants(tree)}
    used = {
        name.id if isinstance(name, ast.Name) else name.attr
        for tree in TREES.values()
        for where in ast.walk(tree)
        if (isinstance(where, ast.Call) and ast.unparse(where.func) in {"typer.Exit", "sys.exit"})
        or (isinstance(where, ast.FunctionDef) and where.name == "exit_code")
        for name in ast.walk(where)
        if isinstance(name, ast.Name | ast.Attribute)
    }
    codes = {values[name] for name in used if name in values}
    assert {1, 2, 3, 130} <= codes
    text = (ROOT / "docs/exit-codes.md").read_text("utf-8")
    heads = text.partition("| Command |")[2].partition("\n")[0]
    assert set(map(int, re.findall(r"\d+", heads))) == codes | {0}
    assert f"| {exec_run._UNKNOWN} |" in text


def constants(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Whole numbers that a module gives names to."""
    for node in tree.body:
        if isinstance(node, ast.Assign):
            target = node.targets[0]
            pairs = (
                zip(target.elts, node.value.elts, strict=True)
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                else [(target, node.value)]
            )
            for name, value in pairs:
                if (
                    isinstance(name, ast.Name)
                    and isinstance(value, ast.Constant)
                    and type(value.value) is int
                ):
                    yield name.id, value.value


def test_every_command_has_its_exit_codes() -> None:
    commands = set(commands_of(app))
    assert commands == {name.removeprefix("crumplezone ") for name in listed_commands()}


def listed_commands() -> set[str]:
    text = (ROOT / "docs/exit-codes.md").read_text("utf-8")
    table = {name for row in rows("exit-codes.md") if len(row) > 2 for name in named(row[0])}
    return table | set(re.findall(r"^## `(.+)`$", text, re.MULTILINE))


def commands_of(group: typer.Typer, before: str = "") -> Iterator[str]:
    for command in group.registered_commands:
        assert command.name or command.callback
        yield before + (command.name or command.callback.__name__)  # type: ignore[union-attr]
    for inner in group.registered_groups:
        assert inner.typer_instance
        yield from commands_of(inner.typer_instance, f"{before}{inner.name} ")


def test_every_logger_is_on_its_page() -> None:
    found = set[str]()
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "logging.getLogger" and node.args:
                match node.args[0]:
                    case ast.Name(id="__name__"):
                        found.add(module)
                    case ast.Constant(value=str(name)):
                        found.add(name)
    assert "llama.cpp" in found
    assert found == first_column("loggers.md")


def test_every_public_name_is_in_the_api() -> None:
    public = {
        name
        for name in crumplezone.__all__
        if not name.startswith("__") and not is_error(getattr(crumplezone, name))
    }
    text = (ROOT / "docs/api/crumplezone.md").read_text("utf-8")
    assert set(re.findall(r"^::: crumplezone\.(\w+)$", text, re.MULTILINE)) == public
