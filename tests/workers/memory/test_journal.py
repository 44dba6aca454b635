"""The journal against a model of memory in which every cell remembers all that it depends on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crumplezone.workers.batch.columns import Columns
from crumplezone.workers.memory.journal import (
    ALL,
    Appended,
    Copied,
    Journal,
    Loaded,
    Operation,
    Removed,
    Shifted,
)

N_SEQ = 3
Cell = tuple[int, int]  # position, and a hash of the token and of every cell that it attended to


class Model:
    """Sequences as sets of cells; what a token becomes depends on what its sequence holds."""

    def __init__(self) -> None:
        self.cells: list[dict[int, int]] = [{} for _ in range(N_SEQ)]

    def do(self, operation: Operation) -> None:
        match operation:
            case Appended(columns):
                self._decode(columns)
            case Loaded(seq_id, state, _):
                self.cells[seq_id] = dict(eval(state))
            case Removed(seq_id, begin, end):
                mine = self.cells[seq_id]
                self.cells[seq_id] = {
                    p: c for p, c in mine.items() if not (p >= begin and (p < end or end < 0))
                }
            case Copied(source, target, _, _):
                self.cells[target] |= self.cells[source]
            case Shifted(seq_id, begin, end, delta):
                self.cells[seq_id] = {
                    p + delta if p >= begin and (p < end or end < 0) else p: hash((c, "moved", delta))
                    if p >= begin and (p < end or end < 0)
                    else c
                    for p, c in self.cells[seq_id].items()
                }

    def _decode(self, columns: Columns) -> None:
        assert columns.tokens is not None
        for row in range(len(columns)):
            mine = columns.take(np.array([row]))
            position = int(mine.positions[0])
            seen = frozenset(
                cell
                for seq_id in mine.seq_ids.tolist()
                for cell in self.cells[seq_id].items()
                if cell[0] < position
            )
            for seq_id in mine.seq_ids.tolist():
                self.cells[seq_id][position] = hash((int(columns.tokens[row]), seen))

    def next(self, seq_id: int) -> int:
        return max(self.cells[seq_id], default=-1) + 1


def tokens(seq_ids: list[int], position: int, values: list[int]) -> Columns:
    n = len(values)
    return Columns(
        tokens=np.array(values, np.int32),
        embd=None,
        positions=np.arange(position, position + n, dtype=np.int32),
        n_seq_id=np.full(n, len(seq_ids), np.int32),
        seq_ids=np.tile(np.array(seq_ids, np.int32), n),
        outputs=np.zeros(n, np.bool_),
    )


seq = st.integers(0, N_SEQ - 1)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("decode"), seq, st.lists(st.integers(0, 5), min_size=1, max_size=3)),
        st.tuples(st.just("couple"), seq, seq, st.integers(0, 5)),
        st.tuples(st.just("remove"), seq, st.integers(-1, 5), st.integers(-1, 6)),
        st.tuples(st.just("tail"), seq, st.integers(0, 6)),
        st.tuples(st.just("drop"), seq),
        st.tuples(st.just("copy"), seq, seq),
        st.tuples(st.just("keep"), seq),
        st.tuples(st.just("shift"), seq, st.integers(0, 4), st.integers(1, 3)),
        st.tuples(st.just("load"), seq),
        st.just(("clear",)),
    ),
    max_size=25,
)


def perform(step: tuple[Any, ...], journal: Journal, model: Model) -> None:  # noqa: C901 - a table
    match step:
        case ("decode", seq_id, values):
            commit(Appended(tokens([seq_id], model.next(seq_id), values)), journal, model)
        case ("couple", a, b, value) if a != b and model.next(a) == model.next(b):
            commit(Appended(tokens([a, b], model.next(a), [value])), journal, model)
        case ("remove", seq_id, begin, end):
            remove(seq_id, begin, end, journal, model)
        case ("tail", seq_id, begin):
            remove(seq_id, begin, ALL, journal, model)
        case ("drop", seq_id):
            journal.removed(seq_id, ALL, ALL)
            model.do(Removed(seq_id, ALL, ALL))
        case ("copy", a, b) if a != b:
            journal.removed(b, ALL, ALL)
            model.do(Removed(b, ALL, ALL))
            if model.cells[a]:
                commit(Copied(a, b, ALL, ALL), journal, model)
        case ("keep", seq_id):
            others = set(range(N_SEQ)) - {seq_id}
            journal.forget(others)
            for other in others:
                model.do(Removed(other, ALL, ALL))
        case ("shift", seq_id, begin, delta) if model.cells[seq_id]:
            commit(Shifted(seq_id, begin, ALL, delta), journal, model)
        case ("load", seq_id) if model.cells[seq_id]:
            state = repr(model.cells[seq_id]).encode()
            positions = np.array(sorted(model.cells[seq_id]), np.int32)
            journal.loaded(seq_id, state, positions)
        case ("clear",):
            journal.clear()
            model.__init__()  # type: ignore[misc]


def remove(seq_id: int, begin: int, end: int, journal: Journal, model: Model) -> None:
    model.do(Removed(seq_id, begin, end))
    whole = not model.cells[seq_id]  # as a session does it
    journal.removed(seq_id, ALL if whole else begin, ALL if whole else end)


def commit(operation: Appended | Copied | Shifted, journal: Journal, model: Model) -> None:
    journal.add(operation)
    model.do(operation)


@given(steps)
@settings(max_examples=150, deadline=None)
def test_a_replay_gives_the_same_memory(taken: list[tuple[Any, ...]]) -> None:
    journal, model = Journal(), Model()
    for step in taken:
        perform(step, journal, model)
        again = Model()
        for operation in journal.replay():
            again.do(operation)
        assert again.cells == model.cells
        for seq_id in range(N_SEQ):
            assert journal.positions(seq_id).tolist() == sorted(model.cells[seq_id])
    if not any(model.cells):
        assert not [op for op in journal.replay() if isinstance(op, Appended)]


def test_a_long_chat_that_is_trimmed_keeps_no_more_than_it_holds() -> None:
    journal = Journal()
    for _ in range(100):
        journal.add(Appended(tokens([0], 0, [1] * 10)))
        journal.removed(0, 4, ALL)
        journal.removed(0, ALL, ALL)
    assert not journal
    for turn in range(100):
        journal.add(Appended(tokens([1], 2 * turn, [1] * 5)))
        journal.removed(1, 2 * turn + 2, ALL)
    assert journal.n_tokens == 200


def test_a_source_that_was_removed_is_rebuilt_for_its_copy_and_removed_again() -> None:
    journal = Journal()
    journal.add(Appended(tokens([0], 0, [1, 2, 3])))
    journal.add(Copied(0, 1, ALL, ALL))
    journal.removed(0, ALL, ALL)
    assert [type(op) for op in journal.replay()] == [Appended, Copied, Removed]
    journal.removed(1, ALL, ALL)
    assert not journal


@pytest.mark.parametrize("seq_ids", [[0, 1], [1, 0]])
def test_tokens_of_one_sequence_are_replayed_together(seq_ids: list[int]) -> None:
    journal = Journal()
    for position in range(4):
        for seq_id in seq_ids:
            journal.add(Appended(tokens([seq_id], position, [position])))
    replayed = list(journal.replay())
    assert all(isinstance(op, Appended) for op in replayed)
    assert [op.columns.seq_ids.tolist() for op in replayed if isinstance(op, Appended)] == [
        [seq_ids[0]] * 4,
        [seq_ids[1]] * 4,
    ]
