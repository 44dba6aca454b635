"""Which texts share a native call, and the context that it needs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Literal

import msgspec

from crumplezone.workers.batch.columns import LLAMA_MAX_SEQ
from crumplezone.workers.model.settings import N_UBATCH
from crumplezone.workers.protocol.config import CTX_PAD, CellConfig
from crumplezone.workers.protocol.embed import (
    EmbedConfig,
)

Pooling = Literal["mean", "cls", "last"]


def plan(
    sizes: Mapping[int, int], given: CellConfig, *, cached: bool, pooling: Pooling
) -> Iterator[tuple[EmbedConfig, list[int]]]:
    """The native calls for texts of so many tokens, shortest first: each call's context and its texts.

    With a cache, llama.cpp cuts what has several sequences into pieces of equal length (`split_equal`), and
    pools each piece alone: so the texts of a call are equally long. Without one, it cuts nothing.
    """

    def alike(i: int) -> int:
        return sizes[i] if cached else _width(sizes[i])

    for _, group in itertools.groupby(sorted(sizes, key=sizes.__getitem__), alike):
        texts = list(group)
        config = shaped(given, sizes[texts[-1]], cached=cached, pooling=pooling)
        call, n_tokens = list[int](), 0
        for i in texts:
            if len(call) == config.n_seq_max or n_tokens + sizes[i] > config.n_batch:
                yield config, call
                call, n_tokens = [], 0
            call.append(i)
            n_tokens += sizes[i]
        yield config, call


def shaped(
    given: CellConfig, longest: int, *, cached: bool, pooling: Literal["", "mean", "cls", "last"] = ""
) -> EmbedConfig:
    """A context for texts of up to so many tokens, as many side by side as there is room for.

    A call is one compute pass (n_ubatch is n_batch), and the buffers grow with it: so it is no larger than
    is of use. It is a multiple of n_seq_max: where llama.cpp pools, it would round it up to one, and abort as
    there are fewer rows to pool (llama_context::graph_reserve, ggml_can_mul_mat).
    """
    width = _width(longest)
    n_batch = min(max(width, N_UBATCH), given.n_batch)
    most = min(max(1, given.n_ctx // width) if cached else LLAMA_MAX_SEQ, n_batch, LLAMA_MAX_SEQ)
    n_seq_max = next(n for n in range(most, 0, -1) if n_batch % n == 0)
    sizes = {"n_ctx": width * n_seq_max, "n_batch": n_batch, "n_ubatch": n_batch, "n_seq_max": n_seq_max}
    return EmbedConfig(**msgspec.structs.asdict(given) | sizes | {"pooling": pooling})


def _width(longest: int) -> int:
    """Room for a text: a power of two, so that few contexts do for all texts."""
    return max(CTX_PAD, 1 << (longest - 1).bit_length())
