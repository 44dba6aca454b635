"""Child side: the memory of a context, its saved states, and adapters. Only cells import this module.

Facts are those of llama.cpp 0c1e57098, include/llama.h unless noted. What llama.cpp would abort on, the
supervisor has refused already (`workers/memory/memory.py`); what it merely fails on is answered as such.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import llama_cpp.llama_cpp as C  # noqa: N812 - the C API
import numpy as np
import numpy.typing as npt

from crumplezone.sandbox.ipc.arena import Arena
from crumplezone.workers.protocol.messages import Adapt, MemoryOperation, Saved, Span


class AdapterError(Exception):
    """llama.cpp did not accept an adapter."""


def spans(memory: Any, seq_ids: Iterable[int]) -> list[Span]:
    """Smallest and largest position of sequences, -1 for an empty one."""
    if not memory:  # encoder-only models have none
        return []
    return [
        Span(seq_id, C.llama_memory_seq_pos_min(memory, seq_id), C.llama_memory_seq_pos_max(memory, seq_id))
        for seq_id in seq_ids
    ]


def operate(memory: Any, request: MemoryOperation) -> bool:
    """Do one operation; False if this kind of memory cannot (a recurrent one keeps no single positions)."""
    seq_id, begin, end = request.seq_id, request.begin, request.end
    if not memory:  # encoder-only: nothing is held, and nothing can be
        return request.name == "clear"
    match request.name:
        case "clear":
            C.llama_memory_clear(memory, True)
        case "remove":
            return bool(C.llama_memory_seq_rm(memory, seq_id, begin, end))
        case "copy":
            C.llama_memory_seq_cp(memory, seq_id, request.target, begin, end)
        case "shift":
            if not C.llama_memory_can_shift(memory):
                return False
            C.llama_memory_seq_add(memory, seq_id, begin, end, request.delta)
    return True


def save(context: Any, seq_id: int, arena: Arena) -> Saved:
    """Write the state of a sequence into the arena, if there is room for it."""
    size = int(C.llama_state_seq_get_size(context, seq_id))
    if size > arena.room:  # to be asked again, with more
        return Saved(size)
    (into,) = arena.arrays([("u1", size)])
    pointer = into.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    return Saved(int(C.llama_state_seq_get_data(context, pointer, size, seq_id)))


def load(context: Any, memory: Any, seq_id: int, state: npt.NDArray[np.uint8]) -> bool:
    """Replace a sequence by a saved state; False if llama.cpp did not take all of it: then it is empty."""
    pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    C.llama_memory_seq_rm(memory, seq_id, -1, -1)  # the state of an empty sequence would leave it as it is
    done = int(C.llama_state_seq_set_data(context, pointer, len(state), seq_id)) == len(state)
    if not done:  # a part may have arrived
        C.llama_memory_seq_rm(memory, seq_id, -1, -1)
    return done


class NativeAdapters:
    """LoRA adapters and the control vector of a context.

    Args:
        model: The model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._loaded: dict[str, Any] = {}

    def use(self, context: Any, request: Adapt, vector: npt.NDArray[np.float32], n_embd: int) -> None:
        """Make these the adapters and the control vector of a context, in the place of those it had.

        Raises:
            AdapterError: llama.cpp refused one; nothing is changed. (A LoRA file left unnoticed would crash
                the first decode.)
        """
        adapters = [self._load(path) for path in request.paths]
        data = vector.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) if len(vector) else None
        layers = request.first_layer, request.last_layer
        if C.llama_set_adapter_cvec(context, data, len(vector), n_embd, *layers):
            raise AdapterError("llama.cpp refused the control vector")
        pointers = (C.llama_adapter_lora_p_ctypes * len(adapters))(*adapters)
        scales = (ctypes.c_float * len(adapters))(*request.scales)
        if C.llama_set_adapters_lora(context, pointers, len(adapters), scales):
            raise AdapterError("llama.cpp refused the adapters")

    def _load(self, path: str) -> Any:
        if path not in self._loaded:
            adapter = C.llama_adapter_lora_init(self._model, path.encode())
            if not adapter:
                raise AdapterError(f"{path} is not a LoRA adapter of this model")
            self._loaded[path] = adapter
        return self._loaded[path]
