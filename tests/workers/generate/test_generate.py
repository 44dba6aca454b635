"""`Decoder.generate`: every prompt gets its text, be there crashes or not."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from crumplezone import Completion, Decoder, Rung
from crumplezone.errors import CrumplezoneError, InputError, SequenceError, UsageError
from crumplezone.reports.records.report import Exit, Outcome, VerdictKind
from crumplezone.reports.store.store import Store
from crumplezone.sandbox.autopsy import turns
from tests.support.decoders import PROMPTS, Dose, Open, kill, outcome, reports_of
from tests.support.native.decode_poison import Poison
from tests.support.processes.constrained import every_turn_taken


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


def test_unordered_generate_yields_every_prompt(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 3)
    prompts = [f"prompt {n}" for n in range(10)]
    ordered = list(decoder.generate(prompts, max_tokens=12))
    unordered = list(decoder.generate(prompts, max_tokens=12, ordered=False))
    assert [c.index for c in ordered] == list(range(10))
    assert sorted(unordered, key=lambda c: c.index) == ordered
    assert list(decoder.generate([])) == []


def test_bad_prompts(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 2)
    with pytest.raises(InputError, match="prompts"):
        decoder.generate("a text is no list of texts")
    for options in ({"max_tokens": 0}, {"temperature": -1}, {"temperature": float("nan")}, {"seed": -2}):
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


def test_a_copy_in_a_shared_cache_keeps_nothing_of_who_was_there(tiny: Path, make: Open) -> None:
    asked: dict[str, Any] = {"n": 3, "max_tokens": 8, "logprobs": 0}
    fresh = make(tiny, 4, kv_unified=True).submit_prompt("x" * 100, **asked).result(60)
    decoder = make(tiny, 4, kv_unified=True)
    list(decoder.generate(PROMPTS[:4], max_tokens=40))
    again = decoder.submit_prompt("x" * 100, **asked).result(60)
    for one, other in zip(again.choices, fresh.choices, strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs
        assert other.logprobs
        told = zip(one.logprobs, other.logprobs, strict=True)
        assert all(abs(a.logprob - b.logprob) < 0.01 for a, b in told)


# --- crashes


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
    assert [report.rung for report in written] == [*["native"] * 3, "safe", "token"]  # 4, 4, 2, and alone
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
    assert any(c.reports for c in disturbed)
    assert {c.rung for c in disturbed} == {Rung.NATIVE}  # each is back with the others
    assert len(reports_of(decoder, store)) == 1
    assert len({c.text for c in undisturbed}) == 8


def test_a_long_prompt_is_read_token_by_token(tiny: Path, make: Open, store: Store, dose: Dose) -> None:
    prompts = ["x" * 100]
    undisturbed = list(make(tiny, 1).generate(prompts, max_tokens=8))
    dose(Poison(min_tokens=2))
    decoder = make(tiny, 1)
    completions = list(decoder.generate(prompts, max_tokens=8))
    assert outcome(completions) == outcome(undisturbed)
    assert [(c.rung, c.error) for c in completions] == [(Rung.TOKEN, None)]
    assert [report.rung for report in reports_of(decoder, store)] == ["native", "safe"]


def test_generate_without_fallback_fails_what_was_in_flight(tiny: Path, make: Open, dose: Dose) -> None:
    tokens = make(tiny).tokenize(PROMPTS[0])
    dose(Poison(token=int(tokens[1]), position=1))
    decoder = make(tiny, 2, safe_fallback=False)
    completions = list(decoder.generate(PROMPTS[:4], max_tokens=4))
    assert [c.finish_reason == "error" for c in completions] == [True, True, False, False]
    assert all(isinstance(c.error, CrumplezoneError) and c.reports for c in completions[:2])


def test_a_poison_among_many_costs_the_others_few_crashes(
    tiny: Path, make: Open, store: Store, dose: Dose
) -> None:
    first = make(tiny, 8)
    undisturbed = list(first.generate(PROMPTS, max_tokens=40))
    bad = int(first.tokenize(PROMPTS[2])[1])
    dose(Poison(token=bad, position=1))
    decoder = make(tiny, 8)
    completions = list(decoder.generate(PROMPTS, max_tokens=40))
    failed = completions.pop(2)
    del undisturbed[2]
    assert outcome(completions) == outcome(undisturbed)
    assert {c.rung for c in completions} == {Rung.NATIVE}
    assert max(len(c.reports) for c in completions) <= 4  # log2(8) + 1
    written = reports_of(decoder, store)
    assert len(written) == len(failed.reports) == 4 + 2  # and the safe rungs
    for report in written:
        assert report.result == "7 of 8 prompts in flight went on; failed: prompt 2"
        assert report.verdict is not None
        assert (report.verdict.kind, report.blamed) == (VerdictKind.INPUT, [2])


def test_prompts_that_crash_only_together_all_get_their_texts(
    tiny: Path, make: Open, store: Store, dose: Dose
) -> None:
    undisturbed = list(make(tiny, 6).generate(PROMPTS[:6], max_tokens=120))
    dose(Poison(min_sequences=4))
    decoder = make(tiny, 6)
    completions = list(decoder.generate(PROMPTS[:6], max_tokens=120))
    assert outcome(completions) == outcome(undisturbed)
    assert {(c.error, c.rung) for c in completions} == {(None, Rung.NATIVE)}
    written = reports_of(decoder, store)
    assert 2 <= len(written) <= 5  # twice at first; when they meet again they part at once
    verdicts = [report.verdict and report.verdict.kind for report in written]
    assert set(verdicts) == {VerdictKind.BATCH_ONLY}
    assert {report.result for report in written} == {"6 of 6 prompts in flight went on"}


def test_a_crash_that_does_not_come_again_is_flaky(
    tiny: Path, make: Open, store: Store, dose: Dose, tmp_path: Path
) -> None:
    dose(Poison(position=20, once=str(tmp_path / "crashed")))
    decoder = make(tiny)
    assert {c.error for c in decoder.generate(PROMPTS[:4], max_tokens=40)} == {None}
    (report,) = reports_of(decoder, store)
    assert report.verdict is not None
    assert report.verdict.kind is VerdictKind.FLAKY
    assert [(step.outcome, step.sequences) for step in report.ladder] == [
        (Outcome.CRASHED, [0, 1, 2, 3]),
        (Outcome.OK, [0, 1, 2, 3]),
    ]


def lane(decoder: Decoder, *gone: int) -> int:
    """The process id of the one lane's cell, when it is none of these any more."""
    end = time.monotonic() + 60
    while not (pids := set(decoder.processes["lanes"]) - {*gone}):
        assert time.monotonic() < end
        os.sched_yield()
    return pids.pop()


def test_kills_isolate_nobody(tiny: Path, make: Open, store: Store) -> None:
    undisturbed = list(make(tiny).generate(PROMPTS[:4], max_tokens=230))
    decoder = make(tiny)
    streams = [decoder.submit_prompt(prompt, max_tokens=230) for prompt in PROMPTS[:4]]
    readers = [iter(stream) for stream in streams]
    texts = [next(reader) for reader in readers]
    gone: list[int] = []
    for _ in range(3):
        gone.append(lane(decoder, *gone))
        kill(gone[-1])
    texts = [text + "".join(reader) for text, reader in zip(texts, readers, strict=True)]
    assert texts == [c.text for c in undisturbed]
    assert {stream.result().rung for stream in streams} == {Rung.NATIVE}
    written = reports_of(decoder, store)
    assert any(len(report.ladder) > 1 for report in written)
    for report in written:
        assert (report.evidence.exit, report.rung) == (Exit.KILLED, "native")
        assert {len(step.sequences) for step in report.ladder} <= {4, 0}  # 0: it had nothing to do any more


def test_nobody_waits_for_the_stacks_of_a_crash_but_the_error_that_names_its_report(
    tiny: Path, make: Open, dose: Dose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "_PATIENCE", 600.0)
    first = make(tiny)
    undisturbed = list(first.generate(PROMPTS[:4], max_tokens=40))
    dose(Poison(token=int(first.tokenize(PROMPTS[1])[1]), position=1))
    decoder = make(tiny)
    streams = [decoder.submit_prompt(prompt, max_tokens=40) for prompt in PROMPTS[:4]]
    with every_turn_taken():
        for n in (0, 2, 3):
            assert streams[n].result(60).text == undisturbed[n].text
        assert not streams[1].done()
        assert decoder.submit_prompt(PROMPTS[0], max_tokens=40).result(60).text == undisturbed[0].text
    error = streams[1].result(60).error
    assert isinstance(error, SequenceError)
    assert error.report is not None
    assert Path(error.report, "report.json").exists()


def test_a_prompt_is_not_blamed_for_a_cell_that_was_killed_before_it(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 2)
    assert decoder.pid is not None
    os.kill(decoder.pid, signal.SIGKILL)
    completions = list(decoder.generate(["aa", "bb", "cc"], max_tokens=4))
    assert [completion.error for completion in completions] == [None, None, None]


# --- out of turn


def test_an_abandoned_generation_leaves_no_trace(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 2)
    whole = list(decoder.generate(PROMPTS, max_tokens=8))
    abandoned = decoder.generate(PROMPTS, max_tokens=8)
    next(abandoned)
    abandoned.close()
    assert list(decoder.generate(PROMPTS, max_tokens=8)) == whole


def test_close_ends_a_suspended_generation(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)
    completions = decoder.generate([f"prompt {n}" for n in range(9)], max_tokens=4)
    next(completions)
    decoder.close()
    with pytest.raises(UsageError, match="closed"):
        list(completions)
    with pytest.raises(UsageError):
        decoder.tokenize("x")
