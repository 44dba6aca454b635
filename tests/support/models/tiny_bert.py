"""Tiny models that only encode: their attention sees the whole text, and they keep no keys and values."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from tests.support.models.tiny_gguf import Value, _tokenizer, _write

_POOLING = {"none": 0, "mean": 1, "cls": 2, "last": 3, "rank": 4}


def write_tiny_bert(
    path: str | os.PathLike[str], *, pooling: str = "cls", n_vocab: int = 128, n_ctx: int = 64
) -> Path:
    """Write a one-layered F32 BERT to `path`; it has learned `n_ctx` positions."""
    n_embd, n_ff = 32, 64
    metadata: dict[str, Value | None] = {
        "general.architecture": "bert",
        "bert.vocab_size": n_vocab,
        "bert.context_length": n_ctx,
        "bert.embedding_length": n_embd,
        "bert.feed_forward_length": n_ff,
        "bert.block_count": 1,
        "bert.attention.head_count": 2,
        "bert.attention.layer_norm_epsilon": 1e-5,
        "bert.attention.causal": False,
        "bert.pooling_type": _POOLING[pooling],
        **_tokenizer(n_vocab),
        "tokenizer.ggml.token_type_count": 2,
    }
    weights = {
        "token_embd": (n_vocab, n_embd),
        "token_types": (2, n_embd),
        "position_embd": (n_ctx, n_embd),
        "blk.0.attn_q": (n_embd, n_embd),
        "blk.0.attn_k": (n_embd, n_embd),
        "blk.0.attn_v": (n_embd, n_embd),
        "blk.0.attn_output": (n_embd, n_embd),
        "blk.0.ffn_up": (n_ff, n_embd),
        "blk.0.ffn_down": (n_embd, n_ff),
    }
    rng = np.random.default_rng(0)
    tensors = {
        f"{name}.weight": rng.standard_normal(shape, dtype=np.float32) / np.float32(4)
        for name, shape in weights.items()
    }
    tensors |= {
        f"{name}.bias": np.zeros(rows, np.float32) for name, (rows, _) in weights.items() if "blk" in name
    }
    for norm in ("token_embd_norm", "blk.0.attn_output_norm", "blk.0.layer_output_norm"):
        tensors |= {
            f"{norm}.weight": np.ones(n_embd, np.float32),
            f"{norm}.bias": np.zeros(n_embd, np.float32),
        }
    return _write(path, metadata, tensors)


def write_tiny_t5(path: str | os.PathLike[str], *, n_vocab: int = 128) -> Path:
    """Write a one-layered F32 T5 encoder to `path`."""
    n_embd, n_ff, n_head = 32, 64, 2
    metadata: dict[str, Value | None] = {
        "general.architecture": "t5encoder",
        "t5encoder.vocab_size": n_vocab,
        "t5encoder.context_length": 64,
        "t5encoder.embedding_length": n_embd,
        "t5encoder.feed_forward_length": n_ff,
        "t5encoder.block_count": 1,
        "t5encoder.attention.head_count": n_head,
        "t5encoder.attention.key_length": n_embd // n_head,
        "t5encoder.attention.value_length": n_embd // n_head,
        "t5encoder.attention.layer_norm_rms_epsilon": 1e-5,
        "t5encoder.attention.relative_buckets_count": 32,
        **_tokenizer(n_vocab),
    }
    weights = {
        "token_embd": (n_vocab, n_embd),
        "enc.blk.0.attn_rel_b": (32, n_head),
        "enc.blk.0.attn_q": (n_embd, n_embd),
        "enc.blk.0.attn_k": (n_embd, n_embd),
        "enc.blk.0.attn_v": (n_embd, n_embd),
        "enc.blk.0.attn_o": (n_embd, n_embd),
        "enc.blk.0.ffn_up": (n_ff, n_embd),
        "enc.blk.0.ffn_down": (n_embd, n_ff),
    }
    rng = np.random.default_rng(0)
    tensors = {
        f"{name}.weight": rng.standard_normal(shape, dtype=np.float32) / np.float32(4)
        for name, shape in weights.items()
    }
    for norm in ("enc.output_norm", "enc.blk.0.attn_norm", "enc.blk.0.ffn_norm"):
        tensors[f"{norm}.weight"] = np.ones(n_embd, np.float32)
    return _write(path, metadata, tensors)
