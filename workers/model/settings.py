"""Parameters of a cell, checked before one is started."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Unpack

from crumplezone.errors import InputError, check_integer
from crumplezone.workers.batch.columns import LLAMA_MAX_SEQ
from crumplezone.workers.batch.validate import Capacity
from crumplezone.workers.model.file import check_file, located
from crumplezone.workers.model.parameters import ContextOptions, parameters_of
from crumplezone.workers.protocol.config import INT32_MAX, CellConfig, CellInfo

N_UBATCH = 512  # most tokens per compute pass, as in llama_context_default_params()
_N_CTX_SEQ = 1024  # tokens per sequence, where nobody says


def configure(
    model: str | Path,
    *,
    n_ctx: int,
    n_batch: int,
    n_ubatch: int = N_UBATCH,
    n_seq_max: int = 1,
    n_threads: int,
    n_gpu_layers: int = 0,
    **options: Unpack[ContextOptions],
) -> CellConfig:
    """Model and context parameters that llama.cpp can be given; see `Decoder` for what they mean.

    What is not named in ``options`` is as `llama_cpp.Llama` has it.

    Raises:
        InputError: A parameter is out of range.
        ModelError: The file cannot be a model.
    """
    check_integer("n_seq_max", n_seq_max, 1, LLAMA_MAX_SEQ, " (LLAMA_MAX_SEQ)")
    check_integer("n_ctx", n_ctx, 0, INT32_MAX)
    if 0 < n_ctx < n_seq_max:
        raise InputError("n_ctx", n_ctx, f"must give each of the {n_seq_max} sequences at least one token")
    # llama_context::output_reserve asserts this when the context is made (src/llama-context.cpp, 0c1e57098).
    check_integer("n_batch", n_batch, n_seq_max, INT32_MAX, f" (one token for each of {n_seq_max} sequences)")
    check_integer("n_ubatch", n_ubatch, 1, INT32_MAX)
    check_integer("n_threads", n_threads, 0, 512)
    check_integer("n_gpu_layers", n_gpu_layers, -1, 2**20)
    parameters = parameters_of(options)
    path = located(model)
    check_file(path)
    return CellConfig(
        model=str(path),
        n_ctx=int(n_ctx) or _N_CTX_SEQ * int(n_seq_max),
        n_batch=int(n_batch),
        n_ubatch=int(min(n_ubatch, n_batch)),
        n_seq_max=int(n_seq_max),
        n_threads=int(n_threads) or len(os.sched_getaffinity(0)),
        n_gpu_layers=int(n_gpu_layers),
        **parameters,
    )


def capacity(info: CellInfo, config: CellConfig, *, embeddings: bool) -> Capacity:
    """What a cell can take in one call, as `validate` wants to know it.

    Its n_batch is no limit here: what is larger is split on the safe rung.
    """
    return Capacity(
        n_vocab=info.n_vocab,
        n_embd=info.n_embd_inp,
        n_batch=INT32_MAX,
        n_ubatch=config.n_ubatch,
        n_seq_max=config.n_seq_max,
        n_ctx_seq=None if info.recurrent else info.n_ctx_seq,
        causal=info.causal,
        has_encoder=info.has_encoder,
        has_decoder=info.has_decoder,
        all_outputs=embeddings,
        n_pos_per_embd=info.n_pos_per_embd,
        n_positions=info.n_ctx_train if info.learned_positions else None,
    )
