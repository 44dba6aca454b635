"""Batches as arrays: taking, leaving out, and what can be decoded apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crumplezone.errors import InputError
from crumplezone.workers.batch.columns import UNSET, Columns, Indices, infer_positions

Sets = list[tuple[int, ...]]

set_lists = st.lists(st.sets(st.integers(0, 7), min_size=1, max_size=3).map(tuple), max_size=30)


def batch(sets: Sets) -> Columns:
    n = len(sets)
    return Columns(
        tokens=np.arange(100, 100 + n, dtype=np.int32),
        embd=None,
        positions=np.arange(n, dtype=np.int32),
        n_seq_id=np.array([len(each) for each in sets], np.int32),
        seq_ids=np.array([seq_id for each in sets for seq_id in each], np.int32),
        outputs=np.arange(n) % 3 == 0,
    )


def sets_of(columns: Columns) -> Sets:
    ends = np.cumsum(columns.n_seq_id)
    return [tuple(ids.tolist()) for ids in np.split(columns.seq_ids, ends[:-1])] if len(columns) else []


def tokens_of(columns: Columns) -> list[int]:
    assert columns.tokens is not None
    return [int(token) for token in columns.tokens]


@given(sets=set_lists, data=st.data())
@settings(max_examples=60, deadline=None)
def test_take_takes_every_column(sets: Sets, data: st.DataObject) -> None:
    columns = batch(sets)
    rows = data.draw(st.lists(st.integers(0, len(sets) - 1)) if sets else st.just([]))
    taken = columns.take(np.array(rows, np.intp))
    assert sets_of(taken) == [sets[i] for i in rows]
    assert tokens_of(taken) == [100 + i for i in rows]
    assert taken.positions.tolist() == rows
    assert taken.outputs.tolist() == [i % 3 == 0 for i in rows]


@given(sets=set_lists, gone=st.sets(st.integers(0, 7)))
@settings(max_examples=60, deadline=None)
def test_without_drops_sequences_and_tokens_that_nobody_has(sets: Sets, gone: set[int]) -> None:
    left = {i: kept for i, each in enumerate(sets) if (kept := tuple(s for s in each if s not in gone))}
    columns = batch(sets).without(gone)
    assert sets_of(columns) == list(left.values())
    assert columns.positions.tolist() == list(left)


@given(sets=set_lists)
@settings(max_examples=60, deadline=None)
def test_groups_share_nothing_and_cannot_be_smaller(sets: Sets) -> None:
    columns = batch(sets)
    groups = columns.groups()
    assert sorted(i for group in groups for i in group.tolist()) == list(range(len(sets)))
    assert [int(group[0]) for group in groups] == sorted(int(group[0]) for group in groups)
    members = [{s for i in group for s in sets[i]} for group in groups]
    assert sum(map(len, members)) == len({s for each in sets for s in each})
    for group, whole in zip(groups, members, strict=True):
        assert group.tolist() == sorted(group.tolist())
        reached = set(sets[group[0]])
        for _ in group:
            reached |= {s for i in group for s in sets[i] if reached & set(sets[i])}
        assert reached == whole


def test_a_token_of_two_sequences_couples_them() -> None:
    columns = batch([(0,), (1,), (2,), (0, 2), (1,)])
    assert columns.coupled
    assert [group.tolist() for group in columns.groups()] == [[0, 2, 3], [1, 4]]
    alone = columns.alone(2)
    assert not alone.coupled
    assert (tokens_of(alone), alone.seq_ids.tolist()) == ([102, 103], [2, 2])
    assert columns.rows_of(2).tolist() == [2, 3]


@given(sets=set_lists.filter(bool), cut=st.integers(0, 30))
@settings(max_examples=30, deadline=None)
def test_concatenate_undoes_take(sets: Sets, cut: int) -> None:
    columns = batch(sets)
    parts = [columns.take(rows) for rows in np.split(np.arange(len(sets)), [cut])]
    whole = Columns.concatenate(parts)
    assert sets_of(whole) == sets
    assert tokens_of(whole) == tokens_of(columns)
    assert whole.outputs.tolist() == columns.outputs.tolist()


def test_embeddings_travel_too() -> None:
    one, nothing = np.ones(2, np.int32), np.zeros(2, np.int32)
    vectors = np.arange(6, dtype=np.float32).reshape(2, 3)
    columns = Columns(None, vectors, nothing, one, nothing, nothing == 0)
    for part in (columns.take(np.array([1])), columns.without([5]).take(np.array([1]))):
        assert part.tokens is None
        assert part.embd is not None
        assert part.embd.tolist() == [[3, 4, 5]]
    doubled = Columns.concatenate([columns, columns])
    assert doubled.embd is not None
    assert doubled.embd.shape == (4, 3)


@pytest.mark.parametrize("name", ["tokens", "embd", "n_seq_id", "seq_ids", "outputs"])
def test_columns_of_unequal_length_are_refused(name: str) -> None:
    arrays = {
        "tokens": np.zeros(2, np.int32),
        "embd": np.zeros((2, 4), np.float32),
        "positions": np.zeros(2, np.int32),
        "n_seq_id": np.ones(2, np.int32),
        "seq_ids": np.zeros(2, np.int32),
        "outputs": np.zeros(2, np.bool_),
    }
    Columns(**arrays)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"shape of (n_seq_id|" + name + ")"):
        Columns(**arrays | {name: arrays[name][:1]})


@pytest.mark.parametrize(("count", "seq_id"), [(0, 0), (-1, 0), (1, -1), (1, 256)])
def test_sets_want_sequences_that_can_be(count: int, seq_id: int) -> None:
    zeros = np.zeros(1, np.int32)
    columns = Columns(
        zeros,
        None,
        zeros,
        np.array([count], np.int32),
        np.array([seq_id] * max(count, 0), np.int32),
        zeros == 0,
    )
    with pytest.raises(InputError, match=r"\[0\]"):
        columns.sets()


@pytest.mark.parametrize(
    ("sets", "given_positions", "follows", "expected"),
    [
        ([(0,), (0,)], [None, None], None, [0, 1]),
        ([(0,), (1,), (0,)], [None, None, None], [5, 9], [5, 9, 6]),
        ([(0,), (0,), (0,)], [None, 20, None], [5], [5, 20, 21]),
        ([(0,), (0, 1), (1,)], [None, None, None], [5, 6], [5, 6, 7]),
        ([(1, 0), (0,)], [None, None], [5, 9], [9, 10]),  # the first sequence decides
        ([(7,)], [None], [5], [0]),  # a sequence that the decoder has not
        ([(0,), (0,)], [2**31 - 1, None], None, [2**31 - 1, 2**31 - 1]),  # nothing comes after
    ],
)
def test_positions_that_are_left_out(
    sets: Sets, given_positions: list[int | None], follows: list[int] | None, expected: list[int]
) -> None:
    columns = batch(sets)
    inferred = infer_positions(
        np.array([UNSET if each is None else each for each in given_positions], np.int32),
        columns.n_seq_id,
        columns.seq_ids,
        None if follows is None else np.array(follows, np.int32),
    )
    assert inferred.dtype == np.int32
    assert inferred.tolist() == expected


def test_owners_skip_tokens_of_no_sequence() -> None:
    counts = np.array([1, -3, 0, 2], np.int32)
    columns = Columns(None, None, counts, counts, np.array([4, 5, 6], np.int32), counts == 0)
    owners: Indices = columns.owners
    assert owners.tolist() == [0, 3, 3]
    assert columns.take(np.array([3, 1])).seq_ids.tolist() == [5, 6]
