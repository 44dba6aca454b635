"""Two hundred requests of every kind at once, of which some crash, while somebody kills cells."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest

from crumplezone import ChatStream, Completion, Decoder, Stream
from crumplezone.errors import SequenceError
from tests.support.decoders import Dose, Open
from tests.support.native.decode_poison import Poison

Asked = Stream | ChatStream
Ask = Callable[[Decoder, int], Asked]

_N, _EVERY = 200, 20
_END = 100.0
_KILLS = 12
# In a model as undecided as this one, rounding would decide at a temperature.
GREEDY: dict[str, Any] = {"max_tokens": 10}
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
FORM = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


def chat(decoder: Decoder, n: int, **options: Any) -> ChatStream:
    messages = [{"role": "user", "content": f"number {n}"}]
    return decoder.submit_chat(messages, chat_format="chatml", **{**GREEDY, "max_tokens": 40, **options})


KINDS: list[Ask] = [
    lambda decoder, n: decoder.submit_prompt(f"number {n}", **GREEDY),
    lambda decoder, n: decoder.submit_prompt(f"long {n} " + "and more " * 15, **GREEDY, stop=["zz", "qqq"]),
    lambda decoder, n: decoder.submit_prompt(f"three {n}", **GREEDY, n=3),
    lambda decoder, n: decoder.submit_prompt([3 + n % 50, 9, 12], **GREEDY, logprobs=2),
    lambda decoder, n: chat(decoder, n),
    lambda decoder, n: chat(decoder, n, response_format=FORM),
    lambda decoder, n: chat(decoder, n, tools=[TOOL], tool_choice="required"),
]


def ask(decoder: Decoder, n: int) -> Asked:
    if n % _EVERY == 7:
        return decoder.submit_prompt(f"!number {n}", **GREEDY)
    return KINDS[n % len(KINDS)](decoder, n)


def came_of(asked: Asked) -> Any:
    """What must be equal; of one that fails, that alone."""
    done = asked.result(_END)
    if isinstance(done, Completion):
        return [(c.text, c.tokens, c.finish_reason) for c in done.choices] if not done.error else "failed"
    calls = [call["function"] for call in done.message.get("tool_calls", [])]  # ids are new each time
    return done.message["content"], calls, done.finish_reason, done.completion.tokens


@pytest.mark.timeout(300)
def test_two_hundred_mixed_requests(tiny: Path, make: Open, dose: Dose) -> None:
    options: dict[str, Any] = {"n_ctx_seq": 512}
    first = make(tiny, 8, **options)
    expected = [came_of(asked) for asked in [ask(first, n) for n in range(_N)]]
    assert "failed" not in expected
    dose(Poison(token=int(first.tokenize("!")[1]), position=1))  # of prompts only, not of what is generated
    first.close()
    decoder = make(tiny, 8, workers=2, **options)
    rng, over = random.Random(13), threading.Event()

    def kill() -> None:
        for _ in range(_KILLS):
            if over.wait(0.3):
                return
            found = decoder.processes
            if pids := found["lanes"] + found["spares"] + found["zygote"]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(pids), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    all_asked: list[Asked] = []
    killer.start()
    try:
        for n in range(_N):
            all_asked.append(ask(decoder, n))
            if n % 10 == 3:  # beside those that are waited for
                decoder.submit_prompt("nobody holds this", max_tokens=200)
                cancelled = decoder.submit_prompt("nobody waits for this", max_tokens=200)
                assert cancelled.cancel()
                with pytest.raises(CancelledError):
                    cancelled.result(_END)
        found = [came_of(asked) for asked in all_asked]
    finally:
        over.set()
        killer.join()
    poisoned = [n for n in range(_N) if n % _EVERY == 7]
    assert [n for n, each in enumerate(found) if each == "failed"] == poisoned
    assert [n for n in range(_N) if n not in poisoned and found[n] != expected[n]] == []
    error = all_asked[7].result(_END)
    assert isinstance(error, Completion)
    assert isinstance(error.error, SequenceError)
