"""The cases of a diagnostic run: every ending, each of a real cell."""

from __future__ import annotations

import os
import re
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crumplezone.diagnostics.ci.case import Case, run_case
from crumplezone.diagnostics.ci.probe import ROUNDING, ROUNDING_VECTORS, STEPS, Said, context, difference
from crumplezone.diagnostics.replay.minimise import minimise
from crumplezone.diagnostics.replay.replay import replay
from crumplezone.diagnostics.replay.script import check, script
from crumplezone.reports.records.report import Outcome, Report, VerdictKind
from crumplezone.reports.records.run import CaseRecord, Ending, Shape
from crumplezone.reports.store.store import Store
from tests.support.decoders import Dose, Plant, crashed_stack, descriptors, read_all
from tests.support.models.tiny_bert import write_tiny_bert, write_tiny_t5
from tests.support.models.tiny_gguf import write_block_count_zero, write_tiny_llama, write_truncated
from tests.support.native.decode_poison import Poison

Try = Callable[..., CaseRecord]


@pytest.fixture
def attempt(store: Store) -> Try:
    """Run a case."""

    def run(model: Path, *, deadline: float = 60.0, memory: int | None = None, **shape: Any) -> CaseRecord:
        given: dict[str, Any] = {"n_threads": 1, "n_batch": 512} | shape
        case = Case("a case", model, Shape(**given), deadline, memory)
        record = run_case(case, store.directory)
        assert (record.id, record.model, record.shape) == ("a case", model.name, case.shape)
        return record

    return run


def only(store: Store, record: CaseRecord) -> Report:
    """The report of a case, which is the only one."""
    (report,) = read_all(store)
    assert record.report == report.id
    return report


# --- what passes


@pytest.mark.parametrize(
    "shape",
    [
        {"path": "decode", "tokens": 10, "sequences": 3},
        {"path": "process", "tokens": 10, "sequences": 3, "n_ubatch": 4},
        {"path": "safe", "tokens": 10, "sequences": 3, "n_batch": 3},
        {"path": "decode", "tokens": 40, "sequences": 4, "kv_unified": True, "flash_attn": "off"},
    ],
)
def test_a_text_is_the_same_on_both_paths(
    tiny: Path, attempt: Try, store: Store, shape: dict[str, Any]
) -> None:
    record = attempt(tiny, **shape)
    assert (record.ending, record.detail, record.signature, record.report) == (Ending.PASS, "", None, "")
    assert len(set(record.text.split("\n")) - {""}) == shape["sequences"]
    assert record.safe_text == ""
    assert record.ms > 0
    assert record.peak_rss is not None
    assert record.peak_rss > 1 << 20
    assert read_all(store) == []


def test_every_path_continues_the_same_text(tiny: Path, attempt: Try) -> None:
    texts = {attempt(tiny, path=path, tokens=7, sequences=2).text for path in ("decode", "process", "safe")}
    assert len(texts) == 1


@pytest.mark.parametrize("pooling", ["model", "none", "mean"])
def test_vectors_are_the_same_on_both_paths(tmp_path: Path, attempt: Try, pooling: str) -> None:
    bert = write_tiny_bert(tmp_path / "bert.gguf", pooling="cls")
    record = attempt(bert, path="embed", tokens=12, sequences=3, n_ubatch=510, pooling=pooling)
    assert (record.ending, record.detail, record.text) == (Ending.PASS, "", "")


def test_an_encoder_encodes(tmp_path: Path, attempt: Try) -> None:
    record = attempt(write_tiny_t5(tmp_path / "t5.gguf"), path="encode", tokens=12, sequences=3)
    assert (record.ending, record.detail) == (Ending.PASS, "")


# --- what does not


def test_encode_without_an_encoder_crashes(smollm: Path, attempt: Try, store: Store) -> None:
    record = attempt(smollm, path="encode", tokens=10, sequences=3)
    report = only(store, record)
    assert record.ending is Ending.CRASH
    assert "llama_context::encode" in crashed_stack(report)
    assert record.signature == report.signature
    assert record.signature is not None
    assert record.detail.startswith(record.signature.title)
    assert record.detail.endswith("batch-only: every sequence got its result on the rung safe")
    assert report.batch is not None
    assert (report.batch.operation, report.batch.seq_ids) == ("encode", [0] * 4 + [1] * 3 + [2] * 3)
    assert report.result == f"the case {record.id!r} ends as crash"
    assert [(step.rung, step.sequences) for step in report.ladder] == [
        ("native", [0, 1, 2]), ("safe", [0]), ("safe", [1]), ("safe", [2]),
    ]  # fmt: skip


def test_a_context_is_recorded_and_done_again(tiny: Path, attempt: Try, store: Store) -> None:
    choices = {"kv_unified": True, "type_k": "bf16", "type_v": "f32", "flash_attn": "off"}
    record = attempt(tiny, tokens=2, n_batch=1, n_ubatch=1, **choices)
    assert record.signature is not None
    assert "n_tokens_all <= cparams.n_batch" in record.signature.title
    report = only(store, record)
    assert choices.items() <= report.context.items()
    assert check(script(report), report).same
    least = minimise(report)
    assert set(least.steps) >= {f"{name}: {value} to {usual}" for name, value, usual in [
        ("kv_unified", True, False), ("type_k", "bf16", "f16"),
        ("type_v", "f32", "f16"), ("flash_attn", "off", "auto"),
    ]}  # fmt: skip


def test_a_crash_of_llama_process_is_done_again(
    attempt: Try, store: Store, dose: Dose, tmp_path: Path
) -> None:
    model = write_tiny_llama(
        tmp_path / "model.gguf", n_vocab=128, n_embd=64
    )  # heads of 32: one block of Q8_0
    kinds = {"type_k": "q8_0", "type_v": "q8_0", "flash_attn": "on"}
    dose(Poison(position=6, min_sequences=2))  # two tokens after the batch
    record = attempt(model, path="process", tokens=10, sequences=2, **kinds)
    report = only(store, record)
    assert (record.ending, report.verdict and report.verdict.kind) == (Ending.CRASH, VerdictKind.BATCH_ONLY)
    assert report.batch is not None
    assert (report.batch.operation, report.batch.positions) == ("process", [6, 6])
    assert [(held.seq_id, held.positions) for held in report.batch.held] == [(i, [*range(6)]) for i in (0, 1)]
    assert replay(report, 1).replay.same == 1
    text = script(report)
    assert "params.type_k = 8  # q8_0" in text
    assert "params.flash_attn_type = 1  # on" in text
    assert "llama_process(context" in text
    assert check(text, report).outcome is Outcome.OK  # of a llama.cpp without the poison


def test_a_sequence_that_crashes_alone_is_blamed(tiny: Path, attempt: Try, store: Store, dose: Dose) -> None:
    dose(Poison(position=5))  # only sequence 0 has so many, until the others are continued
    record = attempt(tiny, tokens=11, sequences=2)
    native, safe = read_all(store)
    assert (record.ending, record.report) == (Ending.CRASH, native.id)
    assert record.detail.endswith("input: sequence 0 crashed alone too")
    assert (native.rung, safe.rung, safe.blamed) == ("native", "safe", [0])


def test_a_crash_of_the_safe_path_is_one(tiny: Path, attempt: Try, store: Store, dose: Dose) -> None:
    dose(Poison(how="use_after_free"))
    record = attempt(tiny, path="safe")
    assert (record.ending, only(store, record).rung) == (Ending.CRASH, "safe")


def test_what_a_batch_muddles_up_is_a_mismatch(tiny: Path, attempt: Try, plant: Plant) -> None:
    plant("decode", "tests.support.native.case_stunts:Muddled")
    record = attempt(tiny, tokens=20, sequences=2)
    assert record.ending is Ending.MISMATCH
    assert "sequence" in record.detail
    assert "token 1 is another" in record.detail
    assert record.text != record.safe_text != ""


def test_vectors_that_llama_cpp_pools_piece_by_piece_are_a_mismatch(tiny: Path, attempt: Try) -> None:
    record = attempt(tiny, path="embed", tokens=20, n_ubatch=4, pooling="mean")
    assert record.ending is Ending.MISMATCH
    assert "sequence 0: vector 0 is off by" in record.detail


def test_over_the_deadline_is_a_hang(
    tiny: Path, attempt: Try, store: Store, dose: Dose, tmp_path: Path
) -> None:
    dose(Poison(how="wait", min_sequences=2, fifo=str(tmp_path / "told")))
    record = attempt(tiny, tokens=4, sequences=2, deadline=1.0)
    report = only(store, record)
    assert (record.ending, record.signature) == (Ending.HANG, report.signature)
    assert "no reply within the deadline" in record.detail


def test_over_the_memory_limit_is_an_oom(tiny: Path, attempt: Try, store: Store) -> None:
    record = attempt(tiny, memory=1 << 20)
    assert only(store, record).verdict is not None
    assert record.ending is Ending.OOM
    assert "memory" in record.detail
    assert record.peak_rss is not None
    assert record.peak_rss > 1 << 20


def test_a_loader_that_dies_is_a_crash(tmp_path: Path, attempt: Try, store: Store) -> None:
    record = attempt(write_block_count_zero(tmp_path / "bad.gguf"))
    report = only(store, record)
    assert (record.ending, report.evidence.phase, report.batch) == (Ending.CRASH, "start", None)


def test_a_crash_is_one_without_its_report(tiny: Path, tmp_path: Path) -> None:
    in_the_way = tmp_path / "reports"
    in_the_way.touch()
    record = run_case(Case("a case", tiny, Shape(path="encode", n_batch=64, n_threads=1)), in_the_way)
    assert (record.ending, record.report) == (Ending.CRASH, "")
    assert record.signature is not None
    assert "its report is lost" in record.detail


# --- what is refused


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ({"tokens": 2, "sequences": 3}, "tokens is 2: must be from 3 to"),
        ({"tokens": 0}, "tokens is 0: must be from 1 to"),
        ({"tokens": 257, "sequences": 257}, "sequences is 257: must be from 1 to 256"),
        ({"tokens": 8, "sequences": 4, "n_batch": 3}, "n_batch is 3: must be from 4 to"),
        ({"n_ubatch": 0}, "n_ubatch is 0: must be from 1 to"),
        ({"n_threads": 513}, "n_threads is 513: must be from 0 to 512"),
        ({"pooling": "mean"}, "pooling is 'mean': must be model: the path decode does not pool"),
        ({"type_v": "q4_0", "flash_attn": "off"}, "type_v is 'q4_0': is quantised, which needs flash_attn"),
        ({"type_k": "q2_k"}, "type_k is 'q2_k': must be one of f32, "),
    ],
)
def test_an_impossible_shape_needs_no_cell(tiny: Path, attempt: Try, shape: dict[str, Any], why: str) -> None:
    record = attempt(tiny, **shape)
    assert record.ending is Ending.REFUSED
    assert record.detail.startswith(why)


def test_what_a_model_cannot_do_is_refused(tiny: Path, tmp_path: Path, attempt: Try, store: Store) -> None:
    bert = write_tiny_bert(tmp_path / "bert.gguf")
    for model, shape, why in (
        (tiny, {"tokens": 254}, "tokens is 254: makes 257 in a sequence .*; the model knows 256"),
        (tiny, {"type_k": "q8_0"}, "no such context can be made: .*block size 32 does not divide"),
        (bert, {}, "path is 'decode': must be encode or embed"),
        (tiny, {"path": "process", "tokens": 3, "n_batch": 2}, "refuses token 2 .*: the batch is full"),
    ):  # fmt: skip
        record = attempt(model, **shape)
        assert record.ending is Ending.REFUSED
        assert re.search(why, record.detail)
    assert read_all(store) == []


def test_a_return_code_is_a_refusal(tiny: Path, attempt: Try, store: Store, dose: Dose) -> None:
    dose(Poison(how="interrupt"))
    record = attempt(tiny, tokens=8, n_ubatch=4)
    assert (record.ending, record.detail) == (Ending.REFUSED, "aborted by its callback (rc 2)")
    assert read_all(store) == []


def test_a_build_without_llama_process(tiny: Path, attempt: Try, plant: Plant) -> None:
    plant("decode", "tests.support.native.case_stunts:Older")
    record = attempt(tiny, path="process")
    assert (record.ending, record.detail) == (Ending.REFUSED, "this llama.cpp has no llama_process")


# --- what tells nothing


def test_a_model_that_does_not_load_is_an_error(tmp_path: Path, attempt: Try, store: Store) -> None:
    missing = attempt(tmp_path / "none.gguf")
    assert missing.ending is Ending.ERROR
    assert "cannot be read (No such file or directory)" in missing.detail
    cut = attempt(write_truncated(tmp_path / "cut.gguf"))
    assert cut.ending is Ending.ERROR
    assert "model is corrupted or incomplete" in cut.detail
    assert read_all(store) == []


def test_a_strangers_kill_is_an_error(
    tiny: Path, attempt: Try, store: Store, dose: Dose, tmp_path: Path
) -> None:
    fifo = tmp_path / "told"
    os.mkfifo(fifo)
    dose(Poison(how="wait", fifo=str(fifo)))

    def kill() -> None:
        assert fifo.read_text() == "here"
        for cell in psutil.Process().children():
            cell.send_signal(signal.SIGKILL)

    stranger = threading.Thread(target=kill)
    stranger.start()
    record = attempt(tiny)
    stranger.join()
    assert (record.ending, record.signature) == (Ending.ERROR, None)
    assert only(store, record).evidence.exit == "killed"


def test_without_descriptors_it_is_an_error(tiny: Path, attempt: Try) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(descriptors()) + 4, before[1]))
    try:
        record = attempt(tiny)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert record.ending is Ending.ERROR
    assert "close files, or raise the limit of open ones (ulimit -n is " in record.detail


# --- contexts


@settings(max_examples=60)
@given(st.integers(1, 256), st.integers(0, 2000), st.integers(0, 4096), st.booleans(), st.booleans())
def test_a_context_has_room_for_its_shape(
    tiny: Path, sequences: int, more_tokens: int, more_batch: int, unified: bool, safe: bool
) -> None:
    shape = Shape("decode", sequences, sequences + more_tokens, sequences + more_batch, kv_unified=unified)
    config = context(tiny, shape, safe=safe)
    sizes = [len(part) + STEPS - 1 for part in np.array_split(range(shape.tokens), sequences)]
    streams = 1 if unified else config.n_seq_max
    assert config.n_batch == shape.n_batch <= config.n_ctx  # or llama.cpp would clamp it
    assert config.n_ctx % (256 * streams) == 0  # or it would round it up
    assert config.n_ctx // streams >= (sum(sizes) if unified and not safe else max(sizes))


# --- how answers are compared


def test_texts_differ_where_they_part() -> None:
    rows = np.tile(np.array([0, 1, 2, 3], np.float32), (STEPS, 1))  # one standard deviation: 1.118
    safe = Said([3, 3, 3, 3], rows)
    assert difference(Said([3, 3, 3, 3], None), safe) is None
    near, far = difference(Said([3, 2, 0, 0], None), safe), difference(Said([3, 3, 3, 0], None), safe)
    assert near is not None
    assert far is not None
    assert near.what.startswith("token 2 is another, on the safe path less likely by 0.89 standard")
    assert near.size == pytest.approx(1 / rows[0].std() / ROUNDING)
    assert far.size == pytest.approx(3 * near.size)


def test_vectors_differ_by_their_distance() -> None:
    safe = np.array([[3, 4], [0, 0], [0, 1]], np.float32)
    assert difference(safe * np.float32(1 + ROUNDING_VECTORS / 2), safe) is None
    turned = safe.copy()
    turned[0] = 4, -3
    found = difference(turned, safe)
    assert found is not None
    assert found.size == pytest.approx(2**0.5 / ROUNDING_VECTORS)
    assert found.what.startswith("vector 0 is off by 1.4 of its length")
