"""Continuous batching in a cell: who joins, leaves and shares, and that none of it changes a text."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crumplezone import Batch
from crumplezone.diagnostics.replay.replay import native_calls
from crumplezone.diagnostics.replay.script import script
from crumplezone.errors import CellDied
from crumplezone.reports.records.report import BatchRecord, Exit
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.workers.batch.call import DecodeOptions, RefusedError
from crumplezone.workers.cells.decode_client import DecodeClient
from crumplezone.workers.model.limits import Limits
from crumplezone.workers.model.settings import configure
from crumplezone.workers.native.decode_cell import DecodeCell
from crumplezone.workers.native.engine import engine
from crumplezone.workers.native.engine.prefix import TILE
from crumplezone.workers.protocol.generate.messages import BESIDE, Generated, Join
from crumplezone.workers.protocol.generate.records import generating as recorded
from crumplezone.workers.protocol.generate.sampling import Sampling
from crumplezone.workers.protocol.messages import MemoryOperation, Request
from tests.support.decoders import Plant, report_of
from tests.support.models.tiny_gguf import write_tiny_llama, write_tiny_mamba

CHUNK = 128
STEPS = 12
HOT = Sampling(
    temperature=0.8,
    top_p=0.9,
    min_p=0.01,
    repeat_penalty=1.2,
    frequency_penalty=0.1,
    presence_penalty=0.1,
    seed=7,
)

LONG = Sampling(100)  # more than a reply brings

Make = Callable[..., "Driver"]


class HastyCell(DecodeCell):
    """To which every native call takes long."""

    def handle(self, request: Request) -> msgspec.Struct:
        engine._GROUP_S = 0
        return super().handle(request)


class Driver:
    """A cell, the sequences in it, and what they have got so far."""

    def __init__(self, model: Path, n_seq: int) -> None:
        config = configure(model, n_ctx=256 * n_seq, n_batch=CHUNK, n_seq_max=n_seq, n_threads=1)
        self.client = DecodeClient(config, Limits(60, None), None)
        self.tokens: dict[int, list[int]] = {}
        self.running: set[int] = set()
        self._joins: list[tuple[Join, npt.NDArray[np.int32]]] = []
        self._reset = True

    def join(
        self, seq_id: int, prompt: Sequence[int], sampling: Sampling, drawn: Sequence[int] = (), **asked: Any
    ) -> None:
        tokens = np.array([*prompt, *drawn], np.int32)
        self._joins.append((Join(seq_id, len(tokens), len(prompt), sampling, **asked), tokens))
        self.tokens[seq_id] = []
        self.running.add(seq_id)

    def reset(self) -> None:
        self._reset = True
        self.running.clear()

    def step(self, steps: int = STEPS, *, leaves: Sequence[int] = ()) -> dict[int, list[int]]:
        """One control message; what each sequence got."""
        joins, reset = self._joins, self._reset
        self._joins, self._reset = [], False
        generated: Generated = self.client.generate(joins, steps, CHUNK, leaves=leaves, reset=reset)
        self.running -= {*leaves, *(each.seq_id for each in generated.progress if each.finished)}
        for each in generated.progress:
            self.tokens[each.seq_id] += each.tokens
        return {each.seq_id: each.tokens for each in generated.progress}

    def finish(self) -> dict[int, list[int]]:
        while self.running:
            self.step()
        return self.tokens

    def sent(self) -> list[tuple[int, int]]:
        """Sequence and position of every token in the latest native call."""
        batch = self.client.last_batch(CHUNK, [])
        return list(zip(batch.seq_ids, batch.positions, strict=True))

    def alone(self, prompt: Sequence[int], sampling: Sampling, drawn: Sequence[int] = ()) -> list[int]:
        """A prompt by itself, from empty memory: what follows what was drawn."""
        self.reset()
        self.join(0, prompt, sampling, drawn)
        return self.finish()[0]


@pytest.fixture
def drive() -> Iterator[Make]:
    made: list[Driver] = []

    def make(model: Path, n_seq: int = 4) -> Driver:
        made.append(Driver(model, n_seq))
        return made[-1]

    yield make
    for driver in made:
        driver.client.close()


def words(n: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(3, 128, n).tolist()
    return tokens


# --- drawing


def test_a_sequence_continued_at_any_token_is_the_same(tiny: Path, drive: Make) -> None:
    driver, prompt = drive(tiny, 1), words(9)
    whole = driver.alone(prompt, HOT)
    assert len(set(whole)) > 20
    for cut in range(1, len(whole)):
        assert driver.alone(prompt, HOT, whole[:cut]) == whole[cut:]


def test_the_script_of_a_crash_draws_the_same(tiny: Path, drive: Make) -> None:
    driver = drive(tiny, 2)
    prompts = {0: (words(9), HOT), 1: (words(5, 1), Sampling(20, repeat_penalty=1.3))}
    generating = []
    for seq_id, (prompt, sampling) in prompts.items():
        driver.join(seq_id, prompt, sampling)
        tokens = np.array(prompt, np.int32)
        generating.append(recorded(Join(seq_id, len(tokens), len(tokens), sampling), tokens))
    batch = BatchRecord([], [], [], [], "generate", CHUNK, generating=generating)
    text = script(report_of(batch, str(tiny)))
    text = text.replace(f"in range({native_calls(batch)})", "in range(100)")  # it stops where the crash was
    shown = subprocess.run(
        [sys.executable, "-c", text + "print(SEQUENCES)"], capture_output=True, text=True, timeout=60
    )
    ends = driver.finish()
    assert str({i: prompt + ends[i] for i, (prompt, _) in prompts.items()}) in shown.stdout, shown.stderr


@pytest.mark.parametrize("sampling", [Sampling(8), replace(HOT, max_tokens=8)])
def test_no_token_is_drawn_from_nan(sampling: Sampling, drive: Make, tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "nan.gguf", n_vocab=128)
    norm = np.ones(32, np.float32)
    model.write_bytes(model.read_bytes().replace(norm.tobytes(), (norm * np.nan).tobytes()))
    with pytest.raises(CellDied) as died:
        drive(model, 1).alone(words(5), sampling)
    assert Incident.of(died.value).evidence.result().exit == Exit.NON_FINITE


# --- when a reply comes


def test_the_first_token_comes_at_once(tiny: Path, drive: Make) -> None:
    driver = drive(tiny)
    driver.join(0, words(9), LONG)
    assert [len(tokens) for tokens in driver.step().values()] == [1]
    assert len(driver.step()[0]) > 1
    driver.join(1, words(9, 1), LONG)
    assert [len(tokens) for tokens in driver.step().values()] == [1, 1]


def test_the_last_token_comes_at_once(tiny: Path, drive: Make) -> None:
    driver = drive(tiny)
    driver.join(0, words(9), LONG)
    driver.join(1, words(9, 1), Sampling(3))
    driver.step(1)
    assert [len(tokens) for tokens in driver.step(50).values()] == [2, 2]
    assert driver.running == {0}


def test_a_nudge_ends_one_call_early(tiny: Path, drive: Make) -> None:
    driver = drive(tiny)
    driver.join(0, words(9), LONG)
    driver.step(1)
    assert driver.client.cell is not None
    driver.client.cell.arena.nudge()
    assert len(driver.step(50)[0]) == 1
    assert len(driver.step(50)[0]) > 1
    driver.join(1, words(3 * BESIDE // 2, 1), LONG)
    driver.client.cell.arena.nudge()
    assert [len(tokens) for tokens in driver.step(50).values()] == [1, 0]  # it is being read


def test_a_nudged_cell_may_have_nothing_to_tell(tiny: Path, drive: Make) -> None:
    driver = drive(tiny)
    for seq_id in range(2):
        driver.join(seq_id, words(CHUNK + 70, seq_id), LONG)
    driver.client.start().arena.nudge()
    assert driver.step() == {0: [], 1: []}
    assert {seq_id: len(tokens) for seq_id, tokens in driver.step().items()} == {0: 1, 1: 0}


def test_what_takes_long_is_told_bit_by_bit(tiny: Path, drive: Make, plant: Plant) -> None:
    plant("decode", f"{__name__}:HastyCell")
    driver = drive(tiny, 1)
    driver.join(0, words(9), LONG)
    assert [len(driver.step()[0]) for _ in range(3)] == [1, 1, 1]


# --- joining and leaving


def test_a_long_prompt_stalls_nobody(tiny: Path, drive: Make) -> None:
    driver, prompts = drive(tiny), [words(9), words(7, 1), words(3 * BESIDE // 2, 2), words(5, 3)]
    alone = [driver.alone(prompt, Sampling(30)) for prompt in prompts]
    for seq_id in range(2):
        driver.join(seq_id, prompts[seq_id], Sampling(30))
    driver.step()
    driver.join(2, prompts[2], Sampling(30))
    driver.join(3, prompts[3], Sampling(30))
    assert {seq_id: len(tokens) for seq_id, tokens in driver.step(1).items()} == {0: 1, 1: 1, 2: 0, 3: 0}
    assert len(driver.sent()) == 2  # behind a native call of tiles, as many as may be beside
    assert {seq_id: len(tokens) for seq_id, tokens in driver.step(1).items()} == {0: 1, 1: 1, 2: 2, 3: 1}
    assert list(driver.finish().values()) == alone


def test_who_leaves_is_gone_and_its_place_is_free(tiny: Path, drive: Make) -> None:
    driver, prompts = drive(tiny), [words(9, seed) for seed in range(4)]
    alone = [driver.alone(prompt, Sampling(40)) for prompt in prompts]
    for seq_id in range(3):
        driver.join(seq_id, prompts[seq_id], Sampling(40))
    driver.step()
    assert driver.step(leaves=[1]).keys() == {0, 2}
    driver.join(1, prompts[3], Sampling(40))
    driver.join(2, prompts[1], Sampling(40))
    assert driver.step(leaves=[2]).keys() == {0, 1, 2}
    assert driver.finish() == {0: alone[0], 1: alone[3], 2: alone[1]}
    driver.join(3, prompts[2], Sampling(40))
    driver.step()
    assert driver.step(leaves=[3]) == {}


def test_a_refused_batch_leaves_no_sequence_behind(tiny: Path, drive: Make) -> None:
    driver, prompt = drive(tiny), words(20)
    alone = driver.alone(prompt, Sampling(10))
    driver.join(1, [*prompt[:10], 5000, 3], Sampling(10))
    with pytest.raises(RefusedError) as refused:
        driver.step()
    assert refused.value.rc == -1
    assert driver.alone(prompt, Sampling(10)) == alone


# --- shared prefixes


def test_a_prefix_of_several_prompts_is_computed_once(tiny: Path, drive: Make) -> None:
    driver, prompts = drive(tiny), [words(32) + words(8, seed) for seed in range(1, 5)]
    alone = [driver.alone(prompt, Sampling(12)) for prompt in prompts]
    driver.reset()
    for seq_id in range(3):
        driver.join(seq_id, prompts[seq_id], Sampling(12))
    driver.step(1)
    assert driver.sent() == [(0, position) for position in range(40)]
    driver.step(1)
    others = [(seq_id, position) for seq_id in (1, 2) for position in range(32, 40)]
    assert driver.sent() == [(0, 40), *others]
    driver.join(3, prompts[3], Sampling(12))
    driver.step(1)
    assert driver.sent()[3:] == [(3, position) for position in range(32, 40)]
    assert list(driver.finish().values()) == alone


def test_a_place_keeps_what_its_next_prompt_begins_with(tiny: Path, drive: Make) -> None:
    driver, prompt = drive(tiny, 1), words(150)
    answer = driver.alone(prompt, Sampling(10))
    for longer in (prompt, prompt + answer + words(5, 1), prompt[:3] + words(9, 2)):
        driver.join(0, longer, Sampling(10))
        driver.step(1)
        known = (prompt + answer)[:-1]  # the last token was drawn, but not decoded
        shared = next(
            i for i, token in enumerate(longer) if i == len(longer) - 1 or [token] != known[i : i + 1]
        )
        if len(longer) != len(prompt):  # what is computed alike in both: whole tiles
            shared = min(shared, len(prompt), len(longer)) // TILE * TILE
        assert driver.sent() == [(0, position) for position in range(shared, len(longer))]
        prompt, answer = longer, driver.finish()[0]
        assert driver.alone(prompt, Sampling(10)) == answer


def test_a_sequence_that_left_still_lends_its_prefix(tiny: Path, drive: Make) -> None:
    driver, prompt = drive(tiny, 2), words(100)
    alone = driver.alone(prompt, Sampling(9))
    driver.reset()
    driver.join(0, prompt, Sampling(9))
    driver.join(1, prompt, Sampling(9))  # waits
    driver.step(1, leaves=[])
    driver.step(1, leaves=[0])
    assert driver.sent() == [(1, 99)]
    assert driver.finish()[1] == alone


@pytest.mark.parametrize("operation", ["clear", "decode"])
def test_nothing_is_kept_of_a_memory_that_others_changed(operation: str, tiny: Path, drive: Make) -> None:
    driver, prompt = drive(tiny, 1), words(20)
    driver.alone(prompt, Sampling(2))
    if operation == "clear":
        driver.client.operate(MemoryOperation("clear"))
    else:
        driver.client.send(Batch.of([words(20, 1)]).columns(), DecodeOptions())
    driver.join(0, prompt, Sampling(2))
    driver.step(1)
    assert len(driver.sent()) == 20


def test_a_recurrent_model_shares_nothing(drive: Make, tmp_path: Path) -> None:
    driver, prompts = drive(write_tiny_mamba(tmp_path / "mamba.gguf")), [words(30), words(30)]
    alone = driver.alone(prompts[0], Sampling(6))
    for seq_id, prompt in enumerate(prompts):
        driver.join(seq_id, prompt, Sampling(6))
    driver.step(1)
    assert len(driver.sent()) == 60
    assert list(driver.finish().values()) == [alone, alone]


@pytest.fixture
def pair(tiny: Path, drive: Make) -> tuple[Driver, Driver]:
    """One in which sequences share, and one in which each is alone. The same for all examples."""
    return drive(tiny, 4), drive(tiny, 1)


STEMS = [words(n, seed=n) for n in (3, 17, 40)]
prompts_with_stems = st.builds(
    lambda stem, cut, tail: [*stem[:cut], *tail],
    st.sampled_from(STEMS),
    st.integers(0, 40),
    st.lists(st.integers(3, 127), min_size=1, max_size=12),
)
rounds = st.lists(
    st.tuples(
        st.dictionaries(st.integers(0, 3), st.tuples(prompts_with_stems, st.integers(1, 9)), max_size=4),
        st.sets(st.integers(0, 3), max_size=1),  # to give up
        st.integers(1, 9),  # native calls
    ),
    max_size=4,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds)
def test_sharing_changes_no_text(
    pair: tuple[Driver, Driver],
    rounds: list[tuple[dict[int, tuple[list[int], int]], set[int], int]],
) -> None:
    together, lone = pair
    asked: dict[int, tuple[list[int], int]] = {}
    ended: list[tuple[list[int], int, list[int]]] = []

    def step(steps: int, leaves: set[int]) -> None:
        running = together.running - leaves
        together.step(steps, leaves=sorted(leaves))
        ended.extend((*asked[seq_id], together.tokens[seq_id]) for seq_id in running - together.running)

    for joins, leaves, steps in rounds:
        for seq_id in joins.keys() - together.running:
            asked[seq_id] = joins[seq_id]
            together.join(seq_id, asked[seq_id][0], Sampling(asked[seq_id][1]))
            leaves.discard(seq_id)
        step(steps, leaves & together.running)
    while together.running:
        step(STEPS, set())
    for prompt, max_tokens, tokens in ended:
        assert tokens == lone.alone(prompt, Sampling(max_tokens))


def test_a_shared_prefix_of_real_weights(smollm: Path, drive: Make) -> None:
    driver = drive(smollm)
    stem = words(48)
    prompts = [stem + words(4, seed) for seed in range(1, 5)]
    alone = [driver.alone(prompt, Sampling(8)) for prompt in prompts]
    for seq_id, prompt in enumerate(prompts):
        driver.join(seq_id, prompt, Sampling(8))
    driver.step(1)
    ends = [(seq_id, position) for seq_id in range(4) for position in range(48, 52)]
    assert driver.sent() == ends  # place 0 has the stem of the last prompt that was alone in it
    assert list(driver.finish().values()) == alone


def test_neither_cache_nor_company_nor_a_cut_changes_a_long_prompt_s_text(smollm: Path, drive: Make) -> None:
    """With flash attention, tokens are rounded by how many are computed together: see `TILE`."""
    driver = drive(smollm, 4)
    prompt, drawing = words(2 * TILE + 40), Sampling(30, temperature=0.9, seed=5)
    alone = driver.alone(prompt, drawing)
    driver.reset()
    for seq_id, n in enumerate((TILE + 9, 3, 2 * TILE)):
        driver.join(seq_id, prompt[:n] if n > TILE else words(n, 1), Sampling(40))
    driver.step(1)
    driver.join(3, prompt, drawing)
    assert driver.finish()[3] == alone
    for cut in (1, 17, 29):
        assert alone[:cut] + driver.alone(prompt, drawing, alone[:cut]) == alone
