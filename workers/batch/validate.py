"""Whether a batch can be given to llama.cpp: said before the call, since llama.cpp may not live to say it.

Facts are those of llama.cpp 0c1e57098: src/llama-batch.cpp (``llama_batch_allocr::init``) and
src/llama-context.cpp (``decode``, ``encode``, ``output_reserve``) unless noted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from crumplezone.errors import InputError, PositionError, SequenceIdError, TokenError
from crumplezone.workers.batch.columns import Bool, Columns, Indices, Int32
from crumplezone.workers.protocol.config import INT32_MAX

Level = Literal["strict", "native", "off"]
Int64 = npt.NDArray[np.int64]

_TOKEN_NULL = -1  # LLAMA_TOKEN_NULL, include/llama.h
_GLANCE = 512  # tokens; of more, numpy is faster than a glance


@dataclass(frozen=True)
class Capacity:
    """What a model and a context can take.

    Attributes:
        n_vocab: Tokens of the vocabulary.
        n_embd: Floats of an input embedding (``llama_model_n_embd_inp``).
        n_batch: Most tokens of a call.
        n_ubatch: Most tokens of a compute pass.
        n_seq_max: Sequence ids are below this, even with a unified memory.
        n_ctx_seq: Tokens that memory holds for a sequence; None where it has no end (recurrent models).
        causal: Whether attention is causal. BERT-like models see the whole batch in one pass.
        has_encoder: Whether `encode` exists.
        has_decoder: Whether the model generates.
        n_outputs_max: Most outputs of a call; None for ``n_batch``, which is what llama.cpp makes of 0.
        all_outputs: Every token is an output (``llama_set_embeddings``).
        pooled: Results are pooled over each sequence, which goes wrong across compute passes.
        n_pos_per_embd: Positions of an embedding: 4 for models with M-RoPE, else 1.
        n_positions: Positions that the model has learned (BERT, GPT-2: ``n_ctx_train``); None for any.
    """

    n_vocab: int
    n_embd: int
    n_batch: int
    n_ubatch: int
    n_seq_max: int
    n_ctx_seq: int | None
    causal: bool = True
    has_encoder: bool = False
    has_decoder: bool = True
    n_outputs_max: int | None = None
    all_outputs: bool = False
    pooled: bool = False
    n_pos_per_embd: int = 1
    n_positions: int | None = None


@dataclass(frozen=True, eq=False)
class MemoryState:
    """What a context holds.

    Attributes:
        pos_min: int32, shape (n_seq_max,): the first position of each sequence; -1 where it is empty.
        pos_max: int32, shape (n_seq_max,): the last one.
        encoded: Sequences of the last `encode`, which the decoder of an encoder-decoder model looks at.
    """

    pos_min: Int32
    pos_max: Int32
    encoded: frozenset[int] = frozenset()

    @classmethod
    def empty(cls, n_seq_max: int) -> MemoryState:
        """Nothing yet. Models without memory (BERT) stay like this."""
        return cls(np.full(n_seq_max, -1, np.int32), np.full(n_seq_max, -1, np.int32))

    @property
    def next_positions(self) -> Int32:
        """Where each sequence goes on."""
        return self.pos_max + 1


def validate(
    columns: Columns,
    capacity: Capacity,
    memory: MemoryState,
    level: Level = "strict",
    *,
    encode: bool = False,
) -> None:
    """Refuse what llama.cpp would refuse, die of, or get wrong.

    Args:
        columns: The batch.
        capacity: Of the model and the context.
        memory: What the context holds before the call.
        level: "strict" for all of that; "native" for what llama.cpp itself answers with -1, its memory
            unchanged; "off" for nothing.
        encode: The batch is for ``llama_encode``.

    Raises:
        InputError: Names the first field, index, value and rule: a `TokenError`, `SequenceIdError` or
            `PositionError` where one of those is at fault.
    """
    if level not in _RULES:
        raise InputError("level", level, f"must be one of {', '.join(_RULES)}")
    if not encode and plainly_valid(columns, capacity, memory):
        return
    case = _Checks(columns, capacity, memory, encode)
    for rule in _RULES[level]:
        rule(case)


def plainly_valid(columns: Columns, capacity: Capacity, memory: MemoryState) -> bool:
    """Whether it is seen at a glance that no rule refuses a batch; if not, that is for the rules to say.

    It is of most batches: a few tokens, each of one sequence, that go on one by one where nothing is special.
    """
    n, tokens, room = len(columns), columns.tokens, capacity.n_ctx_seq
    if not 0 < n <= min(_GLANCE, capacity.n_batch) or tokens is None or columns.embd is not None:
        return False
    if capacity.has_encoder or capacity.pooled or not (capacity.causal and columns.single):
        return False
    if capacity.n_outputs_max is not None or capacity.n_positions is not None:
        return False
    values, seq_ids = tokens.tolist(), columns.seq_ids.tolist()
    if min(values) < 0 or max(values) >= capacity.n_vocab:
        return False
    if min(seq_ids) < 0 or max(seq_ids) >= capacity.n_seq_max:
        return False
    held = {seq_id: int(memory.pos_max[seq_id]) for seq_id in set(seq_ids)}
    last = held.copy()
    for seq_id, position in zip(seq_ids, columns.positions.tolist(), strict=True):
        if position != last[seq_id] + 1:
            return False
        last[seq_id] = position
    began = {seq_id: int(memory.pos_min[seq_id]) if end >= 0 else 0 for seq_id, end in held.items()}
    return room is None or all(end - began[seq_id] < room for seq_id, end in last.items())


@dataclass(frozen=True, eq=False)
class _Entries:
    """What ``seq_ids`` lists, one sequence behind the other, the tokens of each in the order of the batch.

    Attributes:
        rows: Index of the token.
        seq_ids: The sequence.
        rank: How many tokens of the same sequence come before it.
        pos: Position of the token, int64.
        held: The last position of the sequence in memory, int64; -1 for none.
    """

    rows: Indices
    seq_ids: Int32
    rank: Indices
    pos: Int64
    held: Int64

    @classmethod
    def of(cls, columns: Columns, memory: MemoryState) -> _Entries:
        order = np.argsort(columns.seq_ids, kind="stable")
        rows, seq_ids = columns.owners[order], columns.seq_ids[order]
        begins = np.flatnonzero(np.diff(seq_ids, prepend=-1))
        rank = np.arange(len(rows)) - np.repeat(begins, np.diff(begins, append=len(rows)))
        pos, held = columns.positions[rows], memory.pos_max[seq_ids]
        return cls(rows, seq_ids, rank, pos.astype(np.int64), held.astype(np.int64))

    def before(self, first: Int64 | int) -> Int64:
        """The position of the token before in the same sequence, or ``first`` where there is none."""
        return np.where(self.rank > 0, np.roll(self.pos, 1), first)

    def earliest(self, wrong: Bool) -> int:
        """Of the wrong entries, the one whose token comes first in the batch."""
        found = np.flatnonzero(wrong)
        return int(found[np.argmin(self.rows[found])])

    def refuse(self, wrong: Bool, limit: Callable[[int], str]) -> None:
        """Raise for the first position that is wrong; ``limit`` says of an entry what it should be."""
        if wrong.any():
            k = self.earliest(wrong)
            raise PositionError(f"positions[{self.rows[k]}]", int(self.pos[k]), limit(k))


@dataclass(frozen=True, eq=False)
class _Checks:
    """A batch under examination. Each rule is a method; it relies on those that `_RULES` puts before it."""

    columns: Columns
    capacity: Capacity
    memory: MemoryState
    encode: bool

    @cached_property
    def entries(self) -> _Entries:
        return _Entries.of(self.columns, self.memory)

    def has_tokens(self) -> None:
        if not len(self.columns):
            raise InputError("batch", "empty", "add at least one token")
        if self.columns.tokens is None and self.columns.embd is None:
            raise TokenError("tokens", None, "must be there, or embd in their place")

    def is_of_one_kind(self) -> None:
        tokens, embd, capacity = self.columns.tokens, self.columns.embd, self.capacity
        if embd is None:
            return
        if tokens is not None:
            raise TokenError("embd", embd.shape, "must be None beside tokens: llama.cpp ignores one of them")
        if embd.shape[1] != capacity.n_embd:
            raise TokenError("shape of embd", embd.shape, f"must be (n, n_embd) = (n, {capacity.n_embd})")
        if not (finite := np.isfinite(embd).all(axis=1)).all():
            raise TokenError(f"embd[{finite.argmin()}]", "NaN or infinity", "must be finite")
        if capacity.n_pos_per_embd > 1:
            limit = f"this model takes {capacity.n_pos_per_embd} (M-RoPE), which cannot be given here"
            raise PositionError("number of positions of an embedding", 1, limit)

    def is_in_vocabulary(self) -> None:
        tokens, n_vocab = self.columns.tokens, self.capacity.n_vocab
        if tokens is None or (self.columns.embd is not None and (tokens == _TOKEN_NULL).all()):
            return
        if len(bad := np.flatnonzero((tokens < 0) | (tokens >= n_vocab))):
            i = int(bad[0])
            raise TokenError(f"tokens[{i}]", int(tokens[i]), f"must be from 0 to n_vocab - 1 = {n_vocab - 1}")

    def belongs_to_sequences(self) -> None:
        # Where no token does, find_slot divides by zero (src/llama-kv-cache.cpp). Where only some do not,
        # they take cells that nobody can remove.
        if len(bad := np.flatnonzero(self.columns.n_seq_id < 1)):
            i = int(bad[0])
            raise SequenceIdError(f"n_seq_id[{i}]", int(self.columns.n_seq_id[i]), "must be at least 1")

    def belongs_to_known_sequences(self) -> None:
        seq_ids, n_seq_max = self.columns.seq_ids, self.capacity.n_seq_max
        if len(bad := np.flatnonzero((seq_ids < 0) | (seq_ids >= n_seq_max))):
            field = f"seq_ids[{self.columns.owners[bad[0]]}]"
            limit = f"must be from 0 to n_seq_max - 1 = {n_seq_max - 1}"
            raise SequenceIdError(field, int(seq_ids[bad[0]]), limit)

    def names_no_sequence_twice(self) -> None:
        entries = self.entries
        twice = (entries.rank > 0) & (np.diff(entries.rows, prepend=-1) == 0)
        if twice.any():
            k = entries.earliest(twice)
            field = f"seq_ids[{entries.rows[k]}]"
            raise SequenceIdError(field, int(entries.seq_ids[k]), "must name each sequence of the token once")

    def suits_the_model(self) -> None:
        capacity = self.capacity
        if self.encode and not capacity.has_encoder:
            # encode() builds the graph without memory, and a decoder's graph dereferences it.
            raise InputError("operation", "encode", "the model has no encoder: decode the batch")
        if self.encode or not (capacity.has_encoder and capacity.has_decoder):
            return
        if capacity.n_seq_max > 1:
            # GGML_ASSERT(!ubatch->equal_seqs()) of llm_graph_input_attn_cross (src/llama-graph.cpp)
            limit = "must be 1 for an encoder-decoder model: make another context"
            raise InputError("n_seq_max", capacity.n_seq_max, limit)
        if missing := set(self.columns.seq_ids.tolist()) - self.memory.encoded:
            raise SequenceIdError("seq_ids", min(missing), "must be encoded before it is decoded")

    def fits_one_call(self) -> None:
        n, capacity = len(self.columns), self.capacity
        if n > capacity.n_batch:
            raise InputError(
                "n_tokens", n, f"must be at most n_batch = {capacity.n_batch}: decode it in parts"
            )
        for applies, why in (
            (self.encode, "an encoder takes one pass"),
            (not capacity.causal, "attention that is not causal takes one pass"),
            (capacity.pooled, "results are pooled within a pass"),
        ):
            if applies and n > capacity.n_ubatch:
                raise InputError("n_tokens", n, f"must be at most n_ubatch = {capacity.n_ubatch}: {why}")
        every = capacity.all_outputs or self.encode
        n_outputs = n if every else int(np.count_nonzero(self.columns.outputs))
        if capacity.n_outputs_max is not None and n_outputs > capacity.n_outputs_max:
            limit = f"must be at most n_outputs_max = {capacity.n_outputs_max}"
            raise InputError("number of outputs", n_outputs, limit)

    def goes_on_one_by_one(self) -> None:
        """There is one right value; -1, INT_MAX, duplicates, holes and a wrong start are something else."""
        entries = self.entries
        if self.capacity.n_pos_per_embd > 1:  # M-RoPE: positions may jump forward
            before = entries.before(entries.held)
            entries.refuse(entries.pos <= before, lambda k: f"must be over {before[k]}: {self._after(k)}")
        else:
            right = entries.held + entries.rank + 1
            entries.refuse(entries.pos != right, lambda k: f"must be {right[k]}: {self._after(k)}")
        if (n_positions := self.capacity.n_positions) is not None:
            # They are rows of a tensor: GGML_ASSERT(i01 >= 0 && i01 < ne01), ggml/src/ggml-cpu/ops.cpp
            limit = f"must be below {n_positions}: the model has learned no more positions"
            entries.refuse(entries.pos >= n_positions, lambda _: limit)

    def _after(self, k: int) -> str:
        seq_id, held = self.entries.seq_ids[k], self.entries.held[k]
        return f"sequence {seq_id} " + ("is empty in memory" if held < 0 else f"ends at {held} in memory")

    def does_not_go_back(self) -> None:
        entries, before = self.entries, self.entries.before(-1)
        entries.refuse(entries.pos < before, lambda k: f"must not go back behind {before[k]}")

    def goes_on_from_memory(self) -> None:
        """Only if there is memory of the sequence: an empty one may begin anywhere."""
        entries, capacity = self.entries, self.capacity
        if capacity.n_pos_per_embd == 1:
            wrong, rule = entries.pos != entries.held + 1, "one up from there"
        elif self.columns.tokens is None:  # embeddings may share the last position
            wrong, rule = entries.pos < entries.held, "at least that"
        else:
            wrong, rule = entries.pos <= entries.held, "more than that"
        known = (entries.rank == 0) & (entries.held >= 0)
        entries.refuse(wrong & known, lambda k: f"{self._after(k)}; must be {rule}")

    def skips_none(self) -> None:
        if self.capacity.n_pos_per_embd > 1:
            return
        entries, before = self.entries, self.entries.before(INT32_MAX)
        # The check subtracts in int32. From INT_MAX to the first position, that can overflow: anything goes.
        first = entries.pos[np.arange(len(entries.pos)) - entries.rank]
        lost = np.isin(entries.seq_ids, entries.seq_ids[entries.pos - first >= INT32_MAX])
        entries.refuse((entries.pos > before + 1) & ~lost, lambda k: f"must be {before[k] + 1}: no gaps")

    def fits_the_context(self) -> None:
        """More would be answered with 1 however often it is tried."""
        entries, room = self.entries, self.capacity.n_ctx_seq
        if room is None or self.encode:
            return
        begin = self.memory.pos_min[entries.seq_ids]
        there = np.where(entries.held < 0, 0, entries.held - begin + 1)
        limit = f"the context holds {room} tokens per sequence"
        entries.refuse(there + entries.rank >= room, lambda k: f"{limit}: {self._after(k)}")

    def shares_only_with_equals(self) -> None:
        columns, memory = self.columns, self.memory
        if not columns.coupled:
            return
        owners = columns.owners
        first = columns.seq_ids[columns.begins[owners]]
        apart = memory.pos_min[first] != memory.pos_min[columns.seq_ids]
        apart |= memory.pos_max[first] != memory.pos_max[columns.seq_ids]
        if apart.any():
            k = int(apart.argmax())
            pair = [int(first[k]), int(columns.seq_ids[k])]
            limit = "memory must hold the same positions of sequences that share a token"
            raise SequenceIdError(f"seq_ids[{owners[k]}]", pair, limit)


_RULES: dict[Level, tuple[Callable[[_Checks], None], ...]] = {
    "strict": (
        _Checks.has_tokens,
        _Checks.is_of_one_kind,
        _Checks.is_in_vocabulary,
        _Checks.belongs_to_sequences,
        _Checks.belongs_to_known_sequences,
        _Checks.names_no_sequence_twice,
        _Checks.suits_the_model,
        _Checks.fits_one_call,
        _Checks.goes_on_one_by_one,
        _Checks.fits_the_context,
        _Checks.shares_only_with_equals,
    ),
    "native": (
        _Checks.has_tokens,
        _Checks.is_in_vocabulary,
        _Checks.belongs_to_known_sequences,
        _Checks.does_not_go_back,
        _Checks.goes_on_from_memory,
        _Checks.skips_none,
        _Checks.shares_only_with_equals,
    ),
    "off": (),
}
