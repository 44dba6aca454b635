"""`Decoder.memory` in real cells: what each operation does, and what never reaches llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crumplezone import Batch, Decoder
from crumplezone.errors import CrumplezoneError, InputError, UsageError
from crumplezone.reports.store.store import Store
from tests.support.decoders import Open, held, kill, say
from tests.support.models.tiny_gguf import write_tiny_mamba

WORDS = [4, 5, 6, 7, 8, 9, 10, 11]


def close(one: Any, other: Any) -> None:
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-2)


@pytest.fixture
def mamba(tmp_path: Path) -> Path:
    return write_tiny_mamba(tmp_path / "mamba.gguf")


# --- what is done


def test_decode_appends(tiny: Path, make: Open) -> None:
    decoder = make(tiny)
    assert held(decoder) == [(-1, -1)] * 4
    whole = say(decoder, 0, *WORDS)
    assert held(decoder)[0] == (0, 7)
    for token in WORDS:
        last = say(decoder, 1, token)
    assert held(decoder)[1] == (0, 7)
    close(last, whole)
    decoder.memory.clear()
    assert held(decoder) == [(-1, -1)] * 4
    close(say(decoder, 0, *WORDS), whole)


def test_a_tail_that_was_removed_was_never_there(tiny: Path, make: Open) -> None:
    decoder = make(tiny)
    say(decoder, 0, *WORDS)
    say(decoder, 1, *WORDS[:5], 99)
    assert decoder.memory.remove(0, 5)
    assert held(decoder)[:2] == [(0, 4), (0, 5)]
    close(say(decoder, 0, 99, 12), say(decoder, 1, 12))
    assert decoder.memory.remove(0)
    assert decoder.memory.remove(0)
    assert held(decoder)[:2] == [(-1, -1), (0, 6)]


def test_a_copy_goes_its_own_way(tiny: Path, make: Open) -> None:
    decoder = make(tiny)
    say(decoder, 3, 42)
    say(decoder, 0, *WORDS)
    decoder.memory.copy(0, 3)
    assert held(decoder) == [(0, 7), (-1, -1), (-1, -1), (0, 7)]
    close(say(decoder, 3, 20), say(decoder, 0, 20))
    assert not np.allclose(say(decoder, 3, 21), say(decoder, 0, 22), atol=0.1)
    decoder.memory.copy(1, 3)  # an empty one
    assert held(decoder)[3] == (-1, -1)


def test_only_one_is_kept(tiny: Path, make: Open) -> None:
    decoder, reference = make(tiny), make(tiny)
    for each in (decoder, reference):
        for seq_id in range(4):
            say(each, seq_id, 10 + seq_id, *WORDS)
    decoder.memory.keep(2)
    assert held(decoder) == [(-1, -1), (-1, -1), (0, 8), (-1, -1)]
    close(say(decoder, 2, 30), say(reference, 2, 30))
    kill(decoder)
    close(say(decoder, 2, 31), say(reference, 2, 31))
    assert held(decoder) == [(-1, -1), (-1, -1), (0, 10), (-1, -1)]


def test_positions_are_relative(tiny: Path, make: Open) -> None:
    """A llama knows distances only: moved as a whole, a sequence goes on as before."""
    decoder = make(tiny)
    for seq_id in (0, 1):
        say(decoder, seq_id, *WORDS)
    assert decoder.memory.shift(0, 0, -1, 7)
    assert held(decoder)[:2] == [(7, 14), (0, 7)]
    close(say(decoder, 0, 50), say(decoder, 1, 50))
    assert decoder.memory.shift(0, -1, -1, -7)
    assert held(decoder)[0] == (0, 8)
    close(say(decoder, 0, 51), say(decoder, 1, 51))


def test_a_context_shift(tiny: Path, make: Open) -> None:
    """The middle is removed and the tail moves down: so a full context goes on, crash or no crash."""
    decoder, reference = make(tiny, 1, n_ctx_seq=256), make(tiny, 1, n_ctx_seq=256)
    for each in (decoder, reference):
        say(each, 0, *[3 + i % 100 for i in range(256)])
        with pytest.raises(InputError, match="the context holds 256 tokens"):
            say(each, 0, 5)
        assert each.memory.remove(0, 4, 100)
        assert each.memory.shift(0, 100, -1, -96)
        assert held(each, 1) == [(0, 159)]
    kill(decoder)
    close(say(decoder, 0, 5), say(reference, 0, 5))
    assert held(decoder, 1) == [(0, 160)]


# --- states


def test_a_state_goes_into_another_decoder_bit_by_bit(smollm: Path, make: Open) -> None:
    first, second = make(smollm, 2), make(smollm, 2)
    say(first, 1, 100, 200, 300, 400)
    state = first.memory.save(1)
    say(second, 0, 55)
    second.memory.load(0, state)
    assert held(second, 2) == [(0, 3), (-1, -1)]
    expected = say(first, 1, 500)
    np.testing.assert_array_equal(say(second, 0, 500), expected)
    second.memory.load(1, state)
    kill(second)
    np.testing.assert_array_equal(say(second, 1, 500), expected)
    assert held(second, 2) == [(0, 4), (0, 4)]


def test_a_state_has_the_copies_and_shifts_before_it(tiny: Path, make: Open) -> None:
    """llama.cpp alone does these at the next decode, and saves what was there before them."""
    first, second = make(tiny), make(tiny)
    say(first, 0, *WORDS)
    first.memory.copy(0, 2)
    second.memory.load(1, first.memory.save(2))
    first.memory.shift(0, 0, -1, 5)
    second.memory.load(0, first.memory.save(0))
    assert held(second)[:2] == [(5, 12), (0, 7)]
    close(say(second, 0, 20), say(first, 0, 20))
    close(say(second, 1, 20), say(first, 2, 20))


def test_a_state_is_not_overwritten_by_a_copy_before_it(tiny: Path, make: Open) -> None:
    first, second = make(tiny), make(tiny)
    say(first, 1, 33, 34)
    for seq_id in range(4):
        say(second, seq_id, *WORDS)
    second.memory.copy(0, 2)
    second.memory.load(2, first.memory.save(1))
    assert held(second) == [(0, 7), (0, 7), (0, 1), (0, 7)]
    close(say(second, 2, 20), say(first, 1, 20))


def test_an_empty_state(tiny: Path, make: Open) -> None:
    decoder = make(tiny)
    say(decoder, 0, *WORDS)
    decoder.memory.load(0, decoder.memory.save(1))
    assert held(decoder)[0] == (-1, -1)
    kill(decoder)
    say(decoder, 0, *WORDS)
    assert decoder.memory.shift(0, 0, -1, 1)


@pytest.mark.parametrize("cut", [1, 4, 8, 500, -1])
def test_a_state_that_was_cut_short(cut: int, tiny: Path, make: Open) -> None:
    decoder, reference = make(tiny), make(tiny)
    for each in (decoder, reference):
        say(each, 0, *WORDS)
        say(each, 1, *WORDS)
    with pytest.raises(InputError, match="no state of this model and context, or cut short"):
        decoder.memory.load(1, decoder.memory.save(0)[:cut])
    assert held(decoder)[:2] == [(0, 7), (-1, -1)]
    close(say(decoder, 0, 20), say(reference, 0, 20))
    assert say(decoder, 1, 4).shape == (128,)


def test_a_state_that_is_none(tiny: Path, make: Open, store: Store) -> None:
    decoder, other = make(tiny, 4), make(tiny, 2)
    say(decoder, 0, *WORDS)
    say(other, 0, *WORDS)
    pid = decoder.pid
    rng = np.random.default_rng(0)
    for state in (b"\0" * 100, b"\xff" * 1000, rng.bytes(5000), other.memory.save(0)):
        with pytest.raises(InputError, match="no state of this model and context"):
            decoder.memory.load(1, state)
    for nothing in (b"", "text", None):
        with pytest.raises(InputError, match="state"):
            decoder.memory.load(1, nothing)  # type: ignore[arg-type]
    assert held(decoder)[:2] == [(0, 7), (-1, -1)]
    assert decoder.pid == pid
    assert store.rows() == []


# --- what is refused


BAD: dict[str, Callable[[Decoder], object]] = {
    "seq_id is 4: must be from 0 to 3": lambda d: d.memory.remove(4),
    "seq_id is -1": lambda d: d.memory.remove(-1),
    "seq_id is 1.0": lambda d: d.memory.pos_max(1.0),  # type: ignore[arg-type]
    "seq_id is True": lambda d: d.memory.pos_min(True),
    "seq_id is 300": lambda d: d.memory.keep(300),
    "seq_id is 5": lambda d: d.memory.save(5),
    "seq_id is 6": lambda d: d.memory.load(6, b"x"),
    "begin is -2: must be from -1": lambda d: d.memory.remove(0, -2),
    "end is -5: must be from -1": lambda d: d.memory.remove(0, 0, -5),
    "end is 2147483648": lambda d: d.memory.remove(0, 0, 2**31),
    "source is 9": lambda d: d.memory.copy(9, 0),
    "target is 4": lambda d: d.memory.copy(0, 4),
    "target is 0: must be another sequence": lambda d: d.memory.copy(0, 0),
    "begin is -3": lambda d: d.memory.shift(0, -3, -1, 1),
    "delta is 0.5": lambda d: d.memory.shift(0, 0, -1, 0.5),  # type: ignore[arg-type]
    "delta is -3: moves positions to -1..4": lambda d: d.memory.shift(0, 2, -1, -3),
    "delta is 2147483647: moves positions to": lambda d: d.memory.shift(0, 0, -1, 2**31 - 1),
    "delta is -1: position 3 is held already": lambda d: d.memory.shift(0, 4, -1, -1),
    "delta is 2: position 4 is held already": lambda d: d.memory.shift(0, 0, 4, 2),
}


def test_arguments_are_refused_by_name(tiny: Path, make: Open, store: Store) -> None:
    decoder = make(tiny)
    say(decoder, 0, *WORDS)
    pid = decoder.pid
    decoder.memory.shift(0, 0, -1, 1)
    decoder.memory.shift(0, 0, -1, -1)
    for message, work in BAD.items():
        with pytest.raises(InputError) as caught:
            work(decoder)
        assert str(caught.value).startswith(message)
    assert decoder.memory.remove(1, 3, 3)
    assert decoder.memory.remove(0, 5, 2)
    assert decoder.memory.shift(1, 0, -1, 100)  # nothing is there
    assert held(decoder)[:2] == [(0, 7), (-1, -1)]
    assert decoder.pid == pid
    assert store.rows() == []


def test_use_after_close(tiny: Path, make: Open) -> None:
    decoder = make(tiny)
    memory = decoder.memory
    decoder.close()
    for work in (
        memory.clear,
        lambda: memory.remove(0),
        lambda: memory.copy(0, 1),
        lambda: memory.pos_max(0),
        lambda: memory.save(0),
        lambda: decoder.resize(n_ctx=512),
        decoder.set_adapters,
    ):
        with pytest.raises(UsageError, match="closed"):
            work()


# --- recurrent models


def test_a_recurrent_memory_cannot_be_cut(mamba: Path, make: Open) -> None:
    decoder, reference = make(mamba), make(mamba)
    for each in (decoder, reference):
        say(each, 0, *WORDS)
    for begin, end in ((5, -1), (7, 8), (1, 100)):
        assert not decoder.memory.remove(0, begin, end)
        assert decoder.memory.pos_max(0) == 7
    close(say(decoder, 0, 20), say(reference, 0, 20))
    kill(decoder)
    close(say(decoder, 0, 21), say(reference, 0, 21))
    decoder.memory.copy(0, 1)
    close(say(decoder, 1, 22), say(reference, 0, 22))
    assert decoder.memory.remove(0)
    assert decoder.memory.pos_max(0) == -1


def test_a_copied_recurrent_state_can_be_saved(mamba: Path, make: Open) -> None:
    decoder, other = make(mamba, 2), make(mamba, 2)
    say(decoder, 0, *WORDS)
    decoder.memory.copy(0, 1)
    with pytest.raises(CrumplezoneError, match="needs a sequence that is empty"):
        decoder.memory.save(1)
    say(decoder, 0, 20)
    other.memory.load(0, decoder.memory.save(1))
    close(say(other, 0, 20), say(decoder, 1, 20))


@pytest.mark.parametrize("recurrent", [False, True])
def test_half_of_a_refused_batch_is_taken_back(
    recurrent: bool, tiny: Path, mamba: Path, make: Open, store: Store
) -> None:
    model = mamba if recurrent else tiny
    decoder, reference = make(model, n_batch=4), make(model, n_batch=4)
    for each in (decoder, reference):
        say(each, 0, *WORDS)
        say(each, 1, *WORDS)
    pid = decoder.pid
    batch = Batch(16, 2)
    for seq_id, begin in ((0, 8), (1, 8)):
        batch.add_sequence(seq_id, WORDS)
        for i in range(8):
            batch.set_pos(len(batch) - 8 + i, begin + i)
    batch.set_pos(6, 100)  # in the second native call of sequence 0: a gap
    result = decoder.decode(batch, level="off")
    assert list(result.errors) == [0]
    assert "invalid (rc -1)" in str(result.errors[0])
    assert held(decoder)[:2] == [(7 if recurrent else 0, 7), (15 if recurrent else 0, 15)]
    assert (decoder.pid == pid) is not recurrent  # its cell could only be given up
    close(say(decoder, 0, 20), say(reference, 0, 20))
    assert result.logits(1).shape == (128,)
    close(result.logits(1), say(reference, 1, *WORDS))
    assert store.rows() == []
