"""The whole ladder, in real cells: results are right, crashes are survived, reports are complete."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

from crumplezone import Batch, Completion, Decoder, Result, Rung, SafeBatchProcessor
from crumplezone.errors import (
    BatchError,
    CellDied,
    CellRefused,
    CrumplezoneError,
    InputError,
    ModelError,
    ReportError,
    SequenceError,
    UsageError,
)
from crumplezone.reports.schema import Exit, Outcome, Report
from crumplezone.reports.store import Store
from crumplezone.workers.runner import Runner
from tests import poison
from tests.poison import Poison
from tests.tiny_gguf import write_block_count_zero, write_tiny_llama, write_truncated

Open = Callable[..., Decoder]
Dose = Callable[[Poison], None]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "reports")


@pytest.fixture
def make(store: Store) -> Iterator[Open]:
    """Make decoders that are closed after the test. One thread: on busy machines OpenMP's spin for long."""
    made: list[Decoder] = []

    def open_decoder(model: Path, n_seq: int = 4, n_ctx_seq: int = 256, **options: object) -> Decoder:
        settings: dict[str, object] = {"n_threads": 1, "reports": store.directory, **options}
        made.append(Decoder(model, n_ctx=n_ctx_seq * n_seq, n_seq_max=n_seq, **settings))  # type: ignore[arg-type]
        return made[-1]

    yield open_decoder
    for decoder in made:
        decoder.close()


@pytest.fixture
def dose(monkeypatch: pytest.MonkeyPatch) -> Dose:
    """Make every cell that starts from now on a `PoisonCell`."""

    def give(dosed: Poison) -> None:
        monkeypatch.setattr(Runner.__init__, "__defaults__", (poison.TARGET,))
        monkeypatch.setenv(poison.VARIABLE, msgspec.json.encode(dosed).decode())

    return give


def reports_of(decoder: Decoder, store: Store) -> list[Report]:
    """Oldest first."""
    decoder.flush_reports()
    rows = store.rows()
    assert [row.problem for row in rows if row.problem] == []
    return [store.read(row.id) for row in reversed(rows)]


def crashed_stack(report: Report) -> str:
    (thread,) = [thread for thread in report.evidence.threads if thread.crashed]
    return "\n".join(f"{frame.symbol} in {frame.module}" for frame in thread.native)


def sequences(n_tokens: int, n_seq: int, n_vocab: int) -> list[list[int]]:
    tokens = np.random.default_rng(n_tokens).integers(3, n_vocab, n_tokens)
    return [part.tolist() for part in np.array_split(tokens, n_seq)]


def assert_equal_logits(one: Result, other: Result) -> None:
    assert one.seq_ids == other.seq_ids
    for seq_id in one.seq_ids:
        a, b = one.logits(seq_id), other.logits(seq_id)
        assert int(a.argmax()) == int(b.argmax())
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-2)


# --- results


def test_native_equals_one_sequence_at_a_time(smollm: Path, make: Open, store: Store) -> None:
    native = make(smollm, 16)
    with SafeBatchProcessor(smollm, n_ctx=256, n_threads=1, reports=store.directory) as safe:
        for n_tokens, n_seq in [(1, 1), (10, 1), (10, 3), (512, 16)]:
            batch = Batch.of(sequences(n_tokens, n_seq, native.info.n_vocab))
            result, reference = native.decode(batch), safe.decode(batch)
            assert_equal_logits(result, reference)
            assert {result.rung(i) for i in result.seq_ids} == {Rung.NATIVE}
            assert {reference.rung(i) for i in reference.seq_ids} == {Rung.SAFE}
    assert store.rows() == []


def test_generate_equals_one_prompt_at_a_time(smollm: Path, make: Open) -> None:
    prompts = [
        f"{word} is" for word in ("Paris", "Water", "The sun", "A cat", "Gold", "Music", "Snow", "Time")
    ]
    prompts += [f"Once upon a time, {n} little" for n in range(8)]
    together = list(make(smollm, 16).generate(prompts, max_tokens=8))
    alone = list(make(smollm, 1).generate(prompts, max_tokens=8))
    assert [c.prompt for c in together] == prompts
    assert [(c.index, c.text, c.tokens) for c in together] == [(c.index, c.text, c.tokens) for c in alone]
    assert {(c.rung, c.error, c.reports) for c in together} == {(Rung.NATIVE, None, ())}


def test_outputs_are_found_by_position(tiny: Path, make: Open) -> None:
    decoder = make(tiny)
    batch = Batch(20, 3)
    batch.add_sequence(2, [4, 5, 6], "all")
    batch.add_sequence(0, [7, 8], "none")
    batch.add_sequence(1, [4, 5])
    result = decoder.decode(batch, embeddings=True)
    np.testing.assert_allclose(result.logits(2, 1), result.logits(1), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(result.logits(2), result.logits(2, 2))
    assert result.logits(2).shape == (128,)
    assert result.embeddings(2).shape == (32,)
    for seq_id, pos in [(0, -1), (1, 0), (2, 3), (2, -2), (3, -1)]:
        with pytest.raises(InputError):
            result.logits(seq_id, pos)
    with pytest.raises(InputError, match="embeddings=True"):
        decoder.decode(batch).embeddings(2)


def test_unordered_generate_yields_every_prompt(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 3)
    prompts = [f"prompt {n}" for n in range(10)]
    ordered = list(decoder.generate(prompts, max_tokens=12))
    unordered = list(decoder.generate(prompts, max_tokens=12, ordered=False))
    assert [c.index for c in ordered] == list(range(10))
    assert sorted(unordered, key=lambda c: c.index) == ordered
    assert list(decoder.generate([])) == []


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
    assert [report.rung for report in reports_of(decoder, store)] == ["native", "safe", "safe"]


def test_a_crash_in_a_safe_processor(tiny: Path, store: Store, dose: Dose) -> None:
    dose(Poison(token=99))
    with SafeBatchProcessor(tiny, n_ctx=64, n_threads=1, reports=store.directory) as safe:
        result = safe.decode(Batch.of([[4, 5], [99]]))
    assert list(result.errors) == [1]
    assert result.rung(0) == Rung.SAFE
    assert [store.read(row.id).rung for row in store.rows()] == ["token", "safe"]


PROMPTS = [f"{letter}bc and {n} more" for n, letter in enumerate("abcdefgh")]


def outcome(completions: list[Completion]) -> list[tuple[int, str, list[int]]]:
    return [(c.index, c.text, c.tokens) for c in completions]


def test_one_poisoned_prompt_fails_alone(tiny: Path, make: Open, store: Store, dose: Dose) -> None:
    first = make(tiny)
    undisturbed = list(first.generate(PROMPTS, max_tokens=40))
    bad = int(first.tokenize(PROMPTS[5])[1])
    dose(Poison(token=bad, position=1))
    decoder = make(tiny)
    completions = list(decoder.generate(PROMPTS, max_tokens=40))
    assert [c.index for c in completions] == list(range(8))
    failed = completions.pop(5)
    del undisturbed[5]
    assert outcome(completions) == outcome(undisturbed)
    assert {c.error for c in completions} == {None}
    assert failed.finish_reason == "error"
    assert isinstance(failed.error, SequenceError)
    written = reports_of(decoder, store)
    assert [report.rung for report in written] == ["native", "safe", "token"]
    assert set(failed.reports) == {str(store.path(report.id)) for report in written}
    assert all(report.blamed == [5] for report in written)
    for report in written:
        assert report.batch is not None
        assert bad in report.batch.tokens
        assert report.batch.operation == "generate"


def test_sampled_text_is_the_same_with_a_crash_in_the_middle(
    tiny: Path, make: Open, store: Store, dose: Dose, tmp_path: Path
) -> None:
    def sampled(decoder: Decoder) -> list[Completion]:
        return list(decoder.generate(PROMPTS, max_tokens=40, temperature=0.8, seed=7))

    undisturbed = sampled(make(tiny))
    dose(Poison(position=30, once=str(tmp_path / "crashed")))
    decoder = make(tiny)
    disturbed = sampled(decoder)
    assert outcome(disturbed) == outcome(undisturbed)
    assert Rung.SAFE in {c.rung for c in disturbed}
    assert len(reports_of(decoder, store)) == 1
    assert len({c.text for c in undisturbed}) == 8


def test_generate_without_fallback_fails_what_was_in_flight(tiny: Path, make: Open, dose: Dose) -> None:
    tokens = make(tiny).tokenize(PROMPTS[0])
    dose(Poison(token=int(tokens[1]), position=1))
    decoder = make(tiny, 2, safe_fallback=False)
    completions = list(decoder.generate(PROMPTS[:4], max_tokens=4))
    assert [c.finish_reason == "error" for c in completions] == [True, True, False, False]
    assert all(isinstance(c.error, CrumplezoneError) and c.reports for c in completions[:2])


# --- many jobs


def test_a_hundred_jobs_of_which_ten_crash(tiny: Path, make: Open, store: Store) -> None:
    decoder = make(tiny, preflight=False)
    batch = Batch.of([[4, 5, 6], [7, 8]])

    def job(number: int) -> Result:
        return decoder.encode(batch) if number % 10 == 0 else decoder.decode(batch)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(job, range(100)))
    assert [result.rung(0) for result in results] == [
        Rung.SAFE if number % 10 == 0 else Rung.NATIVE for number in range(100)
    ]
    for result in results[1:10]:
        np.testing.assert_array_equal(result.logits(0), results[1].logits(0))
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


# --- bad models


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "header", "truncated", "directory"])
def test_bad_models_are_named(kind: str, tmp_path: Path, store: Store) -> None:
    path = tmp_path / "model.gguf"
    if kind == "truncated":
        write_truncated(path)
    elif kind == "directory":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes({"empty": b"", "text": b"once upon a time, a text file", "header": b"GGUF\3"}[kind])
    with pytest.raises(ModelError) as caught:
        Decoder(path, n_threads=1, reports=store.directory)
    assert caught.value.path == str(path)
    assert str(path) in str(caught.value)
    assert caught.value.report is None
    assert psutil.Process().children(recursive=True) == []
    assert store.rows() == []


def test_a_model_that_kills_its_loader(tmp_path: Path, store: Store) -> None:
    path = write_block_count_zero(tmp_path / "model.gguf")
    with pytest.raises(ModelError, match="died while loading") as caught:
        Decoder(path, n_threads=1, reports=store.directory)
    assert str(path) in str(caught.value)
    assert caught.value.report is not None
    report = store.read(Path(caught.value.report).name)
    assert (report.evidence.exit, report.evidence.phase) == (Exit.ABORT, "start")
    assert report.evidence.assertion is not None
    assert "n_layer" in report.evidence.assertion.text
    assert psutil.Process().children(recursive=True) == []


# --- bad input


def test_bad_batches_are_refused_and_cost_nothing(tiny: Path, make: Open, store: Store) -> None:
    decoder = make(tiny, 2, n_ctx_seq=256)
    pid = decoder.pid
    high = Batch(4, 8)
    high.add_sequence(5, [1])
    bad = {
        r"tokens\[1\] of sequence 0 is 128": Batch.of([[1, 128]]),
        r"tokens\[0\] of sequence 1 is -5": Batch.of([[1], [-5]]),
        "seq_id is 5": high,
        "seq_id is 2": Batch.of([[1]] * 3),
        "context holds 256": Batch.of([[1] * 257]),
        "at least one sequence": Batch(4),
    }
    for message, batch in bad.items():
        for work in (decoder.decode, decoder.encode):
            with pytest.raises(InputError, match=message):
                work(batch)
    assert decoder.decode(Batch.of([[1] * 256, [2]])).rung(0) == Rung.NATIVE
    assert decoder.pid == pid
    assert store.rows() == []


def test_a_prompt_is_not_blamed_for_a_cell_that_was_killed_before_it(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 2)
    assert decoder.pid is not None
    os.kill(decoder.pid, signal.SIGKILL)
    completions = list(decoder.generate(["aa", "bb", "cc"], max_tokens=4))
    assert [completion.error for completion in completions] == [None, None, None]


def test_close_ends_a_suspended_generation(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)
    completions = decoder.generate(["aa", "bb", "cc"], max_tokens=4)
    next(completions)
    decoder.close()
    assert list(completions) == []
    with pytest.raises(UsageError):
        decoder.tokenize("x")


def test_close_waits_for_the_call_of_another_thread(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 4)
    batch = Batch.of([[5] * 60] * 4)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(decoder.decode, batch) for _ in range(4)]
        jobs[0].result()
        decoder.close()
        for job in jobs:
            assert isinstance(job.exception(), UsageError | None)


def test_a_pooling_model_still_gives_a_row_per_token(tmp_path: Path, make: Open) -> None:
    model = tmp_path / "pooling.gguf"
    write_tiny_llama(model, n_vocab=128, overrides={"llama.pooling_type": 1})
    result = make(model, 2).encode(Batch.of([[5, 6, 7], [8, 9]]))
    assert result.errors == {}
    assert not np.allclose(result.embeddings(0, 0), result.embeddings(0, 2))


def test_bad_prompts(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 2)
    for prompts in (["a", ""], ["a", None], [b"bytes"]):
        with pytest.raises(InputError, match="prompts"):
            decoder.generate(prompts)  # type: ignore[arg-type]
    for options in ({"max_tokens": 0}, {"temperature": -1}, {"temperature": float("nan")}, {"seed": -1}):
        with pytest.raises(InputError):
            decoder.generate(["a"], **options)
    completions = list(decoder.generate(["abc", "x" * 300, "def"], max_tokens=4))
    assert [c.finish_reason == "error" for c in completions] == [False, True, False]
    assert isinstance(completions[1].error, InputError)
    assert "256" in str(completions[1].error)
    assert all(c.error is None for c in (completions[0], completions[2]))


def test_a_generation_ends_where_the_context_does(tiny: Path, make: Open) -> None:
    (completion,) = make(tiny, 1).generate(["x" * 250], max_tokens=100)
    assert completion.error is None
    assert 0 <= len(completion.tokens) <= 6


@pytest.mark.parametrize(
    "options", [{"n_seq_max": 0}, {"n_seq_max": 257}, {"n_batch": 0}, {"n_ubatch": 0}, {"n_threads": -1}]
)
def test_bad_parameters(options: dict[str, int], tiny: Path) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        Decoder(tiny, **options)  # type: ignore[arg-type]


# --- out of turn


def test_use_after_close(tiny: Path, make: Open) -> None:
    decoder = make(tiny)
    pid = decoder.pid
    decoder.close()
    decoder.close()
    assert decoder.pid is None
    assert not psutil.pid_exists(pid or 0)
    batch = Batch.of([[1]])
    for work in (
        lambda: decoder.decode(batch),
        lambda: decoder.encode(batch),
        lambda: decoder.tokenize("a"),
        lambda: list(decoder.generate(["a"])),
    ):
        with pytest.raises(UsageError, match="closed"):
            work()


def test_a_second_call_inside_a_running_generate(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 2)
    whole = list(decoder.generate(PROMPTS, max_tokens=8))
    running = decoder.generate(PROMPTS, max_tokens=8)
    first = next(running)
    with pytest.raises(UsageError, match="still running"):
        decoder.decode(Batch.of([[1]]))
    assert [first, *running] == whole
    abandoned = decoder.generate(PROMPTS, max_tokens=8)
    next(abandoned)
    abandoned.close()  # type: ignore[attr-defined]
    assert list(decoder.generate(PROMPTS, max_tokens=8)) == whole


def test_use_in_a_forked_child(tiny: Path, make: Open) -> None:
    decoder = make(tiny)
    child = os.fork()
    if child == 0:
        try:
            decoder.decode(Batch.of([[1]]))
        except UsageError:
            decoder.close()
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    result = decoder.decode(Batch.of([[1]]))
    assert (result.rung(0), result.reports) == (Rung.NATIVE, [])


FORK = """
import os, sys
from crumplezone import Batch, Decoder
if __name__ == "__main__":
    with Decoder(sys.argv[1], n_ctx=256, n_seq_max=1, n_threads=1, reports=sys.argv[2]) as decoder:
        child = os.fork()
        if child == 0:
            sys.exit(0)  # runs every finalizer
        os.waitpid(child, 0)
        print(decoder.decode(Batch.of([[1]])).rung(0))
"""


def test_a_forked_child_that_exits_normally_leaves_the_cell_alone(tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORK, str(tiny), str(tmp_path / "reports")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["native"]


@pytest.mark.parametrize(
    "error",
    [
        InputError("tokens[3]", 7, "must be smaller"),
        ModelError("m.gguf", "is bad", "/r/1"),
        CellDied("cell 5 crashed", object()),
        CellRefused("ValueError", "no"),
        SequenceError(3, "crashed", "/r/2"),
        BatchError("crashed", "/r/3"),
        UsageError("closed"),
        ReportError("gone"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_pickle(error: CrumplezoneError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    expected = error.__dict__ | ({"incident": None} if isinstance(error, CellDied) else {})
    assert again.__dict__ == expected
