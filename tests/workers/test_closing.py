"""Closing while others wait, and bad arguments: one clear error, and nobody waits for ever."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crumplezone import Batch, Decoder, Llama
from crumplezone.errors import InputError, ModelError, UsageError
from crumplezone.reports.records.report import Exit
from crumplezone.reports.store.store import Store
from tests.support.decoders import Open, kill, read_all
from tests.support.processes.zygotes import Asked


def ask_while(close: Callable[[], None], call: Callable[[], object]) -> BaseException | None:
    """Call from another thread, close from this one; what the call raised."""
    raised: list[BaseException] = []
    begun = threading.Event()

    def work() -> None:
        begun.set()
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - it is what is looked at
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait(10)
    close()
    thread.join(20)
    assert not thread.is_alive()
    return raised[0] if raised else None


def test_a_decoder_closed_in_the_middle_of_a_generation_frees_who_waits(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1)
    generation = decoder.generate([f"prompt {n}" for n in range(50)], max_tokens=200)
    next(generation)
    error = ask_while(decoder.close, lambda: list(decoder.generate(["waits behind them"])))
    assert isinstance(error, UsageError)
    assert "closed" in str(error)
    generation.close()


def test_a_llama_closed_in_the_middle_of_a_stream_frees_who_waits(tiny: Path, tmp_path: Path) -> None:
    llama = Llama(str(tiny), n_ctx=64, n_threads=1, reports=tmp_path)
    stream: Any = llama("ab", stream=True, max_tokens=9)
    next(stream)
    error = ask_while(llama.close, lambda: llama("x", max_tokens=1))
    assert isinstance(error, UsageError)
    assert "closed" in str(error)
    del stream


def test_a_missing_model_is_the_original_error_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Model path does not exist") as caught:
        Llama(str(tmp_path / "none.gguf"))
    assert isinstance(caught.value, ModelError)


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("level", lambda d: d.decode(Batch.of([[1]]), level="x")),
        ("text", lambda d: d.tokenize(5)),
        ("lora", lambda d: d.set_adapters(lora=5)),
        ("control", lambda d: d.set_adapters(control="x")),
    ],
)
def test_wrong_types_are_named(field: str, call: Callable[[Decoder], object], tiny: Path, make: Open) -> None:
    with pytest.raises(InputError, match=field):
        call(make(tiny, 1))


@pytest.fixture
def asked() -> Iterator[Asked]:
    """Of the threads that start from now on."""
    event = Asked()
    threading.setprofile(event)
    yield event
    threading.setprofile(None)


def test_a_decoder_is_closed_while_a_stopped_zygote_is_to_fork(
    tiny: Path, make: Open, store: Store, asked: Asked
) -> None:
    decoder = make(tiny, 1, spares=0)
    next(decoder.generate(["a"], max_tokens=1))
    processes = decoder.processes
    os.kill(processes["zygote"][0], signal.SIGSTOP)
    asked.clear()
    for pid in processes["lanes"]:
        kill(pid)
    waiting = decoder.submit_prompt("abc", max_tokens=2)
    assert asked.wait(30)
    decoder.close()
    assert Exit.HANG not in {report.evidence.exit for report in read_all(store)}  # nobody waited that long
    with pytest.raises(UsageError, match="this decoder was closed"):
        waiting.result(0)


@pytest.mark.parametrize("disturb", ["kill", "resize", "encode"])
def test_vectors_and_tokens_of_one_sequence_are_given_to_a_new_cell(
    disturb: str, tiny: Path, make: Open
) -> None:
    decoder, reference = make(tiny, 2), make(tiny, 2)
    vectors = Batch(3, 1, decoder.info.n_embd_inp)
    for _ in range(3):
        vectors.add_embd(0, np.full(decoder.info.n_embd_inp, 0.01, np.float32))
    for each in (decoder, reference):
        each.decode(vectors)
        each.decode(Batch.of([[4, 5]]))
        each.decode(vectors)
    if disturb == "kill":
        assert decoder.pid is not None
        os.kill(decoder.pid, signal.SIGKILL)
    elif disturb == "resize":
        decoder.resize(n_ctx=1024)
    else:
        decoder.encode(Batch.of([[1, 2]]))
    result, expected = decoder.decode(Batch.of([[7]])), reference.decode(Batch.of([[7]]))
    np.testing.assert_allclose(result.logits(0), expected.logits(0), rtol=1e-3, atol=1e-3)
    assert decoder.memory.pos_max(0) == 8


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_vectors_must_be_finite(value: float) -> None:
    batch = Batch(1, 1, 2)
    with pytest.raises(InputError, match=r"vector\[1\]"):
        batch.add_embd(0, [0.0, value])
    assert len(batch) == 0
