"""In-process side: llama.cpp and nothing around it. ``side_decode MODEL N_SEQ N_CTX_SEQ THREADS``."""

from __future__ import annotations

import ctypes
import hashlib
import sys
import time
from typing import Any

import llama_cpp.llama_cpp as C  # noqa: N812 - the C API
import numpy as np
import numpy.typing as npt

from benchmarks.peer import serve
from benchmarks.shape import Shape, peak_mib


class InProcess:
    """A model, a context and one ``llama_batch``, filled through numpy views.

    Args:
        path: The model.
        n_seq: Most sequences.
        n_ctx_seq: Tokens of context for each.
        threads: Compute threads.
    """

    def __init__(self, path: str, n_seq: int, n_ctx_seq: int, threads: int) -> None:
        self._silence = C.llama_log_callback(lambda *_: None)  # must outlive every call
        C.llama_log_set(self._silence, None)
        C.llama_backend_init()
        self._model = C.llama_model_load_from_file(path.encode(), C.llama_model_default_params())
        params = C.llama_context_default_params()
        params.n_ctx, params.n_seq_max = n_seq * n_ctx_seq, n_seq
        params.n_batch, params.n_ubatch = n_seq * n_ctx_seq, 512
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False
        self._context = C.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot make a context for {path}")
        self._n_vocab = C.llama_vocab_n_tokens(C.llama_model_get_vocab(self._model))
        self._batch = C.llama_batch_init(params.n_batch, 0, 1)
        self._token, self._pos, self._logits, self._seq_id = self._views(params.n_batch)

    def _views(self, size: int) -> list[npt.NDArray[Any]]:
        """The batch's arrays, with one sequence id for each token in an array of its own."""
        np.ctypeslib.as_array(self._batch.n_seq_id, (size,))[:] = 1
        seq_id = np.zeros(size, np.int32)
        pointers = ctypes.cast(self._batch.seq_id, ctypes.POINTER(ctypes.c_uint64))
        np.ctypeslib.as_array(pointers, (size,))[:] = seq_id.ctypes.data + 4 * np.arange(
            size, dtype=np.uint64
        )
        fields = (self._batch.token, self._batch.pos, self._batch.logits)
        return [*(np.ctypeslib.as_array(field, (size,)) for field in fields), seq_id]

    def block(self, n_seq: int, n_tokens: int, calls: int) -> tuple[list[float], str]:
        """Seconds of each call from empty memory on, and a digest of the last logits."""
        shape = Shape(n_seq, n_tokens, calls, self._n_vocab)
        C.llama_memory_clear(C.llama_get_memory(self._context), True)
        seconds = []
        for call, tokens in enumerate(shape.calls_tokens()):
            start = time.perf_counter()
            rows = self._decode(tokens, call * n_tokens)
            seconds.append(time.perf_counter() - start)
        return seconds, hashlib.sha256(rows.tobytes()).hexdigest()

    def sequential(self, n_seq: int, n_tokens: int, seconds: float) -> float:
        """Seconds of the batch, one sequence at a time; from as many as fit the time, and one at least."""
        (tokens,) = Shape(n_seq, n_tokens, 1, self._n_vocab).calls_tokens()
        done, start = 0, time.perf_counter()
        for row in tokens:
            # Not the data: to zero the whole cache would count as decoding.
            C.llama_memory_clear(C.llama_get_memory(self._context), False)
            self._decode(row[None], 0)
            done += 1
            if time.perf_counter() - start > seconds:
                break
        return (time.perf_counter() - start) / done * n_seq

    def _decode(self, tokens: npt.NDArray[np.int32], position: int) -> npt.NDArray[np.float32]:
        """Fill the batch, decode it, and copy the last row of each sequence."""
        n_seq, n_tokens = tokens.shape
        size = n_seq * n_tokens
        self._token[:size] = tokens.ravel()
        self._pos[:size] = np.tile(np.arange(position, position + n_tokens), n_seq)
        self._seq_id[:size] = np.repeat(np.arange(n_seq), n_tokens)
        self._logits[:size] = 0
        self._logits[n_tokens - 1 : size : n_tokens] = 1
        self._batch.n_tokens = size
        if rc := C.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama_decode returned {rc}")
        rows = np.empty((n_seq, self._n_vocab), np.float32)
        for seq, row in enumerate(rows):
            pointer = C.llama_get_logits_ith(self._context, (seq + 1) * n_tokens - 1)
            row[:] = np.ctypeslib.as_array(pointer, (self._n_vocab,))
        return rows


def main() -> None:
    """Load, and answer."""
    path, *numbers = sys.argv[1:]

    def build() -> dict[str, Any]:
        side = InProcess(path, *map(int, numbers))
        return {
            "block": side.block,
            "sequential": side.sequential,
            "peak_mib": peak_mib,
        }

    serve(build)


if __name__ == "__main__":
    main()
