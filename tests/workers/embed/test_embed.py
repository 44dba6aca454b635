"""Embeddings: every text gets the vector that it gets alone, and one that crashes fails alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crumplezone import Batch
from crumplezone.diagnostics.replay.minimise import minimise
from crumplezone.diagnostics.replay.replay import replay
from crumplezone.diagnostics.replay.script import check, script
from crumplezone.errors import InputError, ModelError, SequenceError, UsageError
from crumplezone.reports.records.report import Exit, Outcome, Report, VerdictKind
from crumplezone.reports.store.store import Store
from crumplezone.sandbox.cells.cell import CellSpec
from crumplezone.sandbox.cells.zygote import Zygote
from crumplezone.workers.cells.targets import SEEDS
from crumplezone.workers.embed.embedder import Embedder, Embeddings
from crumplezone.workers.embed.packing import plan
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.model.limits import Limits
from crumplezone.workers.model.settings import configure
from crumplezone.workers.protocol.config import CellConfig
from tests.support.decoders import CONTEXT, Open, Plant, batch_of, read_all, report_of
from tests.support.models.tiny_bert import write_tiny_bert, write_tiny_t5
from tests.support.models.tiny_gguf import write_tiny_llama, write_tiny_mamba
from tests.support.native import embed_poison
from tests.support.native.embed_poison import Poison

Make = Callable[..., Embedder]
Dose = Callable[..., None]

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "others"]
TEXTS = [" ".join(WORDS[i % 5 : i % 5 + 1 + i % 7]) for i in range(64)]
FEW = ["abc", "fox", "a dog", "some text", "cat"]
Z = 29  # the token of "z" in the tiny models: <unk>, <s>, </s> and the word mark come first


@pytest.fixture
def reporter(store: Store) -> Iterator[Reporter]:
    with closing(Reporter(store.directory)) as reporter:
        yield reporter


@pytest.fixture
def make_embedder(reporter: Reporter) -> Iterator[Make]:
    made: list[Embedder] = []

    def one(model: Path, *, deadline: float = 60.0, **options: Any) -> Embedder:
        config = configure(model, **{"n_ctx": 4096, "n_batch": 1024, "n_threads": 1} | options)
        made.append(Embedder(config, Limits(deadline, None), reporter))
        return made[-1]

    yield one
    for embedder in made:
        embedder.close()


@pytest.fixture
def dose(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> Dose:
    """Make every embedding cell that starts from now on a poisoned one."""

    def give(how: str, **when: Any) -> None:
        plant("embed", embed_poison.TARGET)
        monkeypatch.setenv(embed_poison.VARIABLE, msgspec.json.encode(Poison(how, **when)).decode())

    return give


def embed(embedder: Embedder, texts: list[str], pooling: str | None = None) -> Embeddings:
    return embedder.embed(texts, pooling=pooling, normalize=False)


def alone(embedder: Embedder, texts: list[str], pooling: str | None = None) -> Any:
    return np.concatenate([embed(embedder, [text], pooling).vectors for text in texts])


# --- vectors


def test_vectors_are_those_of_the_original(smollm: Path, make_embedder: Make) -> None:
    texts = [*TEXTS[:8], "A long text. " * 10, "no <|im_end|> token"]
    code = (
        "import json, sys, llama_cpp;"
        "llama = llama_cpp.Llama(sys.argv[1], embedding=True, pooling_type=1, n_ctx=512, verbose=False);"
        "print(json.dumps([llama.embed(text, normalize=True) for text in json.load(sys.stdin)]))"
    )
    command = [sys.executable, "-c", code, str(smollm)]
    done = subprocess.run(
        command, input=json.dumps(texts).encode(), check=True, capture_output=True, timeout=110
    )
    original = np.array(json.loads(done.stdout), np.float32)
    vectors = make_embedder(smollm).embed(texts, pooling=None, normalize=True).vectors
    assert vectors.shape == original.shape == (len(texts), 576)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert (vectors * original).sum(axis=1).min() > 0.999
    assert (vectors @ original.T).argmax(axis=1).tolist() == list(range(len(texts)))


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_text_among_many_is_what_it_is_alone(tiny: Path, make_embedder: Make, pooling: str) -> None:
    embedder = make_embedder(tiny)
    together = embed(embedder, TEXTS, pooling)
    assert len(together) == 64
    np.testing.assert_allclose(together.vectors, alone(embedder, TEXTS, pooling), rtol=1e-4, atol=1e-5)


def test_vectors_are_pooled_over_the_whole_text(tiny: Path, make_embedder: Make, make: Open) -> None:
    """At and beyond the 512 tokens of a usual compute pass: pooled by us, of the rows of each token."""
    embedder, decoder = make_embedder(tiny), make(tiny, 1, 1024, n_ubatch=1024)
    texts = [("some words and more " * 52)[:n] for n in (1, 510, 511, 512, 1023)]
    vectors = {pooling: embed(embedder, texts, pooling) for pooling in ("mean", "cls", "last")}
    for i, text in enumerate(texts):
        tokens = decoder.tokenize(text)
        assert len(tokens) == len(text) + 1
        result = decoder.encode(Batch.of([tokens]))
        rows = np.stack([result.embeddings(0, position) for position in range(len(tokens))])
        pooled = {"mean": rows.mean(axis=0), "cls": rows[0], "last": rows[-1]}
        for pooling, expected in pooled.items():
            np.testing.assert_allclose(vectors[pooling].vector(i), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("own", ["mean", "cls", "last"])
def test_an_encoder_has_a_pooling_of_its_own(tmp_path: Path, make_embedder: Make, own: str) -> None:
    embedder = make_embedder(write_tiny_bert(tmp_path / "bert.gguf", pooling=own))
    vectors = embed(embedder, [*FEW, ""]).vectors  # of an empty text, the tokens around it
    np.testing.assert_array_equal(vectors, embed(embedder, [*FEW, ""], own).vectors)
    np.testing.assert_allclose(vectors, alone(embedder, [*FEW, ""]), atol=1e-2)
    others = {"mean", "cls", "last"} - {own}
    assert not any(np.allclose(vectors, embed(embedder, [*FEW, ""], other).vectors) for other in others)
    with pytest.raises(InputError, match=r"number of tokens of texts\[1\] is 65: must be from 1 to 64"):
        embed(embedder, ["a", "a" * 64])


def test_a_recurrent_model(tmp_path: Path, make_embedder: Make) -> None:
    embedder = make_embedder(write_tiny_mamba(tmp_path / "mamba.gguf"))
    np.testing.assert_allclose(embed(embedder, FEW).vectors, alone(embedder, FEW), rtol=1e-4, atol=1e-5)


def test_models_without_vectors_for_texts(tmp_path: Path, make_embedder: Make) -> None:
    reranker = make_embedder(write_tiny_llama(tmp_path / "rank.gguf", overrides={"llama.pooling_type": 4}))
    for pooling in (None, "rank"):
        with pytest.raises(InputError, match="scores pairs of texts"):
            embed(reranker, FEW, pooling)
    assert len(embed(reranker, FEW, "last")) == 5
    with pytest.raises(InputError, match=r"Decoder\.encode"):
        embed(make_embedder(write_tiny_t5(tmp_path / "t5.gguf")), FEW)


def test_what_is_no_text(tiny: Path, tmp_path: Path, make_embedder: Make) -> None:
    embedder = make_embedder(tiny)
    for texts, problem in [
        ("abc", "texts is 'abc'"),
        (b"abc", "texts is b'abc'"),
        (5, "texts is 5: must be a list of texts, or another iterable"),
        (["a", 5], r"texts\[1\] is 5: must be a str"),
        (["a", "b" * 1024], r"number of tokens of texts\[1\] is 1025: must be from 1 to 1024"),
        (["a", "b" * (2**24 + 1)], r"bytes of texts\[1\] is 16777217"),
    ]:
        with pytest.raises(InputError, match=problem):
            embed(embedder, texts)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="pooling is 'max': must be 'mean', 'cls', 'last'"):
        embed(embedder, FEW, "max")
    assert embed(embedder, []).vectors.shape == (0, 32)
    found = embed(embedder, ["a", "\N{SNOWMAN}\udc80"])
    for index in (2, -1, "a"):
        with pytest.raises(InputError, match="index"):
            found.vector(index)  # type: ignore[arg-type]
    wordless = write_tiny_llama(tmp_path / "x.gguf", overrides={"tokenizer.ggml.add_bos_token": False})
    with pytest.raises(InputError, match=r"number of tokens of texts\[1\] is 0"):
        embed(make_embedder(wordless), ["a", ""])


def test_cells_come_and_go(tiny: Path, make_embedder: Make) -> None:
    embedder = make_embedder(tiny)
    before = embed(embedder, FEW).vectors
    first = embedder.pid
    assert first
    os.kill(first, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(first)] if psutil.pid_exists(first) else [], timeout=5)
    after = embed(embedder, FEW)
    np.testing.assert_array_equal(after.vectors, before)
    assert after.errors == {}
    assert embedder.pid != first
    embedder.close()
    assert embedder.pid is None
    with pytest.raises(UsageError, match="closed"):
        embed(embedder, FEW)


def test_cells_are_forked(tiny: Path, reporter: Reporter, dose: Dose) -> None:
    config = configure(tiny, n_ctx=1024, n_batch=512, n_threads=1)
    dose("segv", token=Z)
    with closing(Zygote(CellSpec(SEEDS["context"], config), lambda _: None)) as zygote:
        forked = Embedder(config, Limits(60, None), reporter, zygote=zygote, spares=1)
        with closing(forked):
            before = embed(forked, FEW).vectors
            assert psutil.Process(forked.pid).ppid() == zygote.pid
            assert list(embed(forked, [*FEW, "xyz"]).errors) == [5]
            np.testing.assert_array_equal(embed(forked, FEW).vectors, before)
            assert forked._client.wait_for_spares(30)
            assert [psutil.Process(pid).ppid() for pid in forked.spare_pids] == [zygote.pid]


# --- which texts go together

SIZES = st.lists(st.integers(1, 2048), max_size=60)


@settings(max_examples=60)
@given(SIZES, st.integers(1, 2**14), st.integers(1, 2048), st.booleans())
def test_every_text_is_in_one_call_that_has_room_for_it(
    drawn: list[int], n_ctx: int, n_batch: int, cached: bool
) -> None:
    given = CellConfig("m", n_ctx, n_batch, 512, 1, 1)
    sizes = {3 * i: min(size, n_batch, n_ctx) for i, size in enumerate(drawn)}
    calls = list(plan(sizes, given, cached=cached, pooling="mean"))
    assert sorted(i for _, call in calls for i in call) == sorted(sizes)
    for config, call in calls:
        lengths = [sizes[i] for i in call]
        assert 1 <= len(call) <= config.n_seq_max <= min(256, config.n_batch)
        assert sum(lengths) <= config.n_batch == config.n_ubatch <= n_batch
        assert config.n_batch % config.n_seq_max == 0  # else llama.cpp aborts where it pools
        assert max(lengths) <= config.n_ctx // config.n_seq_max
        assert not cached or len(set(lengths)) == 1
        assert not cached or config.n_ctx <= max(n_ctx, 2 * max(256, *lengths))


# --- crashes


@pytest.mark.parametrize("how", ["segv", "nan", "compute", "slot", "tokenizer"])
def test_a_text_that_fails_fails_alone(
    tiny: Path, make_embedder: Make, store: Store, reporter: Reporter, dose: Dose, how: str
) -> None:
    expected = embed(make_embedder(tiny), FEW).vectors
    dose(how, token=Z)
    found = embed(make_embedder(tiny), [*FEW[:2], "xyz", *FEW[2:]])
    assert list(found.errors) == [2]
    np.testing.assert_array_equal([found.vector(i) for i in (0, 1, 3, 4, 5)], expected)
    with pytest.raises(SequenceError) as failed:
        _ = found.vectors
    assert failed.value.seq_id == 2
    if how in {"compute", "slot"}:
        assert failed.value.rc == {"compute": -3, "slot": 1}[how]
        assert found.reports == []
        return
    assert failed.value.report in found.reports
    assert Path(str(failed.value.report), "report.json").is_file()
    reporter.flush()
    native, safe = read_all(store)
    assert (native.rung, safe.rung) == ("native", "safe")
    assert safe.blamed == [2]
    assert safe.verdict is not None
    assert safe.verdict.kind is VerdictKind.INPUT
    assert safe.evidence.exit is (Exit.NON_FINITE if how == "nan" else Exit.SIGNAL)
    if how != "tokenizer":
        assert native.batch is not None
        assert native.batch.operation == "embed"
        assert Z in native.batch.tokens
        assert safe.batch is not None
        assert safe.batch.seq_ids == [0] * len("_xyz")
        assert safe.context["pooling"] == "mean"


def test_no_error_names_a_report_that_could_not_be_written(
    tiny: Path, make_embedder: Make, store: Store, dose: Dose
) -> None:
    dose("segv", token=Z)
    store.directory.write_text("in the way")
    (error,) = embed(make_embedder(tiny), [*FEW, "xyz"]).errors.values()
    assert error.report is None
    assert "report" not in str(error)


@pytest.mark.parametrize("how", ["segv", "hang", "too_many", "no_token"])
def test_what_happens_once_costs_no_text(
    tiny: Path, tmp_path: Path, make_embedder: Make, store: Store, reporter: Reporter, dose: Dose, how: str
) -> None:
    expected = embed(make_embedder(tiny), TEXTS).vectors
    dose(how, once=str(tmp_path / "once"))
    found = embed(make_embedder(tiny, deadline=2.0 if how == "hang" else 60.0), TEXTS)
    assert found.errors == {}
    np.testing.assert_allclose(found.vectors, expected, rtol=1e-4, atol=1e-5)
    reporter.flush()
    (report,) = read_all(store)
    exits = {"segv": Exit.SIGNAL, "hang": Exit.HANG}
    assert report.evidence.exit is exits.get(how, Exit.PROTOCOL)
    assert {step.outcome for step in report.ladder[1:]} == {Outcome.OK}


def test_texts_that_crash_only_together(
    tiny: Path, make_embedder: Make, store: Store, reporter: Reporter, dose: Dose
) -> None:
    dose("segv", min_texts=2)
    found = embed(make_embedder(tiny), FEW)  # "abc", "fox" and "cat" are in one call
    assert found.errors == {}
    reporter.flush()
    (report,) = read_all(store)
    assert found.reports == [str(store.path(report.id))]
    assert report.verdict is not None
    assert report.verdict.kind is VerdictKind.BATCH_ONLY
    assert report.ladder[0].sequences == [0, 1, 4]


def test_no_further_cell(tiny: Path, tmp_path: Path, make_embedder: Make, dose: Dose) -> None:
    """What was computed stays, and each text of the rest says why it was not."""
    model = Path(shutil.copy(tiny, tmp_path / "model.gguf"))
    dose("segv", token=Z)
    embedder = make_embedder(model)
    assert len(embed(embedder, FEW)) == 5
    model.unlink()
    found = embed(embedder, ["a", "z" * 9, "b" * 20])
    assert list(found.errors) == [1, 2]
    assert "cannot be read" in str(found.errors[2])
    assert np.isfinite(found.vector(0)).all()
    with pytest.raises(ModelError):
        embed(embedder, FEW)


# --- asked again


@pytest.fixture
def crash(tiny: Path, make_embedder: Make, dose: Dose, store: Store, reporter: Reporter) -> Report:
    dose("segv", token=Z)
    embed(make_embedder(tiny), ["abc", "xyz", "dog"], "last")
    reporter.flush()
    return read_all(store)[0]


def test_a_crash_is_replayed_and_minimised(crash: Report) -> None:
    assert [run.same for run in replay(crash, runs=1).runs] == [True]
    smallest = minimise(crash).report
    assert smallest.batch is not None
    assert smallest.batch.tokens == [Z]
    assert (smallest.context["n_seq_max"], smallest.context["pooling"]) == (1, "last")


def test_a_crash_as_a_script(crash: Report) -> None:
    text = script(crash)
    assert "pooling_type = llama_cpp.LLAMA_POOLING_TYPE_LAST\n" in text
    assert check(text, crash).outcome is Outcome.OK  # the poison was the cell's, not the model's


@pytest.mark.parametrize("pooling", ["rank", "", 1, None])
def test_a_record_that_cannot_be(pooling: Any) -> None:
    batch = msgspec.structs.replace(batch_of([5, 6]), operation="embed", embeddings=True)
    with pytest.raises(InputError, match=r"context\.pooling"):
        replay(report_of(batch, context=CONTEXT | {"pooling": pooling}))
    shared = msgspec.structs.replace(batch, shared={"0": [1]})
    with pytest.raises(InputError, match=r"batch\.shared"):
        replay(report_of(shared, context=CONTEXT | {"pooling": "mean"}))
