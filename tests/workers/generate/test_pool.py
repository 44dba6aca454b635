"""Jobs on several cells: submitted batches, streamed prompts, cancellation, and what dies meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path

import numpy as np
import pytest

from crumplezone import Batch, Completion, Decoder
from crumplezone.errors import InputError, SequenceError, UsageError
from crumplezone.reports.records.report import Exit
from crumplezone.reports.store.store import Store
from tests.support.decoders import (
    PROMPTS,
    Dose,
    Open,
    assert_equal_logits,
    fork,
    outcome,
    reports_of,
    say,
    sequences,
    wait_for_end,
)
from tests.support.native.decode_poison import Poison


def test_submitted_batches_equal_decoded_ones_and_leave_the_memory_alone(tiny: Path, make: Open) -> None:
    decoder, reference = make(tiny, workers=2), make(tiny)
    say(decoder, 0, 5, 6, 7)
    batches = [Batch.of(sequences(n, 3, 128)) for n in range(9, 21)]
    futures = [decoder.submit(batch) for batch in batches]
    for future, batch in zip(futures, batches, strict=True):
        assert_equal_logits(future.result(60), reference.decode(batch))
        reference.memory.clear()
    assert decoder.memory.pos_max(0) == 2
    assert len({*decoder.processes["lanes"], decoder.pid}) == 3


def test_prompts_and_batches_take_turns(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 2)
    undisturbed = list(decoder.generate(PROMPTS, max_tokens=12))
    streams = [decoder.submit_prompt(prompt, max_tokens=12) for prompt in PROMPTS[:3]]
    batch = decoder.submit(Batch.of([[1, 2, 3]]), embeddings=True)
    streams += [decoder.submit_prompt(prompt, max_tokens=12) for prompt in PROMPTS[3:]]
    assert [stream.result(60).text for stream in streams] == [c.text for c in undisturbed]
    assert batch.result(60).embeddings(0).shape == (decoder.info.n_embd,)


def test_a_submitted_batch_that_crashes_goes_down_the_ladder(tiny: Path, make: Open, dose: Dose) -> None:
    dose(Poison(token=9))
    decoder = make(tiny, workers=2)
    result = decoder.submit(Batch.of([[5, 6], [9, 5], [6, 7]])).result(60)
    assert list(result.errors) == [1]
    assert np.isfinite(result.logits(2)).all()
    assert result.reports


def test_a_batch_that_does_not_fit_is_refused_at_once(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 2)
    with pytest.raises(InputError, match="token"):
        decoder.submit(Batch.of([[1, 2], [1000]]))
    with pytest.raises(InputError, match="prompt"):
        decoder.submit_prompt("")
    with pytest.raises(InputError, match="temperature"):
        decoder.submit_prompt("a", temperature=-1)
    assert decoder.processes["lanes"] == []


def test_a_future_can_be_awaited(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 2, workers=2)
    expected = [completion.text for completion in decoder.generate(PROMPTS, max_tokens=9)]

    async def ask() -> list[str]:
        streams = [decoder.submit_prompt(prompt, max_tokens=9) for prompt in PROMPTS]
        return [c.text for c in await asyncio.gather(*map(asyncio.wrap_future, streams))]

    assert asyncio.run(ask()) == expected


# --- streaming


def test_a_stream_gives_the_first_token_alone_and_the_whole_text(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 2)
    (whole,) = decoder.generate(["abc"], max_tokens=40)
    stream = decoder.submit_prompt("abc", max_tokens=40)
    pieces = list(stream)
    assert "".join(pieces) == whole.text == stream.result().text
    assert 2 <= len(pieces) < 40  # what is unread comes in one piece
    assert list(stream) == []  # a second reader does not wait for ever


def test_a_stream_goes_on_through_a_crash(
    tiny: Path, make: Open, dose: Dose, tmp_path: Path, store: Store
) -> None:
    whole = list(make(tiny).generate(PROMPTS, max_tokens=60, temperature=0.7, seed=3))
    dose(Poison(position=30, once=str(tmp_path / "crashed")))
    decoder = make(tiny)
    streams = [decoder.submit_prompt(p, max_tokens=60, temperature=0.7, seed=3) for p in PROMPTS[:1]]
    assert ["".join(stream) for stream in streams] == [whole[0].text]
    assert [report.evidence.exit for report in reports_of(decoder, store)] == [Exit.SIGNAL]


def test_a_stream_raises_the_error_of_its_prompt_after_its_text(tiny: Path, make: Open, dose: Dose) -> None:
    dose(Poison(position=30))
    decoder = make(tiny)
    stream = decoder.submit_prompt("abc", max_tokens=60)
    pieces: list[str] = []
    with pytest.raises(SequenceError):
        pieces.extend(stream)
    assert pieces
    assert "".join(pieces) == stream.result().text


def test_a_cancelled_prompt_gives_its_place_to_the_next(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)
    (expected,) = decoder.generate(["xyz"], max_tokens=6)
    endless = decoder.submit_prompt("abc", max_tokens=200)
    waiting = [decoder.submit_prompt("xyz", max_tokens=6) for _ in range(2)]
    next(iter(endless))
    assert endless.cancel()
    assert waiting[0].cancel()
    assert waiting[1].result(60).text == expected.text
    with pytest.raises(CancelledError):
        endless.result()


def test_cancelling_what_an_event_loop_waits_for(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)

    async def ask() -> str:
        endless = decoder.submit_prompt("abc", max_tokens=200)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(endless), 0.001)
        assert endless.cancelled()
        return (await asyncio.wrap_future(decoder.submit_prompt("xyz", max_tokens=6))).text

    assert asyncio.run(ask()) == next(decoder.generate(["xyz"], max_tokens=6)).text


# --- deaths


def test_200_prompts_of_which_every_20th_crashes(tiny: Path, make: Open, dose: Dose, store: Store) -> None:
    prompts = [f"{'!' if n % 20 == 7 else ''}number {n}" for n in range(200)]
    first = make(tiny)
    undisturbed = list(first.generate(prompts, max_tokens=8))
    dose(Poison(token=int(first.tokenize("!")[1]), position=1))  # what is generated comes later
    decoder = make(tiny, 8, workers=2)
    completions = list(decoder.generate(prompts, max_tokens=8))
    assert [c.index for c in completions] == list(range(200))
    failed = [c for c in completions if c.error]
    assert [c.index for c in failed] == list(range(7, 200, 20))
    assert outcome([c for c in completions if not c.error]) == outcome(
        [c for c in undisturbed if c.index % 20 != 7]
    )
    blamed = {index for report in reports_of(decoder, store) for index in report.blamed}
    assert blamed == {c.index for c in failed}


def killed(decoder: Decoder, name: str) -> None:
    """SIGKILL the decoder's zygote, its lane's spare, its lane's cell, or several of them."""
    processes = decoder.processes
    for part in name.split(" and "):
        for pid in processes[part]:
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "victims",
    ["zygote", "spares", "lanes", "zygote and spares", "zygote and lanes", "zygote and spares and lanes"],
)
def test_deaths_in_the_middle_of_a_stream(victims: str, tiny: Path, make: Open) -> None:
    whole = [c.text for c in make(tiny).generate(PROMPTS[:4], max_tokens=80)]
    decoder = make(tiny)
    streams = [decoder.submit_prompt(prompt, max_tokens=80) for prompt in PROMPTS[:4]]
    readers = [iter(stream) for stream in streams]
    texts = [next(reader) for reader in readers]
    killed(decoder, victims)
    assert [text + "".join(reader) for text, reader in zip(texts, readers, strict=True)] == whole
    assert [c.text for c in decoder.generate(PROMPTS[:4], max_tokens=80)] == whole


@pytest.mark.parametrize("victims", ["zygote", "spares", "lanes", "zygote and spares and lanes"])
def test_deaths_between_two_jobs_are_not_seen(victims: str, tiny: Path, make: Open, store: Store) -> None:
    decoder = make(tiny)
    whole = list(decoder.generate(PROMPTS, max_tokens=8))
    killed(decoder, victims)
    assert list(decoder.generate(PROMPTS, max_tokens=8)) == whole
    assert {report.evidence.exit for report in reports_of(decoder, store)} <= {Exit.KILLED}


# --- reading ahead, closing


def test_an_iterator_of_prompts_is_read_as_places_fall_free(tiny: Path, make: Open) -> None:
    decoder, read = make(tiny, 2), []

    def prompts() -> Iterator[str]:
        for n in range(100):
            read.append(n)
            yield f"prompt {n}"

    completions = decoder.generate(prompts(), max_tokens=2)
    next(completions)
    assert len(read) <= 8
    assert [c.index for c in completions] == list(range(1, 100))


@pytest.mark.parametrize("ordered", [True, False])
def test_what_is_refused_keeps_back_nothing_that_is_done(ordered: bool, tiny: Path, make: Open) -> None:
    decoder, read = make(tiny, 2), []

    def prompts() -> Iterator[str]:
        yield "abc"
        for n in range(10_000):
            read.append(n)
            yield ""

    with contextlib.closing(decoder.generate(prompts(), max_tokens=2, ordered=ordered)) as completions:
        assert any(c.error is None for c in completions)
        assert len(read) <= 2_000 if ordered else len(read) < 10_000
    with contextlib.closing(decoder.generate(prompts(), max_tokens=2, ordered=ordered)) as completions:
        assert len(list(completions)) == 10_001


@pytest.mark.parametrize("ordered", [True, False])
def test_what_the_source_of_prompts_raises_comes_after_the_prompts_before_it(
    ordered: bool, tiny: Path, make: Open
) -> None:
    def prompts() -> Iterator[str]:
        yield from ("abc", "", "def")
        raise RuntimeError("the source is broken")

    seen: list[int] = []
    with pytest.raises(RuntimeError, match="the source is broken"):
        seen.extend(c.index for c in make(tiny, 2).generate(prompts(), max_tokens=3, ordered=ordered))
    assert sorted(seen) == [0, 1, 2]


def test_what_is_no_prompt_fails_alone(tiny: Path, make: Open) -> None:
    prompts: list[object] = ["a", "", None, b"c", "d"]
    completions = list(make(tiny, 2).generate(prompts, max_tokens=2))  # type: ignore[arg-type]
    assert [isinstance(c.error, InputError) for c in completions] == [False, True, True, True, False]


def test_a_caller_may_do_other_things_in_the_middle_of_a_generation(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 2)
    whole = list(decoder.generate(PROMPTS, max_tokens=8))
    seen: list[Completion] = []
    for completion in decoder.generate(PROMPTS, max_tokens=8):
        seen.append(completion)
        say(decoder, 0, 5)
        assert decoder.encode(Batch.of([[1, 2]])).errors == {}
        assert next(decoder.generate(["nested"], max_tokens=1)).error is None
    assert seen == whole
    assert decoder.memory.pos_max(0) == len(PROMPTS) - 1


def test_closing_fails_what_is_not_done(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)
    streams = [decoder.submit_prompt("abc", max_tokens=200) for _ in range(3)]
    next(iter(streams[0]))
    decoder.close()
    for stream in streams:
        with pytest.raises(UsageError, match="closed"):
            stream.result(60)
    with pytest.raises(UsageError, match="closed"):
        decoder.submit_prompt("abc")


def test_a_callback_of_a_future_may_close_the_decoder(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)
    closed = threading.Event()

    def close(_: object) -> None:
        decoder.close()
        closed.set()

    decoder.submit_prompt("abc", max_tokens=2).add_done_callback(close)
    assert closed.wait(60)
    with pytest.raises(UsageError):
        decoder.tokenize("x")


def test_a_decoder_that_nobody_closes_ends_with_its_last_reference(tiny: Path, tmp_path: Path) -> None:
    decoder = Decoder(tiny, n_seq_max=1, n_threads=1, reports=tmp_path)
    stream = decoder.submit_prompt("abc", max_tokens=200)
    del decoder
    gc.collect()
    with pytest.raises(UsageError, match="closed"):
        stream.result(60)


def test_what_runs_alone_after_a_crash_can_be_cancelled(tiny: Path, make: Open, dose: Dose) -> None:
    dose(Poison(min_sequences=2))  # they stay alone to their end
    decoder = make(tiny, 4, n_ctx_seq=20_000)
    endless = [decoder.submit_prompt("abc", max_tokens=19_000) for _ in range(4)]
    for stream in endless:
        next(iter(stream))
    assert all(stream.cancel() for stream in endless)
    assert decoder.submit_prompt("xyz", max_tokens=2).result(60).error is None


def test_a_callback_that_wants_to_end_the_thread_ends_nothing(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)

    def leave(_: object) -> None:
        raise SystemExit

    decoder.submit_prompt("abc", max_tokens=2).add_done_callback(leave)
    assert decoder.submit_prompt("abc", max_tokens=2).result(60).error is None


def test_an_error_comes_after_the_report_that_it_names(tiny: Path, make: Open, dose: Dose) -> None:
    decoder = make(tiny, 2)
    dose(Poison(token=int(decoder.tokenize("!")[1]), position=1))
    seen = Future[list[bool]]()  # the callbacks run while result() returns
    stream = make(tiny, 2).submit_prompt("!", max_tokens=2)
    stream.add_done_callback(
        lambda done: seen.set_result([Path(path, "report.json").exists() for path in done.result().reports])
    )
    assert stream.result(60).error
    assert seen.result(60) == [True] * 3


def test_a_context_of_another_size_holds_for_prompts_and_texts(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)
    assert "256" in str(next(decoder.generate(["x" * 300])).error)
    decoder.embed(["x"])
    decoder.resize(n_ctx=512)
    assert next(decoder.generate(["x" * 300], max_tokens=2)).error is None
    assert decoder.embed(["x" * 300]).errors == {}


def test_a_fork_does_not_wait_for_what_its_parent_will_get(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 2)
    stream, batch = decoder.submit_prompt("ab", max_tokens=200), decoder.submit(Batch.of([[3, 4]]))
    waits: list[Callable[[], object]] = [lambda: list(stream), stream.result, batch.result]
    read, write = os.pipe()
    if not (pid := fork()):
        for wait in waits:
            try:
                wait()
            except UsageError as error:
                os.write(write, b"refused " if "before a fork" in str(error) else b"?")
        os._exit(0)
    os.close(write)
    try:
        assert wait_for_end(pid, 30)
        assert os.read(read, 100) == b"refused " * 3
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
    assert stream.result(30).error is None
    assert batch.result(30).errors == {}
