"""Reading a caller's ``llama_batch``: a C structure full of pointers that nobody has checked.

Not one of them is dereferenced here. The kernel copies what they point to, and where there is nothing, its
answer is EFAULT; that is an `InputError`, where a dereference would be the end of the process.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from crumplezone.errors import InputError, SequenceIdError, check_integer
from crumplezone.workers.batch.columns import LLAMA_MAX_SEQ, UNSET, Columns, Int32, infer_positions
from crumplezone.workers.batch.validate import Level

MAX_TOKENS = 2**20
_MAX_IDS = 2**22  # entries of seq_id, of all tokens together

_POINTERS = ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")  # struct llama_batch, include/llama.h
_SIZES = {"n_tokens": 4} | dict.fromkeys(_POINTERS, ctypes.sizeof(ctypes.c_void_p))

_IOV_MAX = 1024  # most spans of one writev: limits.h
_PAGE = os.sysconf("SC_PAGESIZE")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.writev.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_libc.writev.restype = ctypes.c_ssize_t


def read_llama_batch(
    batch: object, *, n_embd: int, next_positions: Int32 | None = None, level: Level = "strict"
) -> Columns:
    """Copy a ctypes ``llama_batch``, or that of a ``llama_cpp.LlamaBatch``. Its values are for `validate`.

    NULL for ``pos``, ``n_seq_id``, ``seq_id`` or ``logits`` is what include/llama.h says: the next positions,
    sequence 0, the last token. At level "off" it stands in ``Columns.nulls`` too, to be sent as NULL.

    Args:
        batch: The structure, known by its fields, or what has one as its attribute ``batch``.
        n_embd: Floats of an embedding of the model.
        next_positions: As in `Batch.columns`.
        level: As in `validate`.

    Raises:
        InputError: It is no such structure, or a pointer in it leads nowhere; names the field and index.
    """
    fields = _fields(getattr(batch, "batch", batch))
    n = fields["n_tokens"]
    check_integer("n_tokens", n, 0, MAX_TOKENS)
    row = np.dtype((np.float32, (n_embd,)))
    nulls = {name for name in _POINTERS[2:] if not fields[name]}
    tokens = _array("token", fields, np.int32) if fields["token"] else None
    embd = _array("embd", fields, row) if fields["embd"] else None
    n_seq_id = np.ones(n, np.int32) if "n_seq_id" in nulls else _array("n_seq_id", fields, np.int32)
    seq_ids, lost = _seq_ids(fields, n_seq_id, level)
    if "pos" in nulls:
        positions = infer_positions(np.full(n, UNSET, np.int32), n_seq_id, seq_ids, next_positions)
    else:
        positions = _array("pos", fields, np.int32)
    outputs = np.arange(n) == n - 1 if "logits" in nulls else _array("logits", fields, np.int8) != 0
    return Columns(
        tokens=tokens,
        embd=embd,
        positions=positions,
        n_seq_id=n_seq_id,
        seq_ids=seq_ids,
        outputs=outputs,
        nulls=frozenset(nulls | lost if level == "off" else ()),
    )


def _fields(structure: object) -> dict[str, int]:
    """The values of the structure's fields: ``n_tokens``, and addresses. It is itself read with care."""
    kind: Any = type(structure)
    names = [name for name, *_ in getattr(kind, "_fields_", ())]
    if not isinstance(structure, ctypes.Structure) or names != list(_SIZES):
        limit = f"must be a llama_batch (fields {', '.join(_SIZES)}), or a LlamaBatch that is not closed"
        raise InputError("batch", kind.__name__, limit)
    for name, size in _SIZES.items():
        if getattr(kind, name).size != size:
            raise InputError(f"size of {name}", getattr(kind, name).size, f"must be {size} bytes")
    try:
        raw = _copy([ctypes.addressof(structure)], [ctypes.sizeof(structure)])
    except _UnreadableError as error:
        raise InputError("batch", hex(ctypes.addressof(structure)), "is not there: it was freed") from error
    fields = {}
    for name, size in _SIZES.items():
        begin = getattr(kind, name).offset
        fields[name] = int.from_bytes(raw[begin : begin + size], sys.byteorder, signed=name == "n_tokens")
    return fields


def _array(name: str, fields: dict[str, int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """The ``n_tokens`` elements that a field points to."""
    n, size = fields["n_tokens"], np.dtype(dtype).itemsize
    try:
        return np.frombuffer(bytearray(_copy([fields[name]], [n * size])), dtype)
    except _UnreadableError as error:
        field, where = f"{name}[{error.offset // size}]", hex(fields[name] + error.offset)
        raise InputError(field, where, f"is not there, and n_tokens is {n}") from error


def _seq_ids(fields: dict[str, int], n_seq_id: Int32, level: Level) -> tuple[Int32, set[str]]:
    """The sequence ids, one token behind the other, and the pointers to them that are NULL."""
    counts = np.maximum(n_seq_id, 0)
    if (counts > LLAMA_MAX_SEQ).any():
        i = int(np.argmax(counts > LLAMA_MAX_SEQ))
        raise SequenceIdError(f"n_seq_id[{i}]", int(counts[i]), f"must be at most {LLAMA_MAX_SEQ}")
    if counts.sum() > _MAX_IDS:
        raise SequenceIdError("sum of n_seq_id", int(counts.sum()), f"must be at most {_MAX_IDS}")
    seq_ids = np.zeros(int(counts.sum()), np.int32)
    if not fields["seq_id"]:
        if level != "off" and (counts > 1).any():
            i = int(np.argmax(counts > 1))
            raise SequenceIdError(f"n_seq_id[{i}]", int(counts[i]), "must be 1, since seq_id is NULL")
        return seq_ids, set()
    pointers = _array("seq_id", fields, np.uintp)
    lost = (pointers == 0) & (counts > 0)
    if level != "off" and lost.any():
        i = int(np.argmax(lost))
        raise SequenceIdError(f"seq_id[{i}]", "NULL", f"must point to {counts[i]} ids (n_seq_id[{i}])")
    there = np.flatnonzero(pointers)
    try:
        raw = _copy(pointers[there].tolist(), (4 * counts[there]).tolist())
    except _UnreadableError as error:
        i, j = int(there[error.index]), error.offset // 4
        where = hex(int(pointers[i]) + error.offset)
        limit = f"is not there, and n_seq_id[{i}] is {counts[i]}"
        raise SequenceIdError(f"seq_id[{i}][{j}]", where, limit) from error
    seq_ids[np.repeat(pointers != 0, counts)] = np.frombuffer(raw, np.int32)
    return seq_ids, {f"seq_id[{i}]" for i in np.flatnonzero(lost)}


class _UnreadableError(Exception):
    """Memory that is not there.

    Attributes:
        index: Of the span.
        offset: How many bytes of it are there.
    """

    def __init__(self, index: int, offset: int) -> None:
        super().__init__(index, offset)
        self.index, self.offset = index, offset


def _copy(addresses: list[int], sizes: list[int]) -> bytes:
    """The bytes at these addresses of this process, one span behind the other.

    The kernel writes them into a pipe. That needs no right which a seccomp filter may have taken away
    (process_vm_readv), and respects the protection of pages (/proc/self/mem does not).

    Raises:
        _UnreadableError: A span is not mapped to its end, or may not be read.
    """
    spans = np.array([addresses, sizes], np.uint64).T.copy()  # struct iovec: base, length
    spans[spans[:, 1] == 0] = 0  # wherever an empty one may point to
    copied = bytearray()
    source, sink = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        at, careful = 0, False
        while at < len(spans):
            part = spans[at : at + (1 if careful else _IOV_MAX)].copy()
            if (
                careful
            ):  # at most to the end of the page: of one that it cannot fill, the kernel takes nothing
                part[0, 1] = min(int(part[0, 1]), _PAGE - int(part[0, 0]) % _PAGE)
            written = _libc.writev(sink, part.ctypes.data, len(part))
            if written >= 0:
                copied += os.read(source, written) if written else b""
                at = _skip(spans, at, written)
            elif ctypes.get_errno() != errno.EFAULT:
                raise OSError(ctypes.get_errno(), "writev into a pipe failed")
            elif careful:
                raise _UnreadableError(at, sizes[at] - int(spans[at, 1]))
            else:
                careful = True
    finally:
        os.close(source)
        os.close(sink)
    return bytes(copied)


def _skip(spans: npt.NDArray[np.uint64], at: int, written: int) -> int:
    """Take what was written off the spans from ``at`` on; the first that has something left."""
    ends = np.cumsum(spans[at : at + _IOV_MAX, 1])
    done = int(np.searchsorted(ends, written, "right"))
    rest = written - (int(ends[done - 1]) if done else 0)
    if rest:
        base, size = spans[at + done].tolist()
        spans[at + done] = base + rest, size - rest
    return at + done
