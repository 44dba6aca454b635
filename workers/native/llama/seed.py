"""Child side: the seed of a `Llama`'s zygote: a loaded model. Only cells import this module.

Facts are those of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import llama_cpp.llama
import llama_cpp.llama_cpp as C  # noqa: N812 - the C API
import msgspec

from crumplezone.sandbox.child.loop import Room
from crumplezone.workers.native.model import LoadError, NativeLogs, refuse_gpu
from crumplezone.workers.protocol.llama import LlamaConfig, LlamaSeedInfo

original: Any = llama_cpp.llama  # its own types are incomplete


@contextmanager
def loading_by(load: Callable[..., Any]) -> Iterator[None]:
    """Have the original's constructor load its model by this instead of by ``internals.LlamaModel``."""
    internals = original.internals
    original.internals = SimpleNamespace(**vars(internals) | {"LlamaModel": load})
    try:
        yield
    finally:
        original.internals = internals


class _LoadedError(Exception):
    """Ends the original's constructor when it has loaded its model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model


@dataclass(frozen=True)
class LlamaSeed:
    """What a zygote has: a ``llama_cpp._internals.LlamaModel``, loaded as the original's constructor does."""

    model: Any
    native_logs: NativeLogs  # llama.cpp calls back into it as long as this process lives
    described: LlamaSeedInfo

    def info(self) -> LlamaSeedInfo:
        """What a supervisor may want to know before there is a cell."""
        return self.described


def preload(config: msgspec.Raw, room: Room) -> LlamaSeed:
    """The seed of a zygote. Nothing is computed, and no thread is left.

    Args:
        config: An encoded `LlamaConfig`.
        room: The zygote's.

    Raises:
        LoadError: llama.cpp could not load the model; the message is its own.
        UnforkableError: The state that a GPU's driver keeps for a process does not survive a fork.
    """
    refuse_gpu()
    wanted, native_logs = msgspec.msgpack.decode(config, type=LlamaConfig), NativeLogs(room)
    load = original.internals.LlamaModel

    def loaded(**arguments: Any) -> None:
        raise _LoadedError(load(**arguments))

    with room.recorder.phase("load"), loading_by(loaded):
        try:
            original.Llama(**wanted.parameters | {"model_path": wanted.model})
        except _LoadedError as done:
            model = done.model
        except ValueError as error:
            raise LoadError(native_logs.last_error or str(error)) from error
    size = 0 if wanted.parameters["vocab_only"] else _context_bytes(model.model, wanted.parameters["n_ctx"])
    return LlamaSeed(model, native_logs, LlamaSeedInfo(size))


def _context_bytes(model: Any, n_ctx: int) -> int:
    """Keys and values in float16, two bytes each (llama_kv_cache). Without layers, llama.cpp aborts."""
    n_head = max(int(C.llama_model_n_head(model)), 1)
    width = int(C.llama_model_n_embd(model)) * int(C.llama_model_n_head_kv(model)) // n_head
    tokens = n_ctx or int(C.llama_model_n_ctx_train(model))
    return 2 * 2 * int(C.llama_model_n_layer(model)) * width * tokens
