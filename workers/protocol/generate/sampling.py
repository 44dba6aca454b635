"""How the next token is drawn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from crumplezone.errors import InputError, check_integer, check_number
from crumplezone.workers.protocol.config import INT32_MAX

COLDEST = 1e-6  # a temperature below is greedy: logits divided by it might overflow, and inf - inf is NaN
SEEDS = 2**32 - 1  # as many there are: this number itself has llama.cpp ask the clock (LLAMA_DEFAULT_SEED)
SAMPLERS = (  # in the order of `llama_cpp.Llama` (_init_sampler), which lacks dry, top_n_sigma and xtc
    "penalties",
    "dry",
    "top_n_sigma",
    "top_k",
    "typical_p",
    "top_p",
    "min_p",
    "xtc",
    "temperature",
)
BIASES_MAX = 1024
GRAMMAR_MAX = 2**20  # characters
TRIGGERS_MAX = 16
TRIGGER_MAX = 1000  # characters
_BREAKERS_MAX = 16  # for each, llama.cpp goes through the vocabulary
_BREAKER_MAX = 40  # bytes: llama.cpp cuts the rest off, be it within a character (llama_sampler_init_dry)

_INTEGERS = {  # of `Sampling`: smallest and largest
    "max_tokens": (1, INT32_MAX),
    "min_tokens": (0, INT32_MAX),
    "top_k": (0, INT32_MAX),
    "dry_allowed_length": (0, 2**16),
    "dry_penalty_last_n": (-1, 2**16),
    "mirostat_mode": (0, 2),
    "penalty_last_n": (0, 2**16),
    "seed": (0, SEEDS - 1),
}
_NUMBERS = {
    "temperature": (0.0, 100.0),
    "dynatemp_range": (0.0, 100.0),
    "dynatemp_exponent": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "top_n_sigma": (-1.0, 100.0),
    "xtc_probability": (0.0, 1.0),
    "xtc_threshold": (0.0, 1.0),
    "dry_multiplier": (0.0, 100.0),
    "dry_base": (1.0, 100.0),
    "mirostat_tau": (0.0, 100.0),
    "mirostat_eta": (0.0, 100.0),
    "repeat_penalty": (0.01, 100.0),  # llama.cpp divides by it
    "frequency_penalty": (-100.0, 100.0),
    "presence_penalty": (-100.0, 100.0),
}
_FLAGS = ("ignore_eos", "grammar_lazy")
_TEXTS = ("dry_sequence_breakers", "samplers", "grammar_triggers")  # tuples


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
    for name in _FLAGS:
        if not isinstance(value := getattr(values, name), bool):
            raise InputError(prefix + name, value, "must be True or False")
    _check_biases(prefix + "logit_bias", getattr(values, "logit_bias"))  # noqa: B009 - as the others
    for name in _TEXTS:
        _check_texts(prefix + name, getattr(values, name))
    _check_breakers(prefix + "dry_sequence_breakers", getattr(values, "dry_sequence_breakers"))  # noqa: B009
    _check_samplers(prefix + "samplers", getattr(values, "samplers"))  # noqa: B009
    _check_grammar(prefix, values)


def _check_biases(field: str, biases: object) -> None:
    if not isinstance(biases, Mapping):
        raise InputError(field, biases, "must be a dict of token ids and what is added to their logits")
    check_integer(f"len({field})", len(biases), 0, BIASES_MAX)
    for token, bias in biases.items():
        check_integer(f"token of {field}", token, 0, INT32_MAX)
        check_number(f"{field}[{token}]", bias, -100.0, 100.0)


def _check_texts(field: str, texts: object) -> None:
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise InputError(field, texts, "must be a tuple of texts")


def _check_breakers(field: str, breakers: Sequence[str]) -> None:
    check_integer(f"len({field})", len(breakers), 0, _BREAKERS_MAX)
    for i, text in enumerate(breakers):
        _check_text(f"{field}[{i}]", text)
        check_integer(f"bytes of {field}[{i}]", len(text.encode()), 1, _BREAKER_MAX)


def _check_samplers(field: str, samplers: Sequence[str]) -> None:
    for i, name in enumerate(samplers):
        if name not in SAMPLERS:
            raise InputError(f"{field}[{i}]", name, f"must be one of {', '.join(SAMPLERS)}")
        if name in samplers[:i]:
            raise InputError(f"{field}[{i}]", name, "must not come twice")


def _check_grammar(prefix: str, values: object) -> None:
    grammar, lazy = getattr(values, "grammar"), getattr(values, "grammar_lazy")  # noqa: B009
    triggers: Sequence[str] = getattr(values, "grammar_triggers")  # noqa: B009
    if not isinstance(grammar, str):
        raise InputError(prefix + "grammar", grammar, "must be a text in GBNF")
    check_integer(f"len({prefix}grammar)", len(grammar), 0, GRAMMAR_MAX)
    _check_text(prefix + "grammar", grammar)
    check_integer(f"len({prefix}grammar_triggers)", len(triggers), 0, TRIGGERS_MAX)
    if lazy and not (grammar and triggers):
        raise InputError(prefix + "grammar_lazy", lazy, "must come with a grammar and with grammar_triggers")
    for i, pattern in enumerate(triggers):
        name = f"{prefix}grammar_triggers[{i}]"
        _check_text(name, pattern)
        check_integer(f"len({name})", len(pattern), 1, TRIGGER_MAX)
        try:
            re.compile(pattern.encode())
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(name, pattern, f"must be a regular expression: {error}") from error


def _check_text(field: str, text: str) -> None:
    """It is to be a text for C."""
    try:
        whole = b"\0" not in text.encode()
    except UnicodeEncodeError:
        whole = False
    if not whole:
        raise InputError(field, text, "must be a text without NUL and lone surrogates")


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens, by llama.cpp's own samplers.

    Attributes:
        max_tokens: Most tokens to draw.
        min_tokens: Before so many, none that ends the text is drawn.
        temperature: 0 is greedy: of all the others, only what changes the likeliest token then matters.
        dynatemp_range: The temperature is up to so much lower where the model is certain, or higher.
        dynatemp_exponent: How the temperature follows from the entropy.
        top_k: Of the likeliest tokens so many are kept; 0: all.
        top_p: The likeliest are kept that have this much probability together; 1: all.
        min_p: Those are kept that have this share of the likeliest one's probability; 0: all.
        typical_p: The most typical are kept that have this much probability together; 1: all.
        top_n_sigma: Those are kept that are at most so many standard deviations below the likeliest; 0: all.
        xtc_probability: How often the likeliest tokens are left out, up to the last one above the threshold.
        xtc_threshold: The probability that a token of these has at least; above 0.5, none is left out.
        dry_multiplier: Penalty for tokens that would go on with a repetition; 0: none.
        dry_base: It grows by this factor with each token of the repetition.
        dry_allowed_length: Repetitions of up to so many tokens cost nothing.
        dry_penalty_last_n: They are looked for among so many drawn tokens; -1: all.
        dry_sequence_breakers: Texts over which no repetition goes.
        mirostat_mode: 1 or 2: that version of Mirostat, in the place of all samplers but the penalties.
        mirostat_tau: The surprise that it aims at.
        mirostat_eta: How fast it learns.
        repeat_penalty: Divides the logits of tokens that were drawn lately; 1: does not.
        frequency_penalty: Taken from their logits for each time that they were.
        presence_penalty: Taken from their logits once.
        penalty_last_n: "Lately" is so many tokens; those of the prompt do not count.
        logit_bias: By token id, what is added to its logit before anything else.
        seed: The same seed gives the same text, crash or no crash, but for rounding (`Decoder.generate`).
        ignore_eos: No token is drawn that ends the text.
        samplers: Those that are used, in this order.
        grammar: GBNF, with a rule ``root``: only tokens that go on with it are drawn; empty: none.
        grammar_lazy: It holds from where one of the triggers matches.
        grammar_triggers: Regular expressions (of Python, over UTF-8); what fits the grammar begins at the
            first group that matches anything, or if there is none, with the match.

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
    min_tokens: int = 0
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    typical_p: float = 1.0
    top_n_sigma: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    mirostat_mode: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    logit_bias: dict[int, float] = field(default_factory=dict)
    ignore_eos: bool = False
    samplers: tuple[str, ...] = SAMPLERS
    grammar: str = ""
    grammar_lazy: bool = False
    grammar_triggers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_sampling(self)
        for names, kind in ((_INTEGERS, int), (_NUMBERS, float), (_TEXTS, tuple)):
            for name in names:  # numpy's numbers are welcome, but do not travel
                object.__setattr__(self, name, kind(getattr(self, name)))
        biases = {int(token): float(bias) for token, bias in self.logit_bias.items()}
        object.__setattr__(self, "logit_bias", biases)

    def check_vocabulary(self, n_vocab: int) -> None:
        """Raise `InputError` if a token that is named is none of the model's.

        Args:
            n_vocab: Its token ids are below this.
        """
        for token in self.logit_bias:
            check_integer("token of logit_bias", token, 0, n_vocab - 1, ", the model's last token")

    @property
    def greedy(self) -> bool:
        """Whether no chance is involved."""
        return self.temperature < COLDEST

    @property
    def penalises(self) -> bool:
        """Whether the penalties change anything."""
        penalties = self.repeat_penalty, self.frequency_penalty, self.presence_penalty
        return "penalties" in self.samplers and self.penalty_last_n > 0 and penalties != (1, 0, 0)

    @property
    def dry(self) -> bool:
        """Whether repetitions are penalised."""
        return "dry" in self.samplers and self.dry_multiplier > 0 and self.dry_penalty_last_n != 0

    @property
    def plain(self) -> bool:
        """Whether each token is simply the likeliest."""
        changed = self.logit_bias or self.ignore_eos or self.min_tokens or self.grammar
        return self.greedy and not (changed or self.penalises or self.dry)

    @property
    def looks_back(self) -> bool:
        """Whether the state of the samplers depends on the logits of the tokens before, not just on these."""
        xtc = "xtc" in self.samplers and self.xtc_probability > 0 and self.xtc_threshold <= 0.5
        return not self.greedy and (self.mirostat_mode > 0 or xtc)


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
    min_tokens: int
    dynatemp_range: float
    dynatemp_exponent: float
    typical_p: float
    top_n_sigma: float
    xtc_probability: float
    xtc_threshold: float
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_penalty_last_n: int
    dry_sequence_breakers: tuple[str, ...]
    mirostat_mode: int
    mirostat_tau: float
    mirostat_eta: float
    logit_bias: dict[int, float]
    ignore_eos: bool
    samplers: tuple[str, ...]
    grammar: str
    grammar_lazy: bool
    grammar_triggers: tuple[str, ...]
