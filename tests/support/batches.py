"""Batches, valid and not, and the limits that they are held against."""

from __future__ import annotations

from typing import Any

import numpy as np

from crumplezone.errors import InputError
from crumplezone.workers.batch.batch import Batch
from crumplezone.workers.batch.columns import Columns
from crumplezone.workers.batch.validate import Capacity, Level, MemoryState, validate

INT_MAX = 2**31 - 1
BOTH: tuple[Level, ...] = ("strict", "native")
N_SEQ_MAX = 4
LIMITS = Capacity(n_vocab=128, n_embd=32, n_batch=64, n_ubatch=16, n_seq_max=N_SEQ_MAX, n_ctx_seq=256)


def held(**ends: int) -> MemoryState:
    """Memory in which sequence ``sN`` ends at the given position."""
    pos_max = np.array([ends.get(f"s{i}", -1) for i in range(N_SEQ_MAX)], np.int32)
    return MemoryState(np.minimum(pos_max, 0), pos_max)


def columns(
    positions: list[int], sets: list[list[int]] | None = None, tokens: list[int] | None = None
) -> Columns:
    sets = sets or [[0]] * len(positions)
    return Columns(
        tokens=np.array(tokens or range(len(positions)), np.int32),
        embd=None,
        positions=np.array(positions, np.int32),
        n_seq_id=np.array([len(each) for each in sets], np.int32),
        seq_ids=np.array([seq_id for each in sets for seq_id in each], np.int32),
        outputs=np.arange(len(positions)) == len(positions) - 1,
    )


def refused(
    batch: Columns,
    level: Level = "strict",
    *,
    limits: Capacity = LIMITS,
    memory: MemoryState | None = None,
    **more: Any,
) -> str:
    """Why it was, or nothing."""
    try:
        validate(batch, limits, memory or MemoryState.empty(N_SEQ_MAX), level, **more)
    except InputError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def random_batch(rng: np.random.Generator, memory: MemoryState) -> Columns:
    """A valid batch, most often with something wrong."""
    n, n_seqs = int(rng.integers(1, 25)), int(rng.integers(1, N_SEQ_MAX + 1))
    embd = rng.random() < 0.1
    batch = Batch(64, N_SEQ_MAX + 2, 32 if embd else 0)
    for _ in range(n):
        seq_id, output = int(rng.integers(n_seqs)), bool(rng.random() < 0.5)
        if embd:
            batch.add_embd(seq_id, rng.standard_normal(32), output=output)
        else:
            batch.add_token(seq_id, int(rng.integers(128)), output=output)
    for _ in range(int(rng.choice([0, 0, 0, 0, 3]))):
        batch.add_seq(int(rng.integers(n)), int(rng.integers(n_seqs)))
    if rng.random() < 0.1 and not embd:
        batch.add_sequence(int(rng.integers(n_seqs)), rng.integers(0, 128, 64 - n if n < 64 else 1))
    good = batch.columns(memory.next_positions)
    for _ in range(int(rng.choice([0, 0, 1, 1, 2]))):
        _spoil(good, int(rng.integers(len(good))), rng)
    return good


def _spoil(batch: Columns, i: int, rng: np.random.Generator) -> None:
    pos, seq_ids = batch.positions, batch.seq_ids
    match int(rng.integers(7)):
        case 0:
            pos[i] += rng.integers(-3, 4)
        case 1:
            pos[i] = pos[i - 1]
        case 2:
            pos[i] = rng.choice([-1, -2, 0, INT_MAX, INT_MAX - 1, -INT_MAX])
        case 3:
            pos += rng.integers(-2, 3)
        case 4:
            rng.shuffle(pos)
        case 5:
            seq_ids[i] = rng.choice([-1, 0, 1, N_SEQ_MAX, N_SEQ_MAX - 1, INT_MAX])
        case 6 if batch.tokens is not None:
            batch.tokens[i] = rng.choice([-1, 127, 128, INT_MAX])
