"""Tiny GGUF files for tests: models that decode, ones that the loader refuses or dies on, an adapter."""

from __future__ import annotations

import os
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import gguf
import numpy as np
import numpy.typing as npt

UNK: Final = 0
BOS: Final = 1
EOS: Final = 2

Value = bool | int | float | str | list[str] | list[int] | list[float]

_VALUE_TYPES: Final[dict[type, gguf.GGUFValueType]] = {
    bool: gguf.GGUFValueType.BOOL,
    int: gguf.GGUFValueType.UINT32,
    float: gguf.GGUFValueType.FLOAT32,
    str: gguf.GGUFValueType.STRING,
    list: gguf.GGUFValueType.ARRAY,
}
# Commonest first: a vocabulary too small for all of these maps the rest to <unk>.
_CHARACTERS: Final = (
    "\u2581"
    + string.ascii_lowercase
    + string.digits
    + ".,\n!?'-:"
    + string.ascii_uppercase
    + string.punctuation
)


def _vocabulary(n_vocab: int) -> tuple[list[str], list[float], list[int]]:
    """Return the texts, scores and types of one token per character, padded to `n_vocab`."""
    if n_vocab < 4:
        raise ValueError(f"n_vocab must be at least 4, not {n_vocab}")
    texts = ["<unk>", "<s>", "</s>", *dict.fromkeys(_CHARACTERS)][:n_vocab]
    kinds = [int(gguf.TokenType.UNKNOWN), int(gguf.TokenType.CONTROL), int(gguf.TokenType.CONTROL)]
    kinds += [int(gguf.TokenType.NORMAL)] * (len(texts) - 3)
    padding = n_vocab - len(texts)
    texts += [f"<pad{i}>" for i in range(padding)]
    kinds += [int(gguf.TokenType.UNUSED)] * padding
    return texts, [0.0, 0.0, 0.0, *[-1.0] * (n_vocab - 3)], kinds


def _tensors(
    n_layer: int, n_vocab: int, n_embd: int, n_ff: int, seed: int
) -> dict[str, npt.NDArray[np.float32]]:
    """Return the named tensors of a llama with random weights and separate input and output embeddings."""
    rng = np.random.default_rng(seed)
    ones = np.ones(n_embd, dtype=np.float32)

    def normal(rows: int, columns: int) -> npt.NDArray[np.float32]:
        weights: npt.NDArray[np.float32] = rng.standard_normal((rows, columns), dtype=np.float32)
        return weights * np.float32(columns**-0.5)

    tensors = {
        "token_embd.weight": normal(n_vocab, n_embd),
        "output_norm.weight": ones,
        "output.weight": normal(n_vocab, n_embd),
    }
    for layer in range(n_layer):
        block = f"blk.{layer}"
        tensors |= {f"{block}.{name}_norm.weight": ones for name in ("attn", "ffn")}
        tensors |= {
            f"{block}.attn_{name}.weight": normal(n_embd, n_embd) for name in ("q", "k", "v", "output")
        }
        tensors |= {f"{block}.ffn_{name}.weight": normal(n_ff, n_embd) for name in ("gate", "up")}
        tensors[f"{block}.ffn_down.weight"] = normal(n_embd, n_ff)
    return tensors


def write_tiny_llama(
    path: str | os.PathLike[str],
    *,
    n_layer: int = 2,
    n_vocab: int = 64,
    n_embd: int = 32,
    n_ctx: int = 256,
    seed: int = 0,
    overrides: Mapping[str, Value | None] | None = None,
) -> Path:
    """Write a two-headed F32 llama to `path`; `overrides` replaces metadata, or drops it where None."""
    n_head, n_ff = 2, 2 * n_embd
    metadata: dict[str, Value | None] = {
        "general.name": "tiny-llama",
        "general.architecture": "llama",
        "general.file_type": int(gguf.LlamaFileType.ALL_F32),
        "llama.vocab_size": n_vocab,
        "llama.context_length": n_ctx,
        "llama.embedding_length": n_embd,
        "llama.block_count": n_layer,
        "llama.feed_forward_length": n_ff,
        "llama.attention.head_count": n_head,
        "llama.attention.head_count_kv": n_head,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": n_embd // n_head,
        "llama.rope.freq_base": 10000.0,
        **_tokenizer(n_vocab),
        **(overrides or {}),
    }
    return _write(path, metadata, _tensors(n_layer, n_vocab, n_embd, n_ff, seed))


def write_tiny_mamba(path: str | os.PathLike[str], *, n_vocab: int = 128) -> Path:
    """Write a one-layered F32 Mamba to `path`: recurrent, a state in the place of positions."""
    n_embd, n_inner, n_state, n_conv, n_dt = 32, 64, 16, 4, 2
    metadata: dict[str, Value | None] = {
        "general.architecture": "mamba",
        "mamba.vocab_size": n_vocab,
        "mamba.context_length": 256,
        "mamba.embedding_length": n_embd,
        "mamba.feed_forward_length": 0,
        "mamba.attention.head_count": 0,
        "mamba.block_count": 1,
        "mamba.attention.layer_norm_rms_epsilon": 1e-5,
        "mamba.ssm.conv_kernel": n_conv,
        "mamba.ssm.inner_size": n_inner,
        "mamba.ssm.state_size": n_state,
        "mamba.ssm.time_step_rank": n_dt,
        **_tokenizer(n_vocab),
    }
    shapes = {
        "token_embd.weight": (n_vocab, n_embd),
        "output_norm.weight": (n_embd,),
        "blk.0.attn_norm.weight": (n_embd,),
        "blk.0.ssm_in.weight": (2 * n_inner, n_embd),
        "blk.0.ssm_conv1d.weight": (n_inner, n_conv),
        "blk.0.ssm_conv1d.bias": (n_inner,),
        "blk.0.ssm_x.weight": (n_dt + 2 * n_state, n_inner),
        "blk.0.ssm_dt.weight": (n_inner, n_dt),
        "blk.0.ssm_dt.bias": (n_inner,),
        "blk.0.ssm_a": (n_inner, n_state),
        "blk.0.ssm_d": (n_inner,),
        "blk.0.ssm_out.weight": (n_embd, n_inner),
    }
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(n, dtype=np.float32) / np.float32(4) for name, n in shapes.items()}
    tensors["blk.0.ssm_a"] = -np.abs(tensors["blk.0.ssm_a"])  # below 0, or the state grows for ever
    return _write(path, metadata, tensors)


def write_tiny_lora(path: str | os.PathLike[str], *, n_embd: int = 32) -> Path:
    """Write a LoRA adapter for a tiny llama."""
    metadata: dict[str, Value | None] = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
    }
    rng = np.random.default_rng(0)
    shapes = {"lora_a": (4, n_embd), "lora_b": (n_embd, 4)}
    tensors = {
        f"blk.0.attn_q.weight.{name}": rng.standard_normal(shape, dtype=np.float32)
        for name, shape in shapes.items()
    }
    return _write(path, metadata, tensors)


def _tokenizer(n_vocab: int) -> dict[str, Value | None]:
    texts, scores, kinds = _vocabulary(n_vocab)
    return {
        # Unigram maps a character outside a small vocabulary to <unk>; SPM without byte tokens
        # throws through the C API, and BPE drops the character.
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.unknown_token_id": UNK,
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }


def _write(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Value | None],
    tensors: Mapping[str, npt.NDArray[np.float32]],
) -> Path:
    writer = gguf.GGUFWriter(Path(path), str(metadata["general.architecture"]))
    for key, value in metadata.items():
        if value is not None and key != "general.architecture":
            writer.add_key_value(key, value, _VALUE_TYPES[type(value)])
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def write_block_count_zero(path: str | os.PathLike[str]) -> Path:
    """Write a model on which the loader aborts: `GGML_ASSERT(hparams.n_layer_all > 0 && ...)`, SIGABRT."""
    return write_tiny_llama(path, overrides={"llama.block_count": 0})


def write_truncated(path: str | os.PathLike[str], *, missing: int = 40_000) -> Path:
    """Write a model whose last `missing` bytes of tensor data are missing: the loader returns NULL."""
    target = write_tiny_llama(path)
    size = target.stat().st_size
    tensor_bytes = sum(tensor.nbytes for tensor in _tensors(2, 64, 32, 64, 0).values())
    if not 0 < missing <= tensor_bytes:
        raise ValueError(f"missing must be from 1 to {tensor_bytes}, not {missing}")
    os.truncate(target, size - missing)
    return target
