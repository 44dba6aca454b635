"""Child side: a loaded model, what it is, and what llama.cpp logs. Only cells import this module.

Facts are those of llama.cpp 0c1e57098 (llama-cpp-python 0.3.36), include/llama.h unless noted.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
from dataclasses import dataclass, replace
from typing import Any

import llama_cpp.llama_cpp as C  # noqa: N812 - the C API
import msgspec

from crumplezone.sandbox.child.fork_server import UnforkableError
from crumplezone.sandbox.child.loop import Room
from crumplezone.workers.protocol.config import (
    CACHE_TYPES,
    DEVICES_MAX,
    FLASH_ATTENTION,
    LOAD_MODES,
    ROPE_SCALING,
    SIZE_MAX,
    SPLIT_MODES,
    CellConfig,
    CellInfo,
    ModelFile,
)

_log = logging.getLogger("llama.cpp")
_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}  # enum ggml_log_level
_AS_THEY_ARE = (
    *("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast"),
    *("yarn_beta_slow", "yarn_orig_ctx", "offload_kqv", "op_offload", "swa_full"),
    "kv_unified",  # only if not does a batch give each sequence what it gets alone
)
_CONTINUES = 5  # GGML_LOG_LEVEL_CONT


class LoadError(Exception):
    """llama.cpp returned NULL for a model or a context."""


class ContextError(LoadError):
    """It returned NULL for a context: the model is loaded."""


def ggml() -> ctypes.CDLL:
    """The handle through which ggml's own functions, which llama-cpp-python does not bind, are found.

    dlsym on libllama searches what libllama was linked to. Opening libggml-base by a file name would not do:
    a wheel holds copies under several names, and another copy has another abort callback.
    """
    library: ctypes.CDLL = C._lib  # noqa: SLF001 - there is no public name for it
    return library


def describe(model: Any, context: Any) -> CellInfo:
    """Facts of a loaded model and its context."""
    text = ctypes.create_string_buffer(256)
    C.llama_model_desc(model, text, len(text))
    recurrent = bool(C.llama_model_is_recurrent(model) or C.llama_model_is_hybrid(model))
    has_encoder = bool(C.llama_model_has_encoder(model))
    rope = C.llama_model_rope_type(model)
    commit = ggml().ggml_commit
    commit.restype = ctypes.c_char_p
    return CellInfo(
        n_vocab=C.llama_vocab_n_tokens(C.llama_model_get_vocab(model)),
        n_embd=C.llama_model_n_embd_out(model),
        n_ctx_seq=C.llama_n_ctx_seq(context),
        n_ctx_train=min(max(C.llama_model_n_ctx_train(model), 0), SIZE_MAX),  # grown by YaRN
        n_batch=C.llama_n_batch(context),
        has_encoder=has_encoder,
        has_decoder=bool(C.llama_model_has_decoder(model)),
        n_embd_inp=C.llama_model_n_embd_inp(model),
        causal=_metadata(model, "attention.causal") != "false",
        recurrent=recurrent,
        learned_positions=rope == C.LLAMA_ROPE_TYPE_NONE and not (recurrent or has_encoder),
        n_pos_per_embd=4 if rope in (C.LLAMA_ROPE_TYPE_MROPE, C.LLAMA_ROPE_TYPE_IMROPE) else 1,
        description=text.value.decode("utf-8", "replace"),
        system_info=C.llama_print_system_info().decode("utf-8", "replace"),
        llama_cpp=f"{importlib.metadata.version('llama-cpp-python')} ({commit().decode()})",
    )


def _metadata(model: Any, name: str) -> str:
    """A value of a model file under its architecture's name, or an empty string."""
    text = ctypes.create_string_buffer(256)
    C.llama_model_meta_val_str(model, b"general.architecture", text, len(text))
    key = text.value + b"." + name.encode()
    n = C.llama_model_meta_val_str(model, key, text, len(text))
    return text.value.decode("utf-8", "replace") if n >= 0 else ""


class NativeLogs:
    """Native log lines and the abort message, on their way out. Callbacks must outlive every call."""

    def __init__(self, room: Room) -> None:
        self.last_error = ""
        self._level = logging.INFO
        self._partial = b""
        self._log = C.llama_log_callback(self._on_log)
        C.llama_log_set(self._log, ctypes.c_void_p(0))
        self._abort = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(room.arena.note_abort)
        try:
            set_abort = ggml().ggml_set_abort_callback
        except AttributeError:
            _log.warning("ggml_set_abort_callback is missing: aborts will carry no assertion text")
        else:
            set_abort.restype = ctypes.c_void_p
            set_abort(self._abort)

    def _on_log(self, level: int, text: bytes, _: object) -> None:
        if level != _CONTINUES:
            self._level = _LEVELS.get(level, logging.INFO)
        self._partial += text
        *lines, self._partial = self._partial.split(b"\n")
        for raw in lines:
            line = raw.decode("utf-8", "replace")
            if line.strip(" ."):
                if self._level == logging.ERROR and not line.endswith("failed to load model"):
                    self.last_error = line
                _log.log(self._level, "%s", line)


@dataclass(frozen=True)
class Model:
    """A loaded model, and the logs of the cell that has it.

    Attributes:
        pointer: llama.cpp's.
        file: What was loaded.
    """

    pointer: Any
    file: ModelFile
    native_logs: NativeLogs


@dataclass(frozen=True)
class Seed:
    """What a zygote has: a model, and what a cell would say of it."""

    model: Model
    described: CellInfo

    def info(self) -> CellInfo:
        """As a cell of the zygote's configuration describes itself."""
        return self.described


def load_model(file: ModelFile, room: Room, *, vocab_only: bool = False) -> Model:
    """Load a model, or its vocabulary and metadata alone. Nothing is computed, and no thread is left.

    Raises:
        LoadError: llama.cpp could not; the message is its own.
    """
    native_logs = NativeLogs(room)
    C.llama_backend_init()
    params = model_params(file)
    params.vocab_only = vocab_only
    with room.recorder.phase("load"):
        pointer = C.llama_model_load_from_file(file.model.encode(), params)
    if not pointer:
        raise LoadError(native_logs.last_error or "llama_model_load_from_file returned NULL")
    return Model(pointer, file, native_logs)


def model_params(file: ModelFile) -> Any:
    """What a model is loaded with: a ``llama_model_params``."""
    params = C.llama_model_default_params()
    params.n_gpu_layers, params.main_gpu = file.n_gpu_layers, file.main_gpu
    params.split_mode = SPLIT_MODES[file.split_mode]
    params.load_mode = LOAD_MODES[file.use_mmap, file.use_mlock]
    if file.tensor_split:
        params.tensor_split = (ctypes.c_float * DEVICES_MAX)(*file.tensor_split)  # kept by the structure
    return params


def context_params(config: CellConfig) -> Any:
    """What a context is made of: a ``llama_context_params``."""
    params = C.llama_context_default_params()
    params.n_ctx, params.n_seq_max = config.n_ctx, config.n_seq_max
    params.n_batch, params.n_ubatch = config.n_batch, min(config.n_ubatch, config.n_batch)
    params.n_threads = config.n_threads
    params.n_threads_batch = config.n_threads_batch or config.n_threads
    for name in _AS_THEY_ARE:
        setattr(params, name, getattr(config, name))
    params.rope_scaling_type = ROPE_SCALING[config.rope_scaling_type]
    params.type_k, params.type_v = CACHE_TYPES[config.type_k], CACHE_TYPES[config.type_v]
    params.flash_attn_type = FLASH_ATTENTION[config.flash_attn]
    return params


def make_context(model: Model, config: CellConfig) -> Any:
    """Make a context.

    Raises:
        ContextError: llama.cpp could not; the message is its own.
    """
    params = context_params(config)
    context = C.llama_init_from_model(model.pointer, params)
    if context and C.llama_pooling_type(context) != C.LLAMA_POOLING_TYPE_NONE:
        # The file asks for pooled embeddings; we give a row for each token. (Always asking for NONE would
        # make llama.cpp warn about every model that says nothing.)
        C.llama_free(context)
        params.pooling_type = C.LLAMA_POOLING_TYPE_NONE
        context = C.llama_init_from_model(model.pointer, params)
    if not context:
        raise ContextError(model.native_logs.last_error or "llama_init_from_model returned NULL")
    return context


def refuse_gpu() -> None:
    """Raise `UnforkableError` where llama.cpp was built for one: its driver's state survives no fork."""
    if C.llama_supports_gpu_offload():
        raise UnforkableError("this llama.cpp was built for a GPU")


def preload(config: msgspec.Raw, room: Room) -> Seed:
    """The seed of a zygote. Its cells get the model from `model_of`.

    A context is made and freed again: one that cannot be had is found out here. Nothing is computed.

    Args:
        config: An encoded `CellConfig`.
        room: The zygote's.

    Raises:
        LoadError: As `load_model` and `make_context`.
        UnforkableError: The state that a GPU's driver keeps for a process does not survive a fork.
    """
    refuse_gpu()
    wanted = msgspec.msgpack.decode(config, type=CellConfig)
    model = load_model(wanted.file(), room)
    with room.recorder.phase("context", wanted.n_ctx):
        context = make_context(model, wanted)
    described = describe(model.pointer, context)
    C.llama_free(context)
    return Seed(model, described)


def model_of(preloaded: Any, file: ModelFile, room: Room, *, vocab_only: bool = False) -> Model:
    """The model of a cell: the one that its zygote has loaded, if it is the same, else a new one.

    Args:
        preloaded: As a target gets it.
        file: What it is to be.
        room: The cell's.
        vocab_only: Whether the vocabulary and the metadata of a new one are enough.

    Raises:
        LoadError: As `load_model`.
    """
    if isinstance(preloaded, Seed) and preloaded.model.file == file:
        return replace(preloaded.model, native_logs=NativeLogs(room))
    return load_model(file, room, vocab_only=vocab_only)
