"""Crashes recorded by real decoders, asked again: replay, minimise, stand-alone script, verdict."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from crumplezone import Batch, Decoder
from crumplezone.diagnostics.minimise import Minimised, minimise
from crumplezone.diagnostics.replay import find_model, read_recipe, replay
from crumplezone.diagnostics.script import check, script
from crumplezone.errors import CrumplezoneError, InputError, ModelError, UsageError
from crumplezone.reports import schema
from crumplezone.reports.schema import (
    BatchRecord,
    Environment,
    Evidence,
    Exit,
    Fault,
    Frame,
    Generating,
    LadderStep,
    ModelRecord,
    Outcome,
    Replay,
    Report,
    Thread,
    Verdict,
    VerdictKind,
)
from crumplezone.reports.verdict import from_ladder, verdict_after
from crumplezone.workers.runner import Runner
from tests import poison
from tests.poison import Poison
from tests.tiny_gguf import write_block_count_zero, write_tiny_llama

CONTEXT: dict[str, int | float | bool | str | None] = {
    "n_ctx": 512,
    "n_batch": 64,
    "n_ubatch": 64,
    "n_seq_max": 2,
    "n_threads": 1,
    "n_gpu_layers": 0,
    "kv_unified": False,
}
Job = Callable[[Decoder], object]


class EverySecondCell(poison.PoisonCell):
    """Dies in every second call: of a file that each death makes and the next call takes away."""

    def _dies(self, poison: Poison, _: list[Any]) -> bool:
        marker = Path(poison.once)
        if marker.exists():
            marker.unlink()
            return False
        marker.touch()
        return True


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "reports"


@pytest.fixture
def record(store: Path) -> Callable[..., list[Report]]:
    """Let a decoder crash; returns the reports, oldest first."""

    def crash(model: Path, job: Job, **options: Any) -> list[Report]:
        settings = {"n_threads": 1, "n_seq_max": 4, "n_ctx": 1024, "preflight": False} | options
        with Decoder(model, reports=store, **settings) as decoder:
            job(decoder)
        return sorted(read_all(store), key=lambda report: report.crashed_at)

    return crash


def read_all(store: Path) -> list[Report]:
    return [schema.decode(file.read_bytes()) for file in store.glob("*/report.json")]


@pytest.fixture
def dose(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make every llama.cpp cell that starts from now on a poisoned one."""

    def give(dosed: Poison, target: str = poison.TARGET) -> None:
        monkeypatch.setattr(Runner.__init__, "__defaults__", (target,))
        monkeypatch.setenv(poison.VARIABLE, msgspec.json.encode(dosed).decode())

    return give


@pytest.fixture
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, which nothing may be written to."""
    here = tmp_path / "cwd"
    here.mkdir()
    monkeypatch.chdir(here)
    yield here
    assert list(here.iterdir()) == []


def batch_of(*sequences: list[int]) -> BatchRecord:
    return BatchRecord(
        tokens=[token for tokens in sequences for token in tokens],
        positions=[position for tokens in sequences for position in range(len(tokens))],
        seq_ids=[seq_id for seq_id, tokens in enumerate(sequences) for _ in tokens],
        outputs=[position == len(tokens) - 1 for tokens in sequences for position in range(len(tokens))],
    )


def report_of(batch: BatchRecord | None, model: str = "", **fields: Any) -> Report:
    """A report that nobody wrote."""
    evidence = Evidence(Exit.SIGNAL, 1, fault=Fault(11, "SIGSEGV"))
    given: dict[str, Any] = {"evidence": evidence, "context": CONTEXT, "model": ModelRecord(model)}
    return Report(id="x", crashed_at="", batch=batch, **given | fields)


def columns(report: Report) -> tuple[list[int], list[int], list[int], list[bool]]:
    assert report.batch is not None
    return report.batch.tokens, report.batch.positions, report.batch.seq_ids, report.batch.outputs


def plainly(text: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run a script with nothing of ours around it."""
    file = tmp_path / "plain.py"
    file.write_text(text, encoding="ascii")
    env = {"GGML_NO_BACKTRACE": "1", "PATH": os.environ["PATH"]}
    return subprocess.run(
        [sys.executable, str(file)], capture_output=True, text=True, env=env, check=False, timeout=60
    )


# --- llama.cpp's own crashes, from report to script


@pytest.mark.usefixtures("empty_directory")
def test_encode_on_smollm_ends_at_one_token(
    smollm: Path, record: Callable[..., list[Report]], store: Path, tmp_path: Path
) -> None:
    sequences = [list(range(100 + 20 * i, 116 + 20 * i)) for i in range(4)]
    (report,) = record(smollm, lambda decoder: decoder.encode(Batch.of(sequences)))

    replayed = replay(report, 2)
    assert (replayed.replay.runs, replayed.replay.crashed, replayed.replay.same) == (2, 2, 2)
    assert replayed.replay.versions["llama.cpp"] == report.environment.versions["llama.cpp"]
    assert replayed.verdict is not None
    assert replayed.verdict.kind == VerdictKind.BATCH_ONLY
    assert replayed.notes == []

    seen: list[Minimised] = []
    least = minimise(report, on_progress=seen.append)
    assert least.complete
    assert (least.crashed, least.measured) == (3, 3)
    assert least.tests <= 20
    assert len(seen) >= 5
    assert columns(least.report) == ([100], [0], [0], [True])
    assert least.report.context["n_ctx"] == 256
    assert "sequences: 4 to 1" in least.steps
    assert "tokens: 64 to 1" in least.steps

    text = script(least.report)
    ran = check(text, least.report)
    assert (ran.outcome, ran.same) == (Outcome.CRASHED, True)
    assert ran.evidence is not None
    assert any("llama_context::encode" in f.symbol for t in ran.evidence.threads for f in t.native)
    assert plainly(text, tmp_path).returncode == -11
    assert [report.id for report in read_all(store)] == [report.id]


@pytest.mark.usefixtures("empty_directory")
def test_an_assertion_keeps_its_text(tiny: Path, record: Callable[..., list[Report]], tmp_path: Path) -> None:
    batch = Batch.of([[4, 5, 6]])
    (report,) = record(tiny, lambda decoder: decoder.decode(batch), n_batch=2, n_seq_max=1)
    least = minimise(report)
    assert least.complete
    assert len(columns(least.report)[0]) == 2  # n_batch can be 1
    assert least.report.context["n_batch"] == 1
    assert least.report.evidence.assertion is not None
    assert replay(least.report, 1).replay.same == 1

    text = script(report)
    ran = check(text, report)
    assert ran.same
    assert ran.evidence is not None
    assert ran.evidence.assertion is not None
    assert "n_tokens_all <= cparams.n_batch" in ran.evidence.assertion.text
    plain = plainly(text, tmp_path)
    assert plain.returncode == -6
    assert "n_tokens_all <= cparams.n_batch" in plain.stderr


def test_a_loader_that_dies(tmp_path: Path, store: Path) -> None:
    model = write_block_count_zero(tmp_path / "bad.gguf")
    with pytest.raises(ModelError):
        Decoder(model, n_threads=1, reports=store)
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


# --- what is recorded


def test_every_rung_records_its_own_context(
    tiny: Path, record: Callable[..., list[Report]], dose: Callable[..., None]
) -> None:
    dose(Poison(token=99))
    batch = Batch.of([[4, 5], [6, 99, 7]])
    written = record(tiny, lambda decoder: decoder.decode(batch, embeddings=True), n_batch=2048)
    assert [report.rung for report in written] == ["native", "safe", "token"]
    assert [report.context["n_seq_max"] for report in written] == [4, 1, 1]
    assert [report.context["n_ctx"] for report in written] == [1024, 256, 256]
    assert [report.batch and report.batch.chunk for report in written] == [0, 256, 1]
    assert [report.batch and report.batch.embeddings for report in written[1:]] == [True, True]
    for report in written:
        replayed = replay(report, 1)
        assert replayed.replay.same == 1
        assert replayed.verdict is not None
        assert replayed.verdict.kind == VerdictKind.INPUT


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_generation_goes_on_where_it_was(
    temperature: float,
    tiny: Path,
    record: Callable[..., list[Report]],
    dose: Callable[..., None],
    tmp_path: Path,
) -> None:
    prompts = ["abc and more", "xyz", "a longer one, to begin with"]

    def generate(decoder: Decoder) -> None:
        list(decoder.generate(prompts, max_tokens=60, temperature=temperature, seed=7))

    dose(Poison(position=60, min_sequences=2))
    (report,) = record(tiny, generate)
    assert report.batch is not None
    assert {each.seq_id for each in report.batch.generating} >= set(report.batch.seq_ids)
    assert any(len(each.tokens) > len(prompts[2]) + 1 for each in report.batch.generating)
    replayed = replay(report, 1)
    assert (replayed.replay.crashed, replayed.replay.same) == (1, 1)

    # Without the poison the script passes, and one of its native calls is the one that crashed.
    text = script(report)
    shown = text.replace('"""One native call."""', 'print("call", sorted(row[:3] for row in rows))')
    plain = plainly(shown, tmp_path)
    assert plain.returncode == 0, plain.stderr
    tokens, positions, seq_ids, _ = columns(report)
    lost = sorted(zip(tokens, positions, seq_ids, strict=True))
    assert f"call {lost}" in plain.stdout.splitlines()
    assert check(text, report).outcome == Outcome.OK


def test_non_finite_logits(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "nan.gguf", n_embd=32)
    norm = np.ones(32, np.float32)
    model.write_bytes(model.read_bytes().replace(norm.tobytes(), (norm * np.nan).tobytes()))
    report = report_of(batch_of([4, 5]), str(model), evidence=Evidence(Exit.NON_FINITE, 1))
    ran = check(script(report), report)
    assert ran.same
    assert ran.detail == "NaN or infinity in output 1"


# --- minimise


def test_two_sequences_that_only_crash_together(
    tiny: Path, record: Callable[..., list[Report]], dose: Callable[..., None]
) -> None:
    dose(Poison(token=99, min_sequences=2))
    sequences = [[4, 5], [7, 8, 9], [11, 99, 13]]
    (report,) = record(tiny, lambda decoder: decoder.decode(Batch.of(sequences)))
    least = minimise(report)
    tokens, positions, seq_ids, outputs = columns(least.report)
    assert 99 in tokens
    assert (len(tokens), positions, seq_ids, outputs) == (2, [0, 0], [0, 1], [False, False])
    assert least.report.context["n_seq_max"] == 2
    assert replay(least.report, 1).replay.same == 1


def test_a_generation_is_reduced_to_one_prompt_token(tiny: Path, dose: Callable[..., None]) -> None:
    dose(Poison(token=99))
    batch = BatchRecord(
        [],
        [],
        [],
        [],
        "generate",
        64,
        generating=[Generating(0, [1, 5, 6], 20), Generating(3, [1, 99, 7], 20)],
    )
    report = report_of(batch, str(tiny), context=CONTEXT | {"n_seq_max": 4, "n_ctx": 1024})
    crash = replay(report, 1).runs[0].evidence
    assert crash is not None
    least = minimise(replace(report, evidence=crash))
    assert least.report.batch is not None
    assert least.report.batch.generating == [Generating(0, [99], 20)]
    assert least.report.context["n_seq_max"] == 1


def test_a_crash_that_happened_once_is_flaky(
    tiny: Path, record: Callable[..., list[Report]], dose: Callable[..., None], tmp_path: Path
) -> None:
    dose(Poison(once=str(tmp_path / "once")))
    (report,) = record(tiny, lambda decoder: decoder.decode(Batch.of([[4, 5], [6]])))
    assert (from_ladder(report) or Verdict(VerdictKind.INPUT, "")).kind == VerdictKind.BATCH_ONLY
    replayed = replay(report, 2)
    assert [run.outcome for run in replayed.runs] == [Outcome.OK, Outcome.OK]
    assert replayed.verdict == Verdict(VerdictKind.FLAKY, "passed 2 of 2 when repeated")
    with pytest.raises(CrumplezoneError, match=r"0 of 10 runs showed it \('passed'\)"):
        minimise(report)


def test_a_flaky_crash_is_measured_and_tried_often_enough(
    tiny: Path, record: Callable[..., list[Report]], dose: Callable[..., None], tmp_path: Path
) -> None:
    marker = tmp_path / "every second"
    dose(Poison(once=str(marker)), "tests.test_replay:EverySecondCell")
    (report,) = record(tiny, lambda decoder: decoder.decode(Batch.of([[4, 5]])), n_seq_max=1, n_ctx=256)
    marker.unlink(missing_ok=True)

    def stop(_: Minimised) -> None:
        raise KeyboardInterrupt

    least = minimise(report, on_progress=stop)
    assert (least.crashed, least.measured) == (5, 10)
    assert columns(least.report)[0] == [4]
    assert least.tests <= 12


def test_a_search_ends_with_its_tests(tiny: Path, dose: Callable[..., None]) -> None:
    dose(Poison(token=99))
    report = report_of(batch_of([4, 5, 6, 7], [8, 99, 9, 10]), str(tiny))
    crash = replay(report, 1).runs[0].evidence
    assert crash is not None
    least = minimise(replace(report, evidence=crash), tests_max=6)
    assert (least.complete, least.tests, least.measured) == (False, 6, 3)
    assert columns(least.report) == ([8, 99, 9, 10], [0, 1, 2, 3], [1, 1, 1, 1], [False, False, False, True])


# --- models


def test_a_model_that_has_moved(tiny: Path, tmp_path: Path, record: Callable[..., list[Report]]) -> None:
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
        ("context.kv_unified", {"context": CONTEXT | {"kv_unified": True}}),
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
            {"batch": replace(GENERATING, generating=[Generating(0, [1], 4, 0.5, -1)])},
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


hostile = st.text() | st.sampled_from(
    [
        "\nimport os\n",
        "\r\x0c\u2028import os",
        '""" + 1',
        "'); import os #",
        "\\N{x}\\",
        "{x}$y${model}%s",
        "coding: rot13",
        "\udc80\0",
    ]
)


@settings(max_examples=60)
@given(hostile, hostile, hostile)
def test_a_hostile_report_adds_nothing_to_its_script(one: str, two: str, three: str) -> None:
    def written(one: str, two: str, three: str) -> str:
        thread = Thread(1, crashed=True, native=[Frame(symbol=one, module=two)])
        return script(
            replace(
                report_of(batch_of([4, 5])),
                evidence=Evidence(Exit.SIGNAL, 1, fault=Fault(11, two), threads=[thread]),
                model=ModelRecord(three, sha256=one, description=two),
                environment=Environment({"llama.cpp": one, "python": two, "kernel": three, one: two}, three),
                crashed_at=one,
                result=two,
            )
        )

    def code(text: str, model: str) -> str:
        tree = ast.parse(text.encode("ascii"))  # bytes: Python itself looks for an encoding
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value == model:
                node.value = "MODEL"
        return ast.dump(tree)

    text = written(one, two, three)
    assert "coding" not in "".join(text.splitlines()[:2])
    assert code(text, three) == code(written("", "", "MODEL"), "MODEL")


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
    assert verdict_after(report, Replay("", 3, 3, 0), 0) == verdict
    passed = verdict_after(report, Replay("", 3, 0, 0), 0)
    assert passed is not None
    assert passed.kind == (kind if kind == VerdictKind.ENVIRONMENT else VerdictKind.FLAKY)
    assert verdict_after(report, Replay("", 3, 0, 0), 1) == verdict  # a refusal is no pass
