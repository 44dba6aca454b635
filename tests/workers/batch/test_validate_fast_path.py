"""What `validate` accepts at a glance is what its rules accept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crumplezone.workers.batch import validate as module
from crumplezone.workers.batch.columns import Columns
from crumplezone.workers.batch.validate import Capacity, Level, MemoryState, plainly_valid
from tests.support.batches import BOTH, LIMITS, N_SEQ_MAX, columns, held, random_batch, refused


def by_the_rules(batch: Columns, level: Level, limits: Capacity, memory: MemoryState) -> str:
    """Why the rules refuse it, without a glance before, or nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "plainly_valid", lambda *_: False)
        return refused(batch, level, limits=limits, memory=memory)


SPECIAL = [
    LIMITS,
    replace(LIMITS, n_vocab=100),
    replace(LIMITS, n_batch=8),
    replace(LIMITS, n_ubatch=4, causal=False),
    replace(LIMITS, n_ubatch=4, pooled=True),
    replace(LIMITS, n_seq_max=2),
    replace(LIMITS, n_ctx_seq=9),
    replace(LIMITS, n_ctx_seq=None),
    replace(LIMITS, has_encoder=True),
    replace(LIMITS, n_outputs_max=2),
    replace(LIMITS, n_pos_per_embd=4),
    replace(LIMITS, n_positions=9),
]


@given(seed=st.integers(0, 2**32), ends=st.lists(st.integers(-1, 9), min_size=N_SEQ_MAX, max_size=N_SEQ_MAX))
@settings(max_examples=150, deadline=None)
def test_what_a_glance_accepts_no_rule_refuses(seed: int, ends: list[int]) -> None:
    rng = np.random.default_rng(seed)
    pos_max = np.array(ends, np.int32)
    memory = MemoryState(np.minimum(pos_max, rng.integers(0, 9)), pos_max)
    batch = random_batch(rng, memory)
    for limits in SPECIAL:
        seen = plainly_valid(batch, limits, memory)
        for level in BOTH:
            why = by_the_rules(batch, level, limits, memory)
            assert not (seen and why), (limits, why)
            assert refused(batch, level, limits=limits, memory=memory) == why
    valid = not by_the_rules(batch, "strict", LIMITS, memory)
    assert plainly_valid(batch, LIMITS, memory) == (valid and batch.single and batch.tokens is not None)


PLAIN = columns([5, 6, 0], [[0], [0], [1]])
NOT_PLAIN = [
    (columns([5, 7, 0], [[0], [0], [1]]), LIMITS),
    (columns([5, 0, 0], [[0], [0], [1]]), LIMITS),
    (columns([5, 6, 0], [[0], [0], [1]], [1, 2, -1]), LIMITS),
    (columns([5, 6, 0], [[0], [0], [1]], [1, 128, 2]), LIMITS),
    (columns([5, 6, 10], [[0], [0], [-1]]), LIMITS),  # -1 is also where numpy keeps the last sequence
    (columns([5, 6, 0], [[0], [0], [N_SEQ_MAX]]), LIMITS),
    (columns([5, 0], [[0], [1, 1]]), LIMITS),
    (columns([]), LIMITS),
    (replace(PLAIN, embd=np.zeros((3, 32), np.float32)), LIMITS),
    (replace(PLAIN, tokens=None), LIMITS),
    (PLAIN, replace(LIMITS, n_batch=2)),
    (PLAIN, replace(LIMITS, n_ubatch=2, causal=False)),
    (PLAIN, replace(LIMITS, n_ubatch=2, pooled=True)),
    (PLAIN, replace(LIMITS, has_encoder=True)),
    (PLAIN, replace(LIMITS, n_outputs_max=0)),
    (PLAIN, replace(LIMITS, n_ctx_seq=6)),
    (PLAIN, replace(LIMITS, n_positions=6)),
]


@pytest.mark.parametrize(("batch", "limits"), NOT_PLAIN)
def test_what_a_rule_refuses_is_not_accepted_at_a_glance(batch: Columns, limits: Capacity) -> None:
    memory = held(s0=4, s3=9)
    assert plainly_valid(PLAIN, LIMITS, memory)
    assert by_the_rules(batch, "strict", limits, memory)
    assert not plainly_valid(batch, limits, memory)
