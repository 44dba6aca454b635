"""What callers of `Llama` hand over: small values where llama_cpp has objects that load its library."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from crumplezone.errors import InputError, UsageError
from crumplezone.workers.protocol.llama import Grammar

Ids = npt.NDArray[np.intc]
Logits = npt.NDArray[np.single]
LogitsProcessor = Callable[[Ids, Logits], Logits]
StoppingCriteria = Callable[[Ids, Logits], bool]


class LlamaGrammar:
    """A GBNF grammar. It is compiled in the cell, when it is used: a bad one is an `InputError` there."""

    def __init__(self, *, _grammar: str, _root: str = "root", _schema: bool = False) -> None:
        self._grammar, self._root, self._schema = _grammar, _root, _schema

    @classmethod
    def from_string(cls, grammar: str, verbose: bool = True) -> Self:  # noqa: ARG003 - the original's parameter
        """A grammar of GBNF text."""
        return cls(_grammar=grammar)

    @classmethod
    def from_file(cls, file: str | Path, verbose: bool = True) -> Self:
        """A grammar of a file of GBNF text."""
        return cls.from_string(Path(file).read_text("utf-8-sig"), verbose)

    @classmethod
    def from_json_schema(cls, json_schema: str, verbose: bool = True) -> Self:  # noqa: ARG003 - as above
        """A grammar that lets through what fits a JSON schema (JSON text)."""
        try:
            json.loads(json_schema)
        except ValueError as error:
            raise InputError("json_schema", json_schema, f"must be JSON text: {error}") from error
        return cls(_grammar=json_schema, _schema=True)


class LogitsProcessorList(list[LogitsProcessor]):
    """Logits processors, called in turn."""

    def __call__(self, input_ids: Ids, scores: Logits) -> Logits:
        """Pass the scores through each."""
        for processor in self:
            scores = processor(input_ids, scores)
        return scores


class StoppingCriteriaList(list[StoppingCriteria]):
    """Stopping criteria, of which one is enough."""

    def __call__(self, input_ids: Ids, logits: Logits) -> bool:
        """Whether any of them says so; each is called."""
        return any([criterion(input_ids, logits) for criterion in self])  # noqa: C419 - each is called


@dataclass(frozen=True)
class LlamaRAMCache:
    """For `Llama.set_cache`: the states of finished prompts, kept in the cell; a lost cell takes them along.

    Attributes:
        capacity_bytes: How much they may take.
    """

    capacity_bytes: int = 2 << 30


@dataclass(frozen=True)
class LlamaPromptLookupDecoding:
    """For ``Llama(draft_model=...)``: speculative decoding that looks the draft up in the prompt."""

    max_ngram_size: int = 2
    num_pred_tokens: int = 10


@dataclass
class LlamaState:
    """What `Llama.save_state` returns.

    Attributes:
        input_ids: int32, shape (n_ctx,); the first ``n_tokens`` count.
        scores: float32, shape (n_tokens, n_vocab); zeros without ``logits_all``.
        n_tokens: Evaluated.
        llama_state: llama.cpp's own bytes.
        llama_state_size: How many.
        seed: Of the ``Llama``.
    """

    input_ids: Ids
    scores: Logits
    n_tokens: int
    llama_state: bytes
    llama_state_size: int
    seed: int


def grammar_of(grammar: object) -> Grammar | None:
    """A grammar as it travels: GBNF text, a `LlamaGrammar`, or one of llama_cpp's (known by its text)."""
    if grammar is None:
        return None
    if isinstance(grammar, str):
        return Grammar(grammar)
    text = getattr(grammar, "_grammar", None)
    if not isinstance(text, str):
        raise InputError("grammar", grammar, "must be GBNF text or a LlamaGrammar")
    return Grammar(text, str(getattr(grammar, "_root", "root")), bool(getattr(grammar, "_schema", False)))


def capacity_of(cache: object) -> int | None:
    """A cache as it travels: its capacity in bytes."""
    if cache is None:
        return None
    if type(cache).__name__ != "LlamaRAMCache" or not isinstance(getattr(cache, "capacity_bytes", 0), int):
        raise UsageError("a cache lives in the cell: set a crumplezone.LlamaRAMCache(capacity_bytes)")
    return int(getattr(cache, "capacity_bytes", 0))


def lookup_of(draft_model: Any) -> tuple[int, int] | None:
    """A draft model as it travels: the arguments of the only kind that has no code of its own."""
    if draft_model is None:
        return None
    if type(draft_model).__name__ != "LlamaPromptLookupDecoding":
        raise UsageError("a draft model runs in the cell: pass a crumplezone.LlamaPromptLookupDecoding")
    return int(draft_model.max_ngram_size), int(draft_model.num_pred_tokens)
