"""How the next token is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from crumplezone.errors import check_integer, check_number
from crumplezone.workers.protocol.config import INT32_MAX

COLDEST = 1e-6  # a temperature below is greedy: logits divided by it might overflow, and inf - inf is NaN
_INTEGERS = {  # of `Sampling`: smallest and largest
    "max_tokens": (1, INT32_MAX),
    "top_k": (0, INT32_MAX),
    "penalty_last_n": (0, 2**16),
    "seed": (0, 2**63 - 1),
}
_NUMBERS = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repeat_penalty": (0.01, 100.0),  # llama.cpp divides by it
    "frequency_penalty": (-100.0, 100.0),
    "presence_penalty": (-100.0, 100.0),
}


def check_sampling(values: object, prefix: str = "") -> None:
    """Raise `InputError` unless an object has the attributes of a `Sampling`, all of them in range.

    Args:
        values: The object.
        prefix: Put before the name of an attribute in the message.
    """
    for name, limits in _INTEGERS.items():
        check_integer(prefix + name, getattr(values, name), *limits)
    for name, bounds in _NUMBERS.items():
        check_number(prefix + name, getattr(values, name), *bounds)


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens, by llama.cpp's own samplers: penalties, top_k, top_p, min_p, temperature.

    Attributes:
        max_tokens: Most tokens to draw.
        temperature: 0 is greedy: of all the others, only the penalties then matter.
        top_k: Of the likeliest tokens so many are kept; 0: all.
        top_p: The likeliest are kept that have this much probability together; 1: all.
        min_p: Those are kept that have this share of the likeliest one's probability; 0: all.
        repeat_penalty: Divides the logits of tokens that came lately; 1: does not.
        frequency_penalty: Taken from their logits for each time that they came.
        presence_penalty: Taken from their logits once.
        penalty_last_n: "Lately" is so many tokens, the prompt's included.
        seed: The same seed gives the same text, crash or no crash, but for rounding (`Decoder.generate`).

    Raises:
        InputError: One of them is out of range.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_sampling(self)
        for names, kind in ((_INTEGERS, int), (_NUMBERS, float)):
            for name in names:  # numpy's numbers are welcome, but do not travel
                object.__setattr__(self, name, kind(getattr(self, name)))

    @property
    def greedy(self) -> bool:
        """Whether no chance is involved."""
        return self.temperature < COLDEST

    @property
    def plain(self) -> bool:
        """Whether each token is simply the likeliest."""
        penalties = self.repeat_penalty, self.frequency_penalty, self.presence_penalty
        return self.greedy and (not self.penalty_last_n or penalties == (1, 0, 0))


class SamplingOptions(TypedDict, total=False):
    """The fields of `Sampling` as keyword arguments."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    frequency_penalty: float
    presence_penalty: float
    penalty_last_n: int
    seed: int | None
