"""Texts to tokens and back: as llama.cpp does it, for whatever text, in a cell that waits for no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crumplezone import Decoder
from crumplezone.errors import CellDied, InputError, TokenError, UsageError
from crumplezone.reports.records.report import Exit
from crumplezone.reports.store.store import Store
from tests.support.decoders import Open, kill, reports_of, wait_for_end

Dose = Callable[..., None]

TEXTS = [
    "",
    "Hello, world",
    " a\n\n\tb ",
    "Gr\u00fc\u00dfe \u2014 \u65e5\u672c\u8a9e \U0001f9d1\u200d\U0001f680",
    "a\0b",
    "<|im_start|>user<|im_end|>",
    "x" * 5000,
]
_ORIGINAL = """
import json, sys, llama_cpp
llama = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
texts = [text.encode() for text in json.load(sys.stdin)]
print(json.dumps([llama.tokenize(text, True, special) for special in (False, True) for text in texts]))
"""


def child(code: str, model: Path, given: Any) -> Any:
    """What the original says, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, str(model)],
        input=json.dumps(given).encode(),
        check=True,
        capture_output=True,
        timeout=100,
    )
    return json.loads(done.stdout)


def test_tokens_are_those_of_the_original(smollm: Path, make: Open) -> None:
    decoder = make(smollm, 1, awake=False)
    found = [decoder.tokenize(text, special=special).tolist() for special in (False, True) for text in TEXTS]
    assert found == child(_ORIGINAL, smollm, TEXTS)
    assert [decoder.detokenize(decoder.tokenize(text)) for text in TEXTS] == TEXTS


def test_a_special_token_in_a_text_is_text_unless_asked(smollm: Path, make: Open) -> None:
    decoder = make(smollm, 1, awake=False)
    special = decoder.special_tokens
    assert (special.bos_text, special.eos_text) == ("<|im_start|>", "<|im_end|>")
    assert special.eos in special.eog
    assert special.fim_pre == -1
    text = decoder.tokenize("<|im_end|>")
    assert special.eos not in text
    assert decoder.tokenize("<|im_end|>", special=True).tolist() == [special.eos]
    assert decoder.detokenize([special.eos]) == "<|im_end|>"
    assert decoder.detokenize([special.eos], special=False) == ""
    assert decoder.detokenize(text, special=False) == "<|im_end|>"


def test_the_special_tokens_around_a_text(decoder: Decoder) -> None:
    special = decoder.special_tokens
    assert (special.bos, special.eos, special.add_bos, special.add_eos) == (1, 2, True, False)
    assert decoder.tokenize("").tolist() == [1]
    assert decoder.tokenize("", add_special=False).tolist() == []
    assert decoder.tokenize("ab", add_special=False).tolist() == decoder.tokenize("ab").tolist()[1:]


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("a\ud800b", "a\ufffdb"),
        ("\udc00", "\ufffd"),
        ("\ud83e\udd91", "\U0001f991"),  # two halves of a pair, as JSON has them
        ("a\0", "a\0"),
    ],
)
def test_odd_texts(given: str, read: str, smollm: Path, make: Open) -> None:
    decoder = make(smollm, 1, awake=False)
    assert decoder.detokenize(decoder.tokenize(given)) == read


def test_long_texts(smollm: Path, make: Open) -> None:
    decoder = make(smollm, 1, awake=False)
    text = "a word, " * 250_000
    assert decoder.detokenize(decoder.tokenize(text)) == text
    with pytest.raises(InputError, match="number of bytes of text is 16777217: must be at most 16777216"):
        decoder.tokenize("x" * (2**24 + 1))


def test_a_text_that_makes_more_tokens_than_it_has_bytes(decoder: Decoder) -> None:
    """The tiny models' tokenizer spells U+FDFA out, as NFKC does: 18 letters for three bytes."""
    text = "\ufdfa" * 64
    tokens = decoder.tokenize(text)
    assert decoder.tokenize(text).tolist() == tokens.tolist()


def test_any_text_comes_back(smollm: Path, make: Open) -> None:
    """Of those that this model has bytes for: it lacks some of control characters and higher planes."""
    decoder = make(smollm, 1, awake=False)

    @settings(max_examples=60, deadline=None)
    @given(text=st.text(st.characters(max_codepoint=0x1FFFF, exclude_categories=["Cc"])))
    def check(text: str) -> None:
        read = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert decoder.detokenize(decoder.tokenize(text)) == read

    check()


@pytest.mark.parametrize(
    ("tokens", "field"),
    [
        ([1, 128], r"tokens\[1\] is 128: must be from 0 to 127"),
        ([-1], r"tokens\[0\] is -1"),
        ("ab", "tokens is"),
        ([1.5], "tokens is"),
        ([[1]], "tokens is"),
        (None, "tokens is"),
        ([2**70], "tokens"),
    ],
)
def test_tokens_that_are_none(decoder: Decoder, tokens: Any, field: str) -> None:
    with pytest.raises(TokenError, match=field):
        decoder.detokenize(tokens)


def test_tokens_of_any_kind(decoder: Decoder) -> None:
    ids = decoder.tokenize("abc", add_special=False)
    for kind in (np.int8, np.uint16, np.int64):
        assert decoder.detokenize(ids.astype(kind)) == "abc"
    assert decoder.detokenize([]) == ""


# --- cells


def test_it_waits_for_no_other_call(decoder: Decoder) -> None:
    begun, done = threading.Event(), threading.Event()

    def long_call() -> None:
        begun.set()
        assert done.wait(60)

    other = threading.Thread(target=lambda: decoder._turn.run(long_call))
    other.start()
    try:
        assert begun.wait(60)
        assert decoder.tokenize("a").tolist() == [1, 4]
        assert decoder._turn._lock.locked()
    finally:
        done.set()
        other.join()


def test_one_cell_serves_who_calls_one_after_the_other(decoder: Decoder) -> None:
    assert decoder.processes["texts"] == []
    for _ in range(3):
        decoder.tokenize("a")
    assert len(decoder.processes["texts"]) == 1
    assert decoder.processes["memory"] == []


def test_a_spawned_cell_has_no_weights(smollm: Path, make: Open) -> None:
    decoder = make(smollm, 1, start="spawn", awake=False)
    assert len(decoder.tokenize("Hello")) == 1
    (pid,) = decoder.processes["texts"]
    assert smollm.name not in Path(f"/proc/{pid}/maps").read_text()
    assert smollm.name in Path(f"/proc/{decoder.pid}/maps").read_text()


def test_a_cell_that_is_killed_costs_nothing(decoder: Decoder, store: Store) -> None:
    before = decoder.tokenize("abc").tolist()
    kill(decoder.processes["texts"][0])
    assert decoder.tokenize("abc").tolist() == before
    (report,) = reports_of(decoder, store)
    assert report.evidence.exit is Exit.KILLED


def test_a_cell_that_is_killed_at_work_costs_nothing(
    tiny: Path, make: Open, store: Store, dose_text: Dose, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    dose_text("ToTokens", "wait", once=str(tmp_path / "once"), fifo=str(fifo))
    decoder = make(tiny, 1, awake=False)
    found: list[list[int]] = []
    caller = threading.Thread(target=lambda: found.append(decoder.tokenize("abc").tolist()))
    caller.start()
    fifo.read_text()
    (pid,) = decoder.processes["texts"]
    assert decoder.tokenize("ab").tolist() == [1, 4, 5]  # in another cell, meanwhile
    os.kill(pid, signal.SIGKILL)
    caller.join(60)
    assert found == [[1, 4, 5, 6]]
    (report,) = reports_of(decoder, store)
    assert (report.evidence.exit, report.result) == (Exit.KILLED, "it was asked again in a new cell")


@pytest.mark.parametrize(
    ("asked", "how", "call"),
    [
        ("ToTokens", "segv", lambda d: d.tokenize("abc")),
        ("ToTokens", "many", lambda d: d.tokenize("abc")),
        ("ToTokens", "stranger", lambda d: d.tokenize("abc")),
        ("ToText", "segv", lambda d: d.detokenize([4])),
        ("ToText", "many", lambda d: d.detokenize([4])),
        ("AskSpecial", "stranger", lambda d: d.special_tokens),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_crash_or_a_lie_costs_one_call(
    tiny: Path,
    make: Open,
    store: Store,
    dose_text: Dose,
    tmp_path: Path,
    asked: str,
    how: str,
    call: Callable[[Decoder], object],
) -> None:
    dose_text(asked, how, once=str(tmp_path / "once"))
    decoder = make(tiny, 1, awake=False)
    with pytest.raises(CellDied):
        call(decoder)
    call(decoder)
    (report,) = reports_of(decoder, store)
    assert report.evidence.exit is (Exit.SIGNAL if how == "segv" else Exit.PROTOCOL)
    assert report.result == "this call failed"


def test_a_cell_with_another_vocabulary(tiny: Path, make: Open, dose_text: Dose) -> None:
    dose_text("info")
    with pytest.raises(CellDied, match="129 tokens in a vocabulary of 128"):
        make(tiny, 1, awake=False).tokenize("a")


def test_a_decoder_is_closed_in_the_middle_of_a_call(
    tiny: Path, make: Open, dose_text: Dose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crumplezone.workers.text.texts._PATIENCE", 0.2)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    dose_text("ToTokens", "wait", fifo=str(fifo))
    decoder = make(tiny, 1, awake=False)
    errors: list[BaseException] = []

    def call() -> None:
        try:
            decoder.tokenize("abc")
        except Exception as error:  # noqa: BLE001 - told below
            errors.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    fifo.read_text()
    (pid,) = decoder.processes["texts"]
    decoder.close()
    caller.join(60)
    assert wait_for_end(pid)
    (error,) = errors
    assert isinstance(error, UsageError | CellDied)
    with pytest.raises(UsageError, match="closed"):
        decoder.tokenize("a")
