"""``llama_batch`` structs with an owner, as a caller of llama.cpp has them."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from crumplezone import Batch

# --- a caller's own structure


def foreign(*sequences: list[int]) -> Owner:
    """A ctypes ``llama_batch`` with these sequences from position 0 on, as `Batch.of` makes one."""
    owner = Owner([[seq_id] for seq_id, tokens in enumerate(sequences) for _ in tokens])
    columns = Batch.of(sequences).columns()
    filled = {"token": columns.tokens, "pos": columns.positions, "logits": columns.outputs}
    for name, column in filled.items():
        owner.arrays[name][:] = column
    return owner


INT32 = ctypes.POINTER(ctypes.c_int32)


class LlamaBatch(ctypes.Structure):
    """The layout of ``llama_batch``, include/llama.h."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", INT32),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", INT32),
        ("n_seq_id", INT32),
        ("seq_id", ctypes.POINTER(INT32)),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class Owner:
    """A batch, and the memory that it points to."""

    def __init__(self, sets: list[list[int]]) -> None:
        n = len(sets)
        self.arrays: dict[str, npt.NDArray[Any]] = {
            "token": np.arange(10, 10 + n, dtype=np.int32),
            "pos": np.arange(20, 20 + n, dtype=np.int32),
            "n_seq_id": np.array([len(each) for each in sets], np.int32),
            "logits": np.array([i % 2 * 5 for i in range(n)], np.int8),
        }
        self.ids = [np.array(each, np.int32) for each in sets]
        self.arrays["seq_id"] = np.array([each.ctypes.data for each in self.ids], np.uintp)
        self.batch = LlamaBatch(n_tokens=n)
        for name, array in self.arrays.items():
            point(self.batch, name, array.ctypes.data)


def point(batch: LlamaBatch, name: str, address: int) -> None:
    field = getattr(LlamaBatch, name)
    ctypes.c_void_p.from_address(ctypes.addressof(batch) + field.offset).value = address
