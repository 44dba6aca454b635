"""Rows of a batch, cut into those of its sequences."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crumplezone.errors import InputError
from crumplezone.workers.batch.call import Rows
from crumplezone.workers.batch.columns import Columns
from crumplezone.workers.batch.results import Result, share_out
from crumplezone.workers.protocol.generate.sampling import Sampling

token = st.tuples(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.booleans())


@given(st.lists(token, min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_each_sequence_gets_its_own_rows_in_order(batch: list[tuple[list[int], bool]]) -> None:
    sets, outputs = [each for each, _ in batch], [output for _, output in batch]
    columns = Columns(
        tokens=np.zeros(len(batch), np.int32),
        embd=None,
        positions=np.arange(100, 100 + len(batch), dtype=np.int32),
        n_seq_id=np.array([len(each) for each in sets], np.int32),
        seq_ids=np.array([seq_id for each in sets for seq_id in each], np.int32),
        outputs=np.array(outputs),
    )
    places = [sum(outputs[:i]) for i in range(len(batch))]
    rows = Rows(np.arange(2.0 * sum(outputs), dtype=np.float32).reshape(-1, 2), None)
    shared = share_out(columns, rows)
    assert [each.seq_id for each in shared] == list(dict.fromkeys(i for each in sets for i in each))
    for each in shared:
        mine = [i for i, ids in enumerate(sets) for seq_id in ids if outputs[i] and seq_id == each.seq_id]
        assert each.positions.tolist() == [100 + i for i in mine]
        assert each.rows is not None
        assert each.rows.embeddings is None
        assert each.rows.logits is not None
        assert each.rows.logits.tolist() == [[2 * places[i], 2 * places[i] + 1] for i in mine]


def test_rows_are_asked_by_position() -> None:
    ones = np.ones(4, np.int32)
    columns = Columns(
        ones, None, ones.cumsum(dtype=np.int32), ones, np.array([0, 1, 0, 1]), np.array([True, False] * 2)
    )
    result = Result(share_out(columns, Rows(np.array([[5], [6]], np.float32), None)), [])
    assert [result.logits(0, pos).tolist() for pos in (1, 3, -1)] == [[5], [6], [6]]
    for seq_id, pos in ((0, 2), (0, -2), (1, 2), (1, -1), (2, -1)):
        with pytest.raises(InputError):
            result.logits(seq_id, pos)
    with pytest.raises(InputError, match="embeddings=True"):
        result.embeddings(0)


def test_numbers_of_numpy_are_numbers() -> None:
    given = Sampling(max_tokens=np.int16(3), temperature=np.float32(0.5), top_k=np.uint8(4))  # type: ignore[arg-type]
    assert given == Sampling(max_tokens=3, temperature=0.5, top_k=4)
    assert {type(given.max_tokens), type(given.temperature)} == {int, float}
    for none in (True, np.True_, np.float32("nan"), 10**400, "1", None, 1j):
        with pytest.raises(InputError, match=r"temperature is .*: must be a number from"):
            Sampling(temperature=none)  # type: ignore[arg-type]
