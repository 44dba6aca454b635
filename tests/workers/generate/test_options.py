"""Options of sampling, as callers of a `Decoder` give them."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from crumplezone.errors import InputError
from tests.support.decoders import PROMPTS, Open, outcome


def test_what_llama_cpp_does_not_accept_costs_its_prompt_only(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 2)
    expected = outcome(list(decoder.generate(PROMPTS[:2], max_tokens=8)))
    running = decoder.submit_prompt(PROMPTS[0], max_tokens=8)
    for wrong, field in (
        ({"grammar": 'root ::= "'}, "grammar"),
        ({"logit_bias": {128: 1.0}}, "token of logit_bias"),
    ):
        options: Any = wrong
        (refused,) = decoder.generate(["abc"], **options)
        assert isinstance(refused.error, InputError)
        assert (refused.error.field, refused.finish_reason, refused.tokens) == (field, "error", [])
        assert refused.reports == ()
    assert running.result().text == expected[0][1]
    assert outcome(list(decoder.generate(PROMPTS[:2], max_tokens=8))) == expected


@pytest.mark.parametrize("options", [{"temperature": 0.8}, {"temperature": 0.8, "mirostat_mode": 2}, {}])
def test_a_grammar_survives_three_kills(options: dict[str, Any], tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)
    given: dict[str, Any] = {"grammar": 'root ::= "ab" [c-f]+', "max_tokens": 120, "seed": 3} | options
    (expected,) = decoder.generate(["abc"], **given)
    assert set(expected.text[2:]) <= set("cdef")
    stream = decoder.submit_prompt("abc", **given)
    text, kills = "", 0
    for piece in stream:
        text += piece
        if kills < 3 and len(text) > 20 * (kills + 1):
            for pid in decoder.processes["lanes"]:
                with contextlib.suppress(ProcessLookupError):  # it had just died
                    os.kill(pid, signal.SIGKILL)
            kills += 1
    assert (text, stream.result().tokens) == (expected.text, expected.tokens)
