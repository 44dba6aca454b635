"""A cell is killed three times in the middle of a request: its caller sees what he would have without."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crumplezone import Completion, Decoder, Stream
from tests.support.decoders import PROMPTS, Open

_END = 60.0


class Killer:
    """Kills the lanes' cells when so many tokens have come."""

    def __init__(self, decoder: Decoder, *tokens: int) -> None:
        self._decoder = decoder
        self._left = list(tokens or (8, 25, 40))
        self._killed = set[int]()

    @property
    def kills(self) -> int:
        """How many there were."""
        return 3 - len(self._left)

    def look(self, stream: Stream) -> None:
        """Perhaps kill them now."""
        if self._left and len(stream.completion.tokens) >= self._left[0]:
            (pid,) = set(self._decoder.processes["lanes"]) - self._killed
            self._killed.add(pid)
            os.kill(pid, signal.SIGKILL)
            del self._left[0]


def pieces_of(stream: Stream, killer: Killer) -> Iterator[str]:
    for piece in stream:
        yield piece
        killer.look(stream)


def same(one: Completion, other: Completion) -> bool:
    return [(c.text, c.tokens, c.finish_reason, c.stop, c.seed) for c in one.choices] == [
        (c.text, c.tokens, c.finish_reason, c.stop, c.seed) for c in other.choices
    ]


# Greedy: after each kill the prompt is read in a batch of another shape, and where tokens are drawn by chance
# in a model as undecided as this one, its rounding may decide.
PROMPT = "dbc and more"
LONG: dict[str, Any] = {"max_tokens": 120, "seed": 7}


@pytest.fixture
def whole(tiny: Path, make: Open) -> str:
    """The text without a kill, and without a stop string."""
    return make(tiny, 1).submit_prompt(PROMPT, **LONG).result(_END).text


def test_a_stream_up_to_a_stop_string(whole: str, tiny: Path, make: Open) -> None:
    at = next(at for at in range(50, len(whole)) if whole.index(whole[at : at + 4]) == at)
    stop = whole[at : at + 4]
    options: dict[str, Any] = {**LONG, "stop": [stop, "no such text"]}
    decoder = make(tiny, 1)
    undisturbed = decoder.submit_prompt(PROMPT, **options).result(_END)
    assert (undisturbed.text, undisturbed.stop, undisturbed.finish_reason) == (whole[:at], stop, "stop")
    killer, stream = Killer(decoder), decoder.submit_prompt(PROMPT, **options)
    shown = ""
    for piece in pieces_of(stream, killer):
        shown += piece
        assert whole[:at].startswith(shown)  # nothing of the stop string, and nothing twice
    assert shown == whole[:at]
    assert same(stream.result(_END), undisturbed)
    assert killer.kills == 3


def test_a_stream_that_a_loop_reads(whole: str, tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)
    killer = Killer(decoder)

    async def read() -> str:
        async with decoder.submit_prompt(PROMPT, **LONG) as stream:
            shown = ""
            async for piece in stream:
                shown += piece
                killer.look(stream)
            assert (await stream).text == shown
        return shown

    assert asyncio.run(read()) == whole
    assert killer.kills == 3


def test_several_choices(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 3)
    undisturbed = decoder.submit_prompt(PROMPT, n=3, **LONG).result(_END)
    killer, stream = Killer(decoder), decoder.submit_prompt(PROMPT, n=3, **LONG)
    first = "".join(pieces_of(stream, killer))
    texts = [first, *("".join(choice) for choice in stream.choices[1:])]
    assert same(stream.result(_END), undisturbed)
    assert texts == [choice.text for choice in undisturbed.choices]
    assert killer.kills == 3


def test_tokens_texts_echo_and_special_tokens(smollm: Path, make: Open) -> None:
    decoder = make(smollm, 1)
    prompt: list[int | str] = ["<|im_start|>user\nCount: ", 33, " two<|im_end|>\n<|im_start|>assistant\n"]
    options: dict[str, Any] = {"special": True, "echo": True, "max_tokens": 70, "seed": 1}
    undisturbed = decoder.submit_prompt(prompt, **options).result(_END)
    killer, stream = Killer(decoder, 2, 10, 18), decoder.submit_prompt(prompt, **options)
    assert "".join(pieces_of(stream, killer)) == undisturbed.text
    assert undisturbed.text.startswith("<|im_start|>user\nCount: ")
    assert same(stream.result(_END), undisturbed)
    assert stream.result().prompt_tokens == undisturbed.prompt_tokens
    assert killer.kills == 3


def test_characters_of_several_tokens_stay_whole(smollm: Path, make: Open) -> None:
    decoder = make(smollm, 1)
    prompt = "\U0001f600\U0001f680\u2603\U0001f600\U0001f680\u2603\U0001f600\U0001f680\u2603\U0001f600"
    undisturbed = decoder.submit_prompt(prompt, max_tokens=70).result(_END)
    killer, stream = Killer(decoder, 2, 10, 18), decoder.submit_prompt(prompt, max_tokens=70)
    pieces = list(pieces_of(stream, killer))
    assert "".join(pieces) == undisturbed.text
    assert "\ufffd" not in undisturbed.text.removesuffix("\ufffd")
    assert any(ord(character) > 0xFFFF for character in undisturbed.text)
    assert killer.kills == 3


def test_what_is_cancelled_or_late_after_kills_keeps_its_text(whole: str, tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)
    killer, stream = Killer(decoder), decoder.submit_prompt(PROMPT, **LONG)
    for _ in pieces_of(stream, killer):
        if killer.kills == 3:
            stream.cancel()
            break
    kept = stream.completion
    assert kept.finish_reason == "cancelled"
    assert whole.startswith(kept.text)
    assert len(kept.tokens) >= 40
    (after,) = decoder.generate(PROMPTS[:1], max_tokens=3)
    assert after.error is None
