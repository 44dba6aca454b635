"""Models, stores and decoders, and the rule that no test leaves a process behind."""

from __future__ import annotations

import gc
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

import crumplezone
from crumplezone import Decoder
from crumplezone.reports.records.report import Report
from crumplezone.reports.store.store import Store
from crumplezone.sandbox.autopsy.turns import FAMILIAR
from crumplezone.sandbox.host.errands import DELIVERY
from crumplezone.workers.cells.targets import TARGETS
from tests.support.decoders import Dose, Job, Open, Plant, Record, read_all
from tests.support.models.tiny_gguf import write_tiny_llama
from tests.support.native import decode_poison as poison
from tests.support.native.decode_poison import Poison

# A shell that starts the suite beside itself has it ignore these, and everything it starts inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)


_forks: list[str] = []


def pytest_warning_recorded(warning_message: warnings.WarningMessage, nodeid: str) -> None:
    """Have a fork with threads (Python 3.12+) fail the run: what they hold stays locked in there.

    A fork that must be is silenced where it is. No filter does this: Python drops what the warning raises.
    """
    if "is multi-threaded" in str(warning_message.message):
        _forks.append(nodeid)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _forks:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _forks:
        terminalreporter.write_line(f"FAILED: forked a process with threads: {', '.join(_forks)}", red=True)


@pytest.fixture(scope="session")
def smollm() -> Path:
    """The embedded SmolLM2: real weights."""
    return crumplezone.embedded_model()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with random weights: 128 tokens of vocabulary, trained on 256 of context."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny.gguf", n_vocab=128, n_ctx=256)


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Set up first and torn down last: what a test's other fixtures close is gone by then."""
    yield
    children = psutil.Process().children(recursive=True)
    if children:
        gc.collect()  # a cell that nobody closed ends with its last reference
        psutil.wait_procs(children, timeout=5)
    assert psutil.Process().children(recursive=True) == []


@pytest.fixture(autouse=True)
def no_crash_is_familiar() -> None:
    """A test's crash is examined in full, however many tests before it had the same."""
    FAMILIAR.forget()


@pytest.fixture(autouse=True)
def what_was_logged_is_delivered() -> Iterator[None]:
    """No test finds the lines of the one before."""
    yield
    assert DELIVERY.wait(30)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "reports")


@pytest.fixture
def make(store: Store) -> Iterator[Open]:
    """Make decoders that are closed after the test. One thread: on busy machines OpenMP's spin for long."""
    made: list[Decoder] = []

    def open_decoder(
        model: Path, n_seq: int = 4, n_ctx_seq: int = 256, *, awake: bool = True, **options: Any
    ) -> Decoder:
        settings: dict[str, Any] = {"n_threads": 1, "reports": store.directory} | options
        made.append(Decoder(model, n_ctx=n_ctx_seq * n_seq, n_seq_max=n_seq, **settings))
        if awake:
            made[-1]._native.start()  # have its cell running
        return made[-1]

    yield open_decoder
    for decoder in made:
        decoder.close()


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Have the cells of a kind, of clients that are made from now on, run something else."""
    return lambda kind, target: monkeypatch.setitem(TARGETS, kind, target)


@pytest.fixture
def dose(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> Dose:
    """Make every llama.cpp cell that starts from now on a poisoned one."""

    def give(dosed: Poison, target: str = poison.TARGET) -> None:
        plant("decode", target)
        monkeypatch.setenv(poison.VARIABLE, msgspec.json.encode(dosed).decode())

    return give


@pytest.fixture
def record(store: Store, make: Open) -> Record:
    """Let a decoder crash; returns the reports, oldest first."""

    def crash(model: Path, job: Job, **options: Any) -> list[Report]:
        decoder = make(model, **{"preflight": False} | options)
        job(decoder)
        decoder.close()
        return read_all(store)

    return crash


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A memory cgroup of 300 MB below our own, version 1 or 2."""
    line = next(
        (x for x in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in x or "::" in x), "::/"
    )
    _, controllers, path = line.split(":", 2)
    base = Path("/sys/fs/cgroup", "memory" if controllers else "", path.lstrip("/"))
    group = base / f"crumplezone-test-{os.getpid()}"
    limit = group / ("memory.limit_in_bytes" if controllers else "memory.max")
    try:
        group.mkdir()
        limit.write_text(str(300 << 20))
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no cgroup can be made here: {error}")
    yield group
    group.rmdir()
