"""The arrays of the arena, by name."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from crumplezone.sandbox.ipc.arena import Shape


class BatchArrays(NamedTuple):
    """A batch in the arena, laid out by `batch_shapes`.

    Attributes:
        tokens: int32, shape (n_tokens,); or vectors, float32, shape (n_tokens * n_embd,).
        positions: int32, shape (n_tokens,).
        seq_ids: int32, of all tokens one behind the other.
        outputs: int8, shape (n_tokens,).
        n_seq_id: int32, shape (n_tokens,): how many of ``seq_ids`` are each token's.
        pointers: uint64, shape (n_tokens,): where they begin in the cell. Only the cell uses it.
    """

    tokens: npt.NDArray[Any]
    positions: npt.NDArray[np.int32]
    seq_ids: npt.NDArray[np.int32]
    outputs: npt.NDArray[np.int8]
    n_seq_id: npt.NDArray[np.int32]
    pointers: npt.NDArray[np.uint64]

    def part(self, begin: int, end: int) -> BatchArrays:
        """The same range of each: of a batch in which every token has one sequence."""
        return BatchArrays._make(array[begin:end] for array in self)


def batch_shapes(n_tokens: int, n_seq_ids: int = -1, n_embd: int = 0) -> list[Shape]:
    """Of `BatchArrays`, in order. ``n_seq_ids``: -1 if each token has one sequence."""
    first = ("f4", n_tokens * n_embd) if n_embd else ("i4", n_tokens)
    flat = n_tokens if n_seq_ids < 0 else n_seq_ids
    return [first, ("i4", n_tokens), ("i4", flat), ("i1", n_tokens), ("i4", n_tokens), ("u8", n_tokens)]
