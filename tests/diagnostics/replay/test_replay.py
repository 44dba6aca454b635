"""Recorded crashes, asked again; and whose fault they then are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from crumplezone import Batch, Decoder
from crumplezone.diagnostics.replay.minimise import minimise
from crumplezone.diagnostics.replay.recipe import read_recipe
from crumplezone.diagnostics.replay.replay import find_model, replay
from crumplezone.diagnostics.replay.script import check, script
from crumplezone.errors import CrumplezoneError, InputError, ModelError, UsageError
from crumplezone.reports.analysis.verdict import from_ladder, verdict_after
from crumplezone.reports.records.report import (
    BatchRecord,
    Evidence,
    Exit,
    Generating,
    Held,
    LadderStep,
    Outcome,
    Replay,
    Verdict,
    VerdictKind,
)
from crumplezone.reports.store.store import Store
from tests.support.decoders import CONTEXT, Dose, Record, batch_of, read_all, report_of
from tests.support.models.tiny_gguf import write_block_count_zero, write_tiny_llama
from tests.support.native.decode_poison import Poison

# --- crashes of real decoders


def test_a_loader_that_dies(tmp_path: Path, store: Store) -> None:
    model = write_block_count_zero(tmp_path / "bad.gguf")
    with pytest.raises(ModelError):
        Decoder(model, n_threads=1, reports=store.directory)
    (report,) = read_all(store)
    assert report.batch is None
    assert replay(report, 2).replay.same == 2
    assert check(script(report), report).same
    with pytest.raises(UsageError, match="no batch to minimise"):
        minimise(report)
    healed = write_tiny_llama(tmp_path / "good.gguf")
    again = replay(report, 2, healed)
    assert (again.replay.crashed, again.verdict and again.verdict.kind) == (0, VerdictKind.FLAKY)
    assert "the model is another" in again.notes[0]
    assert len(read_all(store)) == 1


def test_every_rung_records_what_it_was_given(tiny: Path, record: Record, dose: Dose) -> None:
    dose(Poison(token=99))
    batch = Batch.of([[4, 5], [6, 99, 7]])
    written = record(tiny, lambda decoder: decoder.decode(batch, embeddings=True), n_batch=2048)
    assert [report.rung for report in written] == ["native", "safe", "token"]
    assert [report.batch and report.batch.chunk for report in written] == [0, 1024, 1]
    # The sequences before were decoded: the safe rungs append to the same memory.
    assert [report.batch and report.batch.held for report in written[1:]] == [[Held(0, [4, 5], [0, 1])]] * 2
    assert [report.batch and report.batch.embeddings for report in written[1:]] == [True, True]
    for report in written:
        replayed = replay(report, 1)
        assert replayed.replay.same == 1
        assert replayed.verdict is not None
        assert replayed.verdict.kind == VerdictKind.INPUT


def test_a_crash_that_happened_once_is_flaky(tiny: Path, record: Record, dose: Dose, tmp_path: Path) -> None:
    dose(Poison(once=str(tmp_path / "once")))
    (report,) = record(tiny, lambda decoder: decoder.decode(Batch.of([[4, 5], [6]])))
    assert (from_ladder(report) or Verdict(VerdictKind.INPUT, "")).kind == VerdictKind.BATCH_ONLY
    replayed = replay(report, 2)
    assert [run.outcome for run in replayed.runs] == [Outcome.OK, Outcome.OK]
    assert replayed.verdict == Verdict(VerdictKind.FLAKY, "passed 2 of 2 when repeated")
    with pytest.raises(CrumplezoneError, match=r"0 of 10 runs showed it \('passed'\)"):
        minimise(report)


# --- models


def test_a_model_that_has_moved(tiny: Path, tmp_path: Path, record: Record) -> None:
    old, new = tmp_path / "old.gguf", tmp_path / "new.gguf"
    old.write_bytes(tiny.read_bytes())
    (report,) = record(old, lambda decoder: decoder.encode(Batch.of([[4]])))
    old.rename(new)
    for ask in (replay, minimise):
        with pytest.raises(ModelError, match=r"old\.gguf: cannot be read .*--model PATH"):
            ask(report)
    moved = replay(report, 1, new)
    assert (moved.replay.same, moved.notes) == (1, [])
    with pytest.raises(ModelError, match=r"nowhere\.gguf: cannot be read") as caught:
        replay(report, 1, tmp_path / "nowhere.gguf")
    assert "--model" not in str(caught.value)
    other = write_tiny_llama(new, n_vocab=128, seed=1)
    assert "the model is another" in replay(report, 1, other).notes[0]


@pytest.mark.parametrize("path", ["", "\0", "x" * 5000, "\udc80", "/dev/zero", "/proc/self/mem", "/"])
def test_hostile_model_paths(path: str) -> None:
    with pytest.raises(ModelError, match="--model PATH"):
        find_model(report_of(batch_of([4]), path), None)


# --- untrusted reports


def test_reports_that_cannot_be_asked_again(tiny: Path) -> None:
    reports = {
        "redacted": report_of(batch_of([4]), str(tiny), redacted=True),
        "not decoding": report_of(None, str(tiny)),
        "only counts towards 'y'": report_of(None, str(tiny), same_as="y"),
        "without 7 tokens of its middle": report_of(replace(batch_of([4]), cut=7), str(tiny)),
        "vectors instead of tokens": report_of(replace(batch_of([4]), n_embd=32), str(tiny)),
        "copies, shifts or saved states": report_of(replace(batch_of([4]), held_more=True), str(tiny)),
    }
    for why, report in reports.items():
        for ask in (replay, minimise, script):
            with pytest.raises(UsageError, match=why):
                ask(report)


GENERATING = BatchRecord([], [], [], [], "generate", 8, generating=[Generating(0, [1], 4)])


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("context.n_ctx", {"context": CONTEXT | {"n_ctx": 2**31}}),
        ("context.n_batch", {"context": CONTEXT | {"n_batch": -1}}),
        ("context.n_ubatch", {"context": CONTEXT | {"n_ubatch": 64.0}}),
        ("context.n_seq_max", {"context": CONTEXT | {"n_seq_max": 257}}),
        ("context.n_threads", {"context": CONTEXT | {"n_threads": "2"}}),
        ("context.n_gpu_layers", {"context": CONTEXT | {"n_gpu_layers": None}}),
        ("context.kv_unified", {"context": CONTEXT | {"kv_unified": 0}}),
        ("context.type_k", {"context": CONTEXT | {"type_k": "q2_k"}}),
        ("context.flash_attn", {"context": CONTEXT | {"flash_attn": True}}),
        ("context.n_ctx", {"context": {}}),
        ("batch.operation", {"batch": replace(batch_of([4]), operation="rm -rf")}),
        ("len(batch.tokens)", {"batch": batch_of()}),
        ("len(batch.tokens)", {"batch": batch_of([0] * (2**20 + 1))}),
        ("len(batch.positions)", {"batch": replace(batch_of([4, 5]), positions=[0])}),
        ("len(batch.seq_ids)", {"batch": replace(batch_of([4, 5]), seq_ids=[0, 0, 0])}),
        ("len(batch.outputs)", {"batch": replace(batch_of([4, 5]), outputs=[])}),
        ("batch.tokens[1]", {"batch": replace(batch_of([4, 5]), tokens=[4, 2**31])}),
        ("batch.positions[0]", {"batch": replace(batch_of([4, 5]), positions=[-(2**31) - 1, 0])}),
        ("batch.seq_ids[1]", {"batch": replace(batch_of([4, 5]), seq_ids=[0, 10**30])}),
        ("batch.chunk", {"batch": replace(batch_of([4, 5]), chunk=-1)}),
        ("batch.chunk", {"batch": replace(GENERATING, chunk=0)}),
        ("batch.shared", {"batch": replace(batch_of([4, 5]), shared={"2": [1]})}),
        ("batch.shared", {"batch": replace(batch_of([4, 5]), shared={"01": [1]})}),
        ("batch.shared", {"batch": replace(batch_of([4, 5]), shared={"9" * 5000: [1]})}),
        ("batch.shared[1][0]", {"batch": replace(batch_of([4, 5]), shared={"1": [2**31]})}),
        ("len(batch.shared[0])", {"batch": replace(batch_of([4, 5]), shared={"0": [1] * 257})}),
        ("batch.nulls", {"batch": replace(batch_of([4, 5]), nulls=["token"])}),
        ("batch.nulls", {"batch": replace(batch_of([4, 5]), nulls=["seq_id[2]"])}),
        ("batch.nulls", {"batch": replace(batch_of([4, 5]), nulls=["pos\nimport os"])}),
        ("len(batch.nulls)", {"batch": replace(GENERATING, nulls=["pos\nimport os"])}),
        ("len(batch.nulls)", {"batch": replace(batch_of([4]), operation="process", nulls=["pos"])}),
        ("len(batch.held)", {"batch": replace(batch_of([4]), held=[Held(0, [4], [0])] * 257)}),
        ("len(batch.held)", {"batch": replace(batch_of([4]), operation="encode", held=[Held(0, [4], [0])])}),
        ("len(batch.held[0].tokens)", {"batch": replace(batch_of([4]), held=[Held(0, [], [])])}),
        ("len(batch.held[0].positions)", {"batch": replace(batch_of([4]), held=[Held(0, [4], [])])}),
        ("batch.held[0].positions[0]", {"batch": replace(batch_of([4]), held=[Held(0, [4], [2**31])])}),
        ("batch.held[0].seq_id", {"batch": replace(batch_of([4]), held=[Held(2**40, [4], [0])])}),
        ("len(batch.generating)", {"batch": replace(GENERATING, generating=[])}),
        (
            "len(batch.generating[0].tokens)",
            {"batch": replace(GENERATING, generating=[Generating(0, [], 4)])},
        ),
        (
            "batch.generating[0].tokens[0]",
            {"batch": replace(GENERATING, generating=[Generating(0, [2**31], 4)])},
        ),
        (
            "batch.generating[1].seq_id",
            {"batch": replace(GENERATING, generating=[Generating(0, [1], 4)] * 2)},
        ),
        (
            "batch.generating[0].max_tokens",
            {"batch": replace(GENERATING, generating=[Generating(0, [1], 2**40)])},
        ),
        (
            "batch.generating[0].temperature",
            {"batch": replace(GENERATING, generating=[Generating(0, [1], 4, float("nan"))])},
        ),
        (
            "batch.generating[0].seed",
            {"batch": replace(GENERATING, generating=[Generating(0, [1], 4, seed=-1)])},
        ),
    ],
)
def test_numbers_out_of_bounds_are_named(field: str, change: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        read_recipe(replace(report_of(batch_of([4])), **change))
    assert caught.value.field == field


def test_tokens_that_the_model_does_not_have_are_sent_all_the_same(tiny: Path) -> None:
    odd = BatchRecord([10**6, -5], [-7, 2**31 - 1], [0, 200], [True, False])
    replayed = replay(report_of(odd, str(tiny)), 1)
    assert [(run.outcome, run.detail) for run in replayed.runs] == [
        (Outcome.REFUSED, "llama.cpp calls the batch invalid (rc -1)")
    ]
    assert replayed.verdict is None


numbers = st.one_of(st.integers(-3, 300), st.integers(), st.sampled_from([2**31 - 1, 2**31, -(2**31)]))


@settings(max_examples=60)
@given(
    columns=st.lists(st.tuples(numbers, numbers, numbers, st.booleans()), max_size=4),
    drop=st.integers(0, 3),
    context=st.fixed_dictionaries({name: numbers | st.just(4) for name in CONTEXT}),
    chunk=numbers,
)
def test_what_is_read_can_be_sent(
    columns: list[tuple[int, int, int, bool]], drop: int, context: dict[str, int], chunk: int
) -> None:
    lists = [list(column) for column in zip(*columns, strict=True)] or [[], [], [], []]
    if drop:
        lists[drop] = lists[drop][1:]
    batch = replace(BatchRecord(*lists), chunk=chunk)  # type: ignore[arg-type]
    try:
        recipe = read_recipe(report_of(batch, context=context | {"kv_unified": False}))
    except InputError:
        return
    assert recipe.batch is not None
    assert len(set(map(len, lists))) == 1
    assert all(-(2**31) <= n < 2**31 for part in lists for n in part)
    assert 0 < recipe.config.n_ctx <= 2**24
    assert 0 <= chunk <= 2**20


# --- verdicts


def ladder(*steps: tuple[str, Outcome, list[int]]) -> list[LadderStep]:
    return [LadderStep(rung, outcome, sequences) for rung, outcome, sequences in steps]


CURED = ladder(("native", Outcome.CRASHED, [0, 1]), ("safe", Outcome.OK, [0]), ("token", Outcome.OK, [1]))


ALONE = ladder(
    ("native", Outcome.CRASHED, [0, 1]),
    ("safe", Outcome.OK, [0]),
    ("safe", Outcome.CRASHED, [1]),
    ("token", Outcome.CRASHED, [1]),
)


REFUSED = ladder(
    ("native", Outcome.CRASHED, [0]), ("safe", Outcome.REFUSED, [0]), ("token", Outcome.REFUSED, [0])
)


@pytest.mark.parametrize(
    ("steps", "blamed", "exit_kind", "kind"),
    [
        (CURED, [], Exit.SIGNAL, VerdictKind.BATCH_ONLY),
        (CURED, [], Exit.HANG, VerdictKind.BATCH_ONLY),
        (CURED, [], Exit.KILLED, VerdictKind.ENVIRONMENT),
        (ALONE, [1], Exit.ABORT, VerdictKind.INPUT),
        (ALONE, [1], Exit.OOM, VerdictKind.ENVIRONMENT),
        ([], [], Exit.FAILED_START, VerdictKind.ENVIRONMENT),
        (REFUSED, [0], Exit.SIGNAL, None),  # failed, but was not seen to crash alone
        (CURED[:2], [], Exit.SIGNAL, None),  # given up half way
        (CURED[:1], [], Exit.SIGNAL, None),
        ([], [], Exit.SIGNAL, None),
    ],
)
def test_verdict_of_the_ladder(
    steps: list[LadderStep], blamed: list[int], exit_kind: Exit, kind: VerdictKind | None
) -> None:
    report = report_of(None, ladder=steps, blamed=blamed, evidence=Evidence(exit_kind, 1))
    verdict = from_ladder(report)
    assert (verdict and verdict.kind) == kind
    assert verdict_after(report, Replay("", 3, 3, 0)) == verdict
    passed = verdict_after(report, Replay("", 3, 0, 0))
    assert passed is not None
    assert passed.kind == (kind if kind == VerdictKind.ENVIRONMENT else VerdictKind.FLAKY)
    assert verdict_after(report, Replay("", 3, 0, 0, refused=1)) == verdict  # a refusal is no pass
