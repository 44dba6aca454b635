"""`Batch`: sequences of tokens to decode together, checked as they are added."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from crumplezone.errors import InputError, check_integer
from crumplezone.reports.schema import BatchRecord

LLAMA_MAX_SEQ = 256  # llama.cpp, src/llama-cparams.h
_INT32_MAX = 2**31 - 1

Tokens = Sequence[int] | npt.NDArray[np.integer]
Outputs = Literal["last", "all", "none"]


@dataclass(frozen=True)
class Entry:
    """One sequence of a batch: its tokens start at position 0.

    Attributes:
        seq_id: Its id, unique in the batch.
        tokens: int32, shape (n,).
        outputs: bool, shape (n,): the tokens that logits are wanted for.
    """

    seq_id: int
    tokens: npt.NDArray[np.int32]
    outputs: npt.NDArray[np.bool_]


class Batch:
    """Sequences of tokens for one `Decoder.decode` or `Decoder.encode`.

    Args:
        n_tokens: Most tokens that it can hold.
        n_seq_max: Sequence ids must be below this (llama.cpp allows up to 256).
    """

    def __init__(self, n_tokens: int, n_seq_max: int = 1) -> None:
        check_integer("n_tokens", n_tokens, 1, _INT32_MAX)
        check_integer("n_seq_max", n_seq_max, 1, LLAMA_MAX_SEQ, " (LLAMA_MAX_SEQ)")
        self.n_tokens, self.n_seq_max = n_tokens, n_seq_max
        self._entries: dict[int, Entry] = {}
        self._used = 0

    @classmethod
    def of(cls, sequences: Iterable[Tokens], outputs: Outputs = "last") -> Batch:
        """Make a batch of exactly these sequences, numbered from 0."""
        kept = list(sequences)
        batch = cls(max(1, sum(len(tokens) for tokens in kept)), max(1, len(kept)))
        for seq_id, tokens in enumerate(kept):
            batch.add_sequence(seq_id, tokens, outputs)
        return batch

    def add_sequence(self, seq_id: int, tokens: Tokens, output: Outputs = "last") -> None:
        """Add one whole sequence.

        Args:
            seq_id: From 0 to ``n_seq_max - 1``, not yet in the batch.
            tokens: Token ids, at least one.
            output: Which tokens to return logits for.

        Raises:
            InputError: A value is out of range or does not fit; the batch is unchanged.
        """
        check_integer("seq_id", seq_id, 0, self.n_seq_max - 1, " (n_seq_max - 1)")
        seq_id = int(seq_id)
        if seq_id in self._entries:
            raise InputError("seq_id", seq_id, "is in the batch already; use another id or a new batch")
        if output not in ("last", "all", "none"):
            raise InputError("output", output, "must be 'last', 'all' or 'none'")
        array = _checked_tokens(tokens, seq_id)
        if self._used + len(array) > self.n_tokens:
            limit = f"at most {self.n_tokens - self._used} more fit into n_tokens = {self.n_tokens}"
            raise InputError(f"len(tokens) of sequence {seq_id}", len(array), limit)
        outputs = np.full(len(array), output == "all")
        outputs[-1] = output != "none"
        self._entries[seq_id] = Entry(seq_id, array, outputs)
        self._used += len(array)

    def __len__(self) -> int:
        """Number of tokens."""
        return self._used

    @property
    def entries(self) -> list[Entry]:
        """The sequences, in the order in which they were added."""
        return list(self._entries.values())

    def check(self, n_vocab: int, n_seq_max: int, n_ctx_seq: int) -> None:
        """Check against a model and a context.

        Raises:
            InputError: Names the first token, sequence or length that is out of range.
        """
        if not self._entries:
            raise InputError("batch", "empty", "add at least one sequence")
        for entry in self._entries.values():
            if entry.seq_id >= n_seq_max:
                limit = f"the decoder was made with n_seq_max = {n_seq_max}; ids go up to {n_seq_max - 1}"
                raise InputError("seq_id", entry.seq_id, limit)
            bad = np.flatnonzero((entry.tokens < 0) | (entry.tokens >= n_vocab))
            if len(bad):
                field = f"tokens[{bad[0]}] of sequence {entry.seq_id}"
                raise InputError(
                    field, int(entry.tokens[bad[0]]), f"must be from 0 to n_vocab - 1 = {n_vocab - 1}"
                )
            if len(entry.tokens) > n_ctx_seq:
                field = f"len(tokens) of sequence {entry.seq_id}"
                raise InputError(
                    field, len(entry.tokens), f"the context holds {n_ctx_seq} tokens per sequence"
                )


def _checked_tokens(tokens: Tokens, seq_id: int) -> npt.NDArray[np.int32]:
    try:
        array = np.asarray(tokens)
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"tokens of sequence {seq_id}", "unreadable", f"must be integers ({error})"
        ) from error
    if array.ndim != 1 or len(array) == 0:
        limit = "must be one-dimensional and hold at least one token"
        raise InputError(f"shape of the tokens of sequence {seq_id}", array.shape, limit)
    if not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"tokens of sequence {seq_id}", str(array.dtype), "must be integers")
    outside = np.flatnonzero((array < -_INT32_MAX - 1) | (array > _INT32_MAX))
    if len(outside):
        raise InputError(
            f"tokens[{outside[0]}] of sequence {seq_id}", int(array[outside[0]]), "must fit into int32"
        )
    return array.astype(np.int32)


def record(
    entries: Sequence[Entry], operation: str, *, chunk: int = 0, embeddings: bool = False
) -> BatchRecord:
    """The batch as a report keeps it; see `BatchRecord` for what the arguments mean."""
    return BatchRecord(
        tokens=[int(token) for entry in entries for token in entry.tokens],
        positions=[position for entry in entries for position in range(len(entry.tokens))],
        seq_ids=[entry.seq_id for entry in entries for _ in entry.tokens],
        outputs=[bool(output) for entry in entries for output in entry.outputs],
        operation=operation,
        chunk=chunk,
        embeddings=embeddings,
    )
