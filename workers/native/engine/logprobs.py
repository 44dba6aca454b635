"""Child side: how likely tokens were, by the logits, before any sampler."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from crumplezone.workers.protocol.generate.messages import Logprob

_LEAST = -9999.0  # in the place of minus infinity, which is no number in JSON


def logprob(row: npt.NDArray[np.float32], token: int, n: int) -> Logprob:
    """That of a token, and the likeliest ones.

    As `llama_cpp.Llama.logits_to_logprobs` computes it, to the bit.

    Args:
        row: Logits, float32, shape (n_vocab,); none is NaN, and the largest is finite.
        token: Its id.
        n: How many of the likeliest.
    """
    below = row - row.max()
    total = np.log(np.exp(below).sum())
    top = []
    if n > 0:
        n = min(n, len(row))
        best = np.argpartition(row, len(row) - n)[len(row) - n :]
        best = best[np.lexsort((best, -row[best]))]  # the likeliest first; of equal ones the first
        values = np.maximum(below[best] - total, _LEAST)
        top = list(zip(best.tolist(), values.tolist(), strict=True))
    return Logprob(max(float(below[token] - total), _LEAST), top)
