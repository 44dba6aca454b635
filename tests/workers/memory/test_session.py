"""A decoder's memory outlives its cells: kills, crashes, resizes, adapters and threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crumplezone import Batch, Decoder, Rung
from crumplezone.errors import InputError, MemoryLostError
from crumplezone.reports.records.report import Exit
from crumplezone.reports.store.store import Store
from tests.support.decoders import Dose, Open, held, kill, reports_of, say
from tests.support.models.tiny_gguf import write_tiny_lora
from tests.support.native.decode_poison import Poison

WORDS = [4, 5, 6, 7, 8, 9, 10, 11]
Logits = dict[int, npt.NDArray[np.float32]]


def close(one: Any, other: Any) -> None:
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-2)


def batch_of(tokens: dict[int, list[int]]) -> Batch:
    batch = Batch(sum(map(len, tokens.values())), 4)
    for seq_id, each in tokens.items():
        batch.add_sequence(seq_id, each)
    return batch


# --- kills


def chat(decoder: Decoder, n_steps: int, before: Callable[[int], None]) -> tuple[list[list[int]], Logits]:
    """Four sequences, greedily, with a tail that is taken back and a copy now and then."""
    following = {seq_id: [1, 30 + seq_id] for seq_id in range(4)}
    said: list[list[int]] = []
    for step in range(n_steps):
        before(step)
        if step % 15 == 14:
            last = decoder.memory.pos_max(1)
            assert decoder.memory.remove(1, last - 3)
        if step % 40 == 39:
            decoder.memory.copy(0, 3)
        result = decoder.decode(batch_of(following))
        assert result.errors == {}
        logits = {seq_id: result.logits(seq_id) for seq_id in range(4)}
        following = {seq_id: [int(row.argmax())] for seq_id, row in logits.items()}
        said.append([tokens[0] for tokens in following.values()])
    return said, logits


@pytest.mark.parametrize("checkpoint_every", [0, 64])
def test_a_cell_that_is_killed_at_every_tenth_step(checkpoint_every: int, tiny: Path, make: Open) -> None:
    undisturbed, logits = chat(make(tiny), 200, lambda _: None)
    decoder = make(tiny, checkpoint_every=checkpoint_every)
    pids = set()

    def disturb(step: int) -> None:
        pids.add(decoder.pid)
        if step % 10 == 9:
            kill(decoder)

    again, last = chat(decoder, 200, disturb)
    assert again == undisturbed
    for seq_id in range(4):
        close(last[seq_id], logits[seq_id])
    assert len(pids) == 20


def test_a_large_model_that_is_killed(smollm: Path, make: Open, store: Store) -> None:
    undisturbed, logits = chat(make(smollm), 20, lambda _: None)
    decoder = make(smollm, checkpoint_every=16)
    again, last = chat(decoder, 20, lambda step: kill(decoder) if step in (7, 16) else None)
    assert again == undisturbed
    for seq_id in range(4):
        np.testing.assert_allclose(last[seq_id], logits[seq_id], rtol=1e-2, atol=0.1)
    assert [report.evidence.exit for report in reports_of(decoder, store)] == [Exit.KILLED] * 2


OPERATIONS = ["cut", "drop", "copy", "keep", "slide", "load", "kill"]
words = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=1)
step = st.one_of(st.tuples(st.just("say"), words), st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 99)))
steps = st.lists(step, min_size=3, max_size=12).filter(
    lambda each: [name for name, _ in each].count("kill") < 3
)


class Twins:
    """Two decoders that are told the same, of which one is killed now and then."""

    def __init__(self, plain: Decoder, killed: Decoder) -> None:
        self.plain, self.killed = plain, killed
        self.token = 3

    def do(self, name: str, what: Any) -> None:
        """One step, of whatever the memory allows."""
        if name == "kill":
            kill(self.killed)
        elif name == "say":
            self._say({seq_id: self._words(n) for seq_id, n in what})
        else:
            seq_id, other = what % 4, (what + 1 + what // 4 % 3) % 4
            first, last = held(self.plain)[seq_id]
            for decoder in (self.plain, self.killed):
                self._operate(decoder, name, seq_id, other, (first + last + 1) // 2)
        assert held(self.killed) == held(self.plain)

    def _operate(self, decoder: Decoder, name: str, seq_id: int, other: int, middle: int) -> None:
        memory = decoder.memory
        match name:
            case "cut":
                assert memory.remove(seq_id, middle)
            case "drop":
                assert memory.remove(seq_id)
            case "copy":
                memory.copy(seq_id, other)
            case "keep":
                memory.keep(seq_id)
            case "slide":
                memory.remove(seq_id, middle, middle + 1)
                assert memory.shift(seq_id, middle + 1, -1, -1)
            case "load":
                memory.load(other, memory.save(seq_id))

    def _words(self, n: int) -> list[int]:
        self.token = 3 + (self.token * 7 + n) % 120
        return [3 + (self.token + i) % 120 for i in range(n)]

    def _say(self, words: dict[int, list[int]]) -> None:
        one, other = self.plain.decode(batch_of(words)), self.killed.decode(batch_of(words))
        assert one.errors == other.errors == {}
        for seq_id in words:
            close(other.logits(seq_id), one.logits(seq_id))


@pytest.mark.parametrize("checkpoint_every", [0, 8])
def test_whatever_was_done_survives(checkpoint_every: int, tiny: Path, make: Open) -> None:
    plain, killed = make(tiny), make(tiny, checkpoint_every=checkpoint_every)

    @settings(max_examples=12, deadline=None)
    @given(steps)
    def check(steps: list[tuple[str, Any]]) -> None:
        twins = Twins(plain, killed)
        for decoder in (plain, killed):
            decoder.memory.clear()
        for name, what in steps:
            twins.do(name, what)
        twins.do("say", [(seq_id, 2) for seq_id in range(4)])

    check()


# --- crashes


def test_the_innocent_go_on_and_the_guilty_are_as_they_were(
    tiny: Path, make: Open, store: Store, dose: Dose
) -> None:
    reference = make(tiny)
    dose(Poison(token=99))
    decoder = make(tiny)
    for each in (reference, decoder):
        for seq_id in range(3):
            say(each, seq_id, *WORDS, seq_id)
    result = decoder.decode(batch_of({0: [20, 21], 1: [22, 99, 23], 2: [24]}))
    assert list(result.errors) == [1]
    assert [result.rung(i) for i in range(3)] == [Rung.SAFE, Rung.TOKEN, Rung.SAFE]
    assert held(decoder) == [(0, 10), (0, 8), (0, 9), (-1, -1)]
    expected = reference.decode(batch_of({0: [20, 21], 2: [24]}))
    for seq_id in (0, 2):
        close(result.logits(seq_id), expected.logits(seq_id))
    for seq_id in range(3):
        close(say(decoder, seq_id, 30), say(reference, seq_id, 30))
    assert [report.blamed for report in reports_of(decoder, store)] == [[1]] * 3


def test_a_memory_that_kills_every_cell_is_lost_once(
    tiny: Path, make: Open, store: Store, dose: Dose, tmp_path: Path
) -> None:
    now = tmp_path / "now"
    dose(Poison(token=42, after=str(now)))
    decoder = make(tiny, spares=0)
    say(decoder, 0, *WORDS)
    say(decoder, 1, 42)
    now.touch()
    kill(decoder)
    with pytest.raises(MemoryLostError, match="it is empty now: decode from 0 again"):
        decoder.memory.copy(0, 2)
    assert held(decoder) == [(-1, -1)] * 4
    written = reports_of(decoder, store)
    assert [report.evidence.exit for report in written] == [Exit.KILLED, Exit.SIGNAL, Exit.SIGNAL]
    assert say(decoder, 0, *WORDS).shape == (128,)
    assert held(decoder)[0] == (0, 7)


@pytest.mark.parametrize("writable", [True, False])
def test_a_memory_that_is_lost_in_the_middle_of_a_decode(
    writable: bool, tiny: Path, make: Open, store: Store, dose: Dose, tmp_path: Path
) -> None:
    if not writable:
        store.directory.write_text("in the way")
    now = tmp_path / "now"
    dose(Poison(token=42, after=str(now)))
    decoder = make(tiny, spares=0)
    say(decoder, 1, 42)
    now.touch()
    kill(decoder)
    with pytest.raises(MemoryLostError) as caught:
        say(decoder, 0, *WORDS)
    assert (str(store.directory) in str(caught.value)) is writable
    assert held(decoder) == [(-1, -1)] * 4
    assert say(decoder, 0, *WORDS).shape == (128,)


def test_a_crash_in_an_operation_is_done_again(tiny: Path, make: Open, store: Store) -> None:
    decoder, reference = make(tiny), make(tiny)
    for each in (decoder, reference):
        say(each, 0, *WORDS)
    operations: list[Callable[[Decoder], object]] = [
        lambda d: d.memory.copy(0, 1),
        lambda d: d.memory.remove(0, 4),
        lambda d: d.memory.shift(1, 0, -1, 2),
        lambda d: d.memory.load(2, d.memory.save(0)),
        lambda d: d.set_adapters(),
        lambda d: d.resize(n_ctx=2048),
    ]
    for work in operations:
        kill(decoder)
        for each in (decoder, reference):
            work(each)
        assert held(decoder) == held(reference) != [(-1, -1)] * 4
    for seq_id in range(3):
        close(say(decoder, seq_id, 30), say(reference, seq_id, 30))
    assert [report.evidence.exit for report in reports_of(decoder, store)] == [Exit.KILLED] * 6


def test_a_job_in_between_leaves_the_memory_alone(tiny: Path, make: Open) -> None:
    decoder, reference = make(tiny), make(tiny)
    for each in (decoder, reference):
        say(each, 0, *WORDS)
    pid = decoder.pid
    list(decoder.generate(["abc", "defg"], max_tokens=5))
    decoder.encode(Batch.of([[7, 8]]))
    assert held(decoder) == held(reference)
    close(say(decoder, 0, 30), say(reference, 0, 30))
    assert decoder.pid == pid


def test_tokens_that_several_sequences_share(tiny: Path, make: Open, store: Store) -> None:
    """With a stream for each sequence, llama.cpp has no slot for these (rc 1): each is decoded alone."""
    decoder, reference = make(tiny), make(tiny)
    batch = Batch(2, 3)
    batch.add_token(0, 5)
    batch.add_seq(batch.add_token(0, 6, output=True), 2)
    batch.set_pos(1, 1)
    say(decoder, 2, 5)
    with pytest.raises(InputError, match="must hold the same positions"):
        decoder.decode(batch)
    batch.add_seq(0, 2)
    decoder.memory.clear()
    result = decoder.decode(batch)
    assert result.errors == {}
    assert {result.rung(i) for i in (0, 2)} == {Rung.SAFE}
    expected = say(reference, 0, 5, 6)
    for seq_id in (0, 2):
        close(result.logits(seq_id, 1), expected)
    assert held(decoder) == [(0, 1), (-1, -1), (0, 1), (-1, -1)]
    assert store.rows() == []


# --- another context


def test_memory_goes_over_into_another_context(tiny: Path, make: Open) -> None:
    decoder, reference = make(tiny, 2), make(tiny, 4)
    for each in (decoder, reference):
        say(each, 0, *WORDS)
        say(each, 1, *WORDS[:3])
        each.memory.copy(0, 1)
    pid = decoder.pid
    decoder.resize(n_ctx=1024, n_seq_max=4)
    assert decoder.pid == pid
    assert held(decoder) == held(reference)
    for seq_id in range(4):
        close(say(decoder, seq_id, 30), say(reference, seq_id, 30))
    kill(decoder)
    for seq_id in range(4):
        close(say(decoder, seq_id, 31), say(reference, seq_id, 31))
    for seq_id in (2, 3):
        decoder.memory.remove(seq_id)
    decoder.resize(n_seq_max=2)
    assert (decoder.info.n_ctx_seq, held(decoder, 2)) == (512, [(0, 9), (0, 9)])
    with pytest.raises(InputError, match="seq_id is 2"):
        decoder.memory.pos_max(2)
    close(say(decoder, 1, 32), say(reference, 1, 32))


def test_a_context_that_is_too_small_changes_nothing(tiny: Path, make: Open, store: Store) -> None:
    decoder = make(tiny, 2, n_ctx_seq=512)
    say(decoder, 1, *[3 + i % 100 for i in range(300)])
    bad: dict[str, dict[str, int]] = {
        "sequence 1 is held; remove it first": {"n_seq_max": 1},
        "sequence 1 holds 300 tokens, and there would be room for 256": {"n_ctx": 512},
        "n_ctx is -1": {"n_ctx": -1},
        "n_seq_max is 0": {"n_seq_max": 0},
        "n_seq_max is 257": {"n_seq_max": 257},
    }
    for message, sizes in bad.items():
        with pytest.raises(InputError, match=message):
            decoder.resize(**sizes)
    assert (decoder.info.n_ctx_seq, held(decoder, 2)) == (512, [(-1, -1), (0, 299)])
    reference = make(tiny, 2, n_ctx_seq=512)
    say(reference, 1, *[3 + i % 100 for i in range(300)])
    close(say(decoder, 1, 30), say(reference, 1, 30))
    assert store.rows() == []


def test_saved_states_do_not_fit_another_number_of_sequences(tiny: Path, make: Open) -> None:
    decoder, reference = make(tiny, 2), make(tiny, 2)
    for each in (decoder, reference):
        say(each, 0, *WORDS)
        each.memory.load(1, each.memory.save(0))
    with pytest.raises(InputError, match="a saved state is not accepted: it needs the n_seq_max"):
        decoder.resize(n_ctx=1024, n_seq_max=4)
    assert held(decoder, 2) == [(0, 7), (0, 7)]
    decoder.resize(n_ctx=2048)
    for seq_id in (0, 1):
        close(say(decoder, seq_id, 30), say(reference, seq_id, 30))


# --- adapters


def test_adapters_are_set_again_in_a_new_cell(tiny: Path, make: Open, tmp_path: Path) -> None:
    lora = write_tiny_lora(tmp_path / "lora.gguf")
    decoder, reference = make(tiny), make(tiny)
    for each in (decoder, reference):
        plain = say(each, 0, *WORDS)
        each.set_adapters({lora: 1.0}, control=np.linspace(-1, 1, 64))
        adapted = say(each, 1, *WORDS)
        assert not np.allclose(adapted, plain, atol=0.1)
    kill(decoder)  # sequence 0 was computed without them, and is so again
    for seq_id in (0, 1):
        close(say(decoder, seq_id, 30), say(reference, seq_id, 30))
    decoder.resize(n_ctx=2048)
    close(say(decoder, 2, *WORDS), adapted)
    decoder.set_adapters()
    close(say(decoder, 3, *WORDS), plain)


def test_what_is_no_adapter_changes_nothing(tiny: Path, make: Open, tmp_path: Path, store: Store) -> None:
    lora = write_tiny_lora(tmp_path / "lora.gguf")
    broken, other = tmp_path / "broken.gguf", write_tiny_lora(tmp_path / "other.gguf", n_embd=48)
    broken.write_bytes(lora.read_bytes()[:-300])
    decoder = make(tiny)
    decoder.set_adapters({lora: 0.5})
    say(decoder, 0, *WORDS)
    adapted = say(decoder, 1, *WORDS)
    pid = decoder.pid
    bad: list[tuple[str, dict[str, Any]]] = [
        ("is not a LoRA adapter of this model", {"lora": {tiny: 1.0}}),
        ("is not a LoRA adapter of this model", {"lora": {other: 1.0}}),
        ("is not a LoRA adapter of this model", {"lora": {lora: 2.0, broken: 1.0}, "control": np.ones(64)}),
        ("lora is", {"lora": {tmp_path / "nowhere.gguf": 1.0}}),
        ("scale of", {"lora": {lora: float("nan")}}),
        (r"control is \(33,\)", {"control": np.ones(33)}),
        ("must be finite", {"control": np.full(32, np.inf)}),
        (r"layers\[0\] is -1", {"control": np.ones(32), "layers": (-1, 2)}),
    ]
    for message, arguments in bad:
        with pytest.raises(InputError, match=message):
            decoder.set_adapters(**arguments)
    close(say(decoder, 2, *WORDS), adapted)
    close(say(decoder, 0, 30), say(decoder, 1, 30))
    assert decoder.pid == pid
    assert store.rows() == []
