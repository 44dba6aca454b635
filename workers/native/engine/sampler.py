"""Child side: how the next token of a sequence is drawn, by llama.cpp's own samplers.

Facts are those of llama.cpp 0c1e57098, src/llama-sampler.cpp.
"""

from __future__ import annotations

import hashlib
from typing import Any

import llama_cpp.llama_cpp as C  # noqa: N812 - the C API
import numpy as np
import numpy.typing as npt

from crumplezone.workers.protocol.generate.sampling import Sampling


def noise(seed: int, position: int) -> int:
    """The seed of one draw.

    It depends on nothing else: so a sequence that is continued elsewhere after a crash draws the same tokens
    as it would have here. (The state of one generator for the whole text could not be told from the number of
    tokens: how much a draw takes from it is up to llama.cpp.)

    Args:
        seed: Of the sequence.
        position: Of the token that is drawn.
    """
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=4).digest()
    return min(int.from_bytes(digest, "little"), C.LLAMA_DEFAULT_SEED - 1)  # that one means: ask the clock


class Sampler:
    """Draws the tokens of one sequence, unless they are simply the likeliest (`Sampling.plain`).

    Close it: the samplers are native objects.

    Args:
        sampling: How.
        n_vocab: Tokens of the vocabulary.
        tokens: int32, shape (n,): what the sequence has so far, for the penalties.
    """

    def __init__(self, sampling: Sampling, n_vocab: int, tokens: npt.NDArray[np.int32]) -> None:
        self._sampling = sampling
        self._chain: Any = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
        penalties = sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty
        self._add(C.llama_sampler_init_penalties(n_vocab, sampling.penalty_last_n, *penalties))
        for token in tokens[max(len(tokens) - sampling.penalty_last_n, 0) :].tolist():
            C.llama_sampler_accept(self._chain, token)
        if sampling.greedy:  # the likeliest is the same, whatever else is left out
            self._add(C.llama_sampler_init_greedy())
            return
        self._add(C.llama_sampler_init_top_k(sampling.top_k))
        self._add(C.llama_sampler_init_top_p(sampling.top_p, 1))
        self._add(C.llama_sampler_init_min_p(sampling.min_p, 1))
        self._add(C.llama_sampler_init_temp(sampling.temperature))

    def draw(self, context: Any, index: int, position: int) -> int:
        """The next token, which then counts for the penalties.

        Args:
            context: Whose logits are drawn from; none of them may be NaN, and the largest is finite.
            index: Of the output in the batch.
            position: Of the token that is drawn.
        """
        if self._sampling.greedy:
            return int(C.llama_sampler_sample(self._chain, context, index))
        n = C.llama_sampler_chain_n(self._chain)
        self._add(C.llama_sampler_init_dist(noise(self._sampling.seed, position)))
        token = int(C.llama_sampler_sample(self._chain, context, index))
        C.llama_sampler_free(C.llama_sampler_chain_remove(self._chain, n))
        return token

    def close(self) -> None:
        """Free the samplers. Idempotent."""
        if self._chain:
            C.llama_sampler_free(self._chain)  # and with it, those that were added
            self._chain = None

    def _add(self, sampler: Any) -> None:
        C.llama_sampler_chain_add(self._chain, sampler)
