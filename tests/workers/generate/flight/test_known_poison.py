"""A prompt that is known to crash alone fails at once, and no cell dies of it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crumplezone import Decoder, Rung
from crumplezone.errors import SequenceError
from crumplezone.reports.store.store import Store
from tests.support.decoders import PROMPTS, Dose, Open, outcome, reports_of
from tests.support.native.decode_poison import Poison


def refused(decoder: Decoder, prompt: str, store: Store, **options: Any) -> str:
    """The report that a prompt's error names; nothing died for it."""
    known = len(reports_of(decoder, store))
    cells = decoder.processes["lanes"]
    completion = decoder.submit_prompt(prompt, max_tokens=8, **options).result(60)
    assert isinstance(completion.error, SequenceError)
    assert "it crashed llama.cpp before" in str(completion.error)
    assert completion.error.report is not None
    assert completion.reports == (completion.error.report,)
    assert completion.tokens == []
    assert len(reports_of(decoder, store)) == known
    assert not cells or decoder.processes["lanes"] == cells
    return completion.error.report


def test_a_known_poison_is_refused_by_all_and_costs_its_neighbours_nothing(
    tiny: Path, make: Open, store: Store, dose: Dose
) -> None:
    first = make(tiny)
    undisturbed = list(first.generate(PROMPTS[1:4], max_tokens=8))
    dose(Poison(token=int(first.tokenize(PROMPTS[0])[1]), position=1))
    decoder = make(tiny)
    error = decoder.submit_prompt(PROMPTS[0], max_tokens=8).result(60).error
    assert isinstance(error, SequenceError)
    assert refused(decoder, PROMPTS[0], store) == error.report
    assert refused(decoder, PROMPTS[0], store, seed=5) == error.report
    together = list(make(tiny).generate(PROMPTS[:4], max_tokens=8))  # another decoder knows it, too
    assert together[0].reports == (error.report,)
    assert [c.tokens for c in together[1:]] == [c.tokens for c in undisturbed]
    assert {c.reports for c in together[1:]} == {()}


def test_a_prompt_that_a_safe_rung_cures_is_no_poison(tiny: Path, make: Open, dose: Dose) -> None:
    prompts = ["x" * 100]
    undisturbed = list(make(tiny, 1).generate(prompts, max_tokens=8))
    dose(Poison(min_tokens=2))
    for _ in range(2):
        completions = list(make(tiny, 1).generate(prompts, max_tokens=8))
        assert outcome(completions) == outcome(undisturbed)
        assert [c.rung for c in completions] == [Rung.TOKEN]


def test_what_chance_has_led_to_is_remembered_with_its_seed(
    tiny: Path, make: Open, store: Store, dose: Dose
) -> None:
    dose(Poison(position=20))
    decoder = make(tiny)
    options: dict[str, Any] = {"temperature": 0.9, "ignore_eos": True}
    error = decoder.submit_prompt("abc", max_tokens=40, **options, seed=3).result(60).error
    assert isinstance(error, SequenceError)
    assert refused(decoder, "abc", store, **options, seed=3) == error.report
    again = decoder.submit_prompt("abc", max_tokens=8, **options, seed=4).result(60)
    assert again.error is None
    assert len(again.tokens) == 8
