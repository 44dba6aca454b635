"""`Columns`: a batch as llama.cpp sees it, one array per field of ``llama_batch``.

Facts are those of llama.cpp 0c1e57098, src/llama-batch.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from crumplezone.errors import InputError
from crumplezone.workers.protocol.arrays import BatchArrays
from crumplezone.workers.protocol.config import INT32_MAX

LLAMA_MAX_SEQ = 256  # src/llama-cparams.h
UNSET = np.iinfo(np.int32).min  # a position that is to be inferred

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Columns:
    """The arrays of a batch of ``n`` tokens. Whether they make sense is for `validate` to say.

    Attributes:
        tokens: int32, shape (n,), or None.
        embd: float32, shape (n, n_embd), or None.
        positions: int32, shape (n,).
        n_seq_id: int32, shape (n,): how many sequences each token belongs to.
        seq_ids: int32: the sequences of each token, one token behind the other.
        outputs: bool, shape (n,): the tokens that a row of results is wanted for.
        nulls: The fields of ``llama_batch`` that are to be NULL for llama.cpp, whatever stands above: "pos",
            "n_seq_id", "seq_id", "logits", or the pointer of a single token ("seq_id[3]"). Parts of a batch
            have none.
    """

    tokens: Int32 | None
    embd: Float32 | None
    positions: Int32
    n_seq_id: Int32
    seq_ids: Int32
    outputs: Bool
    nulls: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        n = len(self.positions)
        n_ids = n if self.single else int(np.maximum(self.n_seq_id, 0).sum())
        for name, shape in (("tokens", (n,)), ("n_seq_id", (n,)), ("seq_ids", (n_ids,)), ("outputs", (n,))):
            column = getattr(self, name)
            if column is not None and column.shape != shape:
                raise InputError(f"shape of {name}", column.shape, f"must be {shape} for {n} positions")
        if self.embd is not None and (self.embd.ndim != 2 or len(self.embd) != n):
            raise InputError("shape of embd", self.embd.shape, f"must be ({n}, n_embd)")

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.positions)

    @classmethod
    def concatenate(cls, parts: Sequence[Columns]) -> Columns:
        """Several batches of one kind (tokens or embeddings) as one."""
        tokens = [part.tokens for part in parts if part.tokens is not None]
        embd = [part.embd for part in parts if part.embd is not None]
        return cls(
            tokens=np.concatenate(tokens) if tokens else None,
            embd=np.concatenate(embd) if embd else None,
            positions=np.concatenate([part.positions for part in parts]),
            n_seq_id=np.concatenate([part.n_seq_id for part in parts]),
            seq_ids=np.concatenate([part.seq_ids for part in parts]),
            outputs=np.concatenate([part.outputs for part in parts]),
        )

    def fill(self, arrays: BatchArrays) -> None:
        """Copy it into the arena; a column that is missing is zeros there. ``pointers`` are the cell's."""
        first = self.tokens if self.embd is None else self.embd.ravel()
        filled = (first, self.positions, self.seq_ids, self.outputs, self.n_seq_id)
        rooms: tuple[npt.NDArray[Any], ...] = arrays  # mypy finds no common type of the six, at times
        for room, column in zip(rooms, filled, strict=False):
            room[:] = 0 if column is None else column

    @cached_property
    def single(self) -> bool:
        """Whether each token belongs to exactly one sequence."""
        ones: int = self.n_seq_id.tolist().count(1)  # of a few tokens faster than numpy, of many not slow
        return ones == len(self.positions)

    @property
    def owners(self) -> Indices:
        """For each entry of `seq_ids`, the index of its token."""
        indices = np.arange(len(self))
        return indices if self.single else np.repeat(indices, np.maximum(self.n_seq_id, 0))

    @property
    def begins(self) -> Indices:
        """For each token, where its entries of `seq_ids` begin."""
        if self.single:
            return np.arange(len(self))
        counts = np.maximum(self.n_seq_id, 0)
        return np.cumsum(counts) - counts

    @property
    def coupled(self) -> bool:
        """Whether a token belongs to several sequences."""
        return not self.single and bool((self.n_seq_id > 1).any())

    @property
    def sequences(self) -> list[int]:
        """The sequences of the batch, in the order of their first tokens."""
        return list(dict.fromkeys(self.seq_ids.tolist()))

    def rows_of(self, seq_id: int) -> Indices:
        """Indices of the tokens of one sequence, in order."""
        rows: Indices = self.owners[self.seq_ids == seq_id]
        return rows

    def take(self, indices: npt.NDArray[np.integer]) -> Columns:
        """The batch of these tokens, in this order."""
        begins, sizes = self.begins[indices], np.maximum(self.n_seq_id[indices], 0)
        within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return self._of_rows(indices, self.n_seq_id[indices], self.seq_ids[np.repeat(begins, sizes) + within])

    def without(self, seq_ids: Iterable[int]) -> Columns:
        """The batch without some sequences; tokens that belonged to no other are gone. Itself if none is."""
        gone = set(seq_ids)
        if self.single and not self.nulls and gone.isdisjoint(self.seq_ids.tolist()):
            return self
        stays = ~np.isin(self.seq_ids, list(gone))
        left = np.bincount(self.owners[stays], minlength=len(self)).astype(np.int32)
        rows = np.flatnonzero(left)
        return self._of_rows(rows, left[rows], self.seq_ids[stays])

    def alone(self, seq_id: int) -> Columns:
        """The tokens of one sequence, as if no other shared them."""
        rows = self.rows_of(seq_id)
        return self._of_rows(rows, np.ones(len(rows), np.int32), np.full(len(rows), seq_id, np.int32))

    def renamed(self, seq_id: int) -> Columns:
        """The tokens as those of another sequence alone."""
        return self._of_rows(
            np.arange(len(self)), np.ones(len(self), np.int32), np.full(len(self), seq_id, np.int32)
        )

    def quiet(self) -> Columns:
        """The same without outputs."""
        return replace(self, outputs=np.zeros(len(self), np.bool_), nulls=frozenset())

    def sets(self) -> list[int]:
        """The sequences of each token as a bit mask: bit ``s`` is set for a token of sequence ``s``.

        Raises:
            InputError: A token belongs to no sequence, or to one that llama.cpp cannot have.
        """
        if len(lonely := np.flatnonzero(self.n_seq_id < 1)):
            i = int(lonely[0])
            raise InputError(f"n_seq_id[{i}]", int(self.n_seq_id[i]), "must be at least 1")
        if len(bad := np.flatnonzero((self.seq_ids < 0) | (self.seq_ids >= LLAMA_MAX_SEQ))):
            i = int(self.owners[bad[0]])
            raise InputError(f"seq_ids[{i}]", int(self.seq_ids[bad[0]]), f"must be below {LLAMA_MAX_SEQ}")
        masks = [0] * len(self)
        for i, seq_id in zip(self.owners.tolist(), self.seq_ids.tolist(), strict=True):
            masks[i] |= 1 << seq_id
        return masks

    def groups(self) -> list[Indices]:
        """The batch cut into what can be decoded apart: no sequence has tokens in two groups.

        Sequences that share a token share a group. Indices rise within a group; groups come in the order of
        their first tokens.
        """
        masks = self.sets()
        groups: list[int] = []
        for mask in dict.fromkeys(masks):
            joined = mask
            for group in groups:
                joined |= group if group & mask else 0
            groups = [group for group in groups if not group & joined] + [joined]
        rows: dict[int, list[int]] = {}
        home = {mask: next(group for group in groups if group & mask) for mask in set(masks)}
        for i, mask in enumerate(masks):
            rows.setdefault(home[mask], []).append(i)
        return [np.array(indices) for indices in rows.values()]

    def _of_rows(self, rows: npt.NDArray[np.integer], n_seq_id: Int32, seq_ids: Int32) -> Columns:
        return Columns(
            tokens=None if self.tokens is None else self.tokens[rows],
            embd=None if self.embd is None else self.embd[rows],
            positions=self.positions[rows],
            n_seq_id=n_seq_id,
            seq_ids=seq_ids,
            outputs=self.outputs[rows],
        )


def infer_positions(positions: Int32, n_seq_id: Int32, seq_ids: Int32, next_positions: Int32 | None) -> Int32:
    """Positions with those that are `UNSET` filled in: one up from the token before, in the same sequence.

    A token of several sequences goes on from its first one, as llama.cpp does it, and takes the others along.

    Args:
        positions: int32, shape (n,), `UNSET` where left out.
        n_seq_id: As in `Columns`.
        seq_ids: As in `Columns`.
        next_positions: int32, one per sequence: where it goes on; None for empty memory. Sequences beyond
            its end are taken as empty: that they cannot exist is for `validate` to say.
    """
    inferred, ids = positions.tolist(), iter(seq_ids.tolist())
    if UNSET not in inferred:
        return positions
    follows = {} if next_positions is None else dict(enumerate(next_positions.tolist()))
    for i, (position, count) in enumerate(zip(inferred, n_seq_id.tolist(), strict=True)):
        mine = (next(ids),) if count == 1 else tuple(islice(ids, max(count, 0)))
        if position == UNSET:
            position = inferred[i] = follows.get(mine[0], 0) if mine else 0
        after = position + 1 if position < INT32_MAX else position
        for seq_id in mine:
            follows[seq_id] = after
    return np.array(inferred, np.int32)
