"""What a batch accepts, and how it says no."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from crumplezone.errors import BatchFullError, InputError, PositionError, SequenceIdError, TokenError
from crumplezone.workers.batch.batch import Batch, Item, Outputs, Tokens
from crumplezone.workers.batch.columns import LLAMA_MAX_SEQ


def tokens_of(batch: Batch) -> list[int]:
    tokens = batch.columns().tokens
    assert tokens is not None
    return [int(token) for token in tokens]


def test_of_numbers_the_sequences_and_counts_the_tokens() -> None:
    batch = Batch.of([[1, 2, 3], np.array([4, 5], np.int64)])
    assert len(batch) == batch.n_tokens == 5
    assert batch.n_seq_max == 2
    assert batch.seq_ids == [0, 1]
    columns = batch.columns()
    assert tokens_of(batch) == [1, 2, 3, 4, 5]
    assert columns.positions.tolist() == [0, 1, 2, 0, 1]
    assert columns.seq_ids.tolist() == [0, 0, 0, 1, 1]
    assert columns.outputs.tolist() == [False, False, True, False, True]
    assert {columns.positions.dtype, columns.seq_ids.dtype, columns.n_seq_id.dtype} == {np.dtype(np.int32)}


@pytest.mark.parametrize(
    ("output", "expected"),
    [("last", [False, False, True]), ("all", [True] * 3), ("none", [False] * 3)],
)
def test_outputs(output: Outputs, expected: list[bool]) -> None:
    assert Batch.of([[7, 8, 9]], output).columns().outputs.tolist() == expected


def test_sequences_keep_the_order_in_which_they_were_added() -> None:
    batch = Batch(10, 4)
    for seq_id in (3, 0, 2, 3):
        batch.add_sequence(seq_id, [seq_id])
    assert batch.seq_ids == [3, 0, 2]
    assert tokens_of(batch) == [3, 0, 2, 3]


def test_a_sequence_that_is_there_goes_on() -> None:
    batch = Batch(10, 2)
    batch.add_sequence(0, [1, 2])
    batch.add_sequence(1, [3])
    batch.add_sequence(0, [4])
    assert batch.columns(np.array([10, 20], np.int32)).positions.tolist() == [10, 11, 20, 12]


def test_items_show_what_was_added() -> None:
    batch = Batch(4, 3)
    assert batch.add_token(0, 11) == 0
    assert batch.add_token(2, 12, pos=7, output=True) == 1
    batch.add_seq(1, 0)
    batch.add_seq(1, 0)
    batch.add_seq(1, 2)
    assert list(batch) == [Item(0, 11, None, (0,), False), Item(1, 12, 7, (2, 0), True)]
    columns = batch.columns()
    assert columns.n_seq_id.tolist() == [1, 2]
    assert columns.seq_ids.tolist() == [0, 2, 0]
    assert batch.seq_ids == [0, 2]


def test_outputs_and_positions_can_be_set_afterwards() -> None:
    batch = Batch(4)
    batch.add_sequence(0, [1, 2, 3], "none")
    batch.set_output(0)
    batch.set_output_last()
    batch.set_pos(1, 9)
    assert batch.columns().outputs.tolist() == [True, False, True]
    assert batch.columns().positions.tolist() == [0, 9, 10]
    batch.set_output(0, False)
    assert batch.columns().outputs.tolist() == [False, False, True]


def test_clear_leaves_room_for_all() -> None:
    batch = Batch(2, 2)
    batch.add_token(0, 1)
    batch.add_seq(0, 1)
    batch.clear()
    assert (len(batch), list(batch), batch.seq_ids, len(batch.columns())) == (0, [], [], 0)
    batch.add_sequence(0, [5, 6])
    assert batch.columns().n_seq_id.tolist() == [1, 1]


def test_what_is_given_is_copied_and_so_is_what_is_taken() -> None:
    tokens = np.array([1, 2], np.int32)
    batch = Batch.of([tokens])
    tokens[0] = 99
    columns = batch.columns()
    assert columns.tokens is not None
    columns.tokens[1] = columns.positions[1] = columns.seq_ids[1] = 77
    assert tokens_of(batch) == [1, 2]
    assert batch.columns().positions.tolist() == [0, 1]
    assert batch.columns().seq_ids.tolist() == [0, 0]


def test_embeddings_stand_in_for_tokens() -> None:
    batch = Batch(100, 1, n_embd=3)
    for i in range(100):  # beyond its first room
        assert batch.add_embd(0, [i, i + 1, i + 2], output=i == 99) == i
    columns = batch.columns()
    assert columns.tokens is None
    assert columns.embd is not None
    assert columns.embd.dtype == np.float32
    assert columns.embd.tolist() == [[i, i + 1, i + 2] for i in range(100)]
    assert next(iter(batch)).token is None


def test_memory_comes_with_the_tokens() -> None:
    tracemalloc.start()
    try:
        batch = Batch(2**20, 1, n_embd=0)
        batch.add_token(0, 1)
        assert tracemalloc.get_traced_memory()[1] < 100_000
        batch.add_sequence(0, np.zeros(2**20 - 1, np.int32))
    finally:
        tracemalloc.stop()
    assert len(batch) == 2**20


@pytest.mark.parametrize(
    ("n_tokens", "n_seq_max", "n_embd"),
    [(0, 1, 0), (-1, 1, 0), (2**31, 1, 0), (8, 0, 0), (8, 257, 0), (8, 1, -1), (8, 1, 2**17)],
)
def test_sizes_have_limits(n_tokens: int, n_seq_max: int, n_embd: int) -> None:
    with pytest.raises(InputError):
        Batch(n_tokens, n_seq_max, n_embd)


def test_the_largest_sizes_are_accepted() -> None:
    assert Batch(2**31 - 1, LLAMA_MAX_SEQ).n_seq_max == 256
    assert len(Batch.of([[1]] * 256).seq_ids) == 256
    with pytest.raises(InputError, match="LLAMA_MAX_SEQ"):
        Batch.of([[1]] * 257)


def assert_refused(
    batch: Batch, error: type[InputError], call: Callable[[], Any], match: str | None = None
) -> None:
    before = list(batch)
    with pytest.raises(error, match=match) as caught:
        call()
    assert type(caught.value) is error
    assert list(batch) == before


@pytest.mark.parametrize(
    "tokens",
    [
        [],
        [[1, 2]],
        [[1], [2, 3]],
        [1.5],
        ["a"],
        [True],
        [None],
        [2**31],
        [-(2**31) - 1],
        [2**70],
        np.array([2**63], np.uint64),
        np.zeros((2, 2), np.int32),
        "text",
        5,
    ],
)
def test_bad_tokens_are_refused_and_change_nothing(tokens: Tokens) -> None:
    batch = Batch(10, 2)
    batch.add_sequence(0, [1])
    assert_refused(batch, TokenError, lambda: batch.add_sequence(1, tokens))


@pytest.mark.parametrize("token", [1.0, "1", None, True, np.True_, np.array([1, 2]), 2**31, -(2**31) - 1])
def test_a_bad_token_is_refused_and_changes_nothing(token: Any) -> None:
    batch = Batch(10, 2)
    assert_refused(batch, TokenError, lambda: batch.add_token(1, token), "token")


@pytest.mark.parametrize("vector", [[1, 2], [[1, 2, 3]], "text", None, [1, "a", 3], [], 7])
def test_a_bad_embedding_is_refused_and_changes_nothing(vector: Any) -> None:
    batch = Batch(10, 2, n_embd=3)
    batch.add_embd(0, [1, 2, 3])
    assert_refused(batch, TokenError, lambda: batch.add_embd(1, vector), "vector")


def test_a_batch_is_of_one_kind() -> None:
    assert_refused(batch := Batch(4, 1, 2), TokenError, lambda: batch.add_token(0, 1), "embeddings only")
    assert_refused(batch, TokenError, lambda: batch.add_sequence(0, [1]), "embeddings only")
    assert_refused(other := Batch(4), TokenError, lambda: other.add_embd(0, []), "tokens only")


@pytest.mark.parametrize("seq_id", [-1, 2, 2**40, 0.0, "0", None, True])
def test_a_bad_sequence_is_refused_and_changes_nothing(seq_id: Any) -> None:
    batch = Batch(4, 2)
    batch.add_token(0, 1)
    for call in (
        lambda: batch.add_token(seq_id, 1),
        lambda: batch.add_sequence(seq_id, [1]),
        lambda: batch.add_seq(0, seq_id),
    ):
        assert_refused(batch, SequenceIdError, call, r"from 0 to 1 \(n_seq_max - 1\)")


@pytest.mark.parametrize("pos", [2**31, -(2**31) - 1, 1.0, "1", True])
def test_a_bad_position_is_refused_and_changes_nothing(pos: Any) -> None:
    batch = Batch(4)
    batch.add_token(0, 1)
    assert_refused(batch, PositionError, lambda: batch.add_token(0, 1, pos=pos), "pos")
    assert_refused(batch, PositionError, lambda: batch.set_pos(0, pos), "pos")


@pytest.mark.parametrize("index", [-1, 1, 0.0, None])
def test_a_bad_index_is_refused_and_changes_nothing(index: Any) -> None:
    batch = Batch(4, 2)
    batch.add_token(0, 1)
    for call in (
        lambda: batch.add_seq(index, 1),
        lambda: batch.set_output(index),
        lambda: batch.set_pos(index, 1),
    ):
        assert_refused(batch, InputError, call, "index")


def test_a_full_batch_is_refused_and_changes_nothing() -> None:
    batch = Batch(4, 2)
    batch.add_sequence(0, [1, 2, 3])
    assert_refused(batch, BatchFullError, lambda: batch.add_sequence(1, [1, 2]), "at most 1 more")
    batch.add_sequence(1, [4])
    assert_refused(batch, BatchFullError, lambda: batch.add_token(1, 5), "at most 0 more")


def test_empty_batches_and_unknown_outputs_are_refused() -> None:
    batch = Batch(4)
    assert_refused(batch, InputError, batch.set_output_last, "empty")
    unknown: Any = "some"
    assert_refused(batch, InputError, lambda: batch.add_sequence(0, [1], unknown), "'last', 'all' or 'none'")
