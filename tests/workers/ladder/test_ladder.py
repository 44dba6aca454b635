"""The ladder, in real cells: crashes are survived, only the guilty fail, and every crash is reported."""

from __future__ import annotations

import hashlib
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crumplezone import Batch, Result, Rung, SafeBatchProcessor
from crumplezone.errors import BatchError, SequenceError, UsageError
from crumplezone.reports.records.report import Exit, Outcome
from crumplezone.reports.store.store import Store
from tests.support.decoders import Dose, Open, assert_equal_logits, crashed_stack, kill, reports_of, sequences
from tests.support.native.decode_poison import Poison

# --- llama.cpp's own crashes


def test_encode_on_a_decoder_only_model(smollm: Path, make: Open, store: Store) -> None:
    batch = Batch.of([[1, 100, 200, 300], [1, 400]])
    careful = make(smollm, 2).encode(batch)
    assert "no encoder" in careful.note
    assert careful.reports == []
    assert store.rows() == []

    decoder = make(smollm, 2, preflight=False)
    bold = decoder.encode(batch)
    assert bold.note == ""
    for result in (careful, bold):
        assert {result.rung(i) for i in result.seq_ids} == {Rung.SAFE}
    for seq_id, pos in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]:
        np.testing.assert_array_equal(bold.embeddings(seq_id, pos), careful.embeddings(seq_id, pos))

    (report,) = reports_of(decoder, store)
    assert bold.reports == [str(store.path(report.id))]
    assert report.rung == "native"
    assert report.evidence.exit == Exit.SIGNAL
    assert report.evidence.fault is not None
    assert report.evidence.fault.name == "SIGSEGV"
    assert "llama_context::encode" in crashed_stack(report)
    (thread,) = [thread for thread in report.evidence.threads if thread.crashed]
    assert all(frame.build_id for frame in thread.native if "libllama" in frame.module)
    assert int(report.evidence.registers["rip"], 16) > 0
    assert report.batch is not None
    assert report.batch.tokens == [1, 100, 200, 300, 1, 400]
    assert report.batch.seq_ids == [0, 0, 0, 0, 1, 1]
    assert report.batch.positions == [0, 1, 2, 3, 0, 1]
    assert report.batch.operation == "encode"
    assert [(step.rung, step.outcome, step.sequences) for step in report.ladder] == [
        ("native", Outcome.CRASHED, [0, 1]),
        ("safe", Outcome.OK, [0]),
        ("safe", Outcome.OK, [1]),
    ]
    assert report.model is not None
    assert report.model.sha256 == hashlib.sha256(smollm.read_bytes()).hexdigest()
    assert any(frame.file == __file__ for frame in report.caller)
    assert (store.path(report.id) / "report.txt").read_text()


def test_more_tokens_than_n_batch(tiny: Path, make: Open, store: Store) -> None:
    batch = Batch.of(sequences(80, 2, 128))
    reference = make(tiny, 2).decode(batch)

    careful = make(tiny, 2, n_batch=32).decode(batch)
    assert "n_batch is 32" in careful.note
    assert_equal_logits(careful, reference)
    assert store.rows() == []

    decoder = make(tiny, 2, n_batch=32, preflight=False)
    bold = decoder.decode(batch)
    assert {bold.rung(i) for i in bold.seq_ids} == {Rung.SAFE}
    assert_equal_logits(bold, reference)
    (report,) = reports_of(decoder, store)
    assert report.evidence.exit == Exit.ABORT
    assert report.evidence.assertion is not None
    assert "n_tokens_all <= cparams.n_batch" in report.evidence.assertion.text
    assert report.context["n_batch"] == 32


@pytest.mark.parametrize("how", ["null_seq_id", "use_after_free"])
def test_crashes_inside_libllama(how: str, tiny: Path, make: Open, store: Store, dose: Dose) -> None:
    batch = Batch.of([[4, 5], [6, 7, 8]])
    reference = make(tiny).decode(batch)
    dose(Poison(how=how, min_sequences=2))
    decoder = make(tiny, deadline=30)
    result = decoder.decode(batch)
    assert_equal_logits(result, reference)
    assert {result.rung(i) for i in result.seq_ids} == {Rung.SAFE}
    (report,) = reports_of(decoder, store)
    assert report.evidence.exit in ({Exit.SIGNAL} if how == "null_seq_id" else {Exit.SIGNAL, Exit.ABORT})
    assert "libllama" in crashed_stack(report)


def test_without_fallback_the_error_names_its_report(tiny: Path, make: Open) -> None:
    decoder = make(tiny, safe_fallback=False, preflight=False)
    with pytest.raises(BatchError) as caught:
        decoder.encode(Batch.of([[1, 2]]))
    assert caught.value.report is not None
    assert (Path(caught.value.report) / "report.json").exists()
    assert decoder.decode(Batch.of([[1, 2]])).rung(0) == Rung.NATIVE


def test_without_fallback_preflight_refuses_and_nothing_crashes(tiny: Path, make: Open, store: Store) -> None:
    decoder = make(tiny, safe_fallback=False)
    with pytest.raises(BatchError, match="no encoder") as caught:
        decoder.encode(Batch.of([[1, 2]]))
    assert caught.value.report is None
    assert store.rows() == []


# --- blame


def test_one_poisoned_sequence_fails_alone(tiny: Path, make: Open, store: Store, dose: Dose) -> None:
    batch = Batch.of([[4, 5, 6], [7, 8, 9], [4, 99, 6], [10, 11]])
    reference = make(tiny).decode(batch)
    dose(Poison(token=99))
    decoder = make(tiny)
    result = decoder.decode(batch)
    for seq_id in (0, 1, 3):
        assert result.rung(seq_id) == Rung.SAFE
        np.testing.assert_allclose(result.logits(seq_id), reference.logits(seq_id), rtol=1e-3, atol=1e-3)
    with pytest.raises(SequenceError) as caught:
        result.logits(2)
    assert caught.value.seq_id == 2
    assert caught.value.report is not None
    assert Path(caught.value.report, "report.json").exists()
    assert result.errors == {2: caught.value}
    written = reports_of(decoder, store)
    assert [report.rung for report in written] == ["native", "safe", "token"]
    assert {tuple(report.blamed) for report in written} == {(2,)}
    assert [str(store.path(report.id)) for report in written] == result.reports
    assert result.reports[-1] == caught.value.report
    assert written[0].batch is not None
    assert len(written[0].batch.tokens) == 11
    assert written[2].batch is not None
    assert written[2].batch.tokens == [4, 99, 6]
    clean = decoder.decode(Batch.of([[4, 5]]))
    assert (clean.rung(0), clean.reports) == (Rung.NATIVE, [])


def test_token_by_token_cures_what_only_long_calls_crash(
    tiny: Path, make: Open, store: Store, dose: Dose
) -> None:
    batch = Batch.of([[4, 5, 6], [7, 8]])
    reference = make(tiny).decode(batch)
    dose(Poison(min_tokens=2))
    decoder = make(tiny)
    result = decoder.decode(batch)
    assert {result.rung(i) for i in result.seq_ids} == {Rung.TOKEN}
    assert result.errors == {}
    assert_equal_logits(result, reference)
    # Between the sequences, a new cell was given what the first one had left.
    reports = reports_of(decoder, store)
    assert sorted(report.rung for report in reports) == ["native", "native", "safe", "safe"]
    assert [r.result for r in reports].count("it was tried again, token by token") == 1


def test_a_crash_in_a_safe_processor(tiny: Path, store: Store, dose: Dose) -> None:
    dose(Poison(token=99))
    with SafeBatchProcessor(tiny, n_ctx=64, n_threads=1, reports=store.directory) as safe:
        result = safe.decode(Batch.of([[4, 5], [99]]))
        assert {row.result for row in store.rows()} == {"1 of 2 sequences decoded one at a time"}
    assert list(result.errors) == [1]
    assert result.rung(0) == Rung.SAFE
    assert [store.read(row.id).rung for row in store.rows()] == ["token", "safe"]


@pytest.mark.parametrize(("start", "spares"), [("zygote", 1), ("zygote", 0), ("spawn", 1), ("spawn", None)])
def test_the_cells_of_a_safe_processor(tiny: Path, store: Store, start: str, spares: int | None) -> None:
    batch = Batch.of([[4, 5], [7]])
    options: dict[str, Any] = {"start": start, "spares": spares}
    with SafeBatchProcessor(tiny, n_ctx=64, n_threads=1, reports=store.directory, **options) as safe:
        first = safe.decode(batch)
        client = safe._safe_rungs.client
        assert client.wait_for_spares(30)
        before, warm = client.pid, client.spare_pids
        assert len(warm) == (spares or 0)
        kill(before)
        assert_equal_logits(safe.decode(batch), first)
        assert not warm or client.pid in warm
        assert client.pid != before
    with pytest.raises(UsageError, match="this SafeBatchProcessor is closed"):
        safe.decode(batch)


# --- many jobs


def test_a_hundred_jobs_of_which_ten_crash(tiny: Path, make: Open, store: Store) -> None:
    decoder = make(tiny, n_ctx_seq=512, preflight=False)
    batch = Batch.of([[4, 5, 6], [7, 8]])

    def job(number: int) -> Result:
        return decoder.encode(batch) if number % 10 == 0 else decoder.decode(batch)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(job, range(100)))
    assert [result.rung(0) for result in results] == [
        Rung.SAFE if number % 10 == 0 else Rung.NATIVE for number in range(100)
    ]
    assert (decoder.memory.pos_max(0), decoder.memory.pos_max(1)) == (90 * 3 - 1, 90 * 2 - 1)
    written = reports_of(decoder, store)
    assert len(written) == 10
    paths = {path for result in results for path in result.reports}
    assert paths == {str(store.path(report.id)) for report in written}


# --- cells that others kill


def test_sigkill_between_calls(tiny: Path, make: Open, store: Store) -> None:
    decoder = make(tiny)
    batch = Batch.of([[4, 5, 6], [7, 8]])
    reference = decoder.decode(batch)
    assert decoder.pid is not None
    os.kill(decoder.pid, signal.SIGKILL)
    decoder.memory.clear()
    result = decoder.decode(batch)
    assert_equal_logits(result, reference)
    assert decoder.decode(batch).rung(0) == Rung.NATIVE
    assert all(report.evidence.exit == Exit.KILLED for report in reports_of(decoder, store))


def test_sigkill_during_a_call(tiny: Path, make: Open, store: Store, dose: Dose, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    batch = Batch.of([[4, 5, 6], [7, 8]])
    reference = make(tiny).decode(batch)
    dose(Poison(how="wait", fifo=str(fifo), min_sequences=2, once=str(tmp_path / "once")))
    decoder = make(tiny)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(decoder.decode, batch)
        assert fifo.read_text() == "here"
        assert decoder.pid is not None
        os.kill(decoder.pid, signal.SIGKILL)
        result = running.result(60)
    assert_equal_logits(result, reference)
    assert result.rung(0) == Rung.SAFE
    (report,) = reports_of(decoder, store)
    assert report.evidence.exit == Exit.KILLED
    assert decoder.decode(batch).rung(0) == Rung.NATIVE


def test_a_hung_call_is_cured(tiny: Path, make: Open, store: Store, dose: Dose, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)  # nobody reads it: the cell waits for ever
    dose(Poison(how="wait", fifo=str(fifo), min_sequences=2))
    decoder = make(tiny, deadline=2.0)
    result = decoder.decode(Batch.of([[4, 5, 6], [7, 8]]))
    assert result.rung(1) == Rung.SAFE
    (report,) = reports_of(decoder, store)
    assert report.evidence.exit == Exit.HANG


def test_no_error_names_a_report_that_could_not_be_written(
    tiny: Path, make: Open, store: Store, dose: Dose
) -> None:
    dose(Poison(token=99))
    store.directory.write_text("in the way")
    batch = Batch.of([[1, 99], [1, 5]])
    result = make(tiny, 2).decode(batch)
    assert list(result.errors) == [0]
    with pytest.raises(BatchError) as caught:
        make(tiny, 2, safe_fallback=False).decode(batch)
    for error in (result.errors[0], caught.value):
        assert isinstance(error, SequenceError | BatchError)
        assert error.report is None
        assert "report" not in str(error)
