"""The journal: the memory operations that a decoder has committed, to give a new cell the same memory.

Tokens are kept, not activations. What no later state depends on is dropped as operations come in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from crumplezone.reports.records.report import Held
from crumplezone.workers.batch.columns import Columns, Int32

ALL = -1  # as a bound: from the beginning, or to the end (llama_memory_seq_rm, include/llama.h)


@dataclass(frozen=True)
class Appended:
    """Tokens that were appended."""

    columns: Columns


@dataclass(frozen=True)
class Removed:
    """Positions ``begin`` to ``end`` (exclusive) of a sequence."""

    seq_id: int
    begin: int
    end: int


@dataclass(frozen=True)
class Copied:
    """Positions of one sequence that were added to another."""

    source: int
    target: int
    begin: int
    end: int


@dataclass(frozen=True)
class Shifted:
    """Positions that were moved by ``delta``."""

    seq_id: int
    begin: int
    end: int
    delta: int


@dataclass(frozen=True)
class Loaded:
    """A sequence that was replaced by a saved state, and the positions in that."""

    seq_id: int
    state: bytes
    positions: Int32


Operation = Appended | Removed | Copied | Shifted | Loaded


class Journal:
    """Committed operations in order."""

    def __init__(self) -> None:
        self._operations: list[Operation] = []

    def __bool__(self) -> bool:
        return bool(self._operations)

    @property
    def n_tokens(self) -> int:
        """Tokens that a replay decodes."""
        return sum(len(op.columns) for op in self._operations if isinstance(op, Appended))

    def add(self, operation: Appended | Copied | Shifted) -> None:
        """Something was appended to memory, copied or moved."""
        self._operations.append(operation)

    def positions(self, seq_id: int) -> Int32:
        """The positions that a sequence holds, ascending."""
        held: dict[int, Int32] = {}
        for operation in self._operations:
            _follow(operation, held)
        return held.get(seq_id, np.empty(0, np.int32))

    def plain(self) -> tuple[list[Held], bool]:
        """Tokens that were simply appended, by sequence, and whether there is anything else."""
        found: dict[int, list[Columns]] = {}
        more = False
        for operation in self.replay():
            if isinstance(operation, Appended) and not (c := operation.columns).coupled and c.embd is None:
                found.setdefault(int(c.seq_ids[0]), []).append(c)
            else:
                more = True
        parts = {seq_id: Columns.concatenate(each) for seq_id, each in found.items()}
        return [
            Held(seq_id, c.tokens.tolist() if c.tokens is not None else [], c.positions.tolist())
            for seq_id, c in parts.items()
        ], more

    def loaded(self, seq_id: int, state: bytes, positions: Int32) -> None:
        """A sequence was replaced by a saved state."""
        self.forget({seq_id})
        self._operations.append(Loaded(seq_id, state, positions))

    def removed(self, seq_id: int, begin: int, end: int) -> None:
        """Positions of a sequence were removed; `ALL` is a bound that is not there."""
        if begin <= 0 and end < 0:
            self.forget({seq_id})
        elif end >= 0 or not self._cut(seq_id, begin):
            self._operations.append(Removed(seq_id, begin, end))

    def forget(self, seq_ids: Iterable[int]) -> None:
        """Sequences were removed whole: drop what nothing else depends on."""
        self._operations += [Removed(seq_id, ALL, ALL) for seq_id in seq_ids]
        self._operations = _effective(_alive(self._operations))

    def clear(self) -> None:
        """Everything was removed."""
        self._operations.clear()

    def replay(self) -> Iterator[Operation]:
        """What gives an empty memory the same content, the tokens of one sequence at a time."""
        pending: list[Columns] = []
        for operation in self._operations:
            if isinstance(operation, Appended):
                pending.append(operation.columns)
                continue
            yield from _one_sequence_at_a_time(pending)
            pending = []
            yield operation
        yield from _one_sequence_at_a_time(pending)

    def _cut(self, seq_id: int, begin: int) -> bool:
        """Drop the tail of a sequence from what was decoded; False if that is not all there is to do.

        Nothing depends on a tail but what was copied from it, or moved.
        """
        left = int((self.positions(seq_id) >= begin).sum())
        for place in range(len(self._operations) - 1, -1, -1):
            operation = self._operations[place]
            if not isinstance(operation, Appended):
                if seq_id in _touched(operation):
                    break
                continue
            columns = operation.columns
            mine = columns.rows_of(seq_id)
            tail = mine[columns.positions[mine] >= begin]
            if (columns.n_seq_id[tail] > 1).any():
                break
            if len(tail):
                rest = columns.take(np.setdiff1d(np.arange(len(columns)), tail))
                self._operations[place] = Appended(rest)
                left -= len(tail)
            if len(tail) < len(mine):  # and what came before is older still
                break
        self._operations = [op for op in self._operations if not isinstance(op, Appended) or len(op.columns)]
        return left <= 0


def _follow(operation: Operation, held: dict[int, Int32]) -> None:
    """What an operation does to the positions of each sequence."""
    nothing = np.empty(0, np.int32)
    match operation:
        case Appended(columns):
            for seq_id in np.unique(columns.seq_ids).tolist():
                fresh = columns.positions[columns.rows_of(seq_id)]
                held[seq_id] = np.union1d(held.get(seq_id, nothing), fresh)
        case Loaded(seq_id, _, positions):
            held[seq_id] = positions
        case Removed(seq_id, begin, end):
            mine = held.get(seq_id, nothing)
            held[seq_id] = mine[~within(mine, begin, end)]
        case Copied(source, target, begin, end):
            copied = held.get(source, nothing)
            held[target] = np.union1d(held.get(target, nothing), copied[within(copied, begin, end)])
        case Shifted(seq_id, begin, end, delta):
            mine = held.get(seq_id, nothing)
            held[seq_id] = np.sort(np.where(within(mine, begin, end), mine + delta, mine))


def within(positions: Int32, begin: int, end: int) -> npt.NDArray[np.bool_]:
    """Which positions lie in a range; a bound below 0 is open."""
    found: npt.NDArray[np.bool_] = (positions >= begin) & ((positions < end) | (end < 0))
    return found


def _touched(operation: Removed | Copied | Shifted | Loaded) -> set[int]:
    if isinstance(operation, Copied):
        return {operation.source, operation.target}
    return {operation.seq_id}


def _alive(operations: list[Operation]) -> list[Operation]:
    """Drop what no sequence depends on in the end.

    Goes backwards: at each point, nobody will see the content of the sequences that are ``dead``.
    """
    dead: set[int] = set()
    kept: list[Operation] = []
    for operation in reversed(operations):
        if isinstance(operation, Appended):
            columns = operation.columns.without(dead)
            if len(columns):
                kept.append(Appended(columns))
        elif isinstance(operation, Copied):
            if operation.target not in dead:
                dead.discard(operation.source)
                kept.append(operation)
        elif operation.seq_id not in dead:
            kept.append(operation)
            if isinstance(operation, Loaded) or operation == Removed(operation.seq_id, ALL, ALL):
                dead.add(operation.seq_id)
    return kept[::-1]


def _effective(operations: list[Operation]) -> list[Operation]:
    """Drop what would act on a sequence that is empty at that point."""
    present: set[int] = set()
    kept: list[Operation] = []
    for operation in operations:
        if isinstance(operation, Appended):
            present.update(operation.columns.seq_ids.tolist())
        elif isinstance(operation, Loaded):
            present.add(operation.seq_id)
        elif isinstance(operation, Copied):
            if operation.source not in present:
                continue
            present.add(operation.target)
        elif operation.seq_id not in present:
            continue
        elif operation == Removed(operation.seq_id, ALL, ALL):
            present.discard(operation.seq_id)
        kept.append(operation)
    return kept


def _one_sequence_at_a_time(pending: list[Columns]) -> Iterator[Appended]:
    """Regroup what was decoded in a row. Tokens that belong to several sequences keep their place."""
    single: dict[int, list[list[Columns]]] = {}  # by sequence: runs of tokens, and of vectors
    for columns in pending:
        for group in map(columns.take, columns.groups()):
            seq_ids = np.unique(group.seq_ids)
            if len(seq_ids) == 1:
                runs = single.setdefault(int(seq_ids[0]), [])
                if not runs or (runs[-1][0].embd is None) != (group.embd is None):
                    runs.append([])
                runs[-1].append(group)
                continue
            yield from (Appended(Columns.concatenate(run)) for runs in single.values() for run in runs)
            single = {}
            yield Appended(group)
    yield from (Appended(Columns.concatenate(run)) for runs in single.values() for run in runs)
