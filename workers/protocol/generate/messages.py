"""What a supervisor asks of a cell that generates: prompts join and leave, and what came of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from crumplezone.sandbox.ipc.arena import Shape
from crumplezone.workers.protocol.arrays import BatchArrays, batch_shapes
from crumplezone.workers.protocol.config import Token
from crumplezone.workers.protocol.generate.sampling import Sampling

BESIDE = 128  # most prompt tokens in a native call that also generates: a long prompt makes none wait longer


class Join(msgspec.Struct, frozen=True):
    """A prompt that takes a free sequence; its tokens lie in the arena (`Generate.arrays`)."""

    seq_id: int
    n_tokens: int
    n_prompt: int  # the first of these; the others were drawn before, and count for everything
    sampling: Sampling
    stops: list[bytes] = []  # a text that has one of these ends
    stop_tokens: list[int] = []  # so does one that would get one of these, which end like an end of generation
    logprobs: int = -1  # how many of the likeliest come with each token drawn; -1: not even its own
    prompt_logprobs: bool = False  # the same for each token of the prompt but the first


class Arrays(Protocol):
    """An arena; the supervisor's is that of a cell."""

    def arrays(self, shapes: Sequence[Shape]) -> list[npt.NDArray[Any]]:
        """Cut into these arrays."""


class Generate(msgspec.Struct, tag="generate", frozen=True):
    """Let sequences leave and prompts join, then run up to ``steps`` native calls over all that run.

    The reply comes earlier when a sequence has got its first token or its last, when the supervisor nudges
    (`Arena.nudge`), or when it would else take long. At least one native call is made if any sequence runs.
    """

    joins: list[Join]
    steps: int
    chunk: int  # most tokens per native call
    leaves: list[int] = []  # sequences to give up, before any joins
    reset: bool = False  # clear the memory and forget every sequence first

    def arrays(self, arena: Arrays) -> tuple[BatchArrays, list[npt.NDArray[np.int32]]]:
        """The batch of a native call, and behind it the tokens of each that joins."""
        joins: list[Shape] = [("i4", join.n_tokens) for join in self.joins]
        arrays = arena.arrays([*batch_shapes(self.chunk), *joins])
        n = len(BatchArrays._fields)
        return BatchArrays(*arrays[:n]), arrays[n:]


class Logprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural logarithm of a token's probability before any sampler, and the likeliest tokens with theirs."""

    logprob: float
    top: list[tuple[Token, float]] = []


class Progress(msgspec.Struct, frozen=True):
    """What one sequence produced: its new tokens, their text (UTF-8, may end inside a character).

    The text is that of all tokens: what a stop string ends is cut off by the supervisor.
    """

    seq_id: int
    tokens: list[Token]
    text: bytes
    finished: Literal["", "stop", "word", "length"] = ""  # end of generation, stop string or token, max_tokens
    logprobs: list[Logprob] = []  # as many as tokens, if they were asked for
    prompt_logprobs: list[Logprob] = []  # of the tokens of the prompt that were read since
    read: int = 0  # tokens that the memory holds by now
    cached: int = 0  # of these, those that did not have to be computed: known with the first reply that reads


class Generated(msgspec.Struct, frozen=True):
    """One entry for each sequence that was running."""

    rc: int
    progress: list[Progress]
