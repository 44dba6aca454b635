"""`Decoder` in real cells: results are right, and what it cannot do is refused by name."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

from crumplezone import Batch, Decoder, Rung, SafeBatchProcessor
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
from crumplezone.reports.records.report import Exit, Held
from crumplezone.reports.store.store import Store
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.workers.cells.decode_client import DecodeClient
from crumplezone.workers.model.limits import Limits
from crumplezone.workers.model.settings import configure
from tests.support.ctypes_batches import foreign, point
from tests.support.decoders import Open, assert_equal_logits, fork, held, kill, reports_of, say, sequences
from tests.support.models.tiny_gguf import write_block_count_zero, write_tiny_llama, write_truncated

# --- results


def test_native_equals_one_sequence_at_a_time(smollm: Path, make: Open, store: Store) -> None:
    native = make(smollm, 16)
    with SafeBatchProcessor(smollm, n_ctx=256, n_threads=1, reports=store.directory) as safe:
        for n_tokens, n_seq in [(1, 1), (10, 1), (10, 3), (512, 16)]:
            batch = Batch.of(sequences(n_tokens, n_seq, native.info.n_vocab))
            native.memory.clear()
            result, reference = native.decode(batch), safe.decode(batch)
            assert_equal_logits(result, reference)
            assert {result.rung(i) for i in result.seq_ids} == {Rung.NATIVE}
            assert {reference.rung(i) for i in reference.seq_ids} == {Rung.SAFE}
    assert store.rows() == []


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


def test_a_pooling_model_still_gives_a_row_per_token(tmp_path: Path, make: Open) -> None:
    model = tmp_path / "pooling.gguf"
    write_tiny_llama(model, n_vocab=128, overrides={"llama.pooling_type": 1})
    result = make(model, 2).encode(Batch.of([[5, 6, 7], [8, 9]]))
    assert result.errors == {}
    assert not np.allclose(result.embeddings(0, 0), result.embeddings(0, 2))


def test_a_ctypes_batch_is_a_batch(tiny: Path, make: Open) -> None:
    sequences = ([4, 5, 6], [7, 8])
    decoder, other = make(tiny), make(tiny)
    given, owner = Batch.of(sequences), foreign(*sequences)
    assert_equal_logits(decoder.decode(owner), other.decode(given))
    point(owner.batch, "pos", 0)  # NULL: where each sequence goes on
    assert_equal_logits(decoder.decode(owner.batch), other.decode(given))
    assert held(decoder) == held(other) == [(0, 5), (0, 3), (-1, -1), (-1, -1)]
    for wrong, field in ((foreign([4, 128]), r"tokens\[1\] is 128"), (foreign([4]), r"positions\[0\] is 0")):
        with pytest.raises(InputError, match=field):
            decoder.decode(wrong.batch)
    with pytest.raises(InputError, match="must be a llama_batch"):
        decoder.decode([1, 2, 3])


def test_nulls_that_are_sent_as_they_are(tiny: Path, make: Open, store: Store) -> None:
    decoder, other = make(tiny), make(tiny)
    for each in (decoder, other):
        say(each, 0, 4, 5)
    owner = foreign([0, 0, 6, 7])
    owner.arrays["token"][:2] = 8, 9
    owner.arrays["pos"] += 2
    owner.arrays["seq_id"][1] = 0
    with pytest.raises(InputError, match=r"seq_id\[1\] is 'NULL'"):
        decoder.decode(owner.batch)
    result = decoder.decode(owner.batch, level="off")
    (report,) = reports_of(decoder, store)
    assert report.evidence.exit == Exit.SIGNAL
    assert report.batch is not None
    assert (report.batch.nulls, report.batch.held) == (["seq_id[1]"], [Held(0, [4, 5], [0, 1])])
    assert (result.rung(0), result.errors) == (Rung.SAFE, {})
    np.testing.assert_allclose(result.logits(0), say(other, 0, 8, 9, 6, 7), rtol=1e-3, atol=1e-3)
    assert held(decoder) == held(other)
    np.testing.assert_allclose(say(decoder, 0, 20), say(other, 0, 20), rtol=1e-3, atol=1e-3)


def test_a_token_of_no_sequence_is_in_no_memory(tiny: Path, make: Open) -> None:
    """A context of one sequence takes it, if asked to, and a new cell need not have it."""
    decoder, other = make(tiny, 1), make(tiny, 1)
    owner = foreign([4, 9, 5])
    owner.arrays["n_seq_id"][1] = 0
    owner.arrays["pos"][:] = 0, 1, 1
    assert decoder.decode(owner, level="native").rung(0) == Rung.NATIVE
    say(other, 0, 4, 5)
    kill(decoder)
    np.testing.assert_allclose(say(decoder, 0, 20), say(other, 0, 20), rtol=1e-3, atol=1e-3)


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
        r"tokens\[1\] is 128": Batch.of([[1, 128]]),
        r"tokens\[1\] is -5": Batch.of([[1], [-5]]),
        r"seq_ids\[0\] is 5": high,
        r"seq_ids\[2\] is 2": Batch.of([[1]] * 3),
        "context holds 256": Batch.of([[1] * 257]),
        "add at least one token": Batch(4),
    }
    for message, batch in bad.items():
        for work in (decoder.decode, decoder.encode):
            with pytest.raises(InputError, match=message):
                work(batch)
    assert decoder.decode(Batch.of([[1] * 256, [2]])).rung(0) == Rung.NATIVE
    assert decoder.pid == pid
    assert store.rows() == []


@pytest.mark.parametrize(
    "options", [{"n_seq_max": -1}, {"n_seq_max": 257}, {"n_batch": 0}, {"n_ubatch": 0}, {"n_threads": -1}]
)
def test_bad_parameters(options: dict[str, int], tiny: Path) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        Decoder(tiny, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"n_ctx": -1},
        {"n_ctx": 2**31},
        {"n_batch": 0},
        {"n_batch": 64.0},
        {"n_threads": 513},
        {"deadline": 0},
        {"deadline": float("nan")},
    ],
)
def test_a_safe_processor_checks_as_a_decoder_does(options: dict[str, float], tiny: Path) -> None:
    with pytest.raises(InputError) as decoder:
        Decoder(tiny, n_seq_max=1, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError) as safe:
        SafeBatchProcessor(tiny, **options)  # type: ignore[arg-type]
    assert str(safe.value) == str(decoder.value)
    assert safe.value.field == next(iter(options))


def test_fewer_tokens_per_call_than_sequences(tiny: Path, make: Open, store: Store) -> None:
    with pytest.raises(InputError, match=r"n_batch is 3: must be from 4 to .* \(one token for each of 4"):
        make(tiny, 4, n_batch=3)
    assert make(tiny, 4, n_batch=4, n_ubatch=1).decode(Batch.of([[1]] * 4)).errors == {}
    assert store.rows() == []
    config = configure(tiny, n_ctx=1024, n_batch=4, n_seq_max=4, n_threads=1)
    refused = DecodeClient(msgspec.structs.replace(config, n_batch=3), Limits(30, None), reporter=None)
    with contextlib.closing(refused), pytest.raises(CellDied) as died:
        refused.start()
    assertion = Incident.of(died.value).evidence.result().assertion
    assert assertion is not None
    assert "n_outputs_max <= cparams.n_outputs_max" in assertion.text


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


def test_close_waits_for_the_call_of_another_thread(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 4)
    batch = Batch.of([[5] * 60] * 4)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(decoder.decode, batch) for _ in range(4)]
        jobs[0].result()
        decoder.close()
        for job in jobs:
            assert isinstance(job.exception(), UsageError | None)


def test_threads_do_not_interleave(tiny: Path, make: Open) -> None:
    decoder, other = make(tiny), make(tiny)

    def talk(seq_id: int) -> list[np.ndarray]:
        rows = []
        for step in range(20):
            rows.append(say(decoder, seq_id, 10 * seq_id + step % 10))
            if step % 5 == 4:
                decoder.memory.remove(seq_id, decoder.memory.pos_max(seq_id) - 1)
        return rows

    with ThreadPoolExecutor(4) as pool:
        spoken = list(pool.map(talk, range(4)))
    decoder = other
    for seq_id in range(4):
        np.testing.assert_allclose(spoken[seq_id], talk(seq_id), rtol=1e-3, atol=1e-3)


def test_use_in_a_forked_child(tiny: Path, make: Open) -> None:
    decoder = make(tiny)
    child = fork()
    if child == 0:
        try:
            decoder.decode(Batch.of([[1]]))
        except UsageError:
            with contextlib.suppress(UsageError):
                decoder.memory.clear()
                os._exit(2)
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
from tests.support.decoders import fork
if __name__ == "__main__":
    with Decoder(sys.argv[1], n_ctx=256, n_seq_max=1, n_threads=1, reports=sys.argv[2]) as decoder:
        child = fork()
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
