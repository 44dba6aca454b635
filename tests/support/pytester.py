"""Runs of pytest with tests in cells: a plugin for test modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from crumplezone.reports.store.store import Store

Run = Callable[..., pytest.RunResult]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where bytecode goes: pytest rewrites the assertions of its plugins, which takes long."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def crumple(
    pytester: pytest.Pytester, store: Store, tiny: Path, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Run pytest in a process of its own, on files given by name."""
    monkeypatch.setenv("CRUMPLEZONE_REPORTS", str(store.directory))
    monkeypatch.setenv("TINY", str(tiny))
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(compiled))
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)

    def run(*arguments: str, crumple: bool = True, **files: str) -> pytest.RunResult:
        pytester.makepyfile(**files)
        options = ["--crumple"] if crumple else []
        return pytester.runpytest_subprocess(*options, "-p", "no:cacheprovider", *arguments, timeout=60)

    return run
