"""Cells that were taken over: what they say in the right form is held against what they were asked."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from crumplezone import Request, Rung
from crumplezone.errors import SequenceError
from crumplezone.reports.records.report import Exit
from crumplezone.reports.store.store import Store
from tests.support.decoders import PROMPTS, Open, Plant, held, outcome, reports_of, say
from tests.support.native import liars

LIES = {
    "stranger": "told of the sequences [77], [0, 1] are in flight",
    "nobody": "told of the sequences [], [0, 1] are in flight",
    "twice": "told of the sequences [0, 1, 0, 1], [0, 1] are in flight",
    "nothing": "told of no token although every prompt has been read",
    "too_much": "went on with sequence 0 after its last token",
    "no_end": "went on with sequence 0 after its last token",
    "no_token": "made up a token for sequence 0: the model has 128",
    "more_read": "told of sequence 0 1015 tokens read, after 0 of 16",
    "unasked": "told of sequence 0 1 probabilities for 1 tokens",
}

Tell = Callable[[str], object]


@pytest.fixture
def tell(plant: Plant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tell:
    """Let the cells that start from now on tell a lie, once or ``always``."""
    file = tmp_path / "lie"
    plant("decode", liars.TARGET)
    monkeypatch.setenv(liars.VARIABLE, str(file))
    file.touch()
    return lambda lie: file.write_text(lie)


def test_a_lie_costs_the_cell_and_no_prompt(tiny: Path, make: Open, store: Store, tell: Tell) -> None:
    decoder = make(tiny, 2, deadline=30)
    both = Request(PROMPTS[0], max_tokens=8, n=2)  # the choices of one request begin together
    honest = decoder.submit_prompt(both).result(60).choices
    assert [c.rung for c in honest] == [Rung.NATIVE, Rung.NATIVE]
    for lie in LIES:
        tell(lie)
        completions = decoder.submit_prompt(both).result(60).choices
        assert outcome([*completions]) == outcome([*honest])
        assert [(c.error, bool(c.reports)) for c in completions] == [(None, True)] * 2, lie
    evidence = [report.evidence for report in reports_of(decoder, store)]
    assert {each.exit for each in evidence} == {Exit.PROTOCOL}
    found = [f"the cell {problem}; killed by the supervisor" for problem in LIES.values()]
    assert [each.detail for each in evidence] == found


def test_a_cell_that_always_lies_ends(tiny: Path, make: Open, store: Store, tell: Tell) -> None:
    tell("nothing always")
    decoder = make(tiny, 2, deadline=30)
    completions = list(decoder.generate(PROMPTS[:3], max_tokens=8))
    for completion in completions:
        assert isinstance(completion.error, SequenceError)
        assert (completion.finish_reason, completion.tokens) == ("error", [])
    written = reports_of(decoder, store)
    assert {report.evidence.exit for report in written} == {Exit.PROTOCOL}
    alone = [report.rung for report in written if report.rung != "native"]
    assert alone == ["safe", "token"] * 3  # who is alone in flight is not tried together with others


def test_more_tokens_than_a_text_can_have(tiny: Path, make: Open, store: Store, tell: Tell) -> None:
    tell("tokens always")
    decoder = make(tiny, 2, deadline=30, awake=False)
    (completion,) = decoder.generate(["abc"], max_tokens=8)
    assert isinstance(completion.error, SequenceError)
    written = reports_of(decoder, store)
    assert [report.evidence.detail for report in written] == [
        "the cell made 20 tokens of 3 bytes; killed by the supervisor"
    ] * 2


@pytest.fixture
def boast(plant: Plant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tell:
    """Let the cells that start from now on tell of more than there is, in some replies of a kind."""
    file = tmp_path / "boast"
    plant("decode", "tests.support.native.liars:Boaster")
    monkeypatch.setenv(liars.VARIABLE, str(file))
    file.write_text("None 0")
    return lambda kind: file.write_text(f"{kind} 1")


def test_a_number_that_cannot_be_costs_the_cell_and_nothing_else(
    tiny: Path, make: Open, store: Store, boast: Tell
) -> None:
    decoder = make(tiny, 2, deadline=30)
    say(decoder, 0, 4, 5, 6)
    honest = decoder.memory.save(0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    boast("Saved")
    assert decoder.memory.save(0) == honest
    boast("Remembered")
    decoder.memory.load(1, honest)
    boast("Generated")
    (completion,) = decoder.generate(["abc"], max_tokens=8)
    assert completion.error is None
    assert held(decoder, 2) == [(0, 2), (0, 2)]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + 100_000  # kilobytes
    details = [report.evidence.detail for report in reports_of(decoder, store)]
    found = [
        "tells of a state of 8589934592 bytes",
        "found positions up to 2147483647",
        "made 60000 bytes of",
    ]
    assert len(details) == len(found)
    assert all(what in detail for what, detail in zip(found, details, strict=True))
