"""What a completion tells beside its text: probabilities, counts, and what ended it; through kills, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from crumplezone import Completion, Decoder, Request
from crumplezone.workers.protocol.generate import messages
from tests.support.decoders import Open, kill
from tests.support.pace import Pace

pytestmark = pytest.mark.skipif(
    not hasattr(messages, "FINISHED"), reason="the cell's half of requests is not there"
)
_END = 60.0


def ask(decoder: Decoder, prompt: Any = "abc", **options: Any) -> Completion:
    return decoder.submit_prompt(prompt, **({"max_tokens": 30} | options)).result(_END)


def killed(decoder: Decoder, at: int, prompt: Any = "abc", **options: Any) -> Completion:
    """The same, with a kill of the cell after some tokens."""
    stream = decoder.submit_prompt(prompt, **({"max_tokens": 30} | options))
    left = [at]
    for _ in stream:
        if left and len(stream.completion.tokens) >= left[0]:
            (pid,) = decoder.processes["lanes"]
            kill(pid)
            left.clear()
    assert not left
    return stream.result(_END)


def values(completion: Completion) -> list[float]:
    return [each.logprob for each in completion.logprobs or []]


def test_a_stop_string_ends_the_work_at_once(tiny: Path, make: Open, pace: Pace) -> None:
    decoder = make(tiny, 1)
    pace.go(400)
    whole = ask(decoder, max_tokens=100)
    calls = len(pace.calls())
    stop = whole.text[20:23]
    at = whole.text.index(stop)
    stopped = ask(decoder, max_tokens=100, stop=[stop])
    assert (stopped.text, stopped.stop, stopped.finish_reason) == (whole.text[:at], stop, "stop")
    assert len(pace.calls()) - calls <= at + 5 + 9


def test_a_stop_token_is_not_in_the_text(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)
    whole = ask(decoder)
    token = whole.tokens[12]
    stopped = ask(decoder, stop_token_ids=[token])
    assert stopped.tokens == whole.tokens[: whole.tokens.index(token)]
    assert (stopped.finish_reason, stopped.stop) == ("stop", None)
    assert ask(decoder, max_tokens=5).finish_reason == "length"


def test_probabilities_come_with_each_token_through_a_kill(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)
    whole = ask(decoder, logprobs=3)
    assert whole.logprobs is not None
    assert len(whole.logprobs) == len(whole.tokens)
    for token, told in zip(whole.tokens, whole.logprobs, strict=True):
        assert [logprob for _, logprob in told.top] == sorted((p for _, p in told.top), reverse=True)
        assert told.top[0] == (token, told.logprob)  # greedy
        assert len(told.top) == 3
    disturbed = killed(decoder, 8, logprobs=3)
    assert disturbed.tokens == whole.tokens
    assert values(disturbed) == pytest.approx(values(whole), abs=1e-2)
    assert ask(decoder, logprobs=0).logprobs is not None
    assert ask(decoder).logprobs is None


def test_an_echo_with_probabilities_has_those_of_the_prompt(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)
    prompt = "a prompt of some length"
    ids = decoder.tokenize(prompt).tolist()
    for told in (
        ask(decoder, prompt, logprobs=2, echo=True),
        ask(decoder, prompt, logprobs=2, echo=True),  # what is cached has to be read again
        killed(decoder, 5, prompt, logprobs=2, echo=True),
    ):
        assert told.prompt_logprobs is not None
        assert told.prompt_logprobs[0] is None
        assert len(told.prompt_logprobs) == told.prompt_tokens == len(ids)
        for at, each in enumerate(told.prompt_logprobs[1:], 1):
            assert each is not None
            (drawn,) = ask(decoder, ids[:at], max_tokens=1, logprobs=20).logprobs or []
            assert dict(drawn.top).get(ids[at], each.logprob) == pytest.approx(each.logprob, abs=2e-2)
    assert ask(decoder, prompt, logprobs=2).prompt_logprobs is None


def test_tokens_that_were_cached_are_counted(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)
    prompt = "a prompt that is read once"
    first, second = (ask(decoder, prompt, max_tokens=2) for _ in range(2))
    assert first.cached_tokens == 0
    assert second.cached_tokens == second.prompt_tokens - 1
    assert first == second


def test_the_best_of_several(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 4)
    heat: dict[str, Any] = {"temperature": 1.5, "seed": 3, "max_tokens": 6}
    alone = [ask(decoder, **heat | {"seed": 3 + i}, logprobs=0) for i in range(4)]
    means = [sum(values(each)) / len(each.tokens) for each in alone]
    order = sorted(range(4), key=lambda i: -means[i])
    stream = decoder.submit_prompt(Request("abc", n=2, best_of=4, **heat))
    texts = ["".join(choice) for choice in stream.choices]
    completion = stream.result(_END)
    assert [each.seed for each in completion.choices] == [3 + i for i in order[:2]]
    assert [each.text for each in completion.choices] == texts == [alone[i].text for i in order[:2]]
    assert completion.logprobs is None
