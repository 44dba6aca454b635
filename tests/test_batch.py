"""What a batch accepts, and how it says no."""

from __future__ import annotations

import numpy as np
import pytest

from crumplezone.errors import InputError
from crumplezone.workers.batch import LLAMA_MAX_SEQ, Batch, Outputs, Tokens, record


def test_of_numbers_the_sequences_and_counts_the_tokens() -> None:
    batch = Batch.of([[1, 2, 3], np.array([4, 5], np.int64)])
    assert len(batch) == batch.n_tokens == 5
    assert batch.n_seq_max == 2
    assert [entry.seq_id for entry in batch.entries] == [0, 1]
    assert [entry.tokens.tolist() for entry in batch.entries] == [[1, 2, 3], [4, 5]]
    assert all(entry.tokens.dtype == np.int32 for entry in batch.entries)


@pytest.mark.parametrize(
    ("output", "expected"),
    [("last", [False, False, True]), ("all", [True] * 3), ("none", [False] * 3)],
)
def test_outputs(output: Outputs, expected: list[bool]) -> None:
    assert Batch.of([[7, 8, 9]], output).entries[0].outputs.tolist() == expected


def test_sequences_keep_the_order_in_which_they_were_added() -> None:
    batch = Batch(10, 4)
    for seq_id in (3, 0, 2):
        batch.add_sequence(seq_id, [seq_id])
    assert [entry.seq_id for entry in batch.entries] == [3, 0, 2]


def test_tokens_are_copied() -> None:
    tokens = np.array([1, 2], np.int32)
    batch = Batch.of([tokens])
    tokens[0] = 99
    assert batch.entries[0].tokens.tolist() == [1, 2]


@pytest.mark.parametrize(("n_tokens", "n_seq_max"), [(0, 1), (-1, 1), (2**31, 1), (8, 0), (8, 257)])
def test_sizes_have_limits(n_tokens: int, n_seq_max: int) -> None:
    with pytest.raises(InputError):
        Batch(n_tokens, n_seq_max)


def test_the_largest_sizes_are_accepted() -> None:
    assert Batch(2**31 - 1, LLAMA_MAX_SEQ).n_seq_max == 256
    assert len(Batch.of([[1]] * 256).entries) == 256
    with pytest.raises(InputError, match="LLAMA_MAX_SEQ"):
        Batch.of([[1]] * 257)


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
    with pytest.raises(InputError):
        batch.add_sequence(1, tokens)
    assert len(batch) == 1
    assert [entry.seq_id for entry in batch.entries] == [0]


def test_bad_ids_outputs_and_lengths_are_refused_and_change_nothing() -> None:
    batch = Batch(4, 2)
    batch.add_sequence(0, [1, 2, 3])
    with pytest.raises(InputError, match=r"from 0 to 1 \(n_seq_max - 1\)") as caught:
        batch.add_sequence(2, [1])
    assert (caught.value.field, caught.value.value) == ("seq_id", 2)
    with pytest.raises(InputError, match="from 0"):
        batch.add_sequence(-1, [1])
    with pytest.raises(InputError, match="in the batch already"):
        batch.add_sequence(0, [1])
    with pytest.raises(InputError, match="at most 1 more"):
        batch.add_sequence(1, [1, 2])
    with pytest.raises(InputError, match="'last', 'all' or 'none'"):
        batch.add_sequence(1, [1], "some")  # type: ignore[arg-type]
    assert len(batch) == 3
    batch.add_sequence(1, [4])
    assert len(batch) == 4


def test_check_against_a_model() -> None:
    batch = Batch(8, 4)
    with pytest.raises(InputError, match="empty"):
        batch.check(100, 4, 8)
    batch.add_sequence(3, [0, 99, 5])
    batch.check(100, 4, 3)
    with pytest.raises(InputError, match="ids go up to 2"):
        batch.check(100, 3, 3)
    with pytest.raises(InputError, match=r"tokens\[1\] of sequence 3 is 99: .* n_vocab - 1 = 98"):
        batch.check(99, 4, 3)
    with pytest.raises(InputError, match="holds 2 tokens per sequence"):
        batch.check(100, 4, 2)
    with pytest.raises(InputError, match=r"tokens\[0\] of sequence 0 is -1"):
        Batch.of([[-1]]).check(100, 1, 8)


def test_record_is_parallel_lists() -> None:
    kept = record(Batch.of([[5, 6], [7]]).entries, "encode")
    assert kept.tokens == [5, 6, 7]
    assert kept.positions == [0, 1, 0]
    assert kept.seq_ids == [0, 0, 1]
    assert kept.outputs == [False, True, True]
    assert kept.operation == "encode"
