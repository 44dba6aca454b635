"""`Batch`: tokens to decode together, checked as they are added. The shape is that of ``llama_batch_ext``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from crumplezone.errors import (
    BatchFullError,
    InputError,
    PositionError,
    SequenceIdError,
    TokenError,
    check_integer,
)
from crumplezone.workers.batch.columns import LLAMA_MAX_SEQ, UNSET, Columns, Float32, Int32, infer_positions
from crumplezone.workers.protocol.config import INT32_MAX

Tokens = Sequence[int] | npt.NDArray[np.integer]
Outputs = Literal["last", "all", "none"]


@dataclass(frozen=True)
class Item:
    """One token of a batch.

    Attributes:
        index: Its place in the batch.
        token: Its id; None for an embedding.
        pos: Its position; None if it is to be inferred.
        seq_ids: The sequences it belongs to, in the order in which they were added.
        output: Whether a row of results is wanted for it.
    """

    index: int
    token: int | None
    pos: int | None
    seq_ids: tuple[int, ...]
    output: bool


class Batch:
    """Tokens, or embeddings in their place, for one `Decoder.decode` or `Decoder.encode`.

    Whatever is refused leaves the batch as it was. (``llama_batch_ext_add_token`` keeps what it refuses.)

    Args:
        n_tokens: Most tokens that it can hold. Memory is taken as they come.
        n_seq_max: Sequence ids must be below this (llama.cpp allows up to 256).
        n_embd: 0 for a batch of tokens; else the batch is of embeddings of this many floats, as with
            ``llama_batch_init``.

    Raises:
        InputError: A size is out of range.
    """

    def __init__(self, n_tokens: int, n_seq_max: int = 1, n_embd: int = 0) -> None:
        check_integer("n_tokens", n_tokens, 1, INT32_MAX)
        check_integer("n_seq_max", n_seq_max, 1, LLAMA_MAX_SEQ, " (LLAMA_MAX_SEQ)")
        check_integer("n_embd", n_embd, 0, 2**16)
        self.n_tokens, self.n_seq_max, self.n_embd = int(n_tokens), int(n_seq_max), int(n_embd)
        self.clear()

    @classmethod
    def of(cls, sequences: Iterable[Tokens], outputs: Outputs = "last") -> Batch:
        """Make a batch of exactly these sequences, numbered from 0."""
        kept = list(sequences)
        batch = cls(max(1, sum(len(tokens) for tokens in kept)), max(1, len(kept)))
        for seq_id, tokens in enumerate(kept):
            batch.add_sequence(seq_id, tokens, outputs)
        return batch

    def clear(self) -> None:
        """Take everything out."""
        self._tokens: list[int] = []
        self._vectors: list[Float32] = []  # in their place
        self._positions: list[int] = []
        self._seq_ids: list[int] = []  # of each, the first
        self._outputs: list[bool] = []
        self._shared: dict[int, list[int]] = {}  # by index, the sequences that `add_seq` added

    def add_token(self, seq_id: int, token: int, pos: int | None = None, output: bool = False) -> int:
        """Add one token.

        Args:
            seq_id: The sequence it belongs to, from 0 to ``n_seq_max - 1``.
            token: Its id, int32. The vocabulary is known, and checked, when it is decoded.
            pos: Its position, int32; None: the one after whatever its sequence holds by then.
            output: Whether a row of results is wanted.

        Returns:
            Its index in the batch.

        Raises:
            BatchFullError: ``n_tokens`` are there.
            TokenError: The token is no int32, or this is a batch of embeddings.
            SequenceIdError: The sequence is out of range.
            PositionError: The position is no int32.
        """
        check_integer("token", token, -INT32_MAX - 1, INT32_MAX, error=TokenError)
        return self._append(seq_id, [int(token)], [], pos, bool(output))

    def add_embd(
        self, seq_id: int, vector: npt.ArrayLike, pos: int | None = None, output: bool = False
    ) -> int:
        """Add one embedding in place of a token; the rest is as with `add_token`.

        Args:
            seq_id: The sequence it belongs to.
            vector: The embedding, float32, shape (n_embd,).
            pos: Its position.
            output: Whether a row of results is wanted.
        """
        try:
            with np.errstate(over="ignore"):
                floats = np.asarray(vector, np.float32)
        except (TypeError, ValueError) as error:
            raise TokenError("vector", vector, f"must be {self.n_embd} numbers ({error})") from error
        if floats.shape != (self.n_embd,):
            raise TokenError("shape of vector", floats.shape, f"must be (n_embd,) = ({self.n_embd},)")
        if not np.isfinite(floats).all():
            i = int(np.isfinite(floats).argmin())
            raise TokenError(f"vector[{i}]", float(floats[i]), "must be a finite float32")
        return self._append(seq_id, [], [floats.copy()], pos, bool(output))

    def add_sequence(self, seq_id: int, tokens: Tokens, output: Outputs = "last") -> None:
        """Add tokens at the end of a sequence, be it new in this batch or not.

        Args:
            seq_id: From 0 to ``n_seq_max - 1``.
            tokens: Token ids, int32, at least one.
            output: The tokens among these to return rows for.

        Raises:
            InputError: As `add_token`.
        """
        if output not in ("last", "all", "none"):
            raise InputError("output", output, "must be 'last', 'all' or 'none'")
        last = self._append(seq_id, _checked_tokens(tokens, seq_id), [], None, output == "all")
        self._outputs[last] = output != "none"

    def add_seq(self, index: int, seq_id: int) -> None:
        """Let a token belong to one more sequence, at the same position.

        Raises:
            SequenceIdError: The sequence is out of range.
        """
        self._check_index(index)
        self._check_sequence(seq_id)
        shared = self._shared.setdefault(int(index), [])
        if seq_id != self._seq_ids[index] and seq_id not in shared:
            shared.append(int(seq_id))

    def set_output(self, index: int, output: bool = True) -> None:
        """Say whether a row of results is wanted for a token."""
        self._check_index(index)
        self._outputs[index] = bool(output)

    def set_output_last(self) -> None:
        """Ask for a row of results for the token that was added last."""
        self.set_output(len(self) - 1)

    def set_pos(self, index: int, pos: int) -> None:
        """Set the position of a token.

        Raises:
            PositionError: It is no int32.
        """
        self._check_index(index)
        _check_position(pos)
        self._positions[index] = int(pos)

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self._positions)

    def __iter__(self) -> Iterator[Item]:
        for index, (pos, seq_id, output) in enumerate(
            zip(self._positions, self._seq_ids, self._outputs, strict=True)
        ):
            yield Item(
                index=index,
                token=None if self.n_embd else self._tokens[index],
                pos=None if pos == UNSET else pos,
                seq_ids=(seq_id, *self._shared.get(index, ())),
                output=output,
            )

    @property
    def seq_ids(self) -> list[int]:
        """The sequences of the batch, in the order of their first tokens."""
        return list(dict.fromkeys(seq_id for item in self for seq_id in item.seq_ids))

    def columns(self, next_positions: Int32 | None = None) -> Columns:
        """The batch as llama.cpp sees it, every position set. A copy.

        Args:
            next_positions: int32, one per sequence: the position after what the decoder holds;
                None for empty memory.
        """
        n_seq_id, seq_ids = np.array([1] * len(self), np.int32), np.array(self._seq_ids, np.int32)
        if self._shared:
            shared = [(index, seq_id) for index, more in self._shared.items() for seq_id in more]
            after, more = np.array(shared, np.int32).reshape(-1, 2).T
            n_seq_id += np.bincount(after, minlength=len(self)).astype(np.int32)
            seq_ids = np.insert(seq_ids, after + 1, more)
        positions = np.array(self._positions, np.int32)
        return Columns(
            tokens=None if self.n_embd else np.array(self._tokens, np.int32),
            embd=np.array(self._vectors, np.float32).reshape(-1, self.n_embd) if self.n_embd else None,
            positions=infer_positions(positions, n_seq_id, seq_ids, next_positions),
            n_seq_id=n_seq_id,
            seq_ids=seq_ids,
            outputs=np.array(self._outputs, np.bool_),
        )

    def _append(
        self, seq_id: int, tokens: list[int], vectors: list[Float32], pos: int | None, output: bool
    ) -> int:
        """Add tokens, or vectors in their place, and return the index of the last."""
        if tokens if self.n_embd else vectors:
            field, takes = ("token", "embeddings") if tokens else ("embd", "tokens")
            limit = f"this batch was made with n_embd = {self.n_embd}, which takes {takes} only"
            raise TokenError("new entry", field, limit)
        self._check_sequence(seq_id)
        if pos is not None:
            _check_position(pos)
        n, room = len(tokens) + len(vectors), self.n_tokens - len(self)
        if n > room:
            limit = f"at most {room} more fit into n_tokens = {self.n_tokens}"
            raise BatchFullError(f"number of tokens to add to sequence {seq_id}", n, limit)
        self._tokens += tokens
        self._vectors += vectors
        self._positions += [UNSET if pos is None else int(pos)] * n
        self._seq_ids += [int(seq_id)] * n
        self._outputs += [output] * n
        return len(self) - 1

    def _check_sequence(self, seq_id: int) -> None:
        check_integer("seq_id", seq_id, 0, self.n_seq_max - 1, " (n_seq_max - 1)", error=SequenceIdError)

    def _check_index(self, index: int) -> None:
        if not len(self):
            raise InputError("index", index, "the batch is empty; add a token first")
        check_integer("index", index, 0, len(self) - 1, " (the last token)")


def _check_position(pos: int) -> None:
    check_integer("pos", pos, UNSET + 1, INT32_MAX, error=PositionError)


def _checked_tokens(tokens: Tokens, seq_id: int) -> list[int]:
    what = f"tokens of sequence {seq_id}"
    try:
        array = np.asarray(tokens)
    except (ValueError, OverflowError) as error:
        raise TokenError(what, "unreadable", f"must be integers ({error})") from error
    if array.ndim != 1 or len(array) == 0:
        raise TokenError(
            f"shape of the {what}", array.shape, "must be one-dimensional, with at least one token"
        )
    if array.dtype.kind not in "iu":
        raise TokenError(what, str(array.dtype), "must be integers")
    values: list[int] = array.tolist()
    if min(values) < -INT32_MAX - 1 or max(values) > INT32_MAX:
        i = next(i for i, value in enumerate(values) if not -INT32_MAX - 1 <= value <= INT32_MAX)
        raise TokenError(f"tokens[{i}] of sequence {seq_id}", values[i], "must fit into int32")
    return values
