"""One crash of llama.cpp has one signature, and one stack, whoever takes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from crumplezone import Batch, Decoder
from crumplezone.reports.records.report import Report
from crumplezone.reports.store.store import Store
from tests.support.decoders import Dose, Open, reports_of
from tests.support.native.decode_poison import Poison
from tests.support.processes import one_crash
from tests.support.processes.helpers import autopsies, kill_helpers
from tests.support.records.stacks import by_pystack, comparable


def encode(decoder: Decoder) -> None:
    decoder.encode(Batch.of([[1, 2, 3]]))


def decode(decoder: Decoder) -> None:
    decoder.decode(Batch.of([[5] * 20, [6] * 20]))


CRASHES: dict[str, tuple[Callable[[Decoder], None], Poison | None, int]] = {
    "encode on a decoder-only model": (encode, None, 64),
    "an assertion": (decode, None, 32),  # of more tokens than n_batch
    "no sequence ids": (decode, Poison(how="null_seq_id", min_sequences=2), 64),
    "below Python": (decode, Poison(how="segv", min_sequences=2), 64),
}


@pytest.mark.parametrize("crash", CRASHES)
def test_stack_and_signature(
    crash: str, tiny: Path, make: Open, dose: Dose, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, poison, n_batch = CRASHES[crash]
    if poison:
        dose(poison)

    def once() -> Report:
        decoder = make(tiny, 2, n_batch=n_batch, preflight=False, deadline=30)
        job(decoder)
        return reports_of(decoder, store)[-1]

    seen = autopsies(monkeypatch)
    whole = once()
    assert comparable(seen[0].native) == comparable(by_pystack(seen[0]))
    assert len(seen[0].native) > 10
    kill_helpers(monkeypatch)
    alone = once()
    assert not next(step.ok for step in alone.evidence.steps if step.name == "stacks (pystack)")
    assert alone.signature == whole.signature
    assert alone.id != whole.id


def test_equal_crashes_of_several_processes_whose_helpers_are_killed(tiny: Path, store: Store) -> None:
    found = one_crash.run(tiny, store.directory, processes=3, crashes=9)
    assert found["codes"] == [0, 0, 0]
    assert (found["reports"], len(found["as signed"])) == (9, 1)
    assert found["titles"] == ["SIGSEGV in llama_kv_cache_context::build_input_k_idxs"]
