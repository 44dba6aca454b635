"""Child side: llama.cpp behind typed requests. Only cells import this module.

Facts are those of llama.cpp 0c1e57098 (llama-cpp-python 0.3.36), include/llama.h unless noted.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import llama_cpp.llama_cpp as C  # noqa: N812 - the C API
import msgspec
import numpy as np
import numpy.typing as npt

from crumplezone.sandbox.child import Room
from crumplezone.workers import native_memory
from crumplezone.workers.engine import Engine
from crumplezone.workers.protocol import (
    Adapt,
    Adapted,
    CellConfig,
    CellInfo,
    Decode,
    Decoded,
    Generate,
    Generated,
    Load,
    MemoryOperation,
    Remembered,
    Request,
    Resize,
    Save,
    Saved,
    Tokenize,
    Tokenized,
    batch_shapes,
    row_shapes,
)

_log = logging.getLogger("llama.cpp")
_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}  # enum ggml_log_level
_CONTINUES = 5  # GGML_LOG_LEVEL_CONT
_INT32 = ctypes.POINTER(ctypes.c_int32)
_INT8 = ctypes.POINTER(ctypes.c_int8)
_FLOAT = ctypes.POINTER(ctypes.c_float)


class LoadError(Exception):
    """llama.cpp returned NULL for a model or a context."""


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
        n_ctx_train=C.llama_model_n_ctx_train(model),
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


class Voices:
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


class LlamaCell:
    """One model and one context.

    Args:
        config: An encoded `CellConfig`.
        room: The cell's arena.

    Raises:
        LoadError: The model or the context could not be made; the message is llama.cpp's own.
    """

    request_type: Any = Request

    def __init__(self, config: msgspec.Raw, room: Room) -> None:
        self.config = msgspec.msgpack.decode(config, type=CellConfig)
        self._arena, self.recorder = room.arena, room.recorder
        self._voices = Voices(room)
        C.llama_backend_init()
        with self.recorder.phase("load"):
            self.model = self._load_model()
        self.vocab = C.llama_model_get_vocab(self.model)
        with self.recorder.phase("context", self.config.n_ctx):
            self.context = self._make_context()
        self.memory = C.llama_get_memory(self.context)
        self._info = describe(self.model, self.context)
        self._engine = Engine(self)
        self._adapters = native_memory.Adapters(self.model)
        self._unsettled = False  # copies and shifts that llama.cpp has noted down, but not done

    def info(self) -> CellInfo:
        """Facts of the loaded model."""
        return self._info

    def handle(self, request: Request) -> msgspec.Struct:
        """Answer one request."""
        match request:
            case Decode():
                return self._decode(request)
            case Tokenize():
                return Tokenized(self._tokenize(request.n_bytes))
            case Generate():
                return self._generate(request)
            case MemoryOperation():
                with self.recorder.phase(request.name, request.seq_id):
                    self._unsettled |= request.name in ("copy", "shift")
                    return self._remembered(native_memory.operate(self.memory, request))
            case Save():
                return Saved(self._save(request.seq_id))
            case Load():
                self._settle()
                (state,) = self._arena.arrays([("u1", request.size)])
                return self._remembered(native_memory.load(self.context, self.memory, request.seq_id, state))
            case Resize():
                self._resize(request)
                return self._info
            case Adapt():
                self._adapt(request)
                return Adapted()

    def _load_model(self) -> Any:
        params = C.llama_model_default_params()
        params.n_gpu_layers = self.config.n_gpu_layers
        model = C.llama_model_load_from_file(self.config.model.encode(), params)
        if not model:
            raise LoadError(self._voices.last_error or "llama_model_load_from_file returned NULL")
        return model

    def _make_context(self) -> Any:
        params = C.llama_context_default_params()
        params.n_ctx = self.config.n_ctx
        params.n_batch = self.config.n_batch
        params.n_ubatch = min(self.config.n_ubatch, self.config.n_batch)
        params.n_seq_max = self.config.n_seq_max
        params.n_threads = params.n_threads_batch = self.config.n_threads
        params.kv_unified = False  # only so does a batch give each sequence what it would get alone
        context = C.llama_init_from_model(self.model, params)
        if context and C.llama_pooling_type(context) != C.LLAMA_POOLING_TYPE_NONE:
            # The file asks for pooled embeddings; we give a row for each token. (Always asking for NONE would
            # make llama.cpp warn about every model that says nothing.)
            C.llama_free(context)
            params.pooling_type = C.LLAMA_POOLING_TYPE_NONE
            context = C.llama_init_from_model(self.model, params)
        if not context:
            raise LoadError(self._voices.last_error or "llama_init_from_model returned NULL")
        return context

    def clear(self) -> None:
        """Empty the memory of every sequence. Encoder-only models have none."""
        if self.memory:
            C.llama_memory_clear(self.memory, True)

    def run(
        self,
        arrays: list[npt.NDArray[Any]],
        begin: int,
        end: int,
        *,
        n_embd: int = 0,
        encode: bool = False,
        nulls: Sequence[str] = (),
    ) -> int:
        """One native call over tokens ``begin`` to ``end`` of a batch laid out as `batch_shapes`."""
        rows, positions, seq_ids, outputs, n_seq_id, pointers = arrays
        counts = np.maximum(n_seq_id, 0).astype(np.uint64)
        pointers[:] = seq_ids.ctypes.data + 4 * (np.cumsum(counts) - counts)
        for name in nulls:
            if name.startswith("seq_id["):
                pointers[int(name[7:-1])] = 0

        def at(name: str, array: npt.NDArray[Any], kind: Any, width: int = 1) -> Any:
            begins = array.ctypes.data + array.itemsize * width * begin
            return ctypes.cast(0 if name in nulls else begins, kind)

        batch: Any = C.llama_batch()
        batch.n_tokens = end - begin
        batch.token = None if n_embd else at("token", rows, _INT32)
        batch.embd = at("embd", rows, _FLOAT, n_embd) if n_embd else None
        batch.pos = at("pos", positions, _INT32)
        batch.n_seq_id = at("n_seq_id", n_seq_id, _INT32)
        batch.seq_id = at("seq_id", pointers, ctypes.POINTER(_INT32))
        batch.logits = at("logits", outputs, _INT8)
        what, call = ("encode", C.llama_encode) if encode else ("decode", C.llama_decode)
        with self.recorder.phase(what, end - begin):
            rc = int(call(self.context, batch))
        self._unsettled &= bool(rc) or encode
        return rc

    def _decode(self, request: Decode) -> Decoded:
        with self.recorder.phase("build", request.n_tokens):
            shapes = batch_shapes(request.n_tokens, request.n_seq_ids, request.n_embd)
            *batch, logits, embeddings = self._arena.arrays([*shapes, *row_shapes(request, self._info)])
            wanted = batch[3].copy()
            C.llama_set_embeddings(self.context, request.embeddings)
            if request.embeddings:  # llama.cpp then insists on every token being an output, and warns
                batch[3][:] = 1
            if request.fresh:
                self.clear()
        rc = self.run(
            batch, 0, request.n_tokens, n_embd=request.n_embd, encode=request.encode, nulls=request.nulls
        )
        if rc == 0:
            outputs = np.flatnonzero(wanted).tolist()
            with self.recorder.phase("copy", len(outputs)):
                for row, i in enumerate(outputs):
                    self._copy(C.llama_get_logits_ith, i, logits, row, self._info.n_vocab)
                    self._copy(C.llama_get_embeddings_ith, i, embeddings, row, self._info.n_embd)
        return Decoded(rc, native_memory.spans(self.memory, self._sequences(np.unique(batch[2]).tolist())))

    def _sequences(self, seq_ids: Iterable[int]) -> list[int]:
        """Those that exist: of any other, llama.cpp would abort."""
        return [seq_id for seq_id in seq_ids if 0 <= seq_id < self.config.n_seq_max]

    def _remembered(self, done: bool) -> Remembered:
        return Remembered(done, native_memory.spans(self.memory, range(self.config.n_seq_max)))

    def _settle(self) -> None:
        """Have copies and shifts done that were only noted down.

        llama.cpp does so at the next decode (llama_kv_cache::update). A state that is saved before that lacks
        them; one that is loaded is then overwritten by them. So decode a token, and remove it again.
        """
        if not self._unsettled:
            return
        ends = [C.llama_memory_seq_pos_max(self.memory, seq_id) for seq_id in range(self.config.n_seq_max)]
        seq_id = ends.index(min(ends))
        begin = ends[seq_id] + 1
        if begin and self._info.recurrent:  # of such a sequence, no single token can be removed
            raise RuntimeError("a state after a copy needs a sequence that is empty: remove one first")
        values = (0, begin, seq_id, 0, 1, 0)
        one = [np.full(1, value, kind) for value, (kind, _) in zip(values, batch_shapes(1), strict=True)]
        self.run(one, 0, 1)  # 1, no room for it, is as good: what was noted down is done before
        C.llama_memory_seq_rm(self.memory, seq_id, begin, -1)
        self._unsettled = False

    def _save(self, seq_id: int) -> int:
        self._settle()
        size = int(C.llama_state_seq_get_size(self.context, seq_id))
        if size > self._arena.room:  # to be asked again, with more
            return size
        (room,) = self._arena.arrays([("u1", size)])
        return native_memory.save(self.context, seq_id, room)

    def _resize(self, request: Resize) -> None:
        C.llama_free(self.context)
        self.config = msgspec.structs.replace(self.config, n_ctx=request.n_ctx, n_seq_max=request.n_seq_max)
        self.context = self._make_context()
        self.memory = C.llama_get_memory(self.context)
        self._info = describe(self.model, self.context)
        self._engine = Engine(self)
        self._unsettled = False

    def _adapt(self, request: Adapt) -> None:
        (vector,) = self._arena.arrays([("f4", request.n_floats)])
        self._adapters.use(self.context, request, vector, self._info.n_embd)

    def _copy(self, get: Any, index: int, into: npt.NDArray[Any], row: int, width: int) -> None:
        if not len(into):
            return
        pointer = get(self.context, index)
        if not pointer:
            raise RuntimeError(f"llama.cpp has no row for output {index} of the batch")
        into[row * width : (row + 1) * width] = np.ctypeslib.as_array(pointer, (width,))

    def _tokenize(self, n_bytes: int) -> int:
        (text,) = self._arena.arrays([("u1", n_bytes)])
        raw = text.tobytes()
        size = n_bytes + 16  # at most one token a byte, and the special ones
        tokens = (C.llama_token * size)()
        with self.recorder.phase("tokenize", len(raw)):
            n_tokens = C.llama_tokenize(self.vocab, raw, len(raw), tokens, size, True, True)
        if n_tokens < 0:
            raise RuntimeError(f"llama_tokenize wants room for {-n_tokens} tokens")
        (room,) = self._arena.arrays([("i4", n_tokens)])
        room[:] = tokens[:n_tokens]
        return int(n_tokens)

    def _generate(self, request: Generate) -> Generated:
        if request.reset:
            self.clear()
            self._engine.reset()
        C.llama_set_embeddings(self.context, False)
        prompts = self._arena.arrays([("i4", join.n_tokens) for join in request.joins])
        for join, tokens in zip(request.joins, prompts, strict=True):
            self._engine.join(join, tokens.copy())
        batch = self._arena.arrays(batch_shapes(request.chunk))
        return self._engine.generate(batch, request.steps)
