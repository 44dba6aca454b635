"""A request as its caller holds it: read, awaited, cancelled, dropped."""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import CancelledError, Future
from pathlib import Path

import pytest

from crumplezone import Completion, Decoder, Stream
from tests.support.decoders import PROMPTS, Open
from tests.support.pace import Pace

_END = 60.0  # seconds


def text_of(decoder: Decoder, prompt: str, n: int) -> str:
    return next(decoder.generate([prompt], max_tokens=n)).text


# --- without waiting in a thread


def test_a_stream_can_be_read_and_awaited_by_a_loop(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 2)
    whole = [text_of(decoder, prompt, 40) for prompt in PROMPTS[:3]]

    async def read(prompt: str) -> str:
        stream = decoder.submit_prompt(prompt, max_tokens=40)
        pieces = [piece async for piece in stream]
        completion = await stream
        assert "".join(pieces) == completion.text
        assert [piece async for piece in stream] == []
        return completion.text

    async def read_all() -> list[str]:
        return await asyncio.gather(*map(read, PROMPTS[:3]))

    assert asyncio.run(read_all()) == whole


def test_the_end_of_async_with_cancels(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)

    async def begin() -> Stream:
        async with decoder.submit_prompt("abc", max_tokens=200) as stream:
            async for piece in stream:
                assert piece
                break
        return stream

    stream = asyncio.run(begin())
    assert stream.cancelled()
    assert decoder.submit_prompt("xyz", max_tokens=2).result(_END).error is None


def test_a_task_that_is_cancelled_while_it_awaits_cancels(tiny: Path, make: Open, pace: Pace) -> None:
    decoder = make(tiny, 1)

    async def begin(way: str) -> Stream:
        stream = decoder.submit_prompt("abc", max_tokens=200)

        async def wait() -> object:
            return await stream if way == "await" else [piece async for piece in stream]

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)  # it has begun to wait
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return stream

    assert asyncio.run(begin("await")).cancelled()
    assert not asyncio.run(begin("async for")).done()  # who holds it may read on
    pace.go(500)


def test_a_decoder_can_be_closed_by_a_loop(tiny: Path, tmp_path: Path) -> None:
    async def work() -> str:
        async with Decoder(tiny, n_seq_max=1, n_threads=1, reports=tmp_path) as decoder:
            return (await decoder.submit_prompt("abc", max_tokens=3)).text

    assert asyncio.run(work())


# --- cancelling


def test_what_is_cancelled_keeps_what_was_made(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)
    whole = text_of(decoder, "abc", 200)
    stream = decoder.submit_prompt("abc", max_tokens=200)
    assert stream.completion.finish_reason == ""
    reader = iter(stream)
    pieces = [next(reader)]
    assert stream.cancel()
    with pytest.raises(CancelledError):
        pieces.extend(reader)
    kept = stream.completion
    assert (kept.finish_reason, kept.error) == ("cancelled", None)
    assert kept.text == "".join(pieces)
    assert whole.startswith(kept.text)
    assert len(kept.tokens) >= 1
    assert kept.prompt_tokens == stream.prompt_tokens == len(decoder.tokenize("abc"))
    assert stream.cancel()  # again
    with pytest.raises(CancelledError):
        stream.result()


def test_a_cancelled_request_takes_part_in_no_further_step(tiny: Path, make: Open, pace: Pace) -> None:
    decoder = make(tiny, 2)
    streams = [decoder.submit_prompt(prompt, max_tokens=100) for prompt in PROMPTS[:2]]
    pace.go(4)
    for stream in streams:
        next(iter(stream))
    streams[0].cancel()
    pace.go(300)
    assert streams[1].result(_END).error is None
    after = [call for call in pace.calls() if len({seq for seq, _ in call}) == 2]
    # It took part in those that were allowed before, and in one that perhaps was under way.
    assert len(after) <= 5
    assert len(pace.calls()) > 50


def test_who_reads_on_another_thread_is_told_of_a_cancel(tiny: Path, make: Open, pace: Pace) -> None:
    decoder = make(tiny, 1)
    stream = decoder.submit_prompt("abc", max_tokens=100)
    waiting, came = threading.Event(), Future[object]()

    def read() -> None:
        waiting.set()
        try:
            came.set_result(list(stream))
        except CancelledError as error:
            came.set_result(error)

    thread = threading.Thread(target=read)
    thread.start()
    waiting.wait(_END)
    stream.cancel()  # no step is allowed
    assert isinstance(came.result(_END), CancelledError)
    thread.join()
    pace.go(500)


# --- dropping


def test_a_stream_that_nobody_holds_gives_its_place_to_the_next(tiny: Path, make: Open, pace: Pace) -> None:
    decoder = make(tiny, 1)
    stream = decoder.submit_prompt("abc", max_tokens=200)
    waiting = [decoder.submit_prompt("def", max_tokens=200) for _ in range(3)]
    pace.go()
    next(iter(stream))
    del stream, waiting
    gc.collect()
    last = decoder.submit_prompt("xyz", max_tokens=6)
    pace.go(30)  # too few for the others
    assert len(last.result(_END).tokens) == 6


def test_a_stream_lives_as_long_as_its_reader(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)
    whole = text_of(decoder, "abc", 60)
    reader = iter(decoder.submit_prompt("abc", max_tokens=60))
    choice = decoder.submit_prompt("abc", max_tokens=60).choices[0]
    gc.collect()
    assert "".join(reader) == whole
    assert "".join(choice) == whole


def test_a_stream_with_a_callback_is_wanted(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)
    whole = text_of(decoder, "abc", 60)
    came: Future[Completion] = Future()
    decoder.submit_prompt("abc", max_tokens=60).add_done_callback(lambda done: came.set_result(done.result()))
    gc.collect()
    assert came.result(_END).text == whole


def test_a_generator_that_is_closed_gives_up_what_is_in_flight(tiny: Path, make: Open, pace: Pace) -> None:
    decoder = make(tiny, 2)
    generation = decoder.generate(iter(["abc", "abd", *["abe"] * 50]), max_tokens=200)
    pace.go(300)
    next(generation)
    generation.close()
    last = decoder.submit_prompt("xyz", max_tokens=6)
    pace.go(30)
    assert len(last.result(_END).tokens) == 6


# --- several choices


def test_several_choices_are_those_of_the_following_seeds(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 4)
    alone = [
        decoder.submit_prompt("abc", max_tokens=20, temperature=1.0, seed=seed).result(_END)
        for seed in (7, 8, 9)
    ]
    stream = decoder.submit_prompt("abc", max_tokens=20, temperature=1.0, seed=7, n=3)
    texts = ["".join(choice) for choice in stream.choices]
    completion = stream.result(_END)
    assert [choice.text for choice in completion.choices] == texts == [each.text for each in alone]
    assert [choice.seed for choice in completion.choices] == [7, 8, 9]
    assert completion.choices[0] is completion
    assert len(set(texts)) == 3


def test_the_prompt_of_several_choices_is_read_once(tiny: Path, make: Open, pace: Pace) -> None:
    decoder = make(tiny, 3)
    prompt = "a prompt that is long enough to be worth a copy of it"
    pace.go(200)
    decoder.submit_prompt(prompt, max_tokens=4, n=3, temperature=1.0).result(_END)
    read = [entry for call in pace.calls() for entry in call if entry[1] < 40]
    assert len(read) < 60  # each of 40 once, and few of them again


def test_cancelling_cancels_every_choice(tiny: Path, make: Open, pace: Pace) -> None:
    decoder = make(tiny, 3)
    stream = decoder.submit_prompt("abc", max_tokens=200, n=3)
    pace.go(3)
    next(iter(stream))
    stream.cancel()
    last = decoder.submit_prompt("xyz", max_tokens=6, n=3)
    pace.go(40)
    assert [len(choice.tokens) for choice in last.result(_END).choices] == [6, 6, 6]
    for choice in stream.choices[1:]:
        with pytest.raises(CancelledError):
            list(choice)


def test_the_error_of_one_choice_is_that_of_its_text(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 2)
    completion = decoder.submit_prompt("x" * 300, n=2).result(_END)
    assert [choice.finish_reason for choice in completion.choices] == ["error", "error"]
