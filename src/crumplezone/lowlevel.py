"""llama.cpp's own functions, by their own names and with their return codes, over a `Decoder`.

Code that calls ``llama_cpp.llama_decode(ctx, batch)`` runs here with a `Decoder` for its context:

    from crumplezone import Decoder, lowlevel as llama_cpp

A crash is not one any more: the batch is decoded sequence by sequence, and the return code is that of
success. A sequence that crashes alone makes it -3, and the others have their results. As there, a context is
for one thread. docs/decoder.md has what is different. (llama.cpp 0c1e57098, include/llama.h)
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from crumplezone.errors import (
    BatchFullError,
    CrumplezoneError,
    InputError,
    SequenceIdError,
    TokenError,
    UsageError,
    check_integer,
)
from crumplezone.sandbox.host.errands import BesideLog
from crumplezone.workers.batch.batch import Batch
from crumplezone.workers.batch.columns import LLAMA_MAX_SEQ, Columns
from crumplezone.workers.batch.ctypes_batch import MAX_TOKENS, read_llama_batch
from crumplezone.workers.batch.results import Result
from crumplezone.workers.decoder import Decoder
from crumplezone.workers.memory.memory import Memory

LLAMA_PROCESS_TYPE_ENCODE, LLAMA_PROCESS_TYPE_DECODE = 0, 1
LLAMA_TOKEN_NULL = -1

llama_token = llama_pos = llama_seq_id = ctypes.c_int32

_log = BesideLog(logging.getLogger("crumplezone"))
_INT32 = ctypes.POINTER(ctypes.c_int32)
_Row = npt.NDArray[np.float32]


class llama_batch(ctypes.Structure):  # noqa: N801 - its name in llama.h
    """``struct llama_batch``: the same fields, filled in the same way."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", _INT32),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", _INT32),
        ("n_seq_id", _INT32),
        ("seq_id", ctypes.POINTER(_INT32)),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


@dataclass
class _Last:
    """What the last call on a decoder left, and how the next one is to be made."""

    columns: Columns | None = None
    result: Result | None = None
    embeddings: bool = False


_last: weakref.WeakKeyDictionary[Decoder, _Last] = weakref.WeakKeyDictionary()


def llama_batch_init(n_tokens: int, embd: int, n_seq_max: int) -> llama_batch:
    """A batch with room for so many tokens. Unlike llama.cpp's it is all zero, and frees itself."""
    check_integer("n_tokens", n_tokens, 1, MAX_TOKENS)
    check_integer("embd", embd, 0, 2**16)
    check_integer("n_seq_max", n_seq_max, 1, LLAMA_MAX_SEQ, " (LLAMA_MAX_SEQ)")
    batch = llama_batch()
    batch.token = None if embd else (ctypes.c_int32 * n_tokens)()
    batch.embd = (ctypes.c_float * (n_tokens * embd))() if embd else None
    batch.pos, batch.n_seq_id = (ctypes.c_int32 * n_tokens)(), (ctypes.c_int32 * n_tokens)()
    rows = ((ctypes.c_int32 * n_seq_max) * n_tokens)()
    batch.seq_id = (_INT32 * n_tokens)(*(ctypes.cast(row, _INT32) for row in rows))
    batch.rows = rows  # ctypes does not keep alive what the pointers of an array point to
    batch.logits = (ctypes.c_int8 * n_tokens)()
    return batch


def llama_batch_get_one(tokens: Any, n_tokens: int) -> llama_batch:
    """A batch of one sequence, 0, that goes on where that ends; a row for its last token.

    Args:
        tokens: A ctypes array of, or a pointer to, ``llama_token``, which the batch refers to; or a sequence
            of integers, which it copies.
        n_tokens: How many of them.
    """
    if isinstance(tokens, Sequence | np.ndarray):
        tokens = (ctypes.c_int32 * len(tokens))(*tokens)
    if isinstance(tokens, ctypes.Array):
        check_integer("n_tokens", n_tokens, 0, len(tokens), ", the length of tokens")
    batch = llama_batch(n_tokens=n_tokens)
    batch.token = tokens
    return batch


def llama_batch_free(batch: llama_batch) -> None:
    """Nothing: a batch frees itself."""


def llama_decode(ctx: Decoder, batch: object) -> int:
    """Decode a batch: 0 done, 1 no memory slot, -1 invalid batch, -3 a sequence crashes alone.

    1 and -1 leave the memory as it was.
    """
    return _run(ctx, batch, encode=False)


def llama_encode(ctx: Decoder, batch: object) -> int:
    """Encode a batch. Without an encoder, where llama.cpp dies, every sequence is decoded.

    Either way the memory is neither used nor changed.
    """
    return _run(ctx, batch, encode=True)


def llama_process(ctx: Decoder, type: int, batch: object) -> int:  # noqa: A002 - its name in llama.h
    """`llama_encode` or `llama_decode`."""
    if type not in (LLAMA_PROCESS_TYPE_ENCODE, LLAMA_PROCESS_TYPE_DECODE):
        raise InputError("type", type, "must be LLAMA_PROCESS_TYPE_ENCODE or LLAMA_PROCESS_TYPE_DECODE")
    return _run(ctx, batch, encode=type == LLAMA_PROCESS_TYPE_ENCODE)


def llama_batch_ext_init(ctx: Decoder) -> Batch:
    """A batch with room for what one call takes."""
    return Batch(ctx.info.n_batch, ctx.n_seq_max)


def llama_batch_ext_free(batch: Batch) -> None:
    """Nothing: a batch frees itself."""


def llama_batch_ext_clear(batch: Batch) -> None:
    """Take everything out."""
    batch.clear()


def llama_batch_ext_add_token(batch: Batch, seq_id: int, id: int) -> int:  # noqa: A002 - its name in llama.h
    """Add a token: its index, or -1 full, -2 invalid token, -3 invalid sequence. A refused one is not kept.

    Without `llama_batch_ext_set_pos` it goes on where its sequence ends.
    """
    try:
        return -2 if id == LLAMA_TOKEN_NULL else batch.add_token(seq_id, id)
    except BatchFullError:
        return -1
    except TokenError:
        return -2
    except SequenceIdError:
        return -3


def llama_batch_ext_add_seq(batch: Batch, idx: int, seq_id: int) -> bool:
    """Let a token belong to one more sequence."""
    return _done(batch.add_seq, idx, seq_id)


def llama_batch_ext_set_pos(batch: Batch, idx: int, pos: Any) -> bool:
    """Set the position of a token: ``pos`` points to a ``llama_pos``, as ``ctypes.byref(llama_pos(7))``."""
    if isinstance(pos, int):
        raise InputError("pos", pos, f"must point to it: ctypes.byref(llama_pos({pos}))")
    # Read as every pointer of a caller is: by the kernel.
    pointer = ctypes.cast(pos, _INT32)
    read = read_llama_batch(llama_batch(n_tokens=1, token=pointer), n_embd=0).tokens
    return read is not None and _done(batch.set_pos, idx, int(read[0]))


def llama_batch_ext_set_output_logits(batch: Batch, idx: int, value: bool) -> bool:
    """Say whether a row is wanted for a token."""
    return _done(batch.set_output, idx, value)


llama_batch_ext_set_output_embd = llama_batch_ext_set_output_logits  # as in llama.cpp, for now


def llama_set_embeddings(ctx: Decoder, embeddings: bool) -> None:
    """Whether the next calls give hidden states too: then every token is an output."""
    _of(ctx).embeddings = bool(embeddings)


def llama_get_logits_ith(ctx: Decoder, i: int) -> _Row | None:
    """Logits of a token of the last batch, float32, shape (n_vocab,); None if it was no output.

    ``i`` is its index in the batch; -1 is the last output, and so on backwards.
    """
    return _row(ctx, i, "logits")


def llama_get_embeddings_ith(ctx: Decoder, i: int) -> _Row | None:
    """Hidden state of a token of the last batch, float32, shape (n_embd,); None if there is none."""
    return _row(ctx, i, "embeddings")


def llama_get_logits(ctx: Decoder) -> npt.NDArray[np.float32]:
    """Logits of every output of the last batch, in its order: float32, shape (n_outputs, n_vocab)."""
    return _rows(ctx, "logits", ctx.info.n_vocab)


def llama_get_embeddings(ctx: Decoder) -> npt.NDArray[np.float32]:
    """Hidden states of every output of the last batch, in its order: float32, shape (n_outputs, n_embd)."""
    return _rows(ctx, "embeddings", ctx.info.n_embd)


def llama_get_memory(ctx: Decoder) -> Memory:
    """The memory of a decoder."""
    return ctx.memory


def llama_memory_clear(mem: Memory, data: bool) -> None:  # noqa: ARG001 - as in llama.h
    """Remove everything."""
    mem.clear()


def llama_memory_seq_rm(mem: Memory, seq_id: int, p0: int, p1: int) -> bool:
    """Remove positions of a sequence, a negative one: of all; False if this memory cannot."""
    seq_ids = range(len(mem.next_positions)) if seq_id < 0 else [seq_id]
    done = [mem.remove(each, max(p0, -1), max(p1, -1)) for each in seq_ids]
    return all(done)


def llama_memory_seq_cp(mem: Memory, seq_id_src: int, seq_id_dst: int, p0: int, p1: int) -> None:
    """Copy a whole sequence; copies of a part abort llama.cpp where each sequence has a stream."""
    if p0 > 0 or (0 <= p1 <= mem.pos_max(seq_id_src)):
        raise InputError("p0, p1", (p0, p1), "must be -1, -1: llama.cpp copies whole sequences only")
    if seq_id_src != seq_id_dst:
        mem.copy(seq_id_src, seq_id_dst)


def llama_memory_seq_keep(mem: Memory, seq_id: int) -> None:
    """Remove every other sequence."""
    mem.keep(seq_id)


def llama_memory_seq_add(mem: Memory, seq_id: int, p0: int, p1: int, delta: int) -> None:
    """Move positions of a sequence.

    Raises:
        InputError: This memory cannot (llama.cpp aborts, or goes on with wrong positions).
    """
    if not mem.shift(seq_id, max(p0, -1), max(p1, -1), delta):
        raise InputError("memory", "recurrent or none", "cannot move positions")


def llama_memory_seq_pos_min(mem: Memory, seq_id: int) -> int:
    """The smallest position of a sequence, -1 if it is empty."""
    return mem.pos_min(seq_id)


def llama_memory_seq_pos_max(mem: Memory, seq_id: int) -> int:
    """The largest position of a sequence, -1 if it is empty."""
    return mem.pos_max(seq_id)


def _of(ctx: Decoder) -> _Last:
    return _last.setdefault(ctx, _Last())


def _done(work: Callable[..., None], *arguments: Any) -> bool:
    try:
        work(*arguments)
    except InputError:
        return False
    return True


def _run(ctx: Decoder, batch: object, *, encode: bool) -> int:
    last = _of(ctx)
    last.columns, last.result = None, None  # llama.cpp goes on showing the rows of the call before
    try:
        columns = _columns(ctx, batch, encode=encode)
        if encode or last.embeddings:
            columns = replace(columns, outputs=np.ones(len(columns), np.bool_))
        if encode:
            result = ctx.encode(columns)
        else:
            result = ctx.decode(columns, embeddings=last.embeddings, level="native")
        rc = min((_code(error) for error in result.errors.values()), default=0)
        if rc in (1, -1):
            return rc if _take_back(ctx, columns, result) else -3
    except UsageError:  # in the middle of another call, where llama.cpp would die; or closed
        raise
    except InputError as error:
        _log.warning("invalid batch: %s", error)
        return -1
    except CrumplezoneError as error:
        _log.warning("%s", error)
        return _code(error)
    last.columns, last.result = columns, result
    return rc


def _columns(ctx: Decoder, batch: object, *, encode: bool) -> Columns:
    follows = None if encode else ctx.memory.next_positions
    if isinstance(batch, Batch):
        columns = batch.columns(follows)
    else:
        columns = read_llama_batch(batch, n_embd=ctx.info.n_embd_inp, next_positions=follows, level="native")
    if (columns.n_seq_id < 1).any():
        # llama.cpp dies if no token has a sequence; if only some have none, nobody can remove them.
        i = int(np.argmin(columns.n_seq_id))
        raise SequenceIdError(f"n_seq_id[{i}]", int(columns.n_seq_id[i]), "must be at least 1")
    return columns


def _take_back(ctx: Decoder, columns: Columns, result: Result) -> bool:
    """Remove what the safe rungs appended before a sequence was refused; False if this memory cannot."""
    done = [
        ctx.memory.remove(seq_id, int(columns.positions[columns.rows_of(seq_id)].min()))
        for seq_id in result.seq_ids
        if seq_id not in result.errors
    ]
    return all(done)


def _code(error: CrumplezoneError) -> int:
    rc: int | None = getattr(error, "rc", None)
    return -3 if rc is None else rc


def _row(ctx: Decoder, i: int, what: str) -> _Row | None:
    last = _of(ctx)
    if last.columns is None or last.result is None:
        return None
    columns, outputs = last.columns, np.flatnonzero(last.columns.outputs)
    if i < 0:
        if -i > len(outputs):
            return None
        i = int(outputs[i])
    if i >= len(columns) or not columns.outputs[i]:
        return None
    seq_id = int(columns.seq_ids[columns.begins[i]])
    try:
        row: _Row = getattr(last.result, what)(seq_id, int(columns.positions[i]))
    except CrumplezoneError:
        return None
    return row


def _rows(ctx: Decoder, what: str, width: int) -> npt.NDArray[np.float32]:
    columns = _of(ctx).columns
    outputs = [] if columns is None else np.flatnonzero(columns.outputs).tolist()
    rows = [row for i in outputs if (row := _row(ctx, i, what)) is not None]
    return np.array(rows, np.float32).reshape(len(rows), width)
