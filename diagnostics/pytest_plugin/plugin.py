"""pytest plugin: ``--crumple`` runs each test in a forked cell of its own, a marker only the marked ones.

Every pytest of an environment that has crumplezone loads this module. It imports nothing else before the
first test that goes into a cell.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest

from crumplezone.diagnostics.pytest_plugin.options import TIMEOUT

_NO_DEBUGGER = "--pdb and --trace need the terminal"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--crumple``."""
    parser.getgroup("crumplezone").addoption(
        "--crumple",
        action="store_true",
        help="Run each test in a forked cell of its own: a crash, hang or exit is that test's failure.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker; refuse what `--crumple` cannot do, before pytest-xdist starts its workers.

    Raises:
        pytest.UsageError: A debugger was asked for.
    """
    config.addinivalue_line(
        "markers",
        "crumple(timeout=None, memory=None): run the test in a forked cell of its own, for so many seconds, "
        "with so many MiB of resident memory.",
    )
    option = config.getoption
    if option("crumple") and _wants_debugger(config) and not option("collectonly"):
        raise pytest.UsageError(
            f"{_NO_DEBUGGER}, and --crumple runs all tests in cells, which have none: leave it out"
        )


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse what no cell can do, before the first test; begin to note the fixtures of this process.

    Raises:
        pytest.UsageError: A debugger was asked for, or this is not Linux.
    """
    option = session.config.getoption
    chosen = sum(map(_crumpled, session.items))
    if not chosen or option("collectonly"):
        return
    if _wants_debugger(session.config):
        raise pytest.UsageError(
            f"{_NO_DEBUGGER}, and {chosen} of these tests run in cells, which have none: deselect what is "
            'marked (-m "not crumple")'
        )
    if sys.platform != "linux":
        raise pytest.UsageError(f"{chosen} of these tests run in cells, which need Linux")
    if chosen < len(session.items):
        from crumplezone.diagnostics.pytest_plugin.child import Inherited

        session.config.pluginmanager.register(Inherited(), Inherited.NAME)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Run a test in a cell, if it is to run there."""
    if not _crumpled(item):
        return None
    from crumplezone.diagnostics.pytest_plugin.supervisor import run

    run(item, nextitem)
    return True


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool | None:
    """Let pytest-timeout's limit of a whole test be that of its cell, whose stacks then tell why."""
    if settings.func_only or not _crumpled(item):
        return None
    item.stash[TIMEOUT] = settings.timeout
    return True


def _wants_debugger(config: pytest.Config) -> bool:
    return bool(config.getoption("usepdb", False) or config.getoption("trace", False))


def _crumpled(item: pytest.Item) -> bool:
    return item.config.option.crumple or item.get_closest_marker("crumple") is not None
