"""Twenty crashes, each in a cell and in a program under `crumplezone exec`: they have the same signature."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from crumplezone import Batch, Decoder
from crumplezone.diagnostics.replay.script import script
from crumplezone.reports.analysis.signature import sign
from crumplezone.reports.records.report import Report
from crumplezone.reports.store.store import Store
from tests.support.ctypes_batches import foreign
from tests.support.decoders import batch_of, read_all, report_of
from tests.support.processes.cells import die as stunt_in_a_cell
from tests.support.processes.crashes import die as fault_in_a_cell
from tests.support.processes.programs import PYTHON, armed, plain
from tests.support.services import faults, stunts

pytestmark = pytest.mark.timeout(400)  # the first one makes all of the crashes

DOUBLE = """
import socket, sys
import msgspec
from crumplezone.sandbox.ipc.arena import Arena
from crumplezone.sandbox.child.loop import Room
from tests.support.services.stunts import Config, Double, Stunt
arena = Arena()
room = Room(arena, socket.socketpair()[0], arena.recorder(), None)
Double(msgspec.Raw(msgspec.msgpack.encode(Config())), room).handle(Stunt(sys.argv[1]))
"""
FAULT = """
import ctypes, sys
from tests.support.services.faults import KINDS, call_native
call_native(ctypes.CDLL(sys.argv[1]), "crash", KINDS.index(sys.argv[2]))
"""
STUNTS: dict[str, tuple[dict[str, float], list[str]]] = {  # the limits of the cell, and of the program
    "hang": ({"deadline": 1}, ["--timeout", "4"]),
    "ill": ({}, []),
    "exit_native": ({}, []),
    "balloon": ({"memory_limit": 400 << 20}, ["--memory", "400"]),
}
LLAMA: dict[str, Callable[[Decoder], object]] = {
    "llama_encode": lambda decoder: decoder.encode(Batch.of([[4, 5, 6], [7, 8]])),
    "GGML_ASSERT": lambda decoder: decoder.decode(Batch.of([[4] * 65])),
    "null seq_id": lambda decoder: decoder.decode(_null(), level="off"),
}
Pair = tuple[Report, Report]


def _null() -> object:
    owner = foreign([4, 5, 6])
    owner.arrays["seq_id"][1] = 0
    return owner


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, Pair]:
    """Of each crash the report of the cell and that of the program, made side by side."""
    folder = tmp_path_factory.mktemp("crashes")
    library = faults.build(folder)

    def program(name: str, command: list[str], *options: str) -> Report:
        store = Store(folder / name)
        done = armed(store, [PYTHON, "-c", *command], *options)
        (report,) = read_all(store)
        code = report.evidence.returncode
        assert code is not None
        assert done.returncode == (code if code >= 0 else 128 - code)
        assert str(store.path(report.id)) in done.stderr
        return report

    def fault(kind: str) -> Pair:
        evidence, _ = fault_in_a_cell(library, kind, "main")
        return report_of(None, evidence=evidence), program(kind, [FAULT, str(library), kind])

    def stunt(name: str) -> Pair:
        limits, options = STUNTS[name]
        evidence = stunt_in_a_cell(name, **limits)  # type: ignore[arg-type]
        return report_of(None, evidence=evidence), program(name, [DOUBLE, name], *options)

    def llama(name: str) -> Pair:
        options = {"n_ctx": 512, "n_seq_max": 2, "n_batch": 64, "n_threads": 1, "preflight": False}
        store = Store(folder / "cells" / name)
        with Decoder(tiny, reports=store.directory, spares=0, start="spawn", **options) as decoder:  # type: ignore[arg-type]
            LLAMA[name](decoder)
        (report, *_) = read_all(store)
        return report, program(name, [script(report)])

    jobs = [(name, partial(stunt, name)) for name in STUNTS]
    jobs += [(name, partial(llama, name)) for name in LLAMA]
    jobs += [(kind, partial(fault, kind)) for kind in faults.KINDS]
    with ThreadPoolExecutor(3) as pool:
        return {name: done.result() for name, done in [(name, pool.submit(job)) for name, job in jobs]}


@pytest.mark.parametrize("name", [*faults.KINDS, *STUNTS, *LLAMA])
def test_its_crash_has_the_signature_of_a_cells(pairs: dict[str, Pair], name: str) -> None:
    of_cell, of_program = pairs[name]
    expected, found = sign(of_cell), of_program.signature
    assert found is not None
    assert (found.id, found.title) == (expected.id, expected.title)
    assert of_program.evidence.exit == of_cell.evidence.exit
    assert of_program.evidence.fault is None or bool(of_program.evidence.registers) == bool(
        of_cell.evidence.registers
    )
    assert [step for step in of_program.evidence.steps if not step.ok] == []


def test_a_report_names_the_program_and_its_llama_cpp(pairs: dict[str, Pair]) -> None:
    of_cell, of_program = pairs["llama_encode"]
    assert of_program.command[:2] == [PYTHON, "-c"]
    name = "llama-cpp-python"
    assert of_program.environment.versions[name] == of_cell.environment.versions[name]
    assert of_program.batch is None


def test_twenty_crashes_were_compared() -> None:
    assert len({*faults.KINDS, *STUNTS, *LLAMA}) == 20
    assert all(hasattr(stunts, f"_{name}") for name in STUNTS)


def test_a_llama_cpp_script_that_passes_is_the_same(tiny: Path, store: Store) -> None:
    command = [PYTHON, "-c", script(report_of(batch_of([4, 5], [6]), str(tiny)))]
    expected, found = (
        (done.returncode, done.stdout, re.sub(r"\d+\.\d+ ms|0x[0-9a-f]+", "N", done.stderr))
        for done in (plain(command), armed(store, command))
    )
    assert "n_seq_max" in expected[2]  # llama.cpp said what it does
    assert found == expected
    assert store.rows() == []
