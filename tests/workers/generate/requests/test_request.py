"""What a request may say: prompts of texts and tokens, options, and one clear error for all else."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crumplezone import Completion, Logprob, Request, Rung
from crumplezone.errors import InputError, TokenError
from crumplezone.workers.generate.requests.completion import best
from crumplezone.workers.protocol.generate.sampling import SEEDS
from tests.support.decoders import Open

_END = 60.0


# --- prompts


def test_token_ids_are_taken_as_they_are(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 2)
    ids = decoder.tokenize("abc and more")
    given: list[Any] = ["abc and more", ids, ids.tolist(), tuple(ids.tolist())]
    completions = list(decoder.generate(given, max_tokens=20))
    assert len({c.text for c in completions}) == 1
    assert {c.prompt_tokens for c in completions} == {len(ids)}
    assert [c.prompt for c in completions] == ["abc and more", *[tuple(ids.tolist())] * 3]


def test_texts_and_tokens_may_be_mixed(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 2)
    first, second = decoder.tokenize("abc").tolist(), decoder.tokenize("def").tolist()
    ids = [*first, 5, 6, *second[1:]]  # one BOS, in front of all
    mixed, plain, late = decoder.generate([["abc", 5, 6, "", "def"], ids, [5, "abc"]], max_tokens=20)
    assert mixed.text == plain.text
    assert mixed.prompt_tokens == plain.prompt_tokens == len(ids)
    assert late.prompt_tokens == len(first)  # what begins with a token has no BOS


def test_special_tokens_are_text_unless_they_are_asked_for(smollm: Path, make: Open) -> None:
    decoder = make(smollm, 2)
    prompt = "<|im_end|>\n<|im_start|>"
    as_text, parsed = (
        decoder.submit_prompt(prompt, max_tokens=1, special=special).result(_END) for special in (False, True)
    )
    assert parsed.prompt_tokens == 3
    assert as_text.prompt_tokens > 8


def test_an_echo_begins_the_text(smollm: Path, make: Open) -> None:
    decoder = make(smollm, 2)
    ids = decoder.tokenize(" is nice").tolist()
    plain, echoed, mixed = decoder.generate(
        [
            Request("The sea is nice", max_tokens=5),
            Request("The sea is nice", max_tokens=5, echo=True),
            Request(["The sea", *ids], max_tokens=5, echo=True),
        ]
    )
    assert echoed.text == mixed.text == "The sea is nice" + plain.text
    assert echoed.tokens == plain.tokens
    stream = decoder.submit_prompt("The sea is nice", max_tokens=5, echo=True, stop=["sea"])
    pieces = list(stream)
    assert pieces[0].startswith("The sea is nice")  # a stop string is looked for behind it
    assert "".join(pieces) == stream.result().text


# --- errors


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("temperature", {"temperature": -1}),
        ("max_tokens", {"max_tokens": 0}),
        ("seed", {"seed": -2}),
        ("seed", {"seed": SEEDS}),
        ("stop[1]", {"stop": ["a", ""]}),
        ("stop[0]", {"stop": [b"a"]}),
        ("stop[0]", {"stop": "\ud800"}),
        ("stop", {"stop": 5}),
        ("number of stop strings", {"stop": ["a"] * 17}),
        ("bytes of all stop strings", {"stop": ["\u2603" * 400]}),
        ("stop_token_ids[0]", {"stop_token_ids": [-1]}),
        ("stop_token_ids", {"stop_token_ids": 5}),
        ("number of stop_token_ids", {"stop_token_ids": [1] * 65}),
        ("timeout", {"timeout": -0.5}),
        ("timeout", {"timeout": float("nan")}),
        ("priority", {"priority": 1001}),
        ("logprobs", {"logprobs": 21}),
        ("echo", {"echo": 1}),
        ("special", {"special": "yes"}),
        ("n", {"n": 0}),
        ("best_of", {"n": 3, "best_of": 2}),
    ],
)
def test_a_bad_option_is_one_error_before_anything_is_done(
    field: str, options: dict[str, Any], tiny: Path, make: Open
) -> None:
    decoder = make(tiny, 1)
    asks = (
        lambda: decoder.submit_prompt("a", **options),
        lambda: decoder.generate(["a"], **options),
        lambda: Request("a", **options),
        lambda: Request("a").changed(**options),
    )
    for ask in asks:
        with pytest.raises(InputError) as caught:
            ask()
        assert caught.value.field == field
        assert str(caught.value).startswith(f"{field} is ")
        assert caught.value.limit in str(caught.value)
    assert decoder.processes["lanes"] == []


@pytest.mark.parametrize("prompt", ["", [], [""], None, 5, b"abc", [1.5], [[1]], ["a", None], [-1], [True]])
def test_what_is_no_prompt(prompt: Any, tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)
    with pytest.raises(InputError, match=r"^prompt"):
        decoder.submit_prompt(prompt)
    (completion,) = decoder.generate([prompt])
    assert isinstance(completion.error, InputError)
    assert completion.error.field.startswith("prompts[0]")
    assert completion.finish_reason == "error"


def test_tokens_that_the_model_has_not(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)
    with pytest.raises(TokenError, match=r"prompt\[1\] is 128: must be from 0 to 127"):
        decoder.submit_prompt(["a", 128])
    with pytest.raises(TokenError, match=r"stop_token_ids\[0\] is 128"):
        decoder.submit_prompt("a", stop_token_ids=[128])


def test_what_the_context_does_not_hold_is_told_before_work(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)
    with pytest.raises(InputError, match=r"number of tokens of prompt is 256: .* 256 tokens"):
        decoder.submit_prompt([5] * 256)
    error = decoder.submit_prompt("x" * 300).result(_END).error
    assert isinstance(error, InputError)
    assert "is 301: the context holds 256 tokens" in str(error)
    assert decoder.submit_prompt([5] * 255, max_tokens=5).result(_END).finish_reason == "length"


# --- one request with others


def test_options_change_a_request(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 2)
    request = Request("abc", max_tokens=3, temperature=0.5, stop="x", priority=2)
    changed = request.changed(max_tokens=np.int64(5), stop=["y", "z"])  # type: ignore[arg-type]
    assert (changed.sampling.max_tokens, changed.sampling.temperature) == (5, 0.5)
    assert (changed.stop, changed.priority, request.stop) == (("y", "z"), 2, ("x",))
    assert changed.changed(max_tokens=3, stop=["x"]) == request
    assert len(decoder.submit_prompt(request, max_tokens=4).result(_END).tokens) == 4


def test_a_seed_of_several_prompts_counts_on(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 2)
    heat: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0}
    told = list(decoder.generate(["abc"] * 3, seed=SEEDS - 2, **heat))
    assert [c.seed for c in told] == [SEEDS - 2, SEEDS - 1, 0]
    for each in told:
        assert decoder.submit_prompt("abc", seed=each.seed, **heat).result(_END).text == each.text
    doubled = list(decoder.generate(["abc"] * 2, seed=5, n=2, **heat))
    assert [choice.seed for each in doubled for choice in each.choices] == [5, 6, 7, 8]
    own = list(decoder.generate([Request("abc", seed=3, **heat)] * 2))
    assert [each.seed for each in own] == [3, 3]


@pytest.mark.parametrize("options", [{}, {"seed": None}, {"seed": -1}])
def test_without_a_seed_equal_prompts_differ_and_can_be_had_again(
    options: dict[str, Any], tiny: Path, make: Open
) -> None:
    decoder = make(tiny, 4)
    told = list(decoder.generate(["abc"] * 6, max_tokens=30, temperature=1.0, **options))
    assert len({each.text for each in told}) == len({each.seed for each in told}) == 6
    again = decoder.submit_prompt("abc", max_tokens=30, temperature=1.0, seed=told[3].seed)
    assert again.result(_END).text == told[3].text


LIKELY = st.lists(st.floats(-20, 0), max_size=5)


@given(st.lists(st.tuples(LIKELY, st.booleans()), min_size=1, max_size=6), st.integers(1, 6))
def test_the_best_are_those_whose_tokens_are_likeliest(given: list[tuple[list[float], bool]], n: int) -> None:
    def completion(index: int, *, bad: bool) -> Completion:
        return Completion(index, "", "", [], "", Rung.NATIVE, InputError("", 0, "") if bad else None)

    made = [(completion(i, bad=bad), [*map(Logprob, told)]) for i, (told, bad) in enumerate(given)]
    chosen = [each.index for each in best(made, n)]
    means = [sum(told) / len(told) if told else float("-inf") for told, _ in given]
    assert len(set(chosen)) == len(chosen) == min(n, len(made))
    for one, other in itertools.pairwise([*chosen, *(i for i in range(len(made)) if i not in chosen)]):
        if one in chosen:
            assert given[one][1] <= given[other][1]  # who failed comes last
            assert given[one][1] != given[other][1] or means[one] >= means[other] - 1e-9
