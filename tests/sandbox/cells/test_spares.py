"""Spares: made beside the caller, and replaced unseen when they die while they wait."""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from logging.handlers import QueueHandler
from pathlib import Path

import numpy as np
import psutil
import pytest

from crumplezone import Batch
from crumplezone.errors import CellDied, ModelError, UsageError
from crumplezone.reports.records.report import Exit, Report
from crumplezone.reports.store.store import Store
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.cell import Cell, CellSpec
from crumplezone.sandbox.cells.spares import SparePool
from crumplezone.sandbox.cells.zygote import Zygote
from crumplezone.workers.batch.call import DecodeOptions
from crumplezone.workers.cells.decode_client import DecodeClient
from crumplezone.workers.cells.source import report_idle
from crumplezone.workers.cells.targets import SEEDS
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.model.limits import Limits
from crumplezone.workers.protocol.config import CellConfig, CellInfo
from tests.support.decoders import Dose, collect, descriptors, kill, read_all
from tests.support.models.tiny_gguf import write_block_count_zero
from tests.support.native.decode_poison import Poison
from tests.support.processes.zygotes import SPEC, Deaths, echo, evidence_of, parent
from tests.support.services.stunts import Config, Echo, Stunt

BATCH = Batch.of([[4, 5, 6], [7, 8]]).columns()
Pids = queue.SimpleQueue[int]
Stock = Callable[..., SparePool]


@pytest.fixture
def deaths() -> Deaths:
    return queue.SimpleQueue()


@pytest.fixture
def warmed() -> Pids:
    """The spares that were warmed."""
    return queue.SimpleQueue()


@pytest.fixture
def zygote(deaths: Deaths) -> Iterator[Zygote]:
    made = Zygote(SPEC, deaths.put)
    yield made
    made.close()


@pytest.fixture
def stock(zygote: Zygote, deaths: Deaths, warmed: Pids) -> Iterator[Stock]:
    """Make supplies of forked cells, closed after the test."""
    made: list[SparePool] = []

    def warm(cell: Cell) -> None:
        echo(cell)
        warmed.put(cell.pid)

    def make(spares: int = 1, warm: Callable[[Cell], None] = warm) -> SparePool:
        made.append(SparePool(SPEC, zygote, spares, warm, deaths.put))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_spares_are_warm_and_wait(stock: Stock, warmed: Pids) -> None:
    supply = stock(2)
    cells = [supply.take()]  # no spare: there is none yet
    assert supply.wait_for_all(30)
    cells += [supply.take(), supply.take()]
    assert {cell.pid for cell in cells[1:]} == {warmed.get(), warmed.get()}
    for cell in cells:
        echo(cell)
        cell.close()


def test_spares_that_die_while_they_wait_are_replaced(stock: Stock, warmed: Pids, deaths: Deaths) -> None:
    supply = stock()
    supply.take().close()
    for signum in (signal.SIGKILL, signal.SIGSEGV):  # the second is held: it has not ended when that is seen
        assert supply.wait_for_all(30)
        os.kill(pid := warmed.get(), signum)
        evidence = evidence_of(deaths)
        assert (evidence.pid, evidence.phase, evidence.returncode) == (pid, "idle", -signum)
    assert supply.wait_for_all(30)
    spare = supply.take()
    assert spare.pid == warmed.get()
    spare.close()


def test_a_dead_spare_is_not_given_away(stock: Stock, warmed: Pids, deaths: Deaths) -> None:
    second, busy = threading.Event(), threading.Event()

    def warm(cell: Cell) -> None:
        if not warmed.empty():  # the thread is here while the first spare dies
            second.set()
            busy.wait(30)
        warmed.put(cell.pid)

    supply = stock(2, warm)
    supply.take().close()
    assert second.wait(30)
    kill(pid := warmed.get())
    cell = supply.take()
    busy.set()
    assert evidence_of(deaths).pid == pid
    echo(cell)
    cell.close()


def test_spares_that_die_again_and_again_are_given_up(stock: Stock, deaths: Deaths) -> None:
    def crash(cell: Cell) -> None:
        cell.call(Stunt("segv"), Echo, 30)

    supply = stock(1, crash)
    for attempts in (3, 1):  # a cell that was had without them is a reason to try once more
        cell = supply.take()
        for _ in range(attempts):
            evidence = evidence_of(deaths)
            assert (evidence.exit, evidence.phase) == (Exit.SIGNAL, "call")
        assert not supply.wait_for_all(30)
        assert deaths.empty()
        cell.close()


def test_new_cells_have_the_renewed_configuration(stock: Stock, warmed: Pids) -> None:
    supply = stock()
    supply.take().close()
    assert supply.wait_for_all(30)
    old = warmed.get()
    supply.renew(replace(SPEC, target="tests.support.services.tricks:Tricks"))  # which answers no echo
    assert warmed.empty()
    with pytest.raises(Exception, match="Invalid value"):
        echo(supply.take())
    assert not psutil.pid_exists(old)


def test_a_zygote_that_dies_between_jobs_is_started_again(
    stock: Stock, zygote: Zygote, deaths: Deaths
) -> None:
    supply = stock()
    supply.take().close()
    assert supply.wait_for_all(30)
    kill(first := zygote.pid)
    assert evidence_of(deaths).pid == first  # nobody asked for a cell
    cells = [supply.take(), supply.take()]
    assert parent(cells[1].pid) == zygote.pid != first
    for cell in cells:
        echo(cell)
        cell.close()


def test_closing_ends_a_spare_that_starts(zygote: Zygote, deaths: Deaths) -> None:
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handler = QueueHandler(records)
    logging.getLogger("stunts.voice").addHandler(handler)
    supply = SparePool(SPEC, zygote, 1, echo, deaths.put)
    supply.take().close()
    supply.renew(replace(SPEC, config=Config("log_and_hang")))
    records.get(timeout=30)
    logging.getLogger("stunts.voice").removeHandler(handler)
    supply.close()
    assert psutil.Process(zygote.pid).children() == []
    assert "spares" not in {thread.name for thread in threading.enumerate()}
    assert deaths.empty()


def test_many_deaths_leave_nothing_behind(stock: Stock, zygote: Zygote, warmed: Pids, deaths: Deaths) -> None:
    def used() -> tuple[int, list[str], list[str]]:
        for (
            each
        ) in threading.enumerate():  # until it ends, one that has told its evidence has the arena mapped
            if each.name.startswith("autopsy"):
                each.join(30)
        # That of the log is the whole process's.
        threads = [each for each in threading.enumerate() if not each.name.startswith("logs")]
        return len(threads), descriptors(), descriptors(zygote.pid)

    def rounds(number: int) -> None:
        supply = stock()
        supply.take().close()
        for _ in range(number):
            assert supply.wait_for_all(30)
            kill(warmed.get())
            evidence_of(deaths)
            assert supply.wait_for_all(30)
            supply.take().close()
            warmed.get()
        supply.close()
        while not warmed.empty():
            warmed.get()

    rounds(1)
    before = used()
    rounds(6)
    assert used() == before
    assert psutil.Process(zygote.pid).children() == []


def test_a_supply_that_nobody_closed_is_collected(zygote: Zygote, deaths: Deaths) -> None:
    supply = SparePool(SPEC, zygote, 1, echo, deaths.put)
    supply.take().close()
    assert supply.wait_for_all(30)
    del supply
    collect()
    assert psutil.Process(zygote.pid).children() == []


# With llama.cpp.


@pytest.fixture
def reporter(store: Store) -> Iterator[Reporter]:
    made = Reporter(store.directory)
    yield made
    made.close()


Run = Callable[..., tuple[DecodeClient, Zygote]]


@pytest.fixture
def run(reporter: Reporter) -> Iterator[Run]:
    """Make clients over zygotes, closed after the test."""
    made: list[tuple[DecodeClient, Zygote]] = []

    def make(model: Path, spares: int = 1) -> tuple[DecodeClient, Zygote]:
        config = CellConfig(str(model), 512, 64, 64, 2, 1)
        spec = CellSpec(SEEDS["context"], config)
        zygote = Zygote(spec, partial(report_idle, reporter, config))
        limits = Limits(30, None)
        made.append((DecodeClient(config, limits, reporter, zygote=zygote, spares=spares), zygote))
        return made[-1]

    yield make
    for client, zygote in made:
        client.close()
        zygote.close()


def logits(client: DecodeClient) -> np.ndarray:
    found = client.send(BATCH, DecodeOptions()).logits
    assert found is not None
    return found


def settled(reporter: Reporter, store: Store) -> list[Report]:
    reporter.flush(kept=True)
    return read_all(store)


def test_forked_spawned_and_spare_cells_compute_the_same(tiny: Path, run: Run) -> None:
    spawned = DecodeClient(CellConfig(str(tiny), 512, 64, 64, 2, 1), Limits(30, None), None)
    expected = logits(spawned)
    spawned.close()
    client, zygote = run(tiny)
    assert zygote.info(CellInfo) == client.info
    np.testing.assert_array_equal(logits(client), expected)
    for _ in range(2):
        assert client.wait_for_spares(30)
        kill(client.pid)
        client.start()
        assert parent(client.pid or 0) == zygote.pid
        np.testing.assert_array_equal(logits(client), expected)


def test_an_idle_cell_that_dies_is_replaced_unseen(
    tiny: Path, run: Run, reporter: Reporter, store: Store
) -> None:
    client, _ = run(tiny)
    expected = logits(client)
    kill(pid := client.pid)
    client.start()
    np.testing.assert_array_equal(logits(client), expected)
    (report,) = settled(reporter, store)
    evidence = report.evidence
    assert (evidence.pid, evidence.phase, evidence.exit) == (pid, "idle", Exit.KILLED)
    assert (evidence.returncode, report.result) == (
        -signal.SIGKILL,
        "another process takes its place; no job was touched",
    )


def test_in_the_middle_of_a_job_a_death_is_told(tiny: Path, run: Run) -> None:
    client, _ = run(tiny)
    logits(client)
    kill(client.pid)
    with pytest.raises(CellDied):
        logits(client)
    logits(client)


def test_zygote_spare_and_cell_killed_at_once(tiny: Path, run: Run, reporter: Reporter, store: Store) -> None:
    client, _ = run(tiny)
    expected = logits(client)
    assert client.wait_for_spares(30)
    pids = [each.pid for each in psutil.Process().children(recursive=True)]
    assert len(pids) == 3
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        kill(pid)
    client.start()
    np.testing.assert_array_equal(logits(client), expected)
    assert client.wait_for_spares(30)
    reports = settled(reporter, store)
    assert {report.evidence.exit for report in reports} == {Exit.KILLED}
    assert {report.evidence.phase for report in reports} == {"idle"}


def test_a_native_crash_in_a_forked_cell(smollm: Path, run: Run) -> None:
    client, _ = run(smollm)
    client.start()
    with pytest.raises(CellDied) as caught:
        client.send(BATCH, DecodeOptions(encode=True))
    evidence = Incident.of(caught.value).evidence.result(60)
    assert (evidence.exit, evidence.returncode) == (Exit.SIGNAL, -signal.SIGSEGV)
    (crashed,) = [thread for thread in evidence.threads if thread.crashed]
    assert "llama_encode" in {frame.symbol for frame in crashed.native}
    assert [step for step in evidence.steps if not step.ok] == []
    assert [phase.name for phase in evidence.flight][-1] == "encode"
    assert "load" not in {phase.name for phase in evidence.flight}
    logits(client)


def test_a_model_that_crashes_when_it_decodes_is_found_by_its_first_job(
    tiny: Path, run: Run, reporter: Reporter, store: Store, dose: Dose
) -> None:
    dose(Poison())
    client, _ = run(tiny)
    client.start()
    assert not client.wait_for_spares(30)
    with pytest.raises(CellDied) as caught:
        logits(client)
    assert Incident.of(caught.value).evidence.result(60).exit == Exit.SIGNAL
    reports = settled(reporter, store)
    assert [report.evidence.exit for report in reports] == [Exit.SIGNAL] * 3
    assert {report.result for report in reports} == {"another process takes its place; no job was touched"}


def test_a_crash_of_the_loader_is_a_report_and_an_error(
    tmp_path: Path, run: Run, reporter: Reporter, store: Store
) -> None:
    client, zygote = run(write_block_count_zero(tmp_path / "model.gguf"))
    with pytest.raises(ModelError, match=r"llama\.cpp died while loading it") as caught:
        client.start()
    (report,) = settled(reporter, store)
    assert caught.value.report == str(store.path(report.id))
    assert (report.evidence.exit, report.evidence.phase) == (Exit.ABORT, "start")
    assert report.evidence.assertion is not None
    assert zygote.pid is None
    client.close()
    with pytest.raises(UsageError):
        client.start()
