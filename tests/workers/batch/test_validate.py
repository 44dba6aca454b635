"""What a batch is refused for, and whether llama.cpp agrees."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crumplezone.errors import InputError, PositionError
from crumplezone.workers.batch.batch import Batch
from crumplezone.workers.batch.columns import Columns
from crumplezone.workers.batch.validate import Capacity, MemoryState, validate
from tests.support.batches import BOTH, INT_MAX, LIMITS, N_SEQ_MAX, columns, held, random_batch, refused


def embeddings(embd: Any, tokens: Any = None) -> Columns:
    n = len(embd)
    return replace(columns(list(range(n))), tokens=tokens, embd=np.array(embd, np.float32))


# Memory, a batch, why it is refused, and whether llama.cpp does that itself (rc -1).
POSITIONS: list[tuple[MemoryState, Columns, str, bool]] = [
    (held(), columns([0, 1, 2]), "", False),
    (held(s0=9), columns([10, 11]), "", False),
    (held(), columns([-1]), "positions[0] is -1: must be 0: sequence 0 is empty in memory", False),
    (held(), columns([-2]), "positions[0] is -2: must be 0", True),
    (held(), columns([-(2**31)]), f"positions[0] is {-(2**31)}: must be 0", True),
    (held(), columns([0, 0]), "positions[1] is 0: must be 1", False),
    (held(), columns([5, 6]), "positions[0] is 5: must be 0", False),
    (held(), columns([0, 2]), "positions[1] is 2: must be 1", True),
    (held(), columns([1, 0]), "positions[0] is 1: must be 0", True),
    (held(), columns([INT_MAX]), f"positions[0] is {INT_MAX}: must be 0", False),
    (held(), columns([0, INT_MAX]), f"positions[1] is {INT_MAX}: must be 1", False),  # its int32 overflows
    (held(s0=9), columns([9]), "positions[0] is 9: must be 10: sequence 0 ends at 9 in memory", True),
    (held(s0=9), columns([11]), "positions[0] is 11: must be 10", True),
    (held(s0=9), columns([0, 10], [[1], [0]]), "", False),
    (held(s0=9), columns([10, 10], [[0], [1]]), "positions[1] is 10: must be 0: sequence 1 is empty", False),
    (held(s0=4, s1=9), columns([5, 10, 7], [[0], [1], [0]]), "positions[2] is 7: must be 6", True),
    (held(s0=4, s1=4), columns([5], [[0, 1]]), "", False),
    (held(s0=4), columns([5], [[0, 1]]), "positions[0] is 5: must be 0: sequence 1 is empty", True),
]


@pytest.mark.parametrize(("memory", "batch", "why", "native"), POSITIONS)
def test_positions(memory: MemoryState, batch: Columns, why: str, native: bool) -> None:
    answer = refused(batch, memory=memory)
    assert why in answer
    assert bool(answer) == bool(why)
    assert bool(refused(batch, "native", memory=memory)) == native
    assert not refused(batch, "off", memory=memory)


def test_sequences_that_share_a_token_must_have_begun_alike() -> None:
    trimmed = MemoryState(np.array([0, 3, -1, -1], np.int32), np.array([9, 9, -1, -1], np.int32))
    batch = columns([10], [[0, 1]])
    for level in BOTH:
        why = refused(batch, level, memory=trimmed)
        assert "seq_ids[0] is [0, 1]: memory must hold the same positions" in why


OTHERS: list[tuple[Columns, str, bool]] = [
    (columns([]), "InputError: batch is 'empty'", True),
    (replace(columns([0]), tokens=None), "TokenError: tokens is None", True),
    (
        columns([0, 1], tokens=[5, 128]),
        "TokenError: tokens[1] is 128: must be from 0 to n_vocab - 1 = 127",
        True,
    ),
    (columns([0], tokens=[-1]), "TokenError: tokens[0] is -1", True),
    (columns([0], [[4]]), "SequenceIdError: seq_ids[0] is 4: must be from 0 to n_seq_max - 1 = 3", True),
    (columns([0, 0], [[0], [1, -1]]), "SequenceIdError: seq_ids[1] is -1", True),
    (columns([0], [[]]), "SequenceIdError: n_seq_id[0] is 0: must be at least 1", False),
    (
        replace(columns([0, 1], [[], [0]]), n_seq_id=np.array([-1, 1])),
        "SequenceIdError: n_seq_id[0] is -1",
        False,
    ),
    (replace(columns([0, 0, 0], [[], [0], [1, 2]]), n_seq_id=np.array([-1, 1, 2])), "SequenceIdError", False),
    (columns([0, 0], [[0], [1, 2, 1]]), "SequenceIdError: seq_ids[1] is 1: must name each", False),
    (columns(list(range(65))), "InputError: n_tokens is 65: must be at most n_batch = 64", False),
    (
        embeddings(np.zeros((2, 31))),
        "TokenError: shape of embd is (2, 31): must be (n, n_embd) = (n, 32)",
        False,
    ),
    (
        embeddings(np.zeros((2, 32)), np.zeros(2, np.int32)),
        "TokenError: embd is (2, 32): must be None",
        False,
    ),
    (embeddings(np.zeros((2, 32)), np.full(2, -1)), "TokenError: embd is (2, 32): must be None", False),
    (embeddings(np.zeros((2, 32)), np.array([-1, 5])), "TokenError: embd is (2, 32): must be None", True),
    (embeddings([[0] * 32, [np.nan] * 32]), "TokenError: embd[1] is 'NaN or infinity'", False),
    (embeddings([[0] * 31 + [np.inf]]), "TokenError: embd[0]", False),
    (embeddings(np.zeros((2, 32))), "", False),
]


@pytest.mark.parametrize(("batch", "why", "native"), OTHERS)
def test_what_is_not_a_position(batch: Columns, why: str, native: bool) -> None:
    answer = refused(batch)
    assert answer.startswith(why)
    assert bool(answer) == bool(why)
    assert bool(refused(batch, "native")) == native
    assert not refused(batch, "off")


MANY = Batch.of([list(range(17))], "all").columns()


@pytest.mark.parametrize(
    ("limits", "memory", "encode", "why"),
    [
        (LIMITS, held(), False, ""),
        (replace(LIMITS, causal=False), held(), False, "n_tokens is 17: must be at most n_ubatch = 16"),
        (replace(LIMITS, pooled=True), held(), False, "n_tokens is 17: must be at most n_ubatch = 16"),
        (replace(LIMITS, has_encoder=True), held(), True, "n_tokens is 17: must be at most n_ubatch = 16"),
        (LIMITS, held(), True, "operation is 'encode': the model has no encoder"),
        (
            replace(LIMITS, has_encoder=True),
            held(),
            False,
            "n_seq_max is 4: must be 1 for an encoder-decoder",
        ),
        (
            replace(LIMITS, has_encoder=True, n_seq_max=1),
            held(),
            False,
            "seq_ids is 0: must be encoded before",
        ),
        (replace(LIMITS, has_encoder=True, has_decoder=False), held(), False, ""),
        (replace(LIMITS, n_outputs_max=16), held(), False, "number of outputs is 17: must be at most"),
        (replace(LIMITS, n_outputs_max=17, all_outputs=True), held(), False, ""),
        (replace(LIMITS, n_ctx_seq=16), held(), False, "positions[16] is 16: the context holds 16 tokens"),
        (replace(LIMITS, n_ctx_seq=17), held(), False, ""),
        (replace(LIMITS, n_ctx_seq=None), held(), False, ""),
        (replace(LIMITS, n_positions=16), held(), False, "positions[16] is 16: must be below 16"),
        (replace(LIMITS, n_positions=17), held(), False, ""),
    ],
)
def test_what_model_and_context_can_take(
    limits: Capacity, memory: MemoryState, encode: bool, why: str
) -> None:
    answer = refused(MANY, limits=limits, memory=memory, encode=encode)
    assert why in answer
    assert bool(answer) == bool(why)
    assert not refused(MANY, "native", limits=limits, memory=memory, encode=encode)


def test_outputs_count_if_all_are() -> None:
    few = Batch.of([list(range(10))]).columns()
    assert not refused(few, limits=replace(LIMITS, n_outputs_max=1))
    assert "number of outputs is 10" in refused(
        few, limits=replace(LIMITS, n_outputs_max=1, all_outputs=True)
    )


def test_what_was_removed_from_the_front_makes_room() -> None:
    limits = replace(LIMITS, n_ctx_seq=16)
    batch = columns([20, 21, 22])
    room = MemoryState(np.array([7, -1, -1, -1], np.int32), np.array([19, -1, -1, -1], np.int32))
    assert not refused(batch, limits=limits, memory=room)
    full = replace(room, pos_min=np.array([6, -1, -1, -1], np.int32))
    assert "positions[2] is 22: the context holds 16" in refused(batch, limits=limits, memory=full)


def test_a_decoder_wants_its_encoder_first() -> None:
    limits = replace(LIMITS, has_encoder=True, n_seq_max=1)
    assert not refused(MANY, limits=limits, memory=replace(held(), encoded=frozenset({0})))


def test_m_rope_positions_may_jump_but_not_stay() -> None:
    limits = replace(LIMITS, n_pos_per_embd=4)
    assert not refused(columns([10, 17, 18]), limits=limits, memory=held(s0=4))
    for level in BOTH:
        assert "positions[0] is 4" in refused(columns([4]), level, limits=limits, memory=held(s0=4))
        assert "positions[1] is 9" in refused(columns([10, 9]), level, limits=limits, memory=held(s0=4))
    assert "positions[1] is 10" in refused(columns([10, 10]), limits=limits, memory=held(s0=4))
    assert not refused(columns([10, 10]), "native", limits=limits, memory=held(s0=4))
    image = embeddings(np.zeros((2, 32)))
    assert "this model takes 4 (M-RoPE)" in refused(image, limits=limits)
    assert not refused(image, "native", limits=limits, memory=held(s0=0))
    assert "positions[0] is 0" in refused(image, "native", limits=limits, memory=held(s0=1))


@given(seed=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_strict_refuses_whatever_native_does(seed: int) -> None:
    rng = np.random.default_rng(seed)
    memory = held(s0=int(rng.integers(-1, 9)), s1=int(rng.integers(-1, 9)))
    batch = random_batch(rng, memory)
    if refused(batch, "native", memory=memory):
        assert refused(batch, memory=memory)


class Native:
    """llama.cpp itself, for `ask_llama_cpp`."""

    def __init__(self, model: str, *, unified: bool) -> None:
        import llama_cpp as C  # noqa: N812 - the C API, which no supervisor loads

        self.c: Any = C
        self._log = C.llama_log_callback(lambda *_: None)
        C.llama_log_set(self._log, None)
        self._model = C.llama_model_load_from_file(model.encode(), C.llama_model_default_params())
        params = C.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 1024, 64, 16, N_SEQ_MAX
        params.kv_unified, params.n_threads = unified, 1
        self.context: Any = C.llama_init_from_model(self._model, params)
        self.memory: Any = C.llama_get_memory(self.context)
        self.limits = replace(LIMITS, n_ctx_seq=int(C.llama_n_ctx_seq(self.context)))

    def held(self) -> MemoryState:
        ends = [
            [get(self.memory, i) for i in range(N_SEQ_MAX)]
            for get in (self.c.llama_memory_seq_pos_min, self.c.llama_memory_seq_pos_max)
        ]
        return MemoryState(np.array(ends[0], np.int32), np.array(ends[1], np.int32))

    def decode(self, batch: Columns) -> int:
        def pointer(array: Any, kind: Any) -> Any:
            return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))

        begins = (np.cumsum(batch.n_seq_id) - batch.n_seq_id).astype(np.uint64)
        rows = batch.seq_ids.ctypes.data + 4 * begins
        native = self.c.llama_batch(n_tokens=len(batch))
        if batch.tokens is not None:
            native.token = pointer(batch.tokens, ctypes.c_int32)
        if batch.embd is not None:
            native.embd = pointer(batch.embd, ctypes.c_float)
        native.pos = pointer(batch.positions, ctypes.c_int32)
        native.n_seq_id = pointer(batch.n_seq_id, ctypes.c_int32)
        native.seq_id = pointer(rows, ctypes.POINTER(ctypes.c_int32))
        native.logits = pointer(batch.outputs, ctypes.c_int8)
        return int(self.c.llama_decode(self.context, native))

    def finite(self, batch: Columns) -> bool:
        rows = [self.c.llama_get_logits_ith(self.context, int(i)) for i in np.flatnonzero(batch.outputs)]
        return all(np.isfinite(np.ctypeslib.as_array(row, (128,))).all() for row in rows)


def ask_llama_cpp(model: str, n_batches: int, seed: int, *, unified: bool) -> None:
    """Compare verdicts with return codes; print how often each was seen. Runs in a process of its own."""
    native, rng = Native(model, unified=unified), np.random.default_rng(seed)
    seen = Counter[str]()
    for _ in range(n_batches):
        memory = native.held()
        batch = random_batch(rng, memory)
        try:
            validate(batch, native.limits, memory)
        except InputError as error:
            if refused(batch, "native", limits=native.limits, memory=memory):
                assert native.decode(batch) == -1, (batch, memory)
                seen["refused by both"] += 1
            elif (
                isinstance(error, PositionError)
                and 0 <= batch.positions.min() <= batch.positions.max() < 2**30
            ):
                assert native.decode(batch) in (0, 1), (batch, memory)
                seen["refused by us"] += 1
                native.c.llama_memory_clear(native.memory, True)  # it holds nonsense now
        else:
            rc = native.decode(batch)
            assert rc in (0, 1), (rc, batch, memory)
            assert rc or native.finite(batch), (batch, memory)
            seen[f"accepted, rc {rc}"] += 1
        if rng.random() < 0.03:
            native.c.llama_memory_seq_rm(
                native.memory, int(rng.integers(N_SEQ_MAX)), int(rng.integers(-1, 9)), -1
            )
        if rng.random() < 0.02:
            native.c.llama_memory_clear(native.memory, True)
    print(dict(seen))


@pytest.mark.parametrize("unified", [False, True])
def test_llama_cpp_agrees(tiny: Path, unified: bool) -> None:
    call = f"ask_llama_cpp({str(tiny)!r}, 500, 0, unified={unified})"
    code = f"from tests.workers.batch.test_validate import ask_llama_cpp; {call}"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert run.returncode == 0, run.stderr
    for verdict in ("accepted, rc 0", "refused by us", "refused by both"):
        assert verdict in run.stdout
