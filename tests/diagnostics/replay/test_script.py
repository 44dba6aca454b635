"""From a recorded crash to a stand-alone script that shows it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from crumplezone import Batch, Decoder
from crumplezone.diagnostics.replay.minimise import Minimised, minimise
from crumplezone.diagnostics.replay.replay import replay
from crumplezone.diagnostics.replay.script import check, script
from crumplezone.reports.records.report import (
    Environment,
    Evidence,
    Exit,
    Fault,
    Frame,
    Held,
    ModelRecord,
    Outcome,
    Thread,
    VerdictKind,
)
from crumplezone.reports.store.store import Store
from tests.support.ctypes_batches import foreign
from tests.support.decoders import CONTEXT, Dose, Record, batch_of, columns, read_all, report_of
from tests.support.models.tiny_gguf import write_tiny_llama
from tests.support.native.decode_poison import Poison


@pytest.fixture
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, which nothing may be written to."""
    here = tmp_path / "cwd"
    here.mkdir()
    monkeypatch.chdir(here)
    yield here
    assert list(here.iterdir()) == []


def plainly(text: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run a script with nothing of ours around it."""
    file = tmp_path / "plain.py"
    file.write_text(text, encoding="ascii")
    env = {"GGML_NO_BACKTRACE": "1", "PATH": os.environ["PATH"]}
    return subprocess.run(
        [sys.executable, str(file)], capture_output=True, text=True, env=env, check=False, timeout=60
    )


@pytest.mark.usefixtures("empty_directory")
def test_encode_on_smollm_ends_at_one_token(
    smollm: Path, record: Record, store: Store, tmp_path: Path
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
def test_an_assertion_keeps_its_text(tiny: Path, record: Record, tmp_path: Path) -> None:
    batch = Batch.of([[4, 5, 6]])
    (report,) = record(tiny, lambda decoder: decoder.decode(batch), n_batch=2, n_seq=1)
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


def test_what_was_held_is_decoded_before(tiny: Path, record: Record, tmp_path: Path) -> None:
    def crash(decoder: Decoder) -> None:
        decoder.decode(Batch.of([[4, 5, 6], [7, 8]]))
        decoder.decode(Batch.of([[9] * 6, [10] * 4]))

    (report,) = record(tiny, crash, n_batch=8)
    text = script(report)
    assert check(text, report).same
    calls = text.replace('"""One native call."""', 'print("call", [row[:3] for row in rows], flush=True)')
    lines = plainly(calls, tmp_path).stdout.splitlines()
    assert lines[:2] == ["call [(4, 0, 0), (5, 1, 0), (6, 2, 0)]", "call [(7, 0, 1), (8, 1, 1)]"]
    assert lines[2].startswith("call [(9, 3, 0), ")
    assert len(lines) == 3


def test_null_is_sent_with_the_batch_alone(tiny: Path, record: Record, tmp_path: Path) -> None:
    owner = foreign([4, 5, 6])
    owner.arrays["seq_id"][1] = 0

    def crash(decoder: Decoder) -> None:
        decoder.decode(Batch.of([[7, 8]]))
        owner.arrays["pos"] += 2
        decoder.decode(owner, level="off")

    (report,) = record(tiny, crash)
    text = script(report)
    assert "batch.seq_id[1] = None" in text
    assert check(text, report).same
    assert plainly(text, tmp_path).returncode == -11


def test_tokens_that_several_sequences_share(tiny: Path, tmp_path: Path) -> None:
    batch = replace(batch_of([4, 5], [6]), shared={"0": [1], "1": [1]}, held=[Held(3, [7, 8], [0, 1])])
    batch = replace(batch, positions=[0, 1, 2])
    text = script(report_of(batch, str(tiny), context=CONTEXT | {"n_seq_max": 4, "n_ctx": 1024}))
    assert "(4, 0, (0, 1), 0), (5, 1, (0, 1), 1), (6, 2, (1,), 1)," in text
    plain = plainly(text, tmp_path)
    assert "no crash: llama_decode returned 1" in plain.stderr  # no slot, with a stream for each sequence


def test_a_token_of_no_sequence(tiny: Path, record: Record) -> None:
    owner = foreign([4])
    owner.arrays["n_seq_id"][0] = 0
    (report,) = record(tiny, lambda decoder: decoder.decode(owner, level="off"))
    assert replay(report, 1).replay.same == 1
    assert check(script(report), report).same


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_generation_goes_on_where_it_was(
    temperature: float,
    tiny: Path,
    record: Record,
    dose: Dose,
    tmp_path: Path,
) -> None:
    prompts = ["abc and more", "xyz", "a longer one, to begin with"]

    def generate(decoder: Decoder) -> None:
        list(decoder.generate(prompts, max_tokens=60, temperature=temperature, seed=7))

    dose(Poison(position=66, min_sequences=2))  # in the middle of a group of calls
    report, *_ = record(tiny, generate)  # the next one is of those that go on together
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
